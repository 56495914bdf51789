"""A small cache, two ranks, worker processes, kills at any moment: the samples of an undisturbed local run."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from mixer import MixtureLoader
from tests.helpers import write_shards

SHARD_BYTES, LIMIT, STEPS = 64 * (16 * 2 + 4) + 300, 4, 240

# A rank: windows of one shard, a wire that takes its time, the state kept every 10 steps, a line for every step.
RANK = """
import hashlib, json, os, random, sys, time
import mixer.dataset, mixer.downloading
from mixer import MixtureLoader
from mixer.order import Order

mixer.dataset.Order = lambda *args: Order(*args, window_samples=64)
real = mixer.downloading.streaming_door.download

def slowly(url, target, timeout, clients, connected):
    if "shard." in url:
        with open(os.environ["LOG"], "a") as log:
            log.write(url + chr(10))
        target.write_bytes(b"x" * 1000)  # what a kill leaves here must not be taken for a shard
        time.sleep(random.random() / 50)
        target.unlink()
    real(url, target, timeout, clients, connected)

mixer.downloading.streaming_door.download = slowly

def as_is(batch):
    return batch

def main():
    cache, remote, rank, steps, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    loader = MixtureLoader(cache, remote=remote, cache_limit=limit, mixture="uniform", global_batch_size=12, seed=3,
                           rank=rank, world_size=2, num_workers=2 * rank, transform=as_is, read_ahead=2)
    state, out = f"{cache}.{rank}.state", open(f"{cache}.{rank}.out", "a")
    if os.path.exists(state):
        loader.load_state_dict(json.load(open(state)))
    batches = iter(loader)
    while loader.step < steps:
        step, batch = loader.step, next(batches)
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
        out.write(f"{step} {digest}{chr(10)}"); out.flush()
        if loader.step % 10 == 0:
            json.dump(loader.state_dict(), open(state + ".new", "w"))
            os.replace(state + ".new", state)
    print(json.dumps(loader.stats()["cache"]))

if __name__ == "__main__":
    main()
"""


class Ranks:
    """Two rank processes, each with its workers in a group of its own."""

    def __init__(self, folder: Path, remote: Path) -> None:
        (folder / "rank.py").write_text(RANK)
        root = str(Path(__file__).parents[2])
        self.environment = {**os.environ, "PYTHONPATH": root, "LOG": str(folder / "log")}
        self.arguments = [str(folder / "cache"), str(remote)]
        self.script, self.running = folder / "rank.py", {}

    def start(self, rank: int) -> None:
        command = [sys.executable, self.script, *self.arguments, str(rank), str(STEPS), str(LIMIT * SHARD_BYTES)]
        self.running[rank] = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def kill(self, rank: int) -> None:
        os.killpg(self.running[rank].pid, signal.SIGKILL)
        self.running[rank].wait()


class Watch(threading.Thread):
    """Notes the most bytes that the shards of a folder took together."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.over = folder, 0, False
        self.start()

    def run(self) -> None:
        while not self.over:
            total = 0
            for pattern in ("*/train/shard.*", ".mixer/process.*/claim.*/*/shard.*"):
                for path in glob.glob(pattern, root_dir=self.folder):
                    total += size_of(self.folder / path)
            self.most = max(self.most, total)
            time.sleep(0.002)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def lines(folder: Path, rank: int) -> list[str]:
    path = folder / f"cache.{rank}.out"
    return path.read_text().splitlines() if path.exists() else []


def reached(folder: Path, rank: int, step: int, process: subprocess.Popen[str]) -> None:
    while not any(int(line.split()[0]) >= step for line in lines(folder, rank)):
        assert process.poll() is None, "a rank ended before its time"
        time.sleep(0.01)


def test_small_cache_kills_and_restarts_change_no_sample(tmp_path, monkeypatch):
    import mixer.dataset
    from mixer.order import Order

    source = write_shards(tmp_path / "source", {"code": 300, "web": 900})
    ranks, watch = Ranks(tmp_path, source), Watch(tmp_path / "cache")
    for rank in (0, 1):
        ranks.start(rank)
    for rank, step in ((0, 60), (1, 90)):  # one without worker processes, one with two
        reached(tmp_path, rank, step, ranks.running[rank])
        time.sleep(random.random() / 10)
        ranks.kill(rank)
        ranks.start(rank)
    said = [json.loads(ranks.running[rank].communicate(timeout=200)[0]) for rank in (0, 1)]
    watch.over = True
    # A shard may go and another come while they are counted.
    assert SHARD_BYTES < watch.most <= (LIMIT + 1) * SHARD_BYTES
    assert all(stats["evicted_files"] > 5 for stats in said)

    monkeypatch.setattr(mixer.dataset, "Order", lambda *args: Order(*args, window_samples=64))
    for rank in (0, 1):
        local = MixtureLoader(
            source, mixture="uniform", global_batch_size=12, seed=3, rank=rank, world_size=2, read_ahead=2
        )
        expected = {
            step: hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
            for step, batch in zip(range(STEPS), local)
        }
        got = {}
        for line in lines(tmp_path, rank):
            step, digest = line.split()
            assert expected[int(step)] == digest
            got[int(step)] = digest
        assert sorted(got) == list(range(STEPS))
    MixtureLoader(tmp_path / "cache", remote=str(source), cache_limit=10**6, global_batch_size=4)
    left = list((tmp_path / "cache" / ".mixer").glob("process.*"))
    assert len(left) == 1, "the next run sweeps what the killed ones left, and has a folder of its own"
