"""The loaders we are measured against, each reading its own best format with its own best settings.

    python -m benchmarks.peers      # makes .venv-bench beside .venv: it sees .venv's packages, and adds the peers'

A peer whose package is found in neither is named in the tables and left out. Every loader is a function of (data
folder, batch size, worker processes) that yields batches for ever; ``workers`` are theirs, and what a peer does with
them is said at its function.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEQ_LEN = 2048
SHARES = {"a": 0.70, "b": 0.25, "c": 0.045, "d": 0.005}
WEIGHTS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
VENV = Path(__file__).resolve().parents[1] / ".venv-bench"
PACKAGES = (
    "litdata>=0.2.50,<0.3",
    "torchdata>=0.11,<0.12",
    "grain>=0.2.10,<0.3",
    "datasets>=4,<5",
    "huggingface-hub<1",  # transformers, which llm-foundry imports, asks for it
)
FOUNDRY = "llm-foundry==0.22.0"  # for benchmarks.conversion; without what it needs to train

Batches = Iterator[Any]


# --- data: the same rows in every format -----------------------------------------------------------------------------


def sizes(num_samples: int) -> dict[str, int]:
    return {name: max(round(share * num_samples), 1) for name, share in SHARES.items()}


def write_data(folder: Path, num_samples: int) -> None:
    """Write int32 rows as one .npy per domain and as MDS; the other formats are made from them by their own tools."""
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


# --- ours ------------------------------------------------------------------------------------------------------------


def mixer(data: Path, batch: int, workers: int, **options: Any) -> Batches:
    """Reads in the training process whatever ``workers`` are: without code of the user's there is nothing for them."""
    from mixer import MixtureLoader

    loader = MixtureLoader(data / "mds", mixture=WEIGHTS, global_batch_size=batch, num_workers=workers, **options)
    return iter(loader)


def mixer_stored(data: Path, batch: int, workers: int) -> Batches:
    return mixer(data, batch, workers, dtype="stored")


def _as_it_is(batch: Any) -> Any:
    return batch


def mixer_transform(data: Path, batch: int, workers: int) -> Batches:
    """With a transform of the user's, which runs in the worker processes."""
    return mixer(data, batch, workers, dtype="stored", transform=_as_it_is)


# --- memory maps -----------------------------------------------------------------------------------------------------


def memmap_gather(data: Path, batch: int, workers: int) -> Batches:
    """The limit: no mixing, no batches to decide on, just rows copied out of memory maps, in the stored dtype."""
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


def memmap_dataloader(data: Path, batch: int, workers: int) -> Batches:
    """Memory maps behind a DataLoader that fetches whole batches: weights fixed, order random with replacement."""
    from torch.utils.data import DataLoader

    dataset = _Rows(data)
    draws = random_draws(dataset.lengths, batch)
    batches = ([*zip(d.tolist(), r.tolist())] for d, r in draws)
    return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers))  # type: ignore[arg-type]


class _Blend:
    """As Megatron-core blends: which domain and which of its samples is looked up in two tables made beforehand."""

    def __init__(self, data: Path, count: int = 200_000) -> None:
        self.data, self.maps = data, None
        lengths, weights = [len(table) for table in tables(data)], np.array(list(WEIGHTS.values()))
        self.domains, self.rows = np.zeros(count, np.int16), np.zeros(count, np.int64)
        orders = [np.random.default_rng(d).permutation(length) for d, length in enumerate(lengths)]
        taken = np.zeros(len(lengths), np.int64)
        for i in range(count):  # the domain that is furthest behind its share
            d = int(np.argmax(weights * (i + 1) - taken))
            self.domains[i], self.rows[i] = d, orders[d][taken[d] % lengths[d]]
            taken[d] += 1

    def __len__(self) -> int:
        return len(self.domains)

    def __getitem__(self, i: int) -> Any:
        import torch

        if self.maps is None:
            self.maps = tables(self.data)  # type: ignore[assignment]
        row = self.maps[self.domains[i]][self.rows[i]]  # type: ignore[index]
        return {"text": torch.from_numpy(row.astype(np.int64))}


def megatron(data: Path, batch: int, workers: int) -> Batches:
    from torch.utils.data import DataLoader

    dataset: Any = _Blend(data)
    while True:
        yield from DataLoader(dataset, batch_size=batch, num_workers=workers, prefetch_factor=8 if workers else None)


# --- other loaders ---------------------------------------------------------------------------------------------------


def streaming(data: Path, batch: int, workers: int) -> Batches:
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [Stream(local=str(data / "mds" / n / "train"), proportion=w) for n, w in WEIGHTS.items()]
    dataset = StreamingDataset(streams=streams, batch_size=batch, shuffle=True)
    while True:
        yield from StreamingDataLoader(dataset, batch_size=batch, num_workers=workers)


def _stacked(rows: list[np.ndarray]) -> Any:
    import torch

    return torch.from_numpy(np.stack(rows).astype(np.int64))


