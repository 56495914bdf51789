"""Streams of token ids -> samples -> shards.

``concat`` cuts the stream of all documents, each with its end-of-text id, every ``seq_len`` tokens; ``best_fit`` cuts
no document that fits into a sample; ``none`` makes each document a sample of its own length (a longer one several).
Either way tokens in = tokens in samples - padding + dropped, per domain and split, and no shard depends on how the
input was cut into units or how many workers there were: prefix sums tell each shard which tokens are its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.best_fit import load_layouts
from converters.locations import Location, location, size_of, write_whole
from converters.options import PackOptions
from converters.shuffling import Shuffled
from converters.splits import SplitPlan, samples_of
from converters.streams import Stream
from converters.tokenizers import forget_encoders
from mixer.errors import DataError, InputError
from mixer.mds import Ragged, compress, empty_shard, shard_buffer, shard_entry, shard_overhead, token_encoding

__all__ = ["PackTask", "check_accounting", "pack_shard", "pack_tasks", "read_record", "require_room", "shard_path"]

DOC_STARTS, SAMPLE_ID = "doc_starts", "sample_id"


class PackTask(NamedTuple):
    """What a process needs to write one shard; ``stream`` holds only the documents from which it is filled.

    ``first_token`` is where the shard starts in that stream, and ``num_tokens`` how many it takes. With a layout, which
    counts tokens of the whole stream and samples from ``first_sample`` on, it is how many of those come before.
    ``first_id`` is the number of its first sample in domain and split.
    """

    stream: Stream | Shuffled
    first_token: int
    num_tokens: int
    layout: str | None
    first_sample: int
    num_samples: int
    first_id: int
    folder: str
    record: str
    number: int
    dtype: str
    eos_id: int
    options: PackOptions

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"shard {self.number} of {self.folder}"

    @property
    def size(self) -> int:
        """How much work it is, compared with others."""
        return self.num_tokens


def shard_columns(dtype: str, options: PackOptions) -> dict[str, str]:
    """Return name -> MDS encoding."""
    varies = options.packing == "none"
    columns = {"tokens": f"ndarray:{dtype}" if varies else token_encoding(dtype, options.seq_len)}
    if options.doc_starts:
        columns[DOC_STARTS] = f"ndarray:{_starts_dtype(options)}"
    if options.sample_ids:
        columns[SAMPLE_ID] = "uint64"
    return columns


def _starts_dtype(options: PackOptions) -> str:
    return "uint16" if options.seq_len <= 1 << 16 else "uint32"


# --- which samples go into which shard -----------------------------------------------------------------------------


def pack_tasks(
    split: SplitPlan,
    *,
    folder: Location,
    records: Location,
    dtype: str,
    eos_id: int,
    options: PackOptions,
    first_number: int = 0,
    first_id: int = 0,
) -> Iterator[PackTask]:
    """Yield one task per shard of a split; shards are numbered from ``first_number``, samples from ``first_id``."""
    cut = _varying_shards if options.packing == "none" else _even_shards
    done = 0
    for number, (count, token, num_tokens) in enumerate(cut(split, dtype, options), start=first_number):
        stream: Stream | Shuffled
        if split.layout is None:
            stream, token = split.stream.part(token, token + num_tokens)
        else:
            start = split.first_sample + done
            ranges = [
                (int(layout.start.min()), int((layout.start + layout.length).max()))
                for layout in load_layouts(split.layout, start, start + count)
            ]
            first, last = min(low for low, _ in ranges), max(high for _, high in ranges)
            stream, within = split.stream.part(first, last)
            token = first - within
        yield PackTask(
            stream, token, num_tokens, split.layout, split.first_sample + done, count, first_id + done, str(folder),
            str(records / f"{number:05d}.json"), number, dtype, eos_id, options,
        )  # fmt: skip
        done += count


def samples_per_shard(dtype: str, options: PackOptions) -> int:
    """Return how many samples fill a shard of ``options.shard_bytes`` (document starts not counted), at least one."""
    overhead, size = _sizes(dtype, options, options.seq_len)
    return max(1, (options.shard_bytes - overhead) // size)


def _sizes(dtype: str, options: PackOptions, num_tokens: int) -> tuple[int, int]:
    """Return the bytes of a shard without samples, and of a sample of so many tokens."""
    columns = shard_columns(dtype, options)
    overhead = shard_overhead(columns, **options.shard_facts())
    return overhead, 4 + num_tokens * np.dtype(dtype).itemsize + (8 if SAMPLE_ID in columns else 0)


def require_room(dtype: str, options: PackOptions, max_record_bytes: int) -> None:
    """Raise InputError if a shard has no room for one sample; without packing, for that of the longest document."""
    longest = min(options.seq_len, max_record_bytes + 1) if options.packing == "none" else options.seq_len
    least = sum(_sizes(dtype, options, longest))
    if options.shard_bytes < least:
        raise InputError(
            f"shard_size {options.shard_bytes:,} bytes is less than one sample of {longest:,} tokens, which takes"
            f" {least:,} with the header. Raise --shard-size (64MiB is usual), or lower --seq-len."
        )


def _even_shards(split: SplitPlan, dtype: str, options: PackOptions) -> Iterator[tuple[int, int, int]]:
    """Yield samples, first token and tokens of each shard of samples of one length."""
    per_shard, seq_len = samples_per_shard(dtype, options), options.seq_len
    for start in range(0, split.num_samples, per_shard):
        count = min(per_shard, split.num_samples - start)
        yield count, (split.first_sample + start) * seq_len, count * seq_len


def _varying_shards(split: SplitPlan, dtype: str, options: PackOptions) -> Iterator[tuple[int, int, int]]:
    """Yield samples, first token and tokens of each shard of samples of their own lengths, as ``MDSWriter`` cuts."""
    columns = shard_columns(dtype, options)
    room = max(1, options.shard_bytes - shard_overhead(columns, **options.shard_facts()))
    fixed = 8 + (8 if SAMPLE_ID in columns else 0)  # its offset, the size of its tokens, its number
    if options.doc_starts:
        fixed += 6 + np.dtype(_starts_dtype(options)).itemsize
    token, count, tokens, size = split.first_token, 0, 0, 0
    stop = split.first_token + split.num_tokens
    for lengths in split.stream.document_lengths(split.first_token, stop):
        samples = _sample_lengths(lengths, options.seq_len)
        sizes = fixed + 1 + _shape_bytes(samples) + samples * np.dtype(dtype).itemsize
        ends, token_ends = np.cumsum(sizes), np.cumsum(samples)
        at = base = token_base = 0
        while at < len(samples):
            fitting = int(ends.searchsorted(base + room - size, "right"))
            fitting = max(fitting, at + (count == 0))
            if fitting > at:
                count, tokens = count + fitting - at, tokens + int(token_ends[fitting - 1]) - token_base
                size += int(ends[fitting - 1]) - base
                at, base, token_base = fitting, int(ends[fitting - 1]), int(token_ends[fitting - 1])
            if at < len(samples):
                yield count, token, tokens
                token, count, tokens, size = token + tokens, 0, 0, 0
    if count:
        yield count, token, tokens


def _sample_lengths(lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Return the tokens of each sample if each document begins a new one.

    >>> _sample_lengths(np.array([3, 9, 8]), 4).tolist()
    [3, 4, 4, 1, 4, 4]
    """
    counts = samples_of(lengths, seq_len)
    samples = np.full(int(counts.sum()), seq_len, np.int64)
    samples[np.cumsum(counts) - 1] = lengths - (counts - 1) * seq_len
    return samples


