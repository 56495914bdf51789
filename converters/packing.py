"""Streams of token ids -> samples -> shards.

All documents of one domain and one split, each with its end-of-text id, follow one another in input order; the stream
is cut into samples of ``seq_len``. So tokens in = seq_len x samples + dropped, per domain and split, and no shard
depends on how the input was cut into units or how many workers there were. Prefix sums over the units tell each shard
which documents it starts and ends in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.options import PackOptions
from converters.stage import UnitTable, load_table, unit_folder
from mixer.errors import DataError, InputError
from mixer.mds import compress, encode_shard, shard_entry, shard_overhead, token_encoding

__all__ = ["HeldOut", "PackTask", "SplitPlan", "choose_held_out", "pack_shard", "plan_splits"]

_HASHES = 1 << 64
_LARGEST_FLOOR = 0.1  # the floor for tiny domains never takes more than a tenth


@dataclass(frozen=True)
class HeldOut:
    """How a domain's validation split is cut.

    ``by`` is ``documents`` (text hash below ``threshold``), ``samples`` (the last samples) or ``nothing``.
    """

    by: str
    share: float = 0.0
    threshold: int = 0


class SplitPlan(NamedTuple):
    """One split of one domain: which part of which stream, and what it amounts to.

    ``units`` are the stream's tokens per unit; the split's samples start at token ``first`` of the stream.
    """

    domain: str
    split: str
    side: str
    threshold: int
    units: tuple[tuple[int, int], ...]
    first: int
    num_samples: int
    num_documents: int
    tokens_in: int
    dropped_tokens: int


class DomainPlan(NamedTuple):
    """What a domain holds, how it is split, and what is wrong with that (empty: nothing)."""

    domain: str
    held_out: HeldOut
    splits: tuple[SplitPlan, ...]
    documents: int
    text_bytes: int
    problem: str


# --- which documents are held out ----------------------------------------------------------------------------------


class _DomainSums:
    """Totals of a domain over all units, and what the choice of held-out documents needs."""

    def __init__(self, options: PackOptions) -> None:
        self.documents = self.tokens = self.text_bytes = self.below = 0
        self.smallest: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._options = options

    def add(self, documents: NDArray[Any]) -> None:
        self.documents += len(documents)
        self.tokens += int(documents["tokens"].sum())
        self.text_bytes += int(documents["bytes"].sum())
        self.below += int((documents["hash"] < np.uint64(int(self._options.held_out * _HASHES))).sum())
        both = np.union1d(self.smallest, documents["hash"].astype(np.uint64))
        self.smallest = both[: self._options.min_held_out]


def choose_held_out(documents: int, below: int, smallest: Sequence[int], options: PackOptions) -> HeldOut:
    """Return how a domain of this many documents is split.

    By documents if enough of them hash below the share; if a higher threshold is needed to reach ``min_held_out``, it
    may take up to a tenth of the documents; else by samples.

    Args:
        documents: in the domain.
        below: how many hash below ``options.held_out``.
        smallest: the ``min_held_out`` smallest distinct hashes, sorted.

    >>> choose_held_out(5000, 52, [1, 2, 3, 4, 5, 6, 7, 8], PackOptions(512, held_out=0.01)).by
    'documents'
    >>> choose_held_out(2, 0, [1, 2], PackOptions(512, held_out=0.01)).by
    'samples'
    """
    if options.held_out == 0:
        return HeldOut("nothing")
    threshold = int(options.held_out * _HASHES)
    if below >= options.min_held_out:
        return HeldOut("documents", options.held_out, threshold)
    if documents * _LARGEST_FLOOR >= options.min_held_out and len(smallest) == options.min_held_out:
        threshold = int(smallest[-1]) + 1
        return HeldOut("documents", options.min_held_out / documents, threshold)
    return HeldOut("samples")


def held_out_samples(num_samples: int, options: PackOptions) -> int:
    """Return how many of a domain's samples are held out where its documents are too few.

    >>> held_out_samples(1000, PackOptions(512, held_out=0.01)), held_out_samples(5, PackOptions(512))
    (10, 1)
    """
    wanted = max(round(options.held_out * num_samples), min(options.min_held_out, int(num_samples * _LARGEST_FLOOR)), 1)
    return min(wanted, max(num_samples - 1, 0))


def plan_splits(stage: str, units: Sequence[int], options: PackOptions) -> list[DomainPlan]:
    """Return the split plans of every domain, sorted by name. Reads the document tables of all units twice."""
    sums: dict[str, _DomainSums] = {}
    for unit in units:
        for name, documents in _by_domain(load_table(unit_folder(stage, unit))):
            sums.setdefault(name, _DomainSums(options)).add(documents)
    held_out = {
        name: choose_held_out(total.documents, total.below, total.smallest.tolist(), options)
        for name, total in sums.items()
    }
    streams: dict[tuple[str, str], _StreamSums] = {}
    for unit in units:
        for name, documents in _by_domain(load_table(unit_folder(stage, unit))):
            for side in _sides(held_out[name]):
                stream = streams.setdefault((name, side), _StreamSums())
                stream.add(unit, documents[_selected(documents, side, held_out[name].threshold)])
    return [_plan_domain(name, sums[name], held_out[name], streams, stage, options) for name in sorted(sums)]


def _by_domain(table: UnitTable) -> Iterator[tuple[str, NDArray[Any]]]:
    for number, name in enumerate(table.names):
        yield name, table.documents[table.domains == number]


def _sides(held_out: HeldOut) -> tuple[str, ...]:
    return ("above", "below") if held_out.by == "documents" else ("all",)


def _selected(documents: NDArray[Any], side: str, threshold: int) -> NDArray[np.bool_]:
    if side == "all":
        return np.ones(len(documents), np.bool_)
    below = documents["hash"] < np.uint64(min(threshold, _HASHES - 1))
    return below if side == "below" else ~below


class _StreamSums:
    def __init__(self) -> None:
        self.units: list[tuple[int, int]] = []
        self.documents = self.tokens = 0

    def add(self, unit: int, documents: NDArray[Any]) -> None:
        tokens = int(documents["tokens"].sum())
        self.documents += len(documents)
        self.tokens += tokens
        if tokens:
            self.units.append((unit, tokens))


def _plan_domain(
    name: str,
    sums: _DomainSums,
    held_out: HeldOut,
    streams: Mapping[tuple[str, str], _StreamSums],
    stage: str,
    options: PackOptions,
) -> DomainPlan:
    if held_out.by == "documents":
        splits = tuple(
            _whole_stream(name, split, side, held_out.threshold, streams[name, side], options.seq_len)
            for split, side in (("train", "above"), ("validation", "below"))
        )
        if splits[1].num_samples == 0 or splits[0].num_samples == 0:
            return _plan_domain(name, sums, HeldOut("samples"), _all_of(streams, name, stage), stage, options)
    elif held_out.by == "nothing":
        splits = (_whole_stream(name, "train", "all", 0, streams[name, "all"], options.seq_len),)
    else:
        splits = _tail_split(name, streams[name, "all"], stage, options)
        kept = sum(split.num_samples for split in splits)
        held_out = HeldOut("samples", splits[1].num_samples / kept if kept else 0.0)
    problem = _problem(name, splits, sums, options)
    return DomainPlan(name, held_out, splits, sums.documents, sums.text_bytes, problem)


def _whole_stream(
    name: str, split: str, side: str, threshold: int, stream: _StreamSums, seq_len: int
) -> SplitPlan:
    samples, dropped = divmod(stream.tokens, seq_len)
    units = tuple(stream.units)
    return SplitPlan(name, split, side, threshold, units, 0, samples, stream.documents, stream.tokens, dropped)


def _all_of(
    streams: Mapping[tuple[str, str], _StreamSums], name: str, stage: str
) -> dict[tuple[str, str], _StreamSums]:
    """Return the stream of all documents of a domain that was to be split by documents."""
    both = _StreamSums()
    for unit in sorted({unit for side in ("above", "below") for unit, _ in streams[name, side].units}):
        for domain, documents in _by_domain(load_table(unit_folder(stage, unit))):
            if domain == name:
                both.add(unit, documents)
    return {(name, "all"): both}


def _tail_split(name: str, stream: _StreamSums, stage: str, options: PackOptions) -> tuple[SplitPlan, SplitPlan]:
    """Cut the last samples off: one run of samples shares at most one document with training."""
    samples, dropped = divmod(stream.tokens, options.seq_len)
    held = held_out_samples(samples, options)
    cut = (samples - held) * options.seq_len
    before = _documents_starting_before(name, stream, stage, cut)
    units = tuple(stream.units)
    train = SplitPlan(name, "train", "all", 0, units, 0, samples - held, before, cut, 0)
    rest = stream.documents - before
    validation = SplitPlan(name, "validation", "all", 0, units, cut, held, rest, stream.tokens - cut, dropped)
    return train, validation


def _documents_starting_before(name: str, stream: _StreamSums, stage: str, token: int) -> int:
    count = at = 0
    for unit, tokens in stream.units:
        if at >= token:
            break
        table = load_table(unit_folder(stage, unit))
        documents = table.documents[table.domains == table.names.index(name)]
        starts = at + np.cumsum(documents["tokens"], dtype=np.int64) - documents["tokens"]
        count += int((starts < token).sum())
        at += tokens
    return count


def _problem(name: str, splits: Sequence[SplitPlan], sums: _DomainSums, options: PackOptions) -> str:
    empty = [split.split for split in splits if split.num_samples == 0]
    if not empty:
        return ""
    return (
        f"domain {name!r} has no {' and no '.join(empty)} sample: its {sums.documents:,} documents hold"
        f" {sums.tokens:,} tokens, and a sample takes {options.seq_len:,}"
        f" ({'two samples are' if options.held_out else 'one is'} needed). Lower --seq-len, add text, leave the domain"
        " out with --exclude, or accept it with --allow-empty."
    )


# --- shards --------------------------------------------------------------------------------------------------------


class PackTask(NamedTuple):
    """What a process needs to write one shard: its ranges are (unit, first token, end token) of the stream."""

    stage: str
    folder: str
    record: str
    number: int
    domain: str
    side: str
    threshold: int
    ranges: tuple[tuple[int, int, int], ...]
    num_samples: int
    dtype: str
    options: PackOptions


def samples_per_shard(dtype: str, options: PackOptions) -> int:
    """Return how many samples fill a shard of ``options.shard_bytes``, at least one."""
    columns = {"tokens": token_encoding(dtype, options.seq_len)}
    overhead = shard_overhead(columns, **options.shard_facts())
    return max(1, (options.shard_bytes - overhead) // (4 + options.seq_len * np.dtype(dtype).itemsize))


def pack_tasks(
    split: SplitPlan, *, stage: str, folder: Path, records: Path, dtype: str, options: PackOptions
) -> Iterator[PackTask]:
    """Yield one task per shard of a split."""
    per_shard = samples_per_shard(dtype, options)
    for number, start in enumerate(range(0, split.num_samples, per_shard)):
        count = min(per_shard, split.num_samples - start)
        first = split.first + start * options.seq_len
        ranges = tuple(_ranges(split.units, first, first + count * options.seq_len))
        record = str(records / f"{number:05d}.json")
        yield PackTask(
            stage, str(folder), record, number, split.domain, split.side, split.threshold, ranges, count, dtype, options
        )


def _ranges(units: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the part of every unit that tokens ``start`` to ``stop`` of the stream lie in.

    >>> list(_ranges([(0, 10), (2, 5), (3, 10)], 8, 16))
    [(0, 8, 10), (2, 0, 5), (3, 0, 1)]
    """
    at = 0
    for unit, tokens in units:
        low, high = max(start - at, 0), min(stop - at, tokens)
        if low < high:
            yield unit, low, high
        at += tokens
        if at >= stop:
            return


