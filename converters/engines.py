"""Who runs the tasks: one function per engine, one row in ``ENGINES``.

    def engine(function, tasks, workers, address) -> Iterator[result]

    local           processes of this machine
    ray             tasks of Ray, on a cluster started for this run
    ray:ADDRESS     on a running cluster: ray:auto, ray:10.0.0.1:6379, ray://head:10001. Inputs, stage and output must
                    be paths that every node sees

Results come in any order. A task that raises stops the run. One whose worker dies is done again, twice at most; then it
is reported by name when all others are done. Text never passes between processes: a task reads its own input and writes
its own files, and returns a few numbers. Workers do not run the main script, so the functions are those of modules.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from mixer.errors import DataError, InputError

__all__ = ["ENGINES", "check_engine", "kept_running", "run_tasks", "start_workers"]

log = logging.getLogger(__name__)
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
    with _at_work(workers) as team:
        yield from _results(team, function, _largest_first(tasks))


def _largest_first(tasks: Iterable[Task]) -> list[Task]:
    """Return tasks by their ``size``, if they have one: with the small ones at the end, all workers end together."""
    return sorted(tasks, key=lambda task: getattr(task, "size", 0), reverse=True)


_TRIES, _MOST_LOST = 3, 8


def _results(team: _Team, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """Yield results as they come; a task whose worker dies goes to another one, and is given up at the third death."""
    waiting, deaths, lost = deque(range(len(tasks))), Counter[int](), list[Task]()
    at_hand: list[deque[tuple[Future[Result], int]]] = [deque() for _ in range(team.size)]
    while (waiting or any(at_hand)) and len(lost) < _MOST_LOST:
        for number, mine in [*enumerate(at_hand)] * 2:  # a second one to go on with at once, while there are many
            if waiting and (not mine or (len(mine) == 1 and len(waiting) >= team.size)):
                task = waiting.popleft()
                try:
                    mine.append((team.submit(number, function, tasks[task], is_idle=not mine), task))
                except BrokenProcessPool:  # its first task will say so, below
                    waiting.appendleft(task)
        wait([future for mine in at_hand for future, _ in mine], return_when=FIRST_COMPLETED)
        for number, mine in enumerate(at_hand):
            while mine and mine[0][0].done():
                future, task = mine.popleft()
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    deaths[task] += team.replace(number, error)
                    waiting.extendleft(other for _, other in mine)
                    mine.clear()
                    if deaths[task] < _TRIES:
                        log.warning("a worker process died at %s; that is done again.", task_name(tasks[task]))
                        waiting.append(task)
                    else:
                        lost.append(tasks[task])
                else:
                    yield result
    if lost:
        raise DataError(
            f"a worker process died (killed, or out of memory?) {_TRIES} times at {_listed(lost)}. What is finished is"
            " kept: run the same command again, with fewer workers if memory is short."
        )


def _listed(tasks: list[Task]) -> str:
    more = f", and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return ", ".join(map(task_name, tasks[:3])) + more


def task_name(task: Any) -> str:
    """Return what a task is called in messages: its ``label``, if it has one."""
    return str(getattr(task, "label", f"task {task}"))


class _Team:
    """Processes, each in a pool of its own: so one that dies is of no matter to the others, and its task is known."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pools: list[ProcessPoolExecutor | None] = [None] * size
        self._started: list[Future[Any]] = [Future()] * size
        self._stillborn = 0

    def submit(self, number: int, function: Callable[[Task], Result], task: Task, is_idle: bool) -> Future[Result]:
        """Give a task to one of the processes, which is started if need be.

        Raises: BrokenProcessPool: if it died at another task.
        """
        try:
            return self.start(number).submit(function, task)
        except BrokenProcessPool as error:
            if not is_idle:
                raise
            self.replace(number, error)
            return self.start(number).submit(function, task)

    def start(self, number: int, first: Callable[[], Any] = int) -> ProcessPoolExecutor:
        """Return a running pool, a new one after it has called ``first``."""
        pool = self._pools[number]
        if pool is None:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start_worker)
            self._pools[number] = pool
            with _signals_held_back(), _without_blas_threads(), _without_main():
                self._started[number] = pool.submit(first)
        return pool

    def replace(self, number: int, error: BrokenProcessPool) -> bool:
        """Forget a process that died; return whether it had come to work.

        Raises: DataError: if none ever did, or some died while they started.
        """
        came_to_work = [each.done() and each.exception() is None for each in self._started]
        self._stillborn += not came_to_work[number]
        if not any(came_to_work) or self._stillborn >= _TRIES:
            raise DataError(
                "a worker process died while it started (killed, or out of memory?). Run the same command again, with"
                f" fewer than {self.size} workers if memory is short."
            ) from error
        self._stop([self._pools[number]])
        self._pools[number] = None
        return came_to_work[number]

    def stop(self) -> None:
        """End the workers at once; what they were at is unfinished and will be done again."""
        self._stop(self._pools)

    @staticmethod
    def _stop(pools: Iterable[ProcessPoolExecutor | None]) -> None:
        some = [pool for pool in pools if pool is not None]
        processes = [process for pool in some for process in (pool._processes or {}).values()]
        threads: list[Any] = [pool._executor_manager_thread for pool in some]
        for pool in some:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
        for thread in threads:  # else it may close its pipe while the interpreter, as it ends, writes to that
            if thread is not None:
                thread.join(5)


_kept: list[_Team | None] = []  # by ``kept_running``; None until there is work for it


@contextlib.contextmanager
def _at_work(workers: int) -> Iterator[_Team]:
    """Yield worker processes: those that are kept running, else some for this block."""
    if _kept and _kept[-1] is not None:
        yield _kept[-1]
        return
    team = _Team(workers)
    if _kept:
        _kept[-1] = team
        yield team
        return
    try:
        yield team
    finally:
        team.stop()


def start_workers(workers: int, tasks: int) -> None:
    """Let the processes that are kept running start and import, while this one does something else."""
    if _kept and min(workers, tasks) > 1:
        with _at_work(workers) as team:
            for number in range(min(workers, tasks)):
                team.start(number, _import_work)


def _import_work() -> None:
    import converters.packing
    import converters.stage  # noqa: F401


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait till the block ends: a process that loses its parent while it starts is noisy.

    What is started in the block does not hear Ctrl-C at all.
    """
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        before = {}  # they are not ours to hold
    for number in before:
        signal.signal(number, lambda number, _: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in caught:
            os.kill(os.getpid(), each)


@contextlib.contextmanager
def _without_blas_threads() -> Iterator[None]:
    """Let what is started in the block begin no threads for linear algebra, unless the user has said how many."""
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes that are started in the block not run the main script again, as they would at first.

    No task needs what is in it; but it may import torch, or have no ``if __name__ == "__main__":`` around its work.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
            team = _kept.pop()
            if team is not None:
                team.stop()
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
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in this place
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
    waiting, lost = iter(_largest_first(tasks)), list[Task]()
    running: dict[Any, Task] = {}
    try:
        while len(lost) < _MOST_LOST:
            for task in itertools.islice(waiting, 2 * workers - len(running)):
                running[remote.remote(os.getcwd(), function, task)] = task
            if not running:
                break
            for reference in ray.wait([*running])[0]:
                task = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                except ray.exceptions.RayError as error:
                    lost.append(task)
                    why = type(error).__name__
                else:
                    yield result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if lost:
        raise DataError(
            f"Ray gave up after three retries ({why}) at {_listed(lost)}. What is finished is kept: run the same"
            " command again."
        )


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
