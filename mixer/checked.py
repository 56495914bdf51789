"""Which files have been compared with their hashes, known to all processes of a run on one node.

A run is a process with its workers, or all ranks that one launcher started. Its processes share a small folder in the
system's place for temporary files: 16 bytes per checked file, and locks that the kernel frees when a process dies. A
file is known by device, inode, size, and times of change, with the hash it was found to have; one that is replaced or
written to later is another file and is checked again. The next run checks everything anew: the folder is removed by the
last process that leaves, or, where that was killed, by the next one that comes.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Checked", "checked_in_this_run", "identity"]

_SLOTS = 256
_KEY_BYTES = 16


def identity(file: os.stat_result) -> str:
    """Return what changes when a file is replaced or written to."""
    return f"{file.st_dev} {file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}"


class Checked:
    """The checks of a run. Safe to use from threads and processes; pickled into a worker, it is that of the same run.

    >>> checks, checked = [], Checked()
    >>> for _ in range(2):
    ...     checked.once("one file", lambda: checks.append("compared"))
    >>> checks
    ['compared']
    """

    def __init__(self, folder: Path | None = None, *, worker: bool = False) -> None:
        self.folder = folder or _folder_of_run()
        self._joined, self._mutex = worker, threading.Lock()
        self._known: set[bytes] = set()
        self._read = 0

    def once(self, what: str, check: Callable[[], None], *, remember: bool = True) -> None:
        """Call ``check`` unless a process of this run has done so for ``what``, and it raised nothing.

        Without ``remember`` the next one checks again.
        """
        key = _key(what)
        if key in self._known:
            return
        with self._slot(key[0] % _SLOTS):
            self._take_in()
            if key in self._known:
                return
            check()
            if remember:
                self._note(key)

    def note(self, what: str) -> None:
        """Say that ``what`` has been checked already, as when a file got another name."""
        self._join()
        self._note(_key(what))

    @contextmanager
    def _slot(self, number: int) -> Iterator[None]:
        """Wait for whoever checks the same file now."""
        self._join()
        with ExitStack() as held:
            if self.folder is not None:
                try:
                    file = held.enter_context(open(self.folder / f"slot.{number}", "ab"))
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError:
                    self.folder = None  # no place to share, or the run is over: this process checks for itself
            yield

    def _note(self, key: bytes) -> None:
        self._known.add(key)
        if self.folder is not None:
            try:
                with open(self.folder / "checked", "ab", buffering=0) as file:
                    file.write(key)
            except OSError:
                self.folder = None

    def _take_in(self) -> None:
        """Learn what other processes have checked meanwhile."""
        if self.folder is None:
            return
        try:
            with self._mutex, open(self.folder / "checked", "rb") as file:
                file.seek(self._read)
                found = file.read()
                whole = len(found) // _KEY_BYTES * _KEY_BYTES
                self._known.update(found[at : at + _KEY_BYTES] for at in range(0, whole, _KEY_BYTES))
                self._read += whole
        except OSError:
            pass

    def _join(self) -> None:
        """Take part in the run: the folder stays while a process holds its lock. Workers live as long as their rank."""
        with self._mutex:
            if self._joined or self.folder is None:
                return
            try:
                atexit.register(_leave, os.getpid(), self.folder, _join(self.folder))
            except OSError:
                self.folder = None
            self._joined = True

    def __reduce__(self) -> tuple[Any, ...]:
        self._join()  # workers find the folder there
        return _in_worker, (self.folder,)


@cache
def checked_in_this_run() -> Checked:
    """Return the one ``Checked`` of this process."""
    return Checked()


@cache
def _in_worker(folder: Path | None) -> Checked:
    return Checked(folder, worker=True)


def _key(what: str) -> bytes:
    return hashlib.blake2b(what.encode(), digest_size=_KEY_BYTES).digest()


# --- the folder ----------------------------------------------------------------------------------------------------


def _folder_of_run() -> Path | None:
    """Return the folder that all processes of this run come to by themselves."""
    launched = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")) > 1
    root = os.getppid() if launched else os.getpid()
    # The same process id may mean another process after a restart, in another container or on another host.
    parts = (socket.gethostname(), _link("/proc/self/ns/pid"), str(root), _started(root))
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"domain-mixer-{os.getuid()}" / name


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _join(folder: Path) -> int:
    """Return a descriptor that holds the run's lock; what a run that is over left behind is removed."""
    base = folder.parent
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid() or base.stat().st_mode & 0o022 or base.is_symlink():
        raise PermissionError(f"{base} is not ours alone")
    with open(base / "lock", "ab") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for other in base.iterdir():
            if other.is_dir() and not _in_use(other):
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        alive = os.open(folder / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(alive, fcntl.LOCK_SH)
        return alive


def _in_use(folder: Path) -> bool:
    try:
        with open(folder / "alive", "rb") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _leave(pid: int, folder: Path, alive: int) -> None:
    """Let go of the lock; the last one removes the folder."""
    if pid != os.getpid():
        return
    try:
        with open(folder.parent / "lock", "ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            os.close(alive)
            if not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