def pack_shard(task: PackTask) -> dict[str, Any]:
    """Write one shard and return its entry in ``index.json``. A finished shard is left as it is."""
    if (done := _finished(task)) is not None:
        return done
    options = task.options
    tokens = np.empty(task.num_samples * options.seq_len, task.dtype)
    at = 0
    for unit, start, stop in task.ranges:
        for part in _stream_slices(task, unit, start, stop):
            tokens[at : at + len(part)] = part
            at += len(part)
    if at != len(tokens):
        raise DataError(f"{task.stage} ends before shard {task.number} of {task.domain!r} is full. Run with --fresh.")
    columns = {"tokens": token_encoding(task.dtype, options.seq_len)}
    how: dict[str, Any] = options.shard_facts()
    raw = encode_shard(columns, tokens.reshape(task.num_samples, options.seq_len), **how)
    zipped = compress(options.compression, raw) if options.compression else None
    entry = shard_entry(
        columns, f"shard.{task.number:05d}.mds", raw, num_samples=task.num_samples, zipped=zipped, **how
    )
    _write(shard_path(task.folder, entry), raw if zipped is None else zipped)
    _write(Path(task.record), orjson.dumps(entry))
    return entry


def shard_path(folder: str | os.PathLike[str], entry: Mapping[str, Any]) -> Path:
    """Return the file that an index entry describes."""
    return Path(folder) / (entry["zip_data"] or entry["raw_data"])["basename"]


