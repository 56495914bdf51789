"""One cache folder as several processes use it: who is alive, what each fetches and will read, and what must go for it.

    local/.mixer/lock.*                        taken by flock, so that the kernel frees what a dead process held
    local/.mixer/process.x/alive               locked by its process as long as that lives
    local/.mixer/process.x/wanted              JSON: the files it will read next, by domain
    local/.mixer/process.x/counts              JSON: what was done since a loader began, its workers included
    local/.mixer/process.x/claim.n/claim       JSON: {"name", "bytes"} of what it fetches into this folder just now

A file is fetched into a claim, whose bytes count as taken, and moved to its name when it is whole. So the limit holds
for all processes together, and what a killed one leaves lies in its own folder, which the next one to look removes.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixer.errors import DataError

__all__ = ["CacheSpace", "parsed"]

_COUNTS = ("hits", "fetched_files", "fetched_bytes", "retries", "evicted_files")
_POLL = 0.02  # seconds between two looks at whether there is room


class CacheSpace:
    """The part of ``RemoteCache`` that processes agree on. Safe to use from threads; pickled, it starts anew.

    Args:
        local: the cache folder.
        limit: bytes that shards, whole and in work, may take in it; None for no limit.
    """

    def __init__(self, local: Path, limit: int | None) -> None:
        self.local, self.limit, self.folder = local, limit, local / ".mixer"
        self._sizes: dict[str, int] = {}  # what may be evicted: path inside the folder → bytes
        self._wanted: dict[str, list[str]] = {}
        self._begin()

    def _begin(self) -> None:
        self._mutex = threading.RLock()
        self._pid, self._own, self._claims = 0, Path(), 0
        self._alive: Any = None  # a file that stays open as long as the process lives

    def own(self) -> Path:
        """Return this process's folder in the cache, made when first asked for; those of dead processes go then."""
        with self._mutex:
            if self._pid != os.getpid():  # new, unpickled or forked
                with self.locked("lock.space"):
                    self._sweep()
                    self._own = Path(tempfile.mkdtemp(prefix="process.", dir=self.folder))
                    self._alive = open(self._own / "alive", "ab")  # noqa: SIM115
                    fcntl.flock(self._alive, fcntl.LOCK_EX)
                self._pid = os.getpid()
                weakref.finalize(self, _remove, self._own, self._pid)
            return self._own

    @contextmanager
    def locked(self, name: str) -> Iterator[Any]:
        """Hold a lock of the folder against threads and processes; yields its file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    # --- what was done ---------------------------------------------------------------------------------------------

    def start_counting(self) -> None:
        """Count from now on, for this process and those that this object is sent to."""
        self._counts = self.own() / "counts"

    def count(self, **added: int) -> dict[str, int]:
        """Add to the counts, and return them."""
        try:
            with open(self._counts, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                counts = parsed(file.read())
                if added:
                    counts |= {name: counts.get(name, 0) + more for name, more in added.items()}
                    file.truncate(0)
                    file.write(json.dumps(counts).encode())
                return counts
        except OSError:
            return {}  # the disk is full, or someone empties the folder: statistics are no reason to stop

    def stats(self) -> dict[str, int]:
        """Return how many shards were here already, files and bytes fetched, attempts repeated, files evicted."""
        counts = self.count()
        return {name: int(counts.get(name, 0)) for name in _COUNTS}

    # --- what is taken ---------------------------------------------------------------------------------------------

    def register(self, files: Mapping[str, int]) -> None:
        """Say which files may be evicted, and their sizes."""
        self._sizes.update(files)

    def want(self, domain: str, names: Iterable[str]) -> None:
        """Say which files of a domain this process will read next: no process evicts them while others will do."""
        if self.limit is None:
            return
        with self._mutex:
            files, path = sorted(names), self.own() / "wanted"
            if self._wanted.get(domain) == files and path.exists():
                return  # a domain that is smaller than a batch begins anew in each of them
            self._wanted[domain] = files
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name("wanted.new").write_text(json.dumps(self._wanted))
            os.replace(path.with_name("wanted.new"), path)

    @contextmanager
    def claim(self, name: str, size_bytes: int, *, ahead: bool = False) -> Iterator[Path | None]:
        """Yield an empty folder to fetch a file into, once it fits within the limit; it is gone afterwards.

        Files go for it that nobody wants, then those longest here; nobody evicts ``name`` meanwhile. Where others'
        claims leave no room, it waits for them. With ``ahead`` it yields None instead of waiting or evicting what is
        wanted.

        Raises: DataError: if the file alone exceeds the limit.
        """
        folder = self._claimed(name, size_bytes, ahead)
        try:
            yield folder
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _claimed(self, name: str, size_bytes: int, ahead: bool) -> Path | None:
        own = self.own()
        if self.limit is not None and size_bytes > self.limit:
            raise DataError(
                f"{name} takes {size_bytes:,} bytes while it is fetched, more than the cache_limit {self.limit:,}."
                " Raise the limit."
            )
        while True:
            with self.locked("lock.space"):
                if self.limit is None or self._make_room(size_bytes, ahead):
                    with self._mutex:
                        self._claims += 1
                        folder = own / f"claim.{self._claims}"
                    folder.mkdir(parents=True)
                    (folder / "claim").write_text(json.dumps({"name": name, "bytes": size_bytes}))
                    return folder
            if ahead or not threading.main_thread().is_alive():  # who reads ahead must not keep a process from ending
                return None
            time.sleep(_POLL)

    def _make_room(self, size_bytes: int, ahead: bool) -> bool:
        """Evict until so many bytes more fit; evict nothing and say False where that cannot be."""
        assert self.limit is not None
        claims, wanted = self._of_all_processes()
        present = [file for file in self._present() if file[1] not in claims]
        excess = sum(size for _, _, size in present) + sum(claims.values()) + size_bytes - self.limit
        present = [file for file in present if not (ahead and file[1] in wanted)]
        if excess > sum(size for _, _, size in present):
            return False
        for _, name, size in sorted(present, key=lambda file: (file[1] in wanted, file)):
            if excess <= 0:
                break
            (self.local / name).unlink(missing_ok=True)
            excess -= size
            self.count(evicted_files=1)
        return True

    def _present(self) -> list[tuple[float, str, int]]:
        """Return (since when, name, bytes) of the evictable files that are here, by listing their folders."""
        found = []
        for folder in {os.path.dirname(name) for name in self._sizes}:
            try:
                with os.scandir(self.local / folder) as entries:
                    for entry in entries:
                        name = os.path.join(folder, entry.name)
                        if name in self._sizes:
                            found.append((entry.stat().st_mtime, name, self._sizes[name]))
            except FileNotFoundError:
                continue
        return found

    def _of_all_processes(self) -> tuple[dict[str, int], set[str]]:
        """Return what all living processes claim (name → bytes) and want; call it within ``lock.space``."""
        self._sweep()
        claims: dict[str, int] = {}
        wanted: set[str] = set()
        for path in self._matching("process.*/claim.*/claim"):
            claim = _read_json(path)
            if claim:
                claims[claim["name"]] = claims.get(claim["name"], 0) + claim["bytes"]
        for path in self._matching("process.*/wanted"):
            wanted.update(*_read_json(path).values())
        return claims, wanted

    def _matching(self, pattern: str) -> list[Path]:
        """Return paths in the folder; unlike pathlib's, this glob bears that others remove folders meanwhile."""
        return [self.folder / name for name in glob.glob(pattern, root_dir=self.folder)]

    def _sweep(self) -> None:
        """Remove the folders of processes that have ended; call it within ``lock.space``."""
        for folder in self._matching("process.*"):
            if folder == self._own:
                continue
            try:
                with open(folder / "alive", "rb") as alive:
                    fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # it lives
            except FileNotFoundError:
                pass
            shutil.rmtree(folder, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_mutex", "_pid", "_own", "_claims", "_alive"}
        return {name: value for name, value in self.__dict__.items() if name not in own} | {"_wanted": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def parsed(text: bytes | str) -> dict[str, Any]:
    """Return a JSON object, or an empty one for what its writer had no time to finish."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parsed(path.read_bytes())
    except OSError:
        return {}  # its process is just removing it


def _remove(folder: Path, pid: int) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
