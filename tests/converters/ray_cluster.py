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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def ray_cluster(cores: int = 2) -> Iterator[Callable[..., None]]:
    """Yield ``convert`` by a cluster that ends with the block; skip the test where Ray is not installed."""
    program = Path(sys.executable).with_name("ray")
    if importlib.util.find_spec("ray") is None or not program.exists():
        pytest.skip("needs Ray: pip install 'domain-mixer[ray]'")
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    # A short path, because that of a socket may have 107 bytes only.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            str(program), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={address[10:]}",
            f"--num-cpus={cores}", f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats",
             f"--dashboard-agent-listen-port={free_port()}",
            "--object-store-memory=100000000",
        ]  # fmt: skip
        head = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for_port(head, int(address[10:]))
            yield lambda *given, **options: by_process(environment, *given, engine=f"ray:{address}", **options)
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
    mine = family(head.pid)
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.communicate(timeout=5)


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(each for child in children for each in family(int(child)))]
    return [pid]
