"""Workers and a node that die in the middle of a conversion by Ray change nothing in its result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters import convert
from tests.converters.corpora import tree_hash, write_corpus
from tests.converters.ray_cluster import family, ray_cluster

OPTIONS: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 64, "unit_size": 3000, "shard_size": 8000}
PROGRAM = """
import functools, sys
from converters import committing, convert, tokenizing
from tests.converters import test_ray_kills as tests
source, out, notes, how, engine, workers = sys.argv[1:]
watch = functools.partial(getattr(tests, how), notes)
tokenizing.stage_unit = functools.partial(watch, tokenizing.stage_unit)
committing.pack_shard = functools.partial(watch, committing.pack_shard)
convert([source], out, engine=engine, workers=int(workers), **tests.OPTIONS)
"""


def dies_once(notes: str, function: Callable[[Any], Any], task: Any) -> Any:
    """Die by SIGKILL at two units and at a shard, each the first time; else do the work, without heavy libraries."""
    assert not {"torch", "streaming", "transformers"} & sys.modules.keys()
    number = task.unit.number if hasattr(task, "unit") else 10 + task.number
    if number in (1, 4, 10):
        try:
            os.close(os.open(f"{notes}/{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return function(task)
        os.kill(os.getpid(), signal.SIGKILL)
    return function(task)


def takes_a_while(notes: str, function: Callable[[Any], Any], task: Any) -> Any:
    """Note on which node this is, and work slowly until one was killed."""
    Path(notes, str(os.getppid())).touch()
    if not Path(notes, "killed").exists():
        time.sleep(0.5)
    return function(task)


def start(cluster: Any, how: str, source: Path, out: Path, notes: Path, workers: int) -> subprocess.Popen[bytes]:
    notes.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(source), str(out), str(notes), how, cluster.engine, str(workers)]
    return subprocess.Popen(command, env=cluster.environment)


def test_three_killed_workers_of_eight_change_nothing(tmp_path):
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "local", **OPTIONS)
    with ray_cluster(cores=8) as cluster:
        assert start(cluster, "dies_once", tmp_path / "corpus", tmp_path / "out", tmp_path / "notes", 8).wait() == 0
    assert sorted(os.listdir(tmp_path / "notes")) == ["1", "10", "4"]
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "local")


def test_killed_node_changes_nothing(tmp_path):
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "local", **OPTIONS)
    with ray_cluster(cores=1) as cluster, cluster.node(cores=2) as node:
        run = start(cluster, "takes_a_while", tmp_path / "corpus", tmp_path / "out", tmp_path / "notes", 3)
        end, mine = time.monotonic() + 60, set()
        while not mine and run.poll() is None and time.monotonic() < end:
            mine = {str(pid) for pid in family(node.pid)} & {*os.listdir(tmp_path / "notes")}
            time.sleep(0.05)
        assert mine, "no task came to the second node"
        for pid in family(node.pid):
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "notes" / "killed").touch()
        assert run.wait() == 0
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "local")