def _shape_bytes(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many bytes MDS takes for these lengths."""
    return np.where(lengths < 1 << 8, 1, np.where(lengths < 1 << 16, 2, 4))


# --- one shard -----------------------------------------------------------------------------------------------------


def pack_shard(task: PackTask) -> dict[str, Any]:
    """Write one shard; return its ``samples``, ``tokens`` (padding too) and its ``entry`` in ``index.json``.

    A finished shard is left as it is.
    """
    if (done := _finished(task)) is not None:
        return done
    forget_encoders()  # or the memory of both would add up
    options, columns = task.options, shard_columns(task.dtype, task.options)
    raw, tokens = _encoded(task, columns)
    zipped = compress(options.compression, raw) if options.compression else None
    entry = shard_entry(
        columns, f"shard.{task.number:05d}.mds", raw, num_samples=task.num_samples, zipped=zipped,
        **options.shard_facts(),
    )  # fmt: skip
    write_whole(shard_path(task.folder, entry), raw if zipped is None else zipped)
    record = {"samples": task.num_samples, "tokens": tokens, "entry": entry}
    write_whole(location(task.record), orjson.dumps(record))
    return record


def _encoded(task: PackTask, columns: Mapping[str, str]) -> tuple[bytearray | memoryview, int]:
    """Return the raw bytes of the shard, and how many tokens are in it."""
    options = task.options
    if columns.keys() == {"tokens"} and options.packing != "none":
        shard, samples = empty_shard(columns, task.num_samples, **options.shard_facts())
        _fill(task, samples.reshape(-1))
        return shard, samples.size
    tokens = 0

    def chunks() -> Iterator[dict[str, Any]]:
        nonlocal tokens
        number = task.first_id
        for rows, used in _varying_rows(task) if options.packing == "none" else _even_rows(task):
            values: dict[str, Any] = {}
            values["tokens"] = rows if options.packing == "none" else rows.values.reshape(len(rows), -1)
            if options.doc_starts:
                values[DOC_STARTS] = _doc_starts(rows, used, task.eos_id, _starts_dtype(options))
            if options.sample_ids:
                values[SAMPLE_ID] = np.arange(number, number + len(rows), dtype=np.uint64)
            number += len(rows)
            tokens += len(rows.values)
            yield values

    return shard_buffer(columns, task.num_samples, chunks(), **options.shard_facts()), tokens


# Of a shard's samples, so that it is not in memory twice.
_CHUNK_TOKENS = 4 << 20
_Rows = tuple[Ragged, NDArray[np.int64]]  # samples, and how many tokens of each are not padding


def _even_rows(task: PackTask) -> Iterator[_Rows]:
    """Yield samples of one length, some at a time."""
    seq_len = task.options.seq_len
    most = max(1, _CHUNK_TOKENS // seq_len)
    for first in range(0, task.num_samples, most):
        count = min(most, task.num_samples - first)
        some = task._replace(
            first_token=task.first_token + (0 if task.layout else first * seq_len),
            first_sample=task.first_sample + first,
            num_samples=count,
        )
        tokens = np.empty(count * seq_len, task.dtype)
        is_last = first + count == task.num_samples
        yield Ragged(tokens, np.full(count, seq_len)), _fill(some, tokens, is_last)


def _fill(task: PackTask, tokens: NDArray[Any], is_last: bool = True) -> NDArray[np.int64]:
    """Write the samples, one after another; return how many tokens of each are not padding."""
    return _fill_by_layout(task, tokens) if task.layout else _fill_evenly(task, tokens, is_last)


def _fill_evenly(task: PackTask, tokens: NDArray[Any], is_last: bool) -> NDArray[np.int64]:
    """Write samples cut evenly from the stream, of which the last of all may be padded."""
    seq_len = task.options.seq_len
    at = task.stream.copy(tokens, task.first_token)
    missing = len(tokens) - at
    if missing and (task.options.tail != "pad" or missing >= seq_len or not is_last):
        raise _ends_early(task)
    tokens[at:] = task.eos_id
    used = np.full(task.num_samples, seq_len)
    used[-1] -= missing
    return used


def _varying_rows(task: PackTask) -> Iterator[_Rows]:
    """Yield samples of their own lengths, which follow one another in the stream, some at a time."""
    at, samples = task.first_token, 0
    for documents in task.stream.document_lengths(at, at + task.num_tokens):
        lengths = _sample_lengths(documents, task.options.seq_len)
        ends = np.cumsum(lengths)
        cuts = ends.searchsorted(np.arange(_CHUNK_TOKENS, int(lengths.sum()), _CHUNK_TOKENS), "right")
        for some in np.split(lengths, np.unique(cuts[cuts > 0])):
            tokens = np.empty(int(some.sum()), task.dtype)
            if task.stream.copy(tokens, at) != len(tokens):
                raise _ends_early(task)
            at, samples = at + len(tokens), samples + len(some)
            yield Ragged(tokens, some), some
    if at != task.first_token + task.num_tokens or samples != task.num_samples:
        raise _ends_early(task)


def _fill_by_layout(task: PackTask, tokens: NDArray[Any]) -> NDArray[np.int64]:
    """Write samples put together by the layout."""
    seq_len = task.options.seq_len
    tokens[:] = task.eos_id
    used = [np.empty(0, np.int64)]
    first = 0
    for layout in load_layouts(str(task.layout), task.first_sample, task.first_sample + task.num_samples):
        sample = np.repeat(np.arange(first, first + layout.num_samples), np.diff(layout.first))
        before = np.cumsum(layout.length) - layout.length
        in_sample = before - before[layout.first[:-1]][sample - first]  # where in its sample a piece goes
        task.stream.copy_pieces(tokens, layout.start - task.first_token, layout.length, sample * seq_len + in_sample)
        used.append(np.bincount(sample - first, layout.length, layout.num_samples).astype(np.int64))
        first += layout.num_samples
    return np.concatenate(used)


def _ends_early(task: PackTask) -> DataError:
    return DataError(
        f"{task.stream.stage} ends before shard {task.number} of {task.stream.domain!r} is full. Run with --fresh."
    )


def _doc_starts(rows: Ragged, used: NDArray[np.int64], eos_id: int, dtype: str) -> Ragged:
    """Return where documents (and the padding) start in each sample; always with the leading 0.

    >>> _doc_starts(Ragged(np.array([5, 0, 6, 0, 7, 0, 0, 0]), np.array([4, 4])), np.array([4, 2]), 0, "uint16").values
    array([0, 2, 0, 2], dtype=uint16)
    """
    firsts = np.cumsum(rows.lengths) - rows.lengths
    starts = np.flatnonzero(rows.values == eos_id) + 1
    row = np.searchsorted(firsts, starts - 1, "right") - 1
    within = starts - firsts[row]
    inside = (within <= used[row]) & (within < rows.lengths[row])
    starts = np.sort(np.concatenate((firsts, starts[inside])))
    counts = 1 + np.bincount(row[inside], minlength=len(rows))
    return Ragged((starts - np.repeat(firsts, counts)).astype(dtype), counts)


def shard_path(folder: str | os.PathLike[str] | Location, entry: Mapping[str, Any]) -> Location:
    """Return the file that an index entry describes."""
    return location(folder) / (entry["zip_data"] or entry["raw_data"])["basename"]


def read_record(task: PackTask) -> dict[str, Any]:
    """Return what ``pack_shard`` returned for a task."""
    return orjson.loads(location(task.record).read_bytes())


def _finished(task: PackTask) -> dict[str, Any] | None:
    try:
        record = read_record(task)
        size = size_of(shard_path(task.folder, record["entry"]))
    except (FileNotFoundError, KeyError):
        return None
    entry = record["entry"]
    return record if size == (entry["zip_data"] or entry["raw_data"])["bytes"] else None


def check_accounting(split: SplitPlan, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError unless tokens in = tokens written - padding + dropped, with the samples that were planned."""
    samples, tokens = (sum(record[name] for record in records) for name in ("samples", "tokens"))
    if samples != split.num_samples or split.tokens_in != tokens - split.padding_tokens + split.dropped_tokens:
        raise DataError(
            f"domain {split.domain!r}, {split.split}: {split.tokens_in:,} tokens came in for {split.num_samples:,}"
            f" samples, but {samples:,} samples of {tokens:,} tokens, {split.padding_tokens:,} of them padding, and"
            f" {split.dropped_tokens:,} dropped went out. This is a bug; please report it."
        )
