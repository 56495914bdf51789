"""Streams: all documents of one domain that serve one purpose, in input order, read from the stage files.

A stream is chosen by domain, by the hash of the text (``below`` a threshold is held out, ``above`` is trained on) and,
after deduplication, by a file per unit that says which documents stay. Its tokens are numbered from 0 on, across
units and their parts; nothing is copied until a shard asks for a range of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from converters.locations import FetchedArray, Location, UrlPath, location, read_range, size_of, write_whole
from converters.stage import DOCUMENT, Part, UnitTable, load_table, parts_of, unit_folder
from mixer.errors import DataError

__all__ = ["Stream", "copy_tokens", "keep_first_copies", "load_kept", "part_ranges"]

HASHES = 1 << 64
Key = TypeVar("Key")


class Stream(NamedTuple):
    """Which documents, and how many of their tokens each part of a unit holds.

    Args:
        side: ``all`` documents, or those with hashes ``below`` or ``above`` (or at) the threshold.
        keep: folder of the deduplication's files, or None.
        parts: (part, tokens) in order; parts without tokens are left out.
    """

    stage: str
    domain: str
    side: str = "all"
    threshold: int = 0
    keep: str | None = None
    parts: tuple[tuple[Part, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)

    def chosen(self, table: UnitTable) -> NDArray[np.bool_]:
        """Return which of a unit's documents belong to the stream, shape (documents,)."""
        if self.domain not in table.names:
            return np.zeros(len(table.documents), np.bool_)
        mask = table.domains == table.names.index(self.domain)
        if self.side == "all":
            return mask
        below = table.documents["hash"] < np.uint64(min(self.threshold, HASHES - 1))
        return mask & (below if self.side == "below" else ~below)

    def lengths(self, part: Part) -> NDArray[np.int64]:
        """Return the tokens of each document that a part adds, in order."""
        table = load_kept(self.stage, part, self.keep)
        return table.documents["tokens"][self.chosen(table)].astype(np.int64)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield rows of ``DOCUMENT``, all in order."""
        for part, _ in self.parts:
            table = load_kept(self.stage, part, self.keep)
            yield table.documents[self.chosen(table)]

    def document_lengths(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each document between two places; those that reach over an edge are cut there."""
        for part, low, high in part_ranges(self.parts, start, self.num_tokens if stop is None else stop):
            edges = np.cumsum(np.concatenate(([0], self.lengths(part)))).clip(low, high)
            yield np.diff(edges)[np.diff(edges) > 0]

    def part(self, start: int, stop: int) -> tuple[Stream, int]:
        """Return the stream cut to the parts between two places, and where it starts in that."""
        used = {part for part, _, _ in part_ranges(self.parts, start, stop)}
        before = itertools.takewhile(lambda row: row[0] not in used, self.parts)
        at = sum(tokens for _, tokens in before)
        return self._replace(parts=tuple(row for row in self.parts if row[0] in used)), start - at

    def copy(self, out: NDArray[Any], start: int) -> int:
        """Fill ``out`` with the ids from ``start`` on; return how many there were."""
        at = 0
        for part, low, high in part_ranges(self.parts, start, start + len(out)):
            runs = self._runs(part)
            sources, lengths = runs.between(low, high)
            places = at + np.cumsum(lengths) - lengths
            self._copy(part, runs, out, sources, lengths, places)
            at += high - low
        return at

    def copy_pieces(
        self, out: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Copy pieces, each within one document, to their places in ``out``."""
        low = 0
        for part, tokens in self.parts:
            here = np.flatnonzero((starts >= low) & (starts < low + tokens))
            if len(here):
                runs = self._runs(part)
                self._copy(part, runs, out, runs.sources(starts[here] - low), lengths[here], places[here])
            low += tokens

    def _runs(self, part: Part) -> _Runs:
        table = load_kept(self.stage, part, self.keep)
        first, last = _runs(self.chosen(table))
        lengths = table.starts[last] - table.starts[first]
        return _Runs(table.starts[first], np.cumsum(lengths) - lengths, lengths, int(table.starts[-1]))

    def _copy(
        self,
        part: Part,
        runs: _Runs,
        out: NDArray[Any],
        sources: NDArray[np.int64],
        lengths: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> None:
        copy_tokens(self.stage, part.unit, out, sources, lengths, places, expected=runs.end)


class _Runs(NamedTuple):
    """The ids that a part adds to a stream, as runs in the unit's file: where each starts there, how many ids come
    before it, its length; and where the part ends in the file."""

    starts: NDArray[np.int64]
    before: NDArray[np.int64]
    lengths: NDArray[np.int64]
    end: int

    def sources(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the ids at these places of the part lie in the file."""
        run = self.before.searchsorted(places, "right") - 1
        return self.starts[run] + places - self.before[run]

    def between(self, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return starts in the file and lengths of the ids from ``low`` to ``high``."""
        starts = self.starts + (low - self.before).clip(0)
        lengths = np.minimum(self.starts + self.lengths, self.starts + high - self.before) - starts
        return starts[lengths > 0], lengths[lengths > 0]


def copy_tokens(
    stage: str,
    unit: int,
    out: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    places: NDArray[np.int64],
    expected: int = 0,
) -> None:
    """Copy runs of a unit's ids, each to its place in ``out``.

    From a disk they are read right into it: mapped, every page around them would stay with this process for a while.

    Raises: DataError: if there are not as many as expected, of this part and those before.
    """
    file = unit_folder(stage, unit) / "tokens.bin"
    runs = zip(starts.tolist(), lengths.tolist(), places.tolist())
    if isinstance(file, UrlPath):
        ids = FetchedArray(file, out.dtype, starts, lengths)
        for start, length, place in runs:
            out[place : place + length] = ids[start : start + length]
        return
    size, into = out.itemsize, out.data.cast("B")
    with open(file, "rb", buffering=0) as raw:
        held = os.fstat(raw.fileno()).st_size // size
        if held < expected:
            raise DataError(f"{file} holds {held:,} tokens, expected {expected:,}. Run with --fresh.")
        for start, length, place in runs:
            raw.seek(start * size)
            at, stop = place * size, (place + length) * size
            while at < stop:
                count = raw.readinto(into[at:stop])
                if not count:
                    raise DataError(f"{file} ends before token {start + length:,}. Run with --fresh.")
                at += count


def part_ranges(parts: Sequence[tuple[Key, int]], start: int, stop: int) -> Iterator[tuple[Key, int, int]]:
    """Yield which tokens of every part ``start`` to ``stop`` of the stream are.

    >>> list(part_ranges([("a", 10), ("b", 5), ("c", 10)], 8, 16))
    [('a', 8, 10), ('b', 0, 5), ('c', 0, 1)]
    """
    at = 0
    for part, tokens in parts:
        low, high = max(start - at, 0), min(stop - at, tokens)
        if low < high:
            yield part, low, high
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


def load_kept(stage: str, part: Part, keep: str | None) -> UnitTable:
    """Return a part's documents; those that deduplication removed belong to domain -1."""
    table = load_table(unit_folder(stage, part.unit), part.number)
    if keep is None:
        return table
    stop = table.first + len(table.documents)
    kept = np.frombuffer(read_range(_keep_file(location(keep), part.unit), table.first, stop), np.bool_)
    return table._replace(domains=np.where(kept, table.domains, np.int32(-1)))


def _keep_file(folder: Location, unit: int) -> Location:
    return folder / f"{unit:06d}.bin"


_COPY = np.dtype([("hash", "<u8"), ("number", "<u8"), ("domain", "<u4")])
_BUCKET_DOCUMENTS, _MOST_BUCKETS = 1 << 21, 512


def keep_first_copies(
    stage: str, units: Sequence[int], folder: Path, *, bucket_documents: int = _BUCKET_DOCUMENTS
) -> dict[str, int]:
    """Write which documents stay if of equal texts in a domain only the first does; return how many go, by domain.

    Texts are equal if their 64-bit hashes are: among a thousand million documents, one pair in forty runs is not.
    They are compared in buckets by hash, so memory is bounded by ``bucket_documents`` of about 60 bytes, up to a
    thousand million documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [size_of(unit_folder(stage, unit) / "documents.bin") // DOCUMENT.itemsize for unit in units]
    count = min(max(1, -(-sum(sizes) // bucket_documents)), _MOST_BUCKETS)
    buckets = [folder / f"bucket.{number}" for number in range(count)]
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
        for part in parts_of(stage, units):
            table = load_table(unit_folder(stage, part.unit), part.number)
            codes = np.array([names.setdefault(name, len(names)) for name in table.names], np.uint32)
            rows = np.empty(len(table.documents), _COPY)
            rows["hash"], rows["domain"] = table.documents["hash"], codes[table.domains] if len(codes) else 0
            rows["number"] = np.arange(number, number + len(rows))
            number += len(rows)
            bucket = rows["hash"] % np.uint64(len(buckets))
            for place, file in enumerate(files):
                file.write((rows[bucket == place] if len(files) > 1 else rows).tobytes())
    return list(names)
