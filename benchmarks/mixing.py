"""How well, how soon and at what cost does a loader follow its weights?

    python -m benchmarks.mixing

Mixing error: the most samples by which any domain is off its share at any prefix of 50,000 draws, for weights 0.4 /
0.3 / 0.2 / 0.1; ours through the mixer, StreamingDataset's through the order it makes of an epoch, the others' through
their own sampling. Lag: batches between ``set_weights`` and the first batch drawn by the new weights, with a loader on
real shards. Planning: microseconds per draw, medians. Results also go to benchmarks/results/mixing.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.peers import SHARES, WEIGHTS, interpreter, sizes, write_data

DRAWS, SAMPLES = 50_000, 100_000


def worst_error(domains: np.ndarray) -> float:
    """Return the greatest distance of any domain's count from its share at any prefix."""
    weights, steps = np.array(list(WEIGHTS.values())), np.arange(1, len(domains) + 1)
    counts = [np.cumsum(domains == d) for d in range(len(weights))]
    return float(max(np.abs(count - weight * steps).max() for count, weight in zip(counts, weights)))


def ours() -> np.ndarray:
    """Return the domain of each draw; inside a batch the order is random, so errors are taken batch by batch."""
    from mixer import Mixer

    mixer = Mixer(sizes(SAMPLES), weights=WEIGHTS, batch_size=1)
    return np.concatenate([mixer.next_batch().domain_ids for _ in range(DRAWS)])


def ours_in_batches() -> float:
    """Return the greatest error after any batch of 512, while the weights move at every batch."""
    from mixer import Mixer

    mixer, target, worst = Mixer(sizes(SAMPLES), weights=WEIGHTS, batch_size=512), np.zeros(4), 0.0
    rng = np.random.default_rng(0)
    for _ in range(2000):
        mixer.set_weights(rng.dirichlet(np.ones(4)))
        target += 512 * mixer.weights
        mixer.next_batch()
        worst = max(worst, float(np.abs(mixer.drawn - target).max()))
    return worst


def streaming() -> np.ndarray:
    from streaming import Stream, StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.util import clean_stale_shared_memory

    from benchmarks.startup import write_indexes

    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        write_indexes(Path(folder), SAMPLES)
        streams = [Stream(local=str(Path(folder) / n / "train"), proportion=w) for n, w in WEIGHTS.items()]
        dataset = StreamingDataset(
            streams=streams, batch_size=16, shuffle=True, num_canonical_nodes=1, shuffle_block_size=1 << 18
        )
        world = dataset._unique_rank_world.detect_workers()
        work = generate_work(dataset.batching_method, dataset, world, 0, 0).reshape(-1)
        firsts = np.cumsum([0, *sizes(SAMPLES).values()])
        return np.searchsorted(firsts, work[work >= 0][:DRAWS], side="right") - 1


def torchdata() -> np.ndarray:
    from torch.utils.data import RandomSampler
    from torchdata.nodes import MapStyleWrapper, MultiNodeWeightedSampler

    nodes: dict[str, Any] = {}
    for number, (name, count) in enumerate(sizes(SAMPLES).items()):
        rows = [number] * count
        nodes[name] = MapStyleWrapper(map_dataset=rows, sampler=RandomSampler(rows))
    mixed = MultiNodeWeightedSampler(nodes, WEIGHTS, stop_criteria="CYCLE_FOREVER")
    mixed.reset()
    return np.array([next(mixed) for _ in range(DRAWS)])


def grain() -> np.ndarray:
    import grain.python as pygrain

    parts = [
        pygrain.MapDataset.source([number] * count).repeat() for number, count in enumerate(sizes(SAMPLES).values())
    ]
    mixed = pygrain.MapDataset.mix(parts, weights=list(WEIGHTS.values()))
    return np.array([mixed[i] for i in range(DRAWS)])


