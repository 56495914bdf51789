"""Streams of token ids -> samples -> shards.

``concat`` cuts the stream of all documents, each with its end-of-text id, every ``seq_len`` tokens; ``best_fit`` cuts
no document that fits into a sample. Either way tokens in = seq_len x samples - padding + dropped, per domain and split,
and no shard depends on how the input was cut into units or how many workers there were: prefix sums over the units
tell each shard which tokens are its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.options import PackOptions
from converters.splits import SplitPlan
from converters.streams import Stream, unit_ranges
from mixer.errors import DataError
from mixer.mds import compress, encode_shard, shard_entry, shard_overhead, token_encoding

__all__ = ["PackTask", "check_accounting", "pack_shard", "pack_tasks", "shard_path"]

DOC_STARTS = "doc_starts"


class PackTask(NamedTuple):
    """What a process needs to write one shard; ``stream`` holds only the units from which it is filled.

    ``first_token`` is where the shard starts in that stream; with a layout, ``first_sample`` counts its samples.
    """

    stream: Stream
    first_token: int
    layout: str | None
    first_sample: int
    num_samples: int
    folder: str
    record: str
    number: int
    dtype: str
    eos_id: int
    options: PackOptions


def shard_columns(dtype: str, options: PackOptions) -> dict[str, str]:
    """Return name -> MDS encoding."""
    columns = {"tokens": token_encoding(dtype, options.seq_len)}
    return {**columns, DOC_STARTS: f"ndarray:{_starts_dtype(options)}"} if options.doc_starts else columns


def _starts_dtype(options: PackOptions) -> str:
    return "uint16" if options.seq_len <= 1 << 16 else "uint32"


def samples_per_shard(dtype: str, options: PackOptions) -> int:
    """Return how many samples fill a shard of ``options.shard_bytes`` (document starts not counted), at least one."""
    overhead = shard_overhead(shard_columns(dtype, options), **options.shard_facts())
    return max(1, (options.shard_bytes - overhead) // (4 + options.seq_len * np.dtype(dtype).itemsize))


def pack_tasks(
    split: SplitPlan,
    *,
    folder: Path,
    records: Path,
    dtype: str,
    eos_id: int,
    options: PackOptions,
    first_number: int = 0,
) -> Iterator[PackTask]:
    """Yield one task per shard of a split; the shards are numbered from ``first_number``."""
    per_shard = samples_per_shard(dtype, options)
    for number, start in enumerate(range(0, split.num_samples, per_shard), start=first_number):
        count = min(per_shard, split.num_samples - start)
        first = split.first_sample + start
        stream, token = _needed(split, first, count, options)
        yield PackTask(
            stream, token, split.layout, first, count, str(folder), str(records / f"{number:05d}.json"), number,
            dtype, eos_id, options,
        )  # fmt: skip


def _needed(split: SplitPlan, first: int, count: int, options: PackOptions) -> tuple[Stream, int]:
    """Return the stream cut to the units that a shard reads, and where the shard starts in it."""
    if split.layout is not None:
        return split.stream, 0
    token = first * options.seq_len
    used = {unit for unit, _, _ in unit_ranges(split.stream.units, token, token + count * options.seq_len)}
    at = 0
    for unit, tokens in split.stream.units:
        if unit in used:
            break
        at += tokens
    units = tuple(row for row in split.stream.units if row[0] in used)
    return split.stream._replace(units=units), token - at


def pack_shard(task: PackTask) -> dict[str, Any]:
    """Write one shard and return its entry in ``index.json``. A finished shard is left as it is."""
    if (done := _finished(task)) is not None:
        return done
    options = task.options
    rows, used = _even_rows(task) if task.layout is None else _laid_out_rows(task)
    columns = shard_columns(task.dtype, options)
    values: Any = {"tokens": rows, DOC_STARTS: _doc_starts(task, rows, used)} if options.doc_starts else rows
    raw = encode_shard(columns, values, **options.shard_facts())
    zipped = compress(options.compression, raw) if options.compression else None
    entry = shard_entry(
        columns, f"shard.{task.number:05d}.mds", raw, num_samples=len(rows), zipped=zipped, **options.shard_facts()
    )
    _write(shard_path(task.folder, entry), raw if zipped is None else zipped)
    _write(Path(task.record), orjson.dumps(entry))
    return entry


def _even_rows(task: PackTask) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return samples (n, T) cut evenly from the stream, and how many tokens of each are not padding."""
    seq_len = task.options.seq_len
    tokens = np.empty(task.num_samples * seq_len, task.dtype)
    at = 0
    for unit, start, stop in unit_ranges(task.stream.units, task.first_token, task.first_token + len(tokens)):
        for part in task.stream.slices(unit, start, stop, task.dtype):
            tokens[at : at + len(part)] = part
            at += len(part)
    missing = len(tokens) - at
    if missing and (task.options.tail != "pad" or missing >= seq_len):
        raise DataError(
            f"{task.stream.stage} ends before shard {task.number} of {task.stream.domain!r} is full. Run with --fresh."
        )
    tokens[at:] = task.eos_id
    used = np.full(task.num_samples, seq_len)
    used[-1] -= missing
    return tokens.reshape(task.num_samples, seq_len), used


def _laid_out_rows(task: PackTask) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return samples (n, T) put together by the layout, and how many tokens of each are not padding."""
    with np.load(str(task.layout)) as layout:
        first = layout["first"][task.first_sample : task.first_sample + task.num_samples + 1]
        start, length = (layout[name][first[0] : first[-1]] for name in ("start", "length"))
    sample = np.repeat(np.arange(task.num_samples), np.diff(first))
    ends = np.cumsum(length)
    at = ends - length - np.concatenate(([0], ends))[(first - first[0])[sample]]  # where in its sample a piece goes
    rows = np.full((task.num_samples, task.options.seq_len), task.eos_id, task.dtype)
    low = 0
    for unit, tokens in task.stream.units:
        pieces = np.flatnonzero((start >= low) & (start < low + tokens))
        if len(pieces):
            stream = np.concatenate(list(task.stream.slices(unit, 0, tokens, task.dtype)))
            for piece in pieces.tolist():
                source = int(start[piece]) - low
                count, where = int(length[piece]), int(at[piece])
                rows[sample[piece], where : where + count] = stream[source : source + count]
        low += tokens
    used = np.bincount(sample, length, task.num_samples).astype(np.int64)
    return rows, used


def _doc_starts(task: PackTask, rows: NDArray[Any], used: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return where documents (and the padding) start in each sample; always with the leading 0."""
    dtype = _starts_dtype(task.options)
    starts = []
    for row, count in zip(rows, used.tolist()):
        ends = np.flatnonzero(row[:count] == task.eos_id) + 1
        starts.append(np.concatenate(([0], ends[ends < len(row)])).astype(dtype))
    return starts


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


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check_accounting(split: SplitPlan, entries: Sequence[Mapping[str, Any]], seq_len: int) -> None:
    """Raise DataError unless tokens in = seq_len x samples - padding + dropped, with the samples that were written."""
    written = sum(entry["samples"] for entry in entries)
    if split.tokens_in != seq_len * written - split.padding_tokens + split.dropped_tokens:
        raise DataError(
            f"domain {split.domain!r}, {split.split}: {split.tokens_in:,} tokens came in, but {written:,} samples of"
            f" {seq_len:,}, {split.padding_tokens:,} of them padding, and {split.dropped_tokens:,} dropped went out."
            " This is a bug; please report it."
        )
