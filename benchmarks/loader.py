"""How many samples a second does a loader deliver, in batches of (B, T), from four very imbalanced domains?

    python -m benchmarks.loader                     # 80 MB, batch 16, no worker processes
    python -m benchmarks.loader --full              # 819 MB: the size of the published table
    python -m benchmarks.loader --workers 0 --workers 2 --loader mixer --loader streaming

Domains hold 70 / 25 / 4.5 / 0.5 % of the samples (2,048 int32 tokens) and are drawn by 0.4 / 0.3 / 0.2 / 0.1. Every
loader reads its own best format, in a process of its own, page cache warm, one math thread; rounds go through all
loaders in turn, and the median is shown. A loader whose package is missing is named and left out. Ratios compare rows
of one run. Results also go to benchmarks/results/loader.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS

SEQ_LEN = 2048
SHARES = {"a": 0.70, "b": 0.25, "c": 0.045, "d": 0.005}
WEIGHTS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}


# --- data: the same rows as MDS (read by mixer and streaming) and as one .npy per domain ------------------------------


def sizes(num_samples: int) -> dict[str, int]:
    return {name: max(round(share * num_samples), 1) for name, share in SHARES.items()}


def write_data(folder: Path, num_samples: int) -> None:
    from mixer import mds

    for number, (name, count) in enumerate(sizes(num_samples).items()):
        rows = np.random.default_rng(number).integers(0, 50_000, (count, SEQ_LEN), np.int32)
        (folder / "npy").mkdir(exist_ok=True)
        np.save(folder / "npy" / f"{name}.npy", rows)
        out = folder / "mds" / name / "train"
        out.mkdir(parents=True)
        columns, entries = {"tokens": mds.token_encoding("int32", SEQ_LEN)}, []
        for shard, first in enumerate(range(0, count, 8000)):
            raw = mds.encode_shard(columns, rows[first : first + 8000], hashes=("xxh64",))
            basename = f"shard.{shard:05}.mds"
            (out / basename).write_bytes(raw)
            samples = min(8000, count - first)
            entries.append(mds.shard_entry(columns, basename, raw, num_samples=samples, hashes=("xxh64",)))
        mds.write_index(out, entries)


def tables(data: Path) -> list[np.ndarray]:
    return [np.load(data / "npy" / f"{name}.npy", mmap_mode="r") for name in SHARES]


def random_draws(lengths: list[int], batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (domains, rows) by the weights; the least that any mixing loader has to decide."""
    rng, chances = np.random.default_rng(0), list(WEIGHTS.values())
    while True:
        domains = rng.choice(len(lengths), batch, p=chances)
        yield domains, (rng.random(batch) * np.array(lengths)[domains]).astype(np.int64)


# --- loaders: folder, batch size, workers -> batches -----------------------------------------------------------------


def mixer(data: Path, batch: int, workers: int, **options: Any) -> Iterator[Any]:
    from mixer import MixtureLoader

    loader = MixtureLoader(data / "mds", mixture=WEIGHTS, global_batch_size=batch, num_workers=workers, **options)
    return iter(loader)


def mixer_stored(data: Path, batch: int, workers: int) -> Iterator[Any]:
    return mixer(data, batch, workers, dtype="stored")


def memmap_gather(data: Path, batch: int, workers: int) -> Iterator[Any]:
    """The limit: no mixing, no batches to decide on, just rows copied out of memory maps."""
    maps = tables(data)
    draws = random_draws([len(table) for table in maps], batch)
    planned = [next(draws) for _ in range(2000)]
    while True:
        for domains, rows in planned:
            out = np.empty((batch, SEQ_LEN), np.int32)
            for i, (domain, row) in enumerate(zip(domains.tolist(), rows.tolist())):
                out[i] = maps[domain][row]
            yield out


class _Rows:
    """Map-style rows of several memory maps, fetched a batch at a time."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.lengths = [len(table) for table in tables(data)]
        self.maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitems__(self, draws: list[tuple[int, int]]) -> Any:
        import torch

        self.maps = self.maps or tables(self.data)
        return torch.from_numpy(np.stack([self.maps[domain][row] for domain, row in draws]).astype(np.int64))


def memmap_dataloader(data: Path, batch: int, workers: int) -> Iterator[Any]:
    """Megatron-style: memory maps behind a plain DataLoader, weights fixed, order random with replacement."""
    from torch.utils.data import DataLoader

    dataset = _Rows(data)
    draws = random_draws(dataset.lengths, batch)
    batches = ([*zip(d.tolist(), r.tolist())] for d, r in draws)
    return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=lambda rows: rows, num_workers=workers))  # type: ignore[arg-type]


def streaming(data: Path, batch: int, workers: int) -> Iterator[Any]:
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [Stream(local=str(data / "mds" / n / "train"), proportion=w) for n, w in WEIGHTS.items()]
    dataset = StreamingDataset(streams=streams, batch_size=batch, shuffle=True)
    while True:
        yield from StreamingDataLoader(dataset, batch_size=batch, num_workers=workers)


def torchdata_nodes(data: Path, batch: int, workers: int) -> Iterator[Any]:
    import torch
    from torch.utils.data import RandomSampler
    from torchdata.nodes import Batcher, Loader, Mapper, MapStyleWrapper, MultiNodeWeightedSampler

    nodes = {}
    for name, table in zip(SHARES, tables(data)):
        nodes[name] = MapStyleWrapper(map_dataset=table, sampler=RandomSampler(table))
    mixed = MultiNodeWeightedSampler(nodes, WEIGHTS, stop_criteria="CYCLE_FOREVER")
    stack = Mapper(Batcher(mixed, batch), lambda rows: torch.from_numpy(np.stack(rows).astype(np.int64)))
    loader = Loader(stack)
    while True:
        yield from loader


def hugging_face(data: Path, batch: int, workers: int) -> Iterator[Any]:
    from datasets import Dataset, interleave_datasets
    from torch.utils.data import DataLoader

    parts = [Dataset.from_dict({"tokens": table}).with_format("torch") for table in tables(data)]
    mixed = interleave_datasets(parts, probabilities=list(WEIGHTS.values()), seed=0)
    while True:
        yield from DataLoader(mixed, batch_size=batch, num_workers=workers)


def _npy_rows(path: str) -> Iterator[Any]:
    import torch

    for row in np.load(path, mmap_mode="r"):
        yield torch.from_numpy(row.copy())


def litdata(data: Path, batch: int, workers: int) -> Iterator[Any]:
    """LitData's own chunks of tokens, combined by weight; it ends with its first domain and is begun again."""
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    parts = []
    for name in SHARES:
        out = data / "litdata" / name
        if not (out / "index.json").exists():
            source = [str(data / "npy" / f"{name}.npy")]
            optimize(_npy_rows, source, str(out), chunk_bytes="64MB", num_workers=1, item_loader=TokensLoader(SEQ_LEN))
        parts.append(StreamingDataset(str(out), item_loader=TokensLoader(SEQ_LEN), shuffle=True, drop_last=False))
    combined = CombinedStreamingDataset(parts, weights=list(WEIGHTS.values()), iterate_over_all=False, seed=0)
    while True:
        yield from StreamingDataLoader(combined, batch_size=batch, num_workers=workers)