def hugging_face() -> np.ndarray:
    from datasets import Dataset, interleave_datasets

    parts = [Dataset.from_dict({"d": [number] * count}) for number, count in enumerate(sizes(SAMPLES).values())]
    mixed = interleave_datasets(parts, probabilities=list(WEIGHTS.values()), seed=0, stopping_strategy="all_exhausted")
    return np.array(mixed[:DRAWS]["d"])


ORDERS = {
    "mixer": (ours, "mixer"),
    "Grain": (grain, "grain"),
    "Hugging Face datasets": (hugging_face, "datasets"),
    "torchdata.nodes": (torchdata, "torchdata"),
    "mosaicml-streaming": (streaming, "streaming"),
}


def planning(num_domains: int, batch: int, rounds: int = 5) -> float:
    """Return microseconds per draw: the batch is allocated, put into order, and samples are found in their windows."""
    from mixer import Mixer
    from mixer.order import Order

    rng, found = np.random.default_rng(0), []
    counts = rng.integers(10_000, 1_000_000, num_domains)
    names = [f"d{i:04}" for i in range(num_domains)]
    weights = rng.dirichlet(np.ones(num_domains))
    orders = [Order(0, name, np.full(count // 1000, 1000), 4096) for name, count in zip(names, counts)]
    sizes_of = {name: order.num_samples for name, order in zip(names, orders)}
    mixer = Mixer(sizes_of, weights=weights, batch_size=batch)
    steps = max(40_000 // batch, 20)
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            draws = mixer.next_batch()
            pairs = zip(draws.firsts.tolist(), draws.counts.tolist())
            np.concatenate([orders[d].take(first, n) for d, (first, n) in enumerate(pairs) if n])[draws.places]
        found.append((time.perf_counter() - began) / (steps * batch) * 1e6)
    return statistics.median(found)


def lag() -> int:
    """Return the batches between ``set_weights`` and the first one drawn by the new weights."""
    from mixer import MixtureLoader

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 2000)
        loader = MixtureLoader(Path(folder) / "mds", mixture=WEIGHTS, global_batch_size=16)
        batches = iter(loader)
        for _ in range(10):
            next(batches)
        loader.set_weights(dict.fromkeys(SHARES, 0.0) | {"c": 1.0})
        for number in range(100):
            if (next(batches)["domain_ids"] == 2).all():
                return number
    raise AssertionError("the new weights never came into force")


def error_of(name: str) -> float | None:
    package = ORDERS[name][1]
    python = interpreter(package)
    if python is None:
        return None
    command = [python, "-m", "benchmarks.mixing", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{name}: failed\n{done.stderr[-500:]}", file=sys.stderr)
        return None
    return float(lines[-1].removeprefix("RESULT "))


@click.command()
@click.option("--one", hidden=True)
def main(one: str | None) -> None:
    """Measure and print one table."""
    if one is not None:
        print(f"RESULT {worst_error(ORDERS[one][0]())}", flush=True)
        os._exit(0)
    errors = {name: error_of(name) for name in ORDERS}
    results: dict[str, Any] = {
        "error_samples": errors,
        "error_moving_weights_samples": ours_in_batches(),
        "planning_us": {"22 domains, batch 512": planning(22, 512), "1000 domains, batch 512": planning(1000, 512)},
        "lag_batches": lag(),
    }
    table = Table(title=f"following the weights, {DRAWS:,} draws")
    table.add_column("what", no_wrap=True)
    table.add_column("measured", justify="right")
    for name, error in errors.items():
        table.add_row(f"worst error at a prefix, samples: {name}", "–" if error is None else f"{error:,.1f}")
    table.add_row("the same, mixer, weights moving at every batch", f"{results['error_moving_weights_samples']:.2f}")
    for name, cost in results["planning_us"].items():
        table.add_row(f"planning, µs per draw: {name}", f"{cost:.2f}")
    table.add_row("batches from set_weights to the first drawn by them", str(results["lag_batches"]))
    Console(width=100).print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mixing.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
