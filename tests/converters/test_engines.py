"""Engines differ in where the work is done, and in nothing else. The Ray tests need the extra ``ray``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import pytest

from converters import convert
from converters.engines import _largest_first, _Team, kept_running, run_tasks
from mixer.errors import DataError, InputError
from tests.converters.corpora import tree_hash, write_corpus

OPTIONS: dict = {"tokenizer": "bytes", "seq_len": 64, "unit_size": 3000, "shard_size": 8000}


def kill_self_once(marker: str) -> str:
    """Die by SIGKILL the first time, as a worker out of memory does; then return."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return marker
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def fail(number: int) -> int:
    raise DataError(f"task {number} is bad")


@pytest.fixture
def ray_engine():
    pytest.importorskip("ray")
    return "ray"


@pytest.mark.parametrize("workers", [1, 2])
def test_error_of_a_task_comes_out_as_it_is(workers):
    with pytest.raises(DataError, match="task 3 is bad"):
        list(run_tasks("local", fail, [3, 3, 3], workers))


@pytest.mark.parametrize(("asked", "expected"), [(None, "1"), ("3", "3")])
def test_workers_start_no_threads_for_linear_algebra(monkeypatch, asked, expected):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", asked)
    assert list(run_tasks("local", os.getenv, ["OPENBLAS_NUM_THREADS"] * 2, 2)) == [expected] * 2
    assert os.getenv("OPENBLAS_NUM_THREADS") == asked  # this process may well do linear algebra


class Sized(NamedTuple):
    number: int
    size: int


def test_largest_tasks_come_first_and_equal_ones_in_their_order():
    tasks = [Sized(0, 2), Sized(1, 9), Sized(2, 2), Sized(3, 5)]
    assert [task.number for task in _largest_first(tasks)] == [1, 3, 0, 2]
    assert _largest_first(["b", "a"]) == ["b", "a"]


class Errand(NamedTuple):
    label: str
    notes: str


def note_and_die_at_poison(errand: Errand) -> str:
    with open(errand.notes, "a") as file:
        file.write(f"{errand.label}\n")
    if errand.label == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    return errand.label


def test_task_of_a_killed_worker_is_done_again(tmp_path, caplog):
    tasks = [str(tmp_path / name) for name in "abc"]
    assert sorted(run_tasks("local", kill_self_once, tasks, 2)) == tasks
    assert [record.message.partition(" at ")[0] for record in caplog.records] == ["a worker process died"] * 3


def test_task_at_which_three_workers_die_is_named_when_all_others_are_done(tmp_path):
    errands = [Errand(name, str(tmp_path / "notes")) for name in ("a", "poison", "b", "c", "d")]
    done = []
    with pytest.raises(DataError, match=r"a worker process died .*3 times at poison\. .*same command again"):
        for result in run_tasks("local", note_and_die_at_poison, errands, 2):
            done.append(result)
    assert sorted(done) == ["a", "b", "c", "d"]
    assert sorted((tmp_path / "notes").read_text().split()) == ["a", "b", "c", "d", "poison", "poison", "poison"]


def test_process_that_died_at_one_task_is_replaced_once_however_many_it_had(tmp_path):
    """Its second task must not replace it, too: the new process would be taken for one that died while it started."""
    team = _Team(1)
    try:
        first = team.submit(0, note_and_die_at_poison, Errand("poison", str(tmp_path / "notes")), is_idle=True)
        with pytest.raises(BrokenProcessPool):
            first.result()
        with pytest.raises(BrokenProcessPool):
            team.submit(0, abs, -1, is_idle=False)
        assert team.replace(0, BrokenProcessPool()), "it had come to work"
        assert team.submit(0, abs, -1, is_idle=False).result() == 1
    finally:
        team.stop()


def test_workers_that_never_start_are_one_clear_error(tmp_path):
    dying = "import os, sys\nif 'multiprocessing.spawn' in str(sys.orig_argv):\n    os._exit(1)\n"
    (tmp_path / "sitecustomize.py").write_text(dying)
    code = "from converters.engines import run_tasks\nlist(run_tasks('local', abs, [1, 2, 3], 2))\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 1
    assert re.search(r"DataError: a worker process died while it started .*with fewer than 2 workers", ended.stderr)


def test_workers_do_not_run_the_script_that_converts(tmp_path):
    write_corpus(tmp_path / "corpus")
    script = tmp_path / "without_guard.py"  # and it may import torch, at its top
    script.write_text(
        "from pathlib import Path\nfrom converters import convert\n"
        f"with open({str(tmp_path / 'runs')!r}, 'a') as runs:\n    runs.write('run\\n')\n"
        f"convert([{str(tmp_path / 'corpus')!r}], {str(tmp_path / 'out')!r}, workers=2, **{OPTIONS!r})\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    assert (tmp_path / "runs").read_text() == "run\n"
    convert([tmp_path / "corpus"], tmp_path / "alone", **OPTIONS)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "alone")


def test_no_tasks_start_no_workers():
    assert list(run_tasks("local", fail, [], 4)) == []


@pytest.mark.parametrize("engine", ["slurm", "local:4", ""])
def test_unknown_engine_is_refused(engine):
    with pytest.raises(InputError, match="no engine"):
        run_tasks(engine, fail, [], 1)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "//127.0.0.1:9", "nowhere.invalid:6379"])
def test_cluster_that_does_not_answer_is_one_line(ray_engine, address):
    with pytest.raises(InputError, match=r"no Ray cluster answers at .*:\d+ \(.+\)\."):
        list(run_tasks(f"ray:{address}", fail, [1], 1))


def test_ray_engine_without_ray_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'domain-mixer\[ray\]'"):
        list(run_tasks("ray", fail, [1], 1))


def test_ray_engine_writes_the_same_bytes(tmp_path, ray_engine, monkeypatch):
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "local", **OPTIONS)
    monkeypatch.chdir(tmp_path)
    convert(["corpus"], Path("by-ray"), engine=ray_engine, workers=2, **OPTIONS)
    assert tree_hash(tmp_path / "local") == tree_hash(tmp_path / "by-ray")


def test_ray_tasks_fail_with_their_own_error_or_by_name(tmp_path, ray_engine):
    errands, done = [Errand(name, str(tmp_path / "notes")) for name in ("poison", "a", "b")], []
    with kept_running(ray_engine, 2):  # Ray takes seconds to start
        with pytest.raises(DataError, match=r"task [34] is bad"):
            list(run_tasks(ray_engine, fail, [3, 4], 2))
        with pytest.raises(DataError, match=r"gave up after three retries \(\w+\) at poison\. "):
            for result in run_tasks(ray_engine, note_and_die_at_poison, errands, 2):
                done.append(result)
    assert sorted(done) == ["a", "b"]
    # Where a worker is lost before it comes to the task, as on a busy machine, Ray counts that too.
    assert 2 <= (tmp_path / "notes").read_text().count("poison") <= 4
