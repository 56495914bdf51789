"""Who runs the tasks: one function per engine, one row in ``ENGINES``.

    def engine(function, tasks, workers, address) -> Iterator[result]

    local           processes of this machine
    ray             tasks of Ray, on a cluster started for this run
    ray:ADDRESS     on a running cluster: ray:auto, ray:10.0.0.1:6379, ray://head:10001. Inputs, stage and output must
                    be paths that every node sees

Results come in any order; a task that raises stops the run, and so does a worker that dies. Text never passes between
processes: a task reads its own input and writes its own files, and returns a few numbers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from mixer.errors import DataError, InputError

__all__ = ["ENGINES", "check_engine", "kept_running", "run_tasks", "start_workers"]

Task = TypeVar("Task")
Result = TypeVar("Result")


def local(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, address: str = ""
) -> Iterator[Result]:
    """Run tasks in ``workers`` processes of this machine; with one worker, in this process."""
    tasks = list(tasks)
    if min(workers, len(tasks)) <= 1:
        yield from map(function, tasks)
        return
    with _pool(workers) as pool:
        try:
            yield from _results(pool, function, tasks, 2 * workers)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory?). Finished work is kept: run the same command again,"
                f" with fewer than {workers} workers if memory is short. In a script of your own, call convert() under"
                ' `if __name__ == "__main__":`.'
            ) from error


_kept: list[ProcessPoolExecutor | None] = []  # by ``kept_running``; None until there is work for it


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes: the one that is kept running, else one for this block."""
    pool = _kept[-1] if _kept else None
    if pool is None:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    if _kept:
        _kept[-1] = pool
        yield pool
        return
    try:
        yield pool
    finally:
        _stop(pool)


def start_workers(workers: int, tasks: int) -> None:
    """Let the processes of the pool that is kept running start and import, while this one does something else."""
    if _kept and min(workers, tasks) > 1:
        with _pool(workers) as pool:
            for _ in range(min(workers, tasks)):
                pool.submit(_import_work)


def _import_work() -> None:
    import converters.packing
    import converters.stage  # noqa: F401


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


# --- Ray -----------------------------------------------------------------------------------------------------------


def ray(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, address: str = "") -> Iterator[Result]:
    """Run tasks by Ray, each on one core; a task whose process or node dies is run again, three times at most."""
    library = _imported_ray()
    with _ray_started(library, workers, address):
        yield from _ray_results(library, function, tasks, workers)


@contextlib.contextmanager
def kept_running(engine: str, workers: int) -> Iterator[None]:
    """Start processes, or Ray, once for everything in the block."""
    name, _, address = engine.partition(":")
    if name != "ray":
        _kept.append(None)
        try:
            yield
        finally:
            pool = _kept.pop()
            if pool is not None:
                _stop(pool)
        return
    with _ray_started(_imported_ray(), workers, f"ray:{address}" if address.startswith("//") else address):
        yield


def _imported_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("the ray engine needs Ray: pip install 'domain-mixer[ray]'.") from error
    return ray


@contextlib.contextmanager
def _ray_started(ray: Any, workers: int, address: str) -> Iterator[None]:
    started = not ray.is_initialized()
    if started:
        _require_answer(address)
        where: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise InputError if nothing listens at HOST:PORT, for which Ray itself would wait many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), 10).close()
    except OSError as error:
        raise InputError(f"no Ray cluster answers at {address} ({error.strerror or error}).") from error


def _ray_results(ray: Any, function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    remote = ray.remote(num_cpus=1, max_retries=3)(_in_folder)
    running: list[Any] = []
    try:
        for task in tasks:
            running.append(remote.remote(os.getcwd(), function, task))
            if len(running) >= 2 * workers:
                done, running = ray.wait(running)
                yield from ray.get(done)
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up on a task after three retries ({type(error).__name__}). Finished work is kept; run the same"
            " command again."
        ) from error
    finally:
        for task_reference in running:
            ray.cancel(task_reference, force=True)


def _in_folder(folder: str, function: Callable[[Task], Result], task: Task) -> Result:
    os.chdir(folder)  # relative paths mean the same as where the run was started
    return function(task)


ENGINES: dict[str, Callable[..., Iterator[Any]]] = {"local": local, "ray": ray}


def check_engine(engine: str, workers: int) -> None:
    """Raise InputError unless there is such an engine here, and a worker."""
    name, _, address = engine.partition(":")
    if name not in ENGINES or (address and name == "local"):
        raise InputError(f"no engine {engine!r}; use 'local', 'ray', or 'ray:<address>' for a running cluster.")
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}.")
    if name == "ray":
        _imported_ray()


def run_tasks(engine: str, function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Run ``function`` over ``tasks`` by the named engine.

    >>> sorted(run_tasks("local", abs, [-2, 1], workers=1))
    [1, 2]
    """
    check_engine(engine, workers)
    name, _, address = engine.partition(":")
    return ENGINES[name](function, tasks, workers, f"ray:{address}" if address.startswith("//") else address)
