"""Shards that live elsewhere: fetched when needed, kept locally within a limit, shared by all ranks of a node.

A file appears under its name only when it is whole and has passed its checks; a killed download leaves a file with
another name, which is swept away later. Ranks take turns per file by locks that the kernel frees when a process dies.
Files of other
users of the same folder are never touched: only what the index names can be evicted.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixer.errors import DataError, InputError
from mixer.streaming_door import download

__all__ = ["RemoteCache"]

_LOCKS = 256
_PARTIAL = ".part"


class RemoteCache:
    """A local folder in front of a remote one, with the same layout. Safe to use from threads and processes.

    Args:
        remote: ``s3://bucket/shards``, ``gs://…``, a local path, or any other scheme of streaming's ``Stream``.
        local: folder that holds what was fetched.
        limit: bytes that shards may take in ``local``; None for no limit.
        timeout: seconds that one attempt may take.
        attempts: how often a download is tried; waits between them double.
    """

    def __init__(
        self,
        remote: str,
        local: str | os.PathLike[str],
        limit: int | None = None,
        *,
        timeout: float = 60.0,
        attempts: int = 4,
    ) -> None:
        self.remote, self.local, self.limit = remote.rstrip("/"), Path(local), limit
        self.timeout, self.attempts = timeout, attempts
        self._sizes: dict[str, int] = {}  # files that may be evicted: path inside the folder → bytes
        self._wanted: dict[str, frozenset[str]] = {}
        self._mutex, self._reserved = threading.Lock(), 0
        self._in_flight: set[str] = set()  # files that a thread is fetching or unpacking
        self.fetched_bytes = self.fetched_files = self.hits = self.evicted_files = 0
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            (self.local / ".mixer").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder {self.local}: {error.strerror}. Choose another one."
            ) from error

    def fetch(self, name: str, *, check: Callable[[Path], None] | None = None, to: str | None = None) -> Path:
        """Bring one file (a path inside the folder) here, whole and checked, and return its local path.

        ``to`` is another name to keep it by. ``check(path)`` raises DataError for a file that is not what it should be;
        it is then fetched again.

        Raises: DataError: naming the file and the remote, when all attempts have failed.
        """
        target = self.local / (to or name)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}{_PARTIAL}")
        for attempt in range(self.attempts):
            try:
                partial.unlink(missing_ok=True)
                download(f"{self.remote}/{name}", partial, self.timeout)
                if check is not None:
                    check(partial)
                size = partial.stat().st_size
                os.replace(partial, target)
                with self._mutex:
                    self.fetched_files, self.fetched_bytes = self.fetched_files + 1, self.fetched_bytes + size
                return target
            except (FileNotFoundError, InputError) as error:
                raise self._failed(name, error, attempt + 1) from error
            except Exception as error:
                if (isinstance(error, OSError) and error.errno == 28) or attempt == self.attempts - 1:
                    raise self._failed(name, error, attempt + 1) from error
                time.sleep(0.2 * 2**attempt * (0.5 + random.random()))
            finally:
                partial.unlink(missing_ok=True)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _failed(self, name: str, error: Exception, attempts: int) -> DataError:
        if isinstance(error, FileNotFoundError):
            return DataError(f"{self.remote}/{name} does not exist. Upload it again, or check `remote`.")
        if isinstance(error, OSError) and error.errno == 28:
            return DataError(
                f"no space left for {self.local / name}. Free space, or set a cache_limit that fits the disk."
            )
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        what = " ".join(str(error).split())
        return DataError(
            f"cannot fetch {self.remote}/{name} ({tried}): {type(error).__name__}: {what}. Check the network and the"
            " credentials; the run goes on from its last checkpoint."
        )

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a file's lock against other threads and ranks; a process that dies lets go of it.

        Files share a fixed number of locks, so nobody may wait for a second one while holding one.
        """
        with self._locked(f"lock.{zlib.crc32(name.encode()) % _LOCKS}"):
            yield

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.local / ".mixer" / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- the limit -------------------------------------------------------------------------------------------------

    def register(self, files: Mapping[str, int]) -> None:
        """Say which files may be evicted, and their sizes."""
        self._sizes.update(files)

    def want(self, domain: str, names: frozenset[str]) -> None:
        """Say which files of a domain will be read next: they are evicted last."""
        self._wanted[domain] = names

    def has_room(self, size_bytes: int) -> bool:
        """Say whether a file fits without evicting one that is wanted."""
        if self.limit is None:
            return True
        wanted = frozenset().union(*self._wanted.values()) if self._wanted else frozenset()
        kept = sum(size for name, size in self._present() if name in wanted)
        return kept + self._reserved + size_bytes <= self.limit

    @contextmanager
    def room(self, size_bytes: int, names: frozenset[str] = frozenset()) -> Iterator[None]:
        """Evict files until ``size_bytes`` more fit within the limit, and keep that room while they are fetched.

        Those not wanted go first, and of them those longest unused; ``names``, what the room is for, stay. Room is kept
        against the threads of this process;
        ranks that fetch at the same moment can exceed the limit by what each of them is fetching.
        """
        if self.limit is None:
            yield
            return
        with self._mutex:
            self._reserved += size_bytes
            self._in_flight |= names
        try:
            self._evict()
            yield
        finally:
            with self._mutex:
                self._reserved -= size_bytes
                self._in_flight -= names

    def _evict(self) -> None:
        assert self.limit is not None
        with self._locked("lock.eviction"):
            present = self._present()
            excess = sum(size for _, size in present) + self._reserved - self.limit
            wanted = frozenset().union(*self._wanted.values()) if self._wanted else frozenset()
            for name, size in sorted(present, key=lambda file: (file[0] in wanted, self._used(file[0]))):
                if excess <= 0:
                    break
                if name in self._in_flight:
                    continue
                (self.local / name).unlink(missing_ok=True)
                excess -= size
                self.evicted_files += 1

    def _present(self) -> list[tuple[str, int]]:
        """Return the evictable files that are here, by listing the folders they lie in."""
        found = []
        for folder in {os.path.dirname(name) for name in self._sizes}:
            try:
                with os.scandir(self.local / folder) as entries:
                    names = [os.path.join(folder, entry.name) for entry in entries]
            except FileNotFoundError:
                continue
            found += [(name, self._sizes[name]) for name in names if name in self._sizes]
        return found

    def _used(self, name: str) -> float:
        try:
            return (self.local / name).stat().st_mtime
        except OSError:
            return 0.0

    def sweep(self) -> None:
        """Remove the parts that killed downloads left behind (older than an hour: no attempt takes that long)."""
        for path in self.local.rglob(f".*{_PARTIAL}"):
            try:
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()
            except OSError:
                pass

    def stats(self) -> dict[str, int]:
        return {
            "hits": self.hits,
            "fetched_files": self.fetched_files,
            "fetched_bytes": self.fetched_bytes,
            "evicted_files": self.evicted_files,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mutex": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _mutex=threading.Lock())
