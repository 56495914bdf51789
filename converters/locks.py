"""One writer at a time in a folder, here or behind a URL.

On disk the lock is the system's and goes with the process, however it ends. On a server it is an object that its owner
writes anew every ``BEAT_SECONDS``. Who finds one takes it over if the owner ran on this machine and is dead, or if it
has not been renewed for ``LEASE_SECONDS`` by the server's own clock; anything else is a refusal that names the owner.
An owner that lost the lock, asleep or cut off, notices before it commits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson

from converters.locations import Location, UrlPath, put
from converters.urls import file_system, persistently
from mixer.errors import DataError, InputError

__all__ = ["Lock", "lock"]

BEAT_SECONDS, LEASE_SECONDS = 15.0, 60.0


class Lock(Protocol):
    """What holds a folder."""

    def check(self) -> None:
        """Raise DataError if another process has taken the folder over."""

    def end(self) -> None:
        """Stop renewing: the folder is about to be removed, or left."""


@contextlib.contextmanager
def lock(folder: Location) -> Iterator[Lock]:
    """Hold a folder, made if need be.

    Raises: InputError: if another process holds it, or it cannot be written.
    """
    if isinstance(folder, UrlPath):
        lease = _Lease(folder)
        try:
            yield lease
        finally:
            lease.release()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another conversion works in {folder}; wait for it to end.") from error
        yield _Held()


class _Held:
    """A lock of the system, which nobody can take over."""

    def check(self) -> None:
        pass

    def end(self) -> None:
        pass


class _Lease:
    """A lock as an object on a server."""

    def __init__(self, folder: UrlPath) -> None:
        self._folder, self._file = folder, folder / "lock"
        self._system, self._name = file_system(self._file.url)
        self._me = {"owner": secrets.token_hex(8), **_this_process()}
        self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._ended.is_set() or self._owner() != self._me["owner"]:
            raise DataError(
                f"another conversion has taken over {self._folder}, because this one gave no sign of life for"
                f" {LEASE_SECONDS:.0f} seconds. Let that one finish."
            )

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def release(self) -> None:
        self.end()
        with contextlib.suppress(Exception):
            if self._owner() == self._me["owner"]:
                self._file.unlink(missing_ok=True)

    def _take(self) -> None:
        holder = self._holder()
        if holder is None:
            try:
                self._write(only_if_absent=True)
            except FileExistsError:
                holder = self._holder()
            except (OSError, DataError, NotImplementedError) as error:
                raise InputError(f"cannot write into {self._folder}: {error or type(error).__name__}.") from error
        if holder is not None and holder["owner"] != self._me["owner"]:
            self._refuse_if_alive(holder)
            self._write()
            time.sleep(0.5)  # if two take over at once, the later write is the one that both find
        if self._owner() != self._me["owner"]:
            raise InputError(f"another conversion began in {self._folder} at this moment; wait for it to end.")

    def _refuse_if_alive(self, holder: dict[str, Any]) -> None:
        here = _this_process()
        if holder["machine"] == here["machine"]:
            if _started(holder["pid"]) != holder["started"]:
                return
            left = ""
        else:
            age = self._age()
            if age > LEASE_SECONDS:
                return
            left = (
                f" Its last sign of life was {max(age, 0):.0f} seconds ago; if it was killed, try again in"
                f" {LEASE_SECONDS - age:.0f} seconds."
            )
        raise InputError(
            f"another conversion (process {holder['pid']} on {holder['host']}) works in {self._folder}; wait for it to"
            f" end.{left}"
        )

    def _age(self) -> float:
        """Return seconds since the lock was renewed, by the server's clock."""
        probe = self._folder / f"now-{self._me['owner']}"
        name = file_system(probe.url)[1]
        put(probe, b"")
        now = persistently("read", probe.url, lambda: self._system.modified(name))
        probe.unlink(missing_ok=True)
        try:
            then = persistently("read", self._file.url, lambda: self._system.modified(self._name))
        except FileNotFoundError:
            return float("inf")
        return (now - then).total_seconds()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the net may be down: the next beat, or the check, will tell
                if self._owner() != self._me["owner"]:
                    self._ended.set()
                else:
                    self._write()

    def _holder(self) -> dict[str, Any] | None:
        try:
            return orjson.loads(self._file.read_bytes())
        except FileNotFoundError:
            return None

    def _owner(self) -> str | None:
        holder = self._holder()
        return holder["owner"] if holder else None

    def _write(self, only_if_absent: bool = False) -> None:
        data = orjson.dumps(self._me)
        mode = {"mode": "create"} if only_if_absent else {}
        try:
            put(self._file, data, **mode)
        except (TypeError, NotImplementedError):
            if not mode:
                raise
            put(self._file, data)  # a server without conditional writes


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}


def _machine() -> str:
    """Return what tells process numbers of one machine, since it was started, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # unknown: nothing can be said of other processes


def _started(pid: int) -> str | None:
    """Return when a process of this machine started, None if it is not there."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] == "Z" else facts[19]
