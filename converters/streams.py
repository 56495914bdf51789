"""Streams: all documents of one domain that serve one purpose, in input order, read from the stage files.

A stream is chosen by domain, by the hash of the text (``below`` a threshold is held out, ``above`` is trained on) and,
after deduplication, by a file per unit that says which documents stay. Its tokens are numbered from 0 on, across
units; nothing is copied until a shard asks for a range of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.stage import UnitTable, load_table, unit_folder
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
        ids = open_tokens(self.stage, unit, dtype, int(table.starts[-1]))
        at = 0
        for first, last in _runs(self.chosen(table)):
            low, high = int(table.starts[first]), int(table.starts[last])
            begin, end = max(start - at, 0), min(stop - at, high - low)
            if begin < end:
                yield ids[low + begin : low + end]
            at += high - low
            if at >= stop:
                return


def copy_slices(
    ids: NDArray[Any],
    out: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    places: NDArray[np.int64],
) -> None:
    """Copy each ``ids[start : start + length]`` to its place in ``out``."""
    for start, length, place in zip(starts.tolist(), lengths.tolist(), places.tolist()):
        out[place : place + length] = ids[start : start + length]


def open_tokens(stage: str, unit: int, dtype: str, expected: int | None = None) -> NDArray[Any]:
    """Return a unit's ids, memory-mapped.

    Raises: DataError: if there are not as many as expected.
    """
    folder = unit_folder(stage, unit)
    ids = np.memmap(folder / "tokens.bin", dtype, "r")
    if expected is not None and len(ids) != expected:
        raise DataError(f"{folder} holds {len(ids):,} tokens, expected {expected:,}. Run with --fresh.")
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


def _runs(chosen: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of every run of True.

    >>> [(int(a), int(b)) for a, b in _runs(np.array([True, True, False, True]))]
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    yield from zip(edges[::2], edges[1::2])


# --- deduplication -------------------------------------------------------------------------------------------------


def load_kept(stage: str, unit: int, keep: str | None) -> UnitTable:
    """Return a unit's documents; those that deduplication removed belong to domain -1."""
    table = load_table(unit_folder(stage, unit))
    if keep is None:
        return table
    kept = np.load(_keep_file(keep, unit))
    return table._replace(domains=np.where(kept, table.domains, np.int32(-1)))


def _keep_file(folder: str, unit: int) -> Path:
    return Path(folder) / f"{unit:06d}.npy"


def keep_first_copies(stage: str, units: Sequence[int], folder: Path) -> dict[str, int]:
    """Write which documents stay if of equal texts in a domain only the first does; return how many go, by domain.

    Texts are equal if their 64-bit hashes are: among a thousand million documents, one pair in forty runs is not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [load_table(unit_folder(stage, unit)) for unit in units]
    kept = [np.ones(len(table.documents), np.bool_) for table in tables]
    removed = {}
    for name in sorted({name for table in tables for name in table.names}):
        places = [np.flatnonzero(table.domains == _index(table, name)) for table in tables]
        hashes = np.concatenate([table.documents["hash"][place] for table, place in zip(tables, places)])
        first = np.zeros(len(hashes), np.bool_)
        first[np.unique(hashes, return_index=True)[1]] = True
        for mask, place, part in zip(kept, places, np.split(first, np.cumsum([len(place) for place in places])[:-1])):
            mask[place] = part
        if removed_here := int((~first).sum()):
            removed[name] = removed_here
    for unit, mask in zip(units, kept):
        np.save(_keep_file(str(folder), unit), mask)
    return removed


def _index(table: UnitTable, name: str) -> int:
    return table.names.index(name) if name in table.names else -2