def torchdata_nodes(data: Path, batch: int, workers: int) -> Batches:
    """Nodes give rows of memory maps, which are read where they are stacked: in threads, faster here than processes."""
    from torch.utils.data import RandomSampler
    from torchdata.nodes import Batcher, Loader, Mapper, MapStyleWrapper, MultiNodeWeightedSampler, ParallelMapper

    maps = zip(SHARES, tables(data))
    nodes = {name: MapStyleWrapper(map_dataset=table, sampler=RandomSampler(table)) for name, table in maps}
    batches = Batcher(MultiNodeWeightedSampler(nodes, WEIGHTS, stop_criteria="CYCLE_FOREVER"), batch)
    parallel = {"num_workers": workers, "method": "thread", "snapshot_frequency": 1000}
    loader = Loader(ParallelMapper(batches, _stacked, **parallel) if workers else Mapper(batches, _stacked))
    while True:
        yield from loader


class _Source:
    """A memory map as Grain wants it; opened where it is read, so that processes share it."""

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, len(np.load(path, mmap_mode="r"))
        self.table: np.ndarray | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Any:
        if self.table is None:
            self.table = np.load(self.path, mmap_mode="r")
        return self.table[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "table": None}


def _int64(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.int64)


def grain(data: Path, batch: int, workers: int) -> Batches:
    """Without processes it reads in place: its threads are slower for rows that are in the page cache."""
    import grain.python as pygrain

    sources = [pygrain.MapDataset.source(_Source(data / "npy" / f"{name}.npy")) for name in SHARES]
    parts = [source.shuffle(seed=number).repeat() for number, source in enumerate(sources)]
    mixed = pygrain.MapDataset.mix(parts, weights=list(WEIGHTS.values())).batch(batch).map(_int64)
    read = mixed.to_iter_dataset(pygrain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        from absl import flags

        flags.FLAGS(["benchmark"])  # its processes ask for parsed flags
        read = read.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=8))
    return iter(read)


def hugging_face(data: Path, batch: int, workers: int) -> Batches:
    """Arrow on disk, memory-mapped, interleaved by an index, read a batch at a time."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets, interleave_datasets, load_from_disk
    from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

    parts = []
    for name, table in zip(SHARES, tables(data)):
        out = data / "arrow" / name
        if not out.exists():
            rows = [
                pa.FixedSizeListArray.from_arrays(
                    pa.array(np.asarray(table[first : first + 5000]).reshape(-1)), SEQ_LEN
                )
                for first in range(0, len(table), 5000)
            ]
            concatenate_datasets([Dataset(pa.table({"tokens": part})) for part in rows]).save_to_disk(str(out))
        parts.append(load_from_disk(str(out)))
    mixed = interleave_datasets(
        parts, probabilities=list(WEIGHTS.values()), seed=0, stopping_strategy="all_exhausted"
    ).with_format("torch")
    sampler = BatchSampler(SequentialSampler(mixed), batch, drop_last=True)
    while True:
        yield from DataLoader(mixed, sampler=sampler, batch_size=None, num_workers=workers)


def _npy_rows(path: str) -> Iterator[Any]:
    import torch

    for row in np.load(path, mmap_mode="r"):
        yield torch.from_numpy(row.copy())


def litdata(data: Path, batch: int, workers: int) -> Batches:
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


class Loader(NamedTuple):
    batches: Callable[[Path, int, int], Batches]
    package: str
    workers: tuple[int, ...] = (0, 1, 2)  # numbers of worker processes that mean anything to it


OURS = "mixer"
LOADERS = {
    OURS: Loader(mixer, "mixer"),
    "mixer, stored dtype": Loader(mixer_stored, "mixer", (0,)),  # workers change nothing for it
    "mixer, transform in workers": Loader(mixer_transform, "mixer"),
    "bare memmap gather": Loader(memmap_gather, "numpy", (0,)),
    "memmap in a DataLoader": Loader(memmap_dataloader, "torch"),
    "torchdata.nodes": Loader(torchdata_nodes, "torchdata"),
    "LitData": Loader(litdata, "litdata"),
    "Grain": Loader(grain, "grain"),
    "Hugging Face datasets": Loader(hugging_face, "datasets"),
    "Megatron-style blend": Loader(megatron, "torch"),
    "mosaicml-streaming": Loader(streaming, "streaming"),
}


@cache
def interpreter(package: str) -> str | None:
    """Return the Python that has a package: this one, else that of .venv-bench; None where neither has it."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    python = VENV / "bin" / "python"
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    if python.exists() and subprocess.run([python, "-c", code], cwd="/", check=False).returncode == 0:
        return str(python)
    return None


def install() -> None:
    """Make .venv-bench: a venv that reads this one's packages, and has the peers' beside them."""
    import venv

    venv.create(VENV, with_pip=False, symlinks=True, clear=True)
    site = next(VENV.glob("lib/python*/site-packages"))
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--prefix", str(VENV), *PACKAGES], check=True)
    subprocess.run([*command, "--prefix", str(VENV), "--no-deps", FOUNDRY], check=True)


if __name__ == "__main__":
    install()