LOADERS: dict[str, tuple[Callable[[Path, int, int], Iterator[Any]], str]] = {
    "mixer": (mixer, "mixer"),
    "mixer, stored dtype": (mixer_stored, "mixer"),
    "bare memmap gather": (memmap_gather, "numpy"),
    "memmap in a DataLoader": (memmap_dataloader, "torch"),
    "torchdata.nodes over memmaps": (torchdata_nodes, "torchdata"),
    "LitData combined": (litdata, "litdata"),
    "Hugging Face interleave": (hugging_face, "datasets"),
    "streaming": (streaming, "streaming"),
}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(name: str, data: Path, batch: int, workers: int, seconds: float) -> float:
    """Return samples per second of one loader, after a warm-up."""
    batches = LOADERS[name][0](data, batch, workers)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds / 3:
        next(batches)
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += 1
    return count * batch / passed


def in_own_process(name: str, data: Path, batch: int, workers: int, seconds: float) -> float | None:
    command = [sys.executable, "-m", "benchmarks.loader", "--one", name, "--data", str(data), "--batch", str(batch)]
    command += ["--workers", str(workers), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RATE ")]
    if done.returncode or not lines:
        print(f"{name}: failed\n{done.stderr[-500:]}", file=sys.stderr)
        return None
    return float(lines[-1].removeprefix("RATE "))


@click.command()
@click.option("--full", is_flag=True, help="819 MB instead of 80 MB.")
@click.option("--loader", "names", multiple=True, type=click.Choice(list(LOADERS)), help="Only these.  [default: all]")
@click.option("--workers", multiple=True, type=int, default=(0,), show_default=True, help="Worker processes.")
@click.option("--batch", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=1.5, show_default=True, help="Per measurement.")
@click.option("--one", hidden=True)
@click.option("--data", hidden=True, type=click.Path(path_type=Path))
def main(
    full: bool,
    names: tuple[str, ...],
    workers: tuple[int, ...],
    batch: int,
    rounds: int,
    seconds: float,
    one: str | None,
    data: Path | None,
) -> None:
    """Measure and print one table."""
    if one is not None and data is not None:
        print(f"RATE {measure(one, data, batch, workers[0], seconds)}", flush=True)
        os._exit(0)  # leave worker processes and background threads of any loader behind
    chosen = [name for name in names or LOADERS if importlib.util.find_spec(LOADERS[name][1]) is not None]
    missing = [f"{name} (needs {LOADERS[name][1]})" for name in names or LOADERS if name not in chosen]
    rates: dict[str, dict[int, list[float]]] = {name: {count: [] for count in workers} for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 100_000 if full else 10_000)
        for _ in range(rounds):
            for count in workers:
                for name in chosen:
                    rate = in_own_process(name, Path(folder), batch, count, seconds)
                    if rate is not None:
                        rates[name][count].append(rate)
    report(rates, {"full": full, "batch": batch, "rounds": rounds, "seq_len": SEQ_LEN}, missing)


def report(rates: dict[str, dict[int, list[float]]], setting: dict[str, Any], missing: list[str]) -> None:
    medians = {n: {w: statistics.median(v) for w, v in by.items() if v} for n, by in rates.items()}
    workers = sorted({count for by in medians.values() for count in by})
    table = Table(title=f"samples/s of {SEQ_LEN} tokens, batch {setting['batch']}, median of {setting['rounds']}")
    table.add_column("loader")
    for count in workers:
        table.add_column(f"{count} workers", justify="right")
        table.add_column("mixer ÷ it", justify="right")
    for name, by in medians.items():
        cells = []
        for count in workers:
            ours = medians.get("mixer", {}).get(count)
            cells.append(f"{by[count]:,.0f}" if count in by else "–")
            cells.append(f"{ours / by[count]:.2f}" if ours and count in by else "–")
        table.add_row(name, *cells)
    Console().print(table)
    if missing:
        print("not installed:", ", ".join(missing))
    RESULTS.mkdir(exist_ok=True)
    result = {"setting": setting, "samples_per_second": rates, "medians": medians, "not_installed": missing}
    (RESULTS / "loader.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
