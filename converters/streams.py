"""Streams: all documents of one domain that serve one purpose, in input order, read from the stage files.

A stream is chosen by domain, by the hash of the text (``below`` a threshold is held out, ``above`` is trained on) and,
after deduplication, by a file per unit that says which documents stay. Its tokens are numbered from 0 on, across
units; nothing is copied until a shard asks for a range of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.locations import FetchedArray, Location, UrlPath, location, size_of, write_whole
from converters.stage import DOCUMENT, UnitTable, load_table, unit_folder
from mixer.errors import DataError

__all__ = ["Stream", "copy_slices", "keep_first_copies", "load_kept", "open_tokens", "unit_ranges"]

HASHES = 1 << 64


class Stream(NamedTuple):
    """Which documents, and how many of their tokens each unit holds.

    Args:
        side: ``all`` documents, or those with hashes ``below`` or ``above`` (or at) the threshold.
        keep: folder of the deduplication's files, or None.
        units: (unit, tokens) in order; units without tokens are left out.
    """

    stage: str
    domain: str
    side: str = "all"
    threshold: int = 0
    keep: str | None = None
    units: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.units)

    def chosen(self, table: UnitTable) -> NDArray[np.bool_]:
        """Return which of a unit's documents belong to the stream, shape (documents,)."""
        if self.domain not in table.names:
            return np.zeros(len(table.documents), np.bool_)
        mask = table.domains == table.names.index(self.domain)
        if self.side == "all":
            return mask
        below = table.documents["hash"] < np.uint64(min(self.threshold, HASHES - 1))
        return mask & (below if self.side == "below" else ~below)

    def lengths(self, unit: int) -> NDArray[np.int64]:
        """Return the tokens of each document that a unit adds, in order."""
        table = load_kept(self.stage, unit, self.keep)
        return table.documents["tokens"][self.chosen(table)].astype(np.int64)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield rows of ``DOCUMENT``, all in order."""
        for unit, _ in self.units:
            table = load_kept(self.stage, unit, self.keep)
            yield table.documents[self.chosen(table)]

    def document_lengths(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each document between two places; those that reach over an edge are cut there."""
        for unit, low, high in unit_ranges(self.units, start, self.num_tokens if stop is None else stop):
            edges = np.cumsum(np.concatenate(([0], self.lengths(unit)))).clip(low, high)
            yield np.diff(edges)[np.diff(edges) > 0]

    def part(self, start: int, stop: int) -> tuple[Stream, int]:
        """Return the stream cut to the units between two places, and where it starts in that."""
        used = {unit for unit, _, _ in unit_ranges(self.units, start, stop)}
        before = itertools.takewhile(lambda row: row[0] not in used, self.units)
        at = sum(tokens for _, tokens in before)
        return self._replace(units=tuple(row for row in self.units if row[0] in used)), start - at

    def copy(self, out: NDArray[Any], start: int) -> int:
        """Fill ``out`` with the ids from ``start`` on; return how many there were."""
        at = 0
        for unit, low, high in unit_ranges(self.units, start, start + len(out)):
            for part in self.slices(unit, low, high, out.dtype.name):
                out[at : at + len(part)] = part
                at += len(part)
        return at

    def copy_pieces(
        self, out: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Copy pieces, each within one document, to their places in ``out``."""
        low = 0
        for unit, tokens in self.units:
            here = np.flatnonzero((starts >= low) & (starts < low + tokens))
            if len(here):
                ids = np.concatenate(list(self.slices(unit, 0, tokens, out.dtype.name)))
                copy_slices(ids, out, starts[here] - low, lengths[here], places[here])
            low += tokens

    def slices(self, unit: int, start: int, stop: int, dtype: str) -> Iterator[NDArray[Any]]:
        """Yield the ids ``start`` to ``stop`` of what a unit adds, as slices of its memory-mapped file."""
        table = load_kept(self.stage, unit, self.keep)
        first, last = _runs(self.chosen(table))
        lows, highs = table.starts[first], table.starts[last]
        before = np.cumsum(highs - lows) - (highs - lows)  # tokens of the runs before
        lows, highs = lows + (start - before).clip(0), np.minimum(highs, lows + stop - before)
        lows, lengths = lows[lows < highs], (highs - lows)[lows < highs]
        ids = open_tokens(self.stage, unit, dtype, int(table.starts[-1]), spans=(lows, lengths))
        for low, length in zip(lows.tolist(), lengths.tolist()):
            yield ids[low : low + length]


def copy_slices(
    ids: NDArray[Any] | FetchedArray,
    out: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    places: NDArray[np.int64],
) -> None:
    """Copy each ``ids[start : start + length]`` to its place in ``out``."""
    for start, length, place in zip(starts.tolist(), lengths.tolist(), places.tolist()):
        out[place : place + length] = ids[start : start + length]


def open_tokens(
    stage: str,
    unit: int,
    dtype: str,
    expected: int | None = None,
    *,
    spans: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> NDArray[Any] | FetchedArray:
    """Return a unit's ids, memory-mapped; from a server, those that the spans (starts, lengths) name.

    Raises: DataError: if there are not as many as expected.
    """
    file = unit_folder(stage, unit) / "tokens.bin"
    if isinstance(file, UrlPath):
        return FetchedArray(file, np.dtype(dtype), *spans)
    ids = np.memmap(file, dtype, "r")
    if expected is not None and len(ids) != expected:
        raise DataError(f"{file} holds {len(ids):,} tokens, expected {expected:,}. Run with --fresh.")
    return ids


def unit_ranges(units: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the part of every unit that tokens ``start`` to ``stop`` of the stream lie in.

    >>> list(unit_ranges([(0, 10), (2, 5), (3, 10)], 8, 16))
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


def _runs(chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where every run of True begins, and ends before.

    >>> [edges.tolist() for edges in _runs(np.array([True, True, False, True]))]
    [[0, 3], [2, 4]]
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    return edges[::2], edges[1::2]


# --- deduplication -------------------------------------------------------------------------------------------------


def load_kept(stage: str, unit: int, keep: str | None) -> UnitTable:
    """Return a unit's documents; those that deduplication removed belong to domain -1."""
    table = load_table(unit_folder(stage, unit))
    if keep is None:
        return table
    kept = np.frombuffer(_keep_file(location(keep), unit).read_bytes(), np.bool_)
    return table._replace(domains=np.where(kept, table.domains, np.int32(-1)))


def _keep_file(folder: Location, unit: int) -> Location:
    return folder / f"{unit:06d}.bin"


_COPY = np.dtype([("hash", "<u8"), ("number", "<u8"), ("domain", "<u4")])
_BUCKET_DOCUMENTS = 1 << 24


def keep_first_copies(
    stage: str, units: Sequence[int], folder: Path, *, bucket_documents: int = _BUCKET_DOCUMENTS
) -> dict[str, int]:
    """Write which documents stay if of equal texts in a domain only the first does; return how many go, by domain.

    Texts are equal if their 64-bit hashes are: among a thousand million documents, one pair in forty runs is not.
    They are compared in buckets by hash, so memory is bounded by ``bucket_documents`` of about 60 bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [size_of(unit_folder(stage, unit) / "documents.bin") // DOCUMENT.itemsize for unit in units]
    buckets = [folder / f"bucket.{number}" for number in range(max(1, -(-sum(sizes) // bucket_documents)))]
    names = _scatter(stage, units, buckets)
    kept = np.ones(sum(sizes), np.bool_) if len(buckets) == 1 else _mapped_ones(folder / "kept", sum(sizes))
    removed: Counter[str] = Counter()
    for bucket in buckets:
        rows = np.fromfile(bucket, _COPY)
        bucket.unlink()
        rows = rows[np.lexsort((rows["number"], rows["hash"], rows["domain"]))]
        copies = rows[1:][(rows["hash"][1:] == rows["hash"][:-1]) & (rows["domain"][1:] == rows["domain"][:-1])]
        kept[copies["number"]] = False
        counts = np.bincount(copies["domain"], minlength=len(names)).tolist()
        removed.update({name: count for name, count in zip(names, counts) if count})
    for unit, end, size in zip(units, np.cumsum(sizes).tolist(), sizes):
        write_whole(_keep_file(folder, unit), kept[end - size : end].tobytes())
    return dict(removed)


def _mapped_ones(file: Path, count: int) -> NDArray[np.bool_]:
    kept = np.memmap(file, np.bool_, "w+", shape=count)
    kept[:] = True
    return kept


def _scatter(stage: str, units: Sequence[int], buckets: Sequence[Path]) -> list[str]:
    """Write every document's hash, number and domain to the bucket of its hash; return the names of the domains."""
    names: dict[str, int] = {}
    number = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        for unit in units:
            table = load_table(unit_folder(stage, unit))
            codes = np.array([names.setdefault(name, len(names)) for name in table.names], np.uint32)
            rows = np.empty(len(table.documents), _COPY)
            rows["hash"], rows["domain"] = table.documents["hash"], codes[table.domains] if len(codes) else 0
            rows["number"] = np.arange(number, number + len(rows))
            number += len(rows)
            bucket = rows["hash"] % np.uint64(len(buckets))
            for place, file in enumerate(files):
                file.write((rows[bucket == place] if len(files) > 1 else rows).tobytes())
    return list(names)
