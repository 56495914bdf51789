"""Run a job on several gloo processes of this machine and collect what each rank returns.

results = run_ranks("ddp", 2, tmp_path)        # [what rank 0 returned, what rank 1 returned]
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
JOBS: dict[str, Callable[[Path, int, int], Any]] = {}


def job(function: Callable[[Path, int, int], Any]) -> Callable[[Path, int, int], Any]:
    """Register ``function(folder, rank, world_size)`` under its name."""
    JOBS[function.__name__] = function
    return function


def run_ranks(
    names: list[str], world_size: int, folder: Path, module: str = "tests.algorithms.rank_jobs"
) -> list[dict[str, Any]]:
    """Return, for each rank, what each job returned there; a failing rank fails the test with its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "NODE_RANK": 0,
        }
        environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, str(folder), *names]
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    failed = [
        f"rank {rank}:\n{output[-3000:]}"
        for rank, (process, output) in enumerate(zip(processes, outputs))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def main() -> None:
    """Run the named jobs in turn on this rank."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from composer.utils import dist

    dist.initialize_dist("cpu")
    results = {name: JOBS[name](folder, rank, world_size) for name in names}
    torch.save(results, folder / f"rank{rank}.pt")
