"""Engines differ in where the work is done, and in nothing else. The Ray tests need the extra ``ray``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from converters import convert
from converters.engines import run_tasks
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


def test_killed_local_worker_is_a_clear_error_and_no_hang(tmp_path):
    with pytest.raises(DataError, match=r"a worker process died.*fewer than 2 workers"):
        list(run_tasks("local", kill_self_once, [str(tmp_path / name) for name in "ab"], 2))


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


def test_error_of_a_ray_task_comes_out_as_it_is(ray_engine):
    with pytest.raises(DataError, match=r"task [34] is bad"):
        list(run_tasks(ray_engine, fail, [3, 4], 2))
