"""Bring one remote file here, or give up in time: no store's client may hold up a run.

Some clients have time-outs, some have none, and none of them can be interrupted. So a download runs in a thread that
does nothing else, and is watched from outside: where ``timeout`` seconds bring less than a MiB, and not the end of the
file either, that thread is left to itself and an error is raised. A thread keeps its clients for the next file, because
making one is slow and sharing one is not safe; after an error it makes new ones, because the old may be broken.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mixer import streaming_door

__all__ = ["ENOUGH", "download"]

ENOUGH = 1 << 20  # bytes within ``timeout`` that count as progress
_LOOK = 0.1  # seconds between two looks at the progress
_TO_CONNECT = 60.0  # seconds for imports and for making a client, which need no network


class _Lane:
    """A thread that downloads one file after another, with its own clients."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[tuple[str, Path, float, threading.Event, Future[None]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="mixer-download", daemon=True).start()

    def _run(self) -> None:
        clients: dict[Any, Any] = {}
        while (job := self.jobs.get()) is not None:
            url, target, timeout, connected, done = job
            try:
                streaming_door.download(url, target, timeout, clients, connected.set)
            except BaseException as error:
                clients.clear()
                done.set_exception(error)
            else:
                done.set_result(None)
            del job, connected, done


_idle: dict[int, list[_Lane]] = {}  # by process: threads do not survive a fork


def download(url: str, target: Path, timeout: float) -> None:
    """Copy one remote file to ``target``, alone in a folder of its own.

    Raises: FileNotFoundError, PermissionError, InputError: as ``streaming_door.download``; TimeoutError: if it stalls;
        otherwise what the store's client raises.
    """
    lanes, connected, done = _idle.setdefault(os.getpid(), []), threading.Event(), Future[None]()
    try:
        lane = lanes.pop()
    except IndexError:
        lane = _Lane()
    lane.jobs.put((url, target, timeout, connected, done))
    seen, since, allowed = 0, time.monotonic(), max(timeout, _TO_CONNECT)
    while not wait([done], min(_LOOK, timeout / 4)).done:
        arrived, now = _bytes_in(target.parent), time.monotonic()
        if arrived - seen >= ENOUGH or (allowed != timeout and connected.is_set()):
            seen, since, allowed = arrived, now, timeout
        elif now - since >= allowed or not threading.main_thread().is_alive():
            lane.jobs.put(None)  # it ends when its client returns, whenever that is
            raise TimeoutError(f"only {arrived - seen:,} bytes came in {now - since:.3g} s")
    lanes.append(lane)
    done.result()


def _bytes_in(folder: Path) -> int:
    """Return the size of what is in a folder; clients write to names of their own before they rename."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except OSError:
                pass
    return total