def _finished(task: PackTask) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(Path(task.record).read_bytes())
        size = os.path.getsize(shard_path(task.folder, entry))
    except FileNotFoundError:
        return None
    return entry if size == (entry["zip_data"] or entry["raw_data"])["bytes"] else None


def _stream_slices(task: PackTask, unit: int, start: int, stop: int) -> Iterator[NDArray[Any]]:
    """Yield the ids ``start`` to ``stop`` of what a unit adds to the stream, as slices of its memory-mapped file."""
    folder = unit_folder(task.stage, unit)
    table = load_table(folder)
    ids = np.memmap(folder / "tokens.bin", task.dtype, "r")
    if len(ids) != table.starts[-1]:
        raise DataError(f"{folder} holds {len(ids):,} tokens, expected {table.starts[-1]:,}. Run with --fresh.")
    chosen = (table.domains == table.names.index(task.domain)) & _selected(table.documents, task.side, task.threshold)
    at = 0
    for first, last in _runs(chosen):
        low, high = int(table.starts[first]), int(table.starts[last])
        begin, end = max(start - at, 0), min(stop - at, high - low)
        if begin < end:
            yield ids[low + begin : low + end]
        at += high - low
        if at >= stop:
            return


def _runs(chosen: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of every run of True.

    >>> [(int(a), int(b)) for a, b in _runs(np.array([True, True, False, True]))]
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    yield from zip(edges[::2], edges[1::2])


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check_accounting(split: SplitPlan, entries: Sequence[Mapping[str, Any]], seq_len: int) -> None:
    """Raise DataError unless tokens in = seq_len x samples + dropped, with the samples that were written."""
    written = sum(entry["samples"] for entry in entries)
    if split.tokens_in != seq_len * written + split.dropped_tokens:
        raise DataError(
            f"domain {split.domain!r}, {split.split}: {split.tokens_in:,} tokens came in, but {written:,} samples of"
            f" {seq_len:,} and {split.dropped_tokens:,} dropped went out. This is a bug; please report it."
        )


def require_samples(plans: Sequence[DomainPlan], options: PackOptions) -> list[str]:
    """Return the problems as warnings if they are allowed, else raise the first of them."""
    problems = [plan.problem for plan in plans if plan.problem]
    if problems and not options.allow_empty:
        raise InputError(problems[0] + (f" ({len(problems) - 1} more domains like this.)" if len(problems) > 1 else ""))
    return problems
