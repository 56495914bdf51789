"""Who runs the tasks: one function per engine, one row in ``ENGINES``.

    def engine(function, tasks, workers) -> Iterator[result]

Results come in any order; a task that raises stops the run, and so does a worker that dies. Text never passes between
processes: a task reads its own input and writes its own files, and returns a few numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from mixer.errors import DataError, InputError

__all__ = ["ENGINES", "run_tasks"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def local(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Run tasks in ``workers`` processes of this machine; with one worker, in this process."""
    tasks = list(tasks)
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield from _results(pool, function, tasks, 2 * workers)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (killed, or out of memory?). Finished work is kept: run the same command again,"
            f" with fewer than {workers} workers if memory is short. In a script of your own, call convert() under"
            ' `if __name__ == "__main__":`.'
        ) from error
    finally:
        _stop(pool)


def _results(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    running: set[Future[Result]] = set()
    for task in tasks:
        running.add(pool.submit(function, task))
        if len(running) >= ahead:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once; what they were at is unfinished and will be done again."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)


def _start_worker() -> None:
    # Ctrl-C goes to the whole process group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: Any) -> None:
    """End this worker when its parent is gone, even by SIGKILL: an orphan must not write beside the next run."""
    wait_for([sentinel])
    os._exit(1)


ENGINES: dict[str, Callable[..., Iterator[Any]]] = {"local": local}


def run_tasks(
    engine: str, function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """Run ``function`` over ``tasks`` by the named engine.

    >>> sorted(run_tasks("local", abs, [-2, 1], workers=1))
    [1, 2]
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r}; there are {sorted(ENGINES)}.")
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}.")
    return ENGINES[engine](function, tasks, workers)
