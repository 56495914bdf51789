"""Fifty random kills in one conversion: of all its processes, or of one worker."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters import convert
from tests.converters.corpora import tree_hash, write_corpus
from tests.converters.zygote import OPTIONS

pytestmark = pytest.mark.once

KILLS, WORKERS = 50, 2


def test_fifty_kills_cost_at_most_a_unit_per_worker_each_and_change_nothing(tmp_path):
    write_corpus(tmp_path / "corpus", scale=2)
    convert([tmp_path / "corpus"], tmp_path / "undisturbed", **OPTIONS)
    out, log, rng = tmp_path / "shards", tmp_path / "log", random.Random(11)
    log.touch()
    command = [sys.executable, "-m", "tests.converters.zygote", str(tmp_path / "corpus"), str(out), str(log), "2"]
    zygote = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    killed = {"tokenising": 0, "packing": 0, "a worker": 0}
    pid = started(zygote)
    while sum(killed.values()) < KILLS:
        begun, finished = len(log.read_text().split()), units(out)
        wanted = done(out) + rng.randint(1, 5)
        while done(out) < wanted and not has_ended(pid):
            time.sleep(0.001)
        workers = children(pid)
        if has_ended(pid):  # a unit was given up at which workers were killed three times
            assert int(zygote.stdout.readline()) == 1, "it was done before it was killed as often as it should be"
            pid = started(zygote)
        elif workers and rng.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                killed["a worker"] += 1
        else:
            killed["packing" if list(out.glob(".pack/shards/*")) else "tokenising"] += 1
            os.killpg(pid, signal.SIGKILL)
            assert int(zygote.stdout.readline()) in (1, -signal.SIGKILL)  # 1 if it gave a unit up at this moment
            assert len(log.read_text().split()) - begun - (units(out) - finished) <= WORKERS
            pid = started(zygote)
        assert not (out / "manifest.json").exists()
    assert min(killed.values()) >= 5
    assert int(zygote.stdout.readline()) == 0
    begun = log.read_text().split()
    assert len(begun) - len(set(begun)) <= WORKERS * (killed["tokenising"] + killed["packing"]) + killed["a worker"]
    zygote.communicate()
    assert tree_hash(out) == tree_hash(tmp_path / "undisturbed")


def started(zygote: subprocess.Popen[str]) -> int:
    zygote.stdin.write("go\n")
    zygote.stdin.flush()
    return int(zygote.stdout.readline())


def units(out: Path) -> int:
    return len(list(out.glob(".stage/units/??????/unit.json")))


def done(out: Path) -> int:
    return units(out) + len(list(out.glob(".pack/shards/*/*/*.json")))


def children(pid: int) -> list[int]:
    """Return the worker processes of a process (not the one that tracks its semaphores)."""
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except FileNotFoundError:
        return []


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
