"""What does it cost that shards lie elsewhere, once the first window is here?

    python -m benchmarks.remote

Shards lie in a bucket of an S3 server (moto) behind a proxy that waits 50 ms before every answer. A training step is
stood in for by a pause of ``--step`` ms, so that fetching has time to run ahead, as it has in training; the loader's
share of the time is what counts. Windows are made small, so that many are passed. Compared is the time per step after
the first window with that of a loader on the same shards on the local disk; rounds alternate. Results also go to
benchmarks/results/remote.json.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.peers import WEIGHTS

SEQ_LEN, PER_SHARD, WINDOW = 2048, 250, 1000
REMOTE = "s3://corpus/shards"


def write_shards(folder: Path, num_samples: int) -> None:
    from benchmarks.peers import sizes
    from mixer import mds
    from mixer.manifest import Domain, Manifest, Split, TokenizerInfo

    columns, domains = {"tokens": mds.token_encoding("uint16", SEQ_LEN)}, {}
    for number, (name, count) in enumerate(sizes(num_samples).items()):
        out = folder / name / "train"
        out.mkdir(parents=True)
        rows, entries = np.random.default_rng(number).integers(0, 50_000, (count, SEQ_LEN)).astype(np.uint16), []
        for shard, first in enumerate(range(0, count, PER_SHARD)):
            part = rows[first : first + PER_SHARD]
            raw, basename = mds.encode_shard(columns, part, hashes=("xxh64",)), f"shard.{shard:05}.mds"
            (out / basename).write_bytes(raw)
            entries.append(mds.shard_entry(columns, basename, raw, num_samples=len(part), hashes=("xxh64",)))
        fingerprint = "sha256:" + mds.hash_hex("sha256", mds.write_index(out, entries).read_bytes())
        split = Split(f"{name}/train", count, count * SEQ_LEN, count, len(entries), 0, fingerprint)
        domains[name] = Domain({"train": split})
    Manifest(domains, SEQ_LEN, "uint16", TokenizerInfo("none", "", 50_000, 0)).save(folder)


@contextmanager
def serving(folder: Path, delay: float) -> Iterator[str]:
    """Put a folder into a bucket; yield the address of a proxy that waits ``delay`` seconds before every answer."""
    from tests.mixer.stores import Proxy
    from tests.s3 import s3_server, upload

    with s3_server() as (client, port):
        upload(client, folder, "shards")
        yield Proxy(port, lambda *_: ("delay", delay)).url


def run(shards: Path, remote: str | None, steps: int, pause: float) -> dict[str, float]:
    """Return seconds per step after the first window, seconds waited in it, and to the first batch."""
    from mixer import MixtureLoader

    began = time.perf_counter()
    loader = MixtureLoader(shards, remote=remote, mixture=WEIGHTS, global_batch_size=16)
    batches = iter(loader)
    next(batches)
    first, times = time.perf_counter() - began, []
    behind = 0.0
    for number in range(steps):
        if number == steps // 4:  # the first windows of all domains lie behind, or are here
            behind = loader.stats()["waited_seconds"]
        began = time.perf_counter()
        next(batches)
        time.sleep(pause)
        times.append(time.perf_counter() - began)
    waited = loader.stats()["waited_seconds"] - behind
    return {"first_batch": first, "step": statistics.mean(times[steps // 4 :]), "waited": waited}


@click.command()
@click.option("--samples", default=20_000, show_default=True)
@click.option("--steps", default=400, show_default=True)
@click.option("--step", default=5.0, show_default=True, help="Milliseconds that a training step is taken to need.")
@click.option("--latency", default=50.0, show_default=True, help="Milliseconds before every answer.")
@click.option("--rounds", default=3, show_default=True)
def main(samples: int, steps: int, step: float, latency: float, rounds: int) -> None:
    """Measure and print one table."""
    import mixer.dataset
    from mixer.order import Order

    mixer.dataset.Order = lambda *args: Order(*args, window_samples=WINDOW)  # type: ignore[misc, assignment]
    found: dict[str, list[dict[str, float]]] = {"local": [], "remote": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder / "shards", samples)
        with serving(folder / "shards", latency / 1000) as os.environ["S3_ENDPOINT_URL"]:
            run(folder / "warm", REMOTE, 2, 0)  # imports
            for number in range(rounds):
                found["local"].append(run(folder / "shards", None, steps, step / 1000))
                found["remote"].append(run(folder / f"cache-{number}", REMOTE, steps, step / 1000))
    medians = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}
    ratio = statistics.median(b["step"] / a["step"] for a, b in zip(found["local"], found["remote"]))
    table = Table(title=f"{latency:g} ms before every answer, {step:g} ms of training per step, {rounds} rounds")
    for column in ("shards", "first batch s", "ms per step after the first window", "of it waited s"):
        table.add_column(column, justify="left" if column == "shards" else "right")
    for name, row in medians.items():
        table.add_row(name, f"{row['first_batch']:.2f}", f"{1000 * row['step']:.3f}", f"{row['waited']:.3f}")
    Console(width=100).print(table)
    print(f"remote ÷ local after the first window: {ratio:.3f} (goal: within 1.1)")
    RESULTS.mkdir(exist_ok=True)
    setting = {"samples": samples, "steps": steps, "step_ms": step, "latency_ms": latency, "rounds": rounds}
    result = {"setting": setting, "medians": medians, "ratio": ratio}
    (RESULTS / "remote.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
    os._exit(0)  # leave the server's threads behind
