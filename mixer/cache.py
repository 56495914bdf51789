"""Shards that live elsewhere: fetched when needed, kept locally within a limit, shared by all processes of a node.

A file appears under its name only when it is whole and has passed its checks. Processes take turns per file, by locks
that the kernel frees when one dies, and what one could not fetch the others do not try again at its side. Files of
other users of the same folder are never touched: only what the index names can be evicted.

How long it takes at most until a file is there or an error is raised: ``retries`` + 1 attempts, each given up when
``timeout`` seconds bring less than a MiB; between them waits of 0.2, 0.4, 0.8, … s, give or take half.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mixer.cache_space import CacheSpace, parsed
from mixer.downloading import download
from mixer.errors import DataError, InputError

__all__ = ["MissingError", "RemoteCache"]

_LOCKS = 256


class MissingError(DataError):
    """The remote has no such file."""


class RemoteCache:
    """A local folder in front of remote ones. Safe to use from threads and processes.

    Args:
        remote: ``s3://bucket/shards``, ``gs://…``, a local path, or any other scheme of streaming's ``Stream``: a
            folder laid out as ``local`` is to be. Or the addresses of MDS folders by domain.
        local: folder that holds what was fetched.
        limit: bytes that shards may take in ``local``, over all processes; None for no limit.
        timeout: seconds that an attempt may go without receiving a MiB.
        retries: how often a download is tried again; waits between the attempts double.
    """

    def __init__(
        self,
        remote: str | Mapping[str, str],
        local: str | os.PathLike[str],
        limit: int | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 3,
    ) -> None:
        if not timeout > 0 or retries < 0:
            raise InputError(
                f"download_timeout must be > 0 seconds and download_retry >= 0; got {timeout} and {retries}."
            )
        if not remote:
            raise InputError("`remote` is empty: give an address, or those of the remote domains by name.")
        self.by_domain = {} if isinstance(remote, str) else {name: url.rstrip("/") for name, url in remote.items()}
        self.remote = remote.rstrip("/") if isinstance(remote, str) else ""
        self.folders: dict[str, str] = {}  # addresses of single folders: path inside ``local`` → URL
        self.local, self.limit = Path(local), limit
        self.timeout, self.attempts = timeout, retries + 1
        self.space = CacheSpace(self.local, limit)
        try:
            self.space.start_counting()
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder {self.local}: {error.strerror}. Choose another one."
            ) from error

    def address(self, name: str) -> str:
        """Return where a file comes from, for people to read: without the password that an address may hold."""
        return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:…@", self.url(name))

    def url(self, name: str) -> str:
        """Return where a file (a path inside the folder) comes from."""
        folder, _, file = name.rpartition("/")
        return f"{self.folders[folder]}/{file}" if folder in self.folders else f"{self.remote}/{name}"

    def holds(self, folder: str) -> bool:
        """Say whether a folder inside ``local`` is a copy of a remote one."""
        return bool(self.remote) or folder in self.folders

    def fetch(self, name: str, *, check: Callable[[Path], None] | None = None, to: str | None = None) -> Path:
        """Bring one file that is no shard (a path inside the folder) here, and return its local path.

        ``to`` is another name to keep it by. Raises: as ``bring``.
        """
        target = self.local / (to or name)
        with self.space.claim(name, 0) as folder:
            assert folder is not None
            path = self.bring(name, folder, check)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return target

    def bring(self, name: str, folder: Path, check: Callable[[Path], None] | None = None) -> Path:
        """Fetch one file into ``folder``, whole and checked, and return its path there.

        ``check(path)`` raises DataError for a file that is not what it should be; it is then fetched again.

        Raises: DataError: naming the file and the remote, when all attempts have failed; MissingError.
        """
        for attempt in range(self.attempts):
            part = folder / f"attempt-{attempt}"  # of its own: a thread that was given up may still write to the last
            try:
                part.mkdir()
                path = part / name.rpartition("/")[2]
                download(self.url(name), path, self.timeout)
                if check is not None:
                    check(path)
                self.space.count(fetched_files=1, fetched_bytes=path.stat().st_size)
                return path
            except InputError:
                raise
            except Exception as error:
                shutil.rmtree(part, ignore_errors=True)
                if _is_final(error) or attempt == self.attempts - 1 or not threading.main_thread().is_alive():
                    raise self._failed(name, error, attempt + 1) from error
                self.space.count(retries=1)
                time.sleep(0.2 * 2**attempt * (0.5 + random.random()))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _failed(self, name: str, error: Exception, attempts: int) -> DataError:
        url, what = self.address(name), " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):
            return MissingError(f"{url} does not exist. Upload it again, or check `remote`.")
        if isinstance(error, PermissionError):
            return DataError(f"{url} may not be read: {what}. Check the credentials, and that it exists.")
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return DataError(
                f"no space left for {self.local / name}. Free space, or set a cache_limit that fits the disk."
            )
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        if isinstance(error, DataError):  # it came, and is not what it should be; where it lay is of no interest
            what = re.sub(r"\S*/claim\.\d+/attempt-\d+/\S*?(?=: )", url, what)
            return DataError(f"cannot fetch {url} ({tried}): {what}")
        return DataError(
            f"cannot fetch {url} ({tried}): {type(error).__name__}: {what}. Check the network and the"
            " credentials, or raise download_timeout or download_retry; the run goes on from its last checkpoint."
        )

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a file's lock against other threads and ranks; a process that dies lets go of it.

        Files share a fixed number of locks, so nobody may wait for a second one while holding one. Who waited while
        another failed to fetch the same file gets that error too, instead of failing as long once more.
        """
        began = time.time()
        with self.space.locked(f"lock.{zlib.crc32(name.encode()) % _LOCKS}") as file:
            file.seek(0)
            failed = parsed(file.read())
            if failed.get("name") == name and failed["at"] >= began:
                raise DataError(failed["error"])
            try:
                yield
            except MissingError:
                raise
            except DataError as error:
                file.truncate(0)
                file.write(json.dumps({"name": name, "at": time.time(), "error": str(error)}).encode())
                raise


def _is_final(error: Exception) -> bool:
    """Say whether trying again is of no use."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return isinstance(error, FileNotFoundError | PermissionError)
