"""The examples run, and go on where they stopped."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), {"book": 30, "code": 150, "web": 400}, vocab_size=60_000)


def needs(*packages):
    if all(importlib.util.find_spec(package) is None for package in packages):
        pytest.skip(f"{' or '.join(packages)} is not installed")


def run(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_pytorch_goes_on_where_it_stopped(shards, tmp_path):
    command = (sys.executable, ROOT / "examples" / "loader_pytorch.py", shards, tmp_path / "checkpoint.pt")
    assert re.findall(r"step (\d+)", run(*command)) == ["1", "2", "3", "4"]
    assert re.findall(r"step (\d+)", run(*command)) == ["5", "6", "7", "8"]


def test_torchrun_ranks_share_batches(shards):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run(*command, ROOT / "examples" / "loader_torchrun.py", shards)
    assert sorted(re.findall(r"rank (\d) of 2, step (\d)", out)) == [(r, s) for r in "01" for s in "123"]


def test_composer_saves_the_loader(shards, tmp_path):
    needs("composer")  # that it restores it too is shown in test_composer.py, in one process
    out = run(sys.executable, ROOT / "examples" / "loader_composer.py", shards, tmp_path / "run", 2)
    assert "trained to step 2; the loader stands at 2" in out and list((tmp_path / "run").rglob("*.pt"))


TRAINERS = {
    "hugging_face": "from transformers import GPT2LMHeadModel, Trainer",
    "lightning": "try: import lightning.pytorch\nexcept ImportError: import pytorch_lightning",
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_goes_on_from_its_checkpoint_to_the_bit(shards, tmp_path, name):
    # Beside a CPU torch, PyPI's torchvision (a CUDA build) keeps both from being imported.
    loads = subprocess.run([sys.executable, "-c", TRAINERS[name]], capture_output=True, text=True)
    if loads.returncode:
        pytest.skip(f"its trainer cannot be imported here: {loads.stderr.strip().splitlines()[-1]}")
    program = (sys.executable, ROOT / "examples" / f"loader_{name}.py", shards)
    whole = trained(run(*program, tmp_path / "whole", 5))
    first, rest = trained(run(*program, tmp_path / "run", 2)), trained(run(*program, tmp_path / "run", 5))
    assert [number for number, _ in first + rest] == ["1", "2", "3", "4", "5"]
    assert first + rest == whole  # losses to nine digits and the ids of all samples


def trained(out):
    """Return (step, loss and samples) of each step that an example printed."""
    return re.findall(r"^step (\d+): (loss .*)$", out, re.MULTILINE)
