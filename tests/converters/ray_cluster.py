"""A Ray cluster of one node on loopback, with ports and a folder of its own, as ``ray start --head`` makes it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Cluster:
    """A running cluster: how conversions name it, and in which environment they reach it. Called, it converts."""

    address: str
    environment: dict[str, str]
    folder: str

    @property
    def engine(self) -> str:
        return f"ray:{self.address}"

    def __call__(self, *given: Path, **options: object) -> None:
        by_process(self.environment, *given, engine=self.engine, **options)

    @contextlib.contextmanager
    def node(self, cores: int) -> Iterator[subprocess.Popen[str]]:
        """Yield one more node."""
        node = self.started(cores, f"--address={self.address}", f"--dashboard-agent-listen-port={free_port()}")
        try:
            yield node
        finally:
            stop(node)

    def started(self, cores: int, *options: str) -> subprocess.Popen[str]:
        command = [
            str(PROGRAM), "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cores}",
            "--disable-usage-stats", "--object-store-memory=100000000", *options,
        ]  # fmt: skip
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, start_new_session=True, **pipes)


PROGRAM = Path(sys.executable).with_name("ray")


@contextlib.contextmanager
def ray_cluster(cores: int = 2) -> Iterator[Cluster]:
    """Yield a cluster that ends with the block; skip the test where Ray is not installed."""
    if importlib.util.find_spec("ray") is None or not PROGRAM.exists():
        pytest.skip("needs Ray: pip install 'domain-mixer[ray]'")
    port = free_port()
    root = str(Path(__file__).parents[2])  # so that workers find the functions of tests
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    checks = ("initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold")  # that a dead node is missed soon
    health = {f"RAY_health_check_{name}": value for name, value in zip(checks, ("1000", "500", "5000", "3"))}
    environment = {**os.environ, **token, **health, "PYTHONPATH": root}
    # A short path, because that of a socket may have 107 bytes only.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(f"127.0.0.1:{port}", environment, folder)
        head = cluster.started(
            cores, "--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false",
            f"--dashboard-agent-listen-port={free_port()}",
        )  # fmt: skip
        try:
            wait_for_port(head, port)
            yield cluster
        finally:
            stop(head)


def by_process(environment: dict[str, str], source: Path, out: Path, **options: object) -> None:
    """Convert in a process of its own: one that has once met Ray keeps to the token of that cluster."""
    program = "import json, sys; from converters import convert; convert(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    command = [sys.executable, "-c", program, str(source), str(out), json.dumps(options, default=str)]
    subprocess.run(command, env=environment, check=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(head: subprocess.Popen[str], port: int) -> None:
    for _ in range(600):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended: {head.communicate()[0][-2000:]}")
        time.sleep(0.1)
    raise RuntimeError("the cluster did not start within a minute")


def stop(head: subprocess.Popen[str]) -> None:
    """End what this cluster started and nothing else, which is why this is not ``ray stop``."""
    for pid in family(head.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.communicate(timeout=5)


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(each for child in children for each in family(int(child)))]
    return [pid]
