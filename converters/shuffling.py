"""A stream's documents in a seeded random order, for packing; the stage files stay as they are.

The order is a permutation of all documents of a domain (of one side of its split), by hashes of their numbers in the
stream. So it depends on the seed and the documents alone, and another seed needs no other tokenisation. It lies in a
file of 32 bytes per document, which shards look up by binary search; it is sorted in buckets, so memory is bounded.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.locations import read_items
from converters.stage import DOCUMENT
from converters.streams import Stream, copy_tokens, load_kept
from converters.urls import is_url
from mixer.randomness import key, random_bits

__all__ = ["Shuffled", "shuffled"]

# Where a document lies: its unit, its tokens, its first token in the unit's file and in the shuffled stream.
_ROW = np.dtype([("unit", "<u4"), ("tokens", "<u4"), ("start", "<i8"), ("at", "<i8"), ("hash", "<u8")])
_KEYED = np.dtype([("key", "<u8"), *_ROW.descr])
_BUCKET_DOCUMENTS, _MOST_BUCKETS = 1 << 20, 512
_ROWS_AT_ONCE = 1 << 17


class Shuffled(NamedTuple):
    """A stream in another order; to be read like ``Stream``.

    Args:
        base: the stream (its parts are not needed any more).
        order: file of ``_ROW``, in the new order.
        num_tokens: of the stream.
        first, last: which rows of the file this is.
    """

    base: Stream
    order: str
    num_tokens: int
    first: int
    last: int

    @property
    def stage(self) -> str:
        return self.base.stage

    @property
    def domain(self) -> str:
        return self.base.domain

    @property
    def side(self) -> str:
        return self.base.side

    def _rows(self) -> NDArray[Any]:
        if is_url(self.order):
            return read_items(self.order, _ROW, self.first, self.last - self.first)
        return np.memmap(self.order, _ROW, "r")[self.first : self.last]

    def _read(self, first: int, last: int) -> NDArray[Any]:
        """Return these rows, counted from the first; not mapped, as what was read would stay with this process."""
        return read_items(self.order, _ROW, self.first + first, last - first)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield rows of ``DOCUMENT``, all in order (sizes in bytes of text are not known here)."""
        count = self.last - self.first
        for first in range(0, count, _ROWS_AT_ONCE):
            part = self._read(first, min(first + _ROWS_AT_ONCE, count))
            documents = np.zeros(len(part), DOCUMENT)
            documents["tokens"], documents["hash"] = part["tokens"], part["hash"]
            yield documents

    def document_lengths(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each document between two places; those that reach over an edge are cut there."""
        for part in self._between(start, self.num_tokens if stop is None else stop):
            yield part[1]

    def part(self, start: int, stop: int) -> tuple[Shuffled, int]:
        """Return the stream cut to the documents between two places, which are still counted from its start."""
        first, last = _documents_between(self._rows(), start, stop)
        return self._replace(first=self.first + first, last=self.first + last), start

    def copy(self, out: NDArray[Any], start: int) -> int:
        """Fill ``out`` with the ids from ``start`` on; return how many there were."""
        for starts, lengths in self._between(start, start + len(out)):
            self.copy_pieces(out, starts, lengths, starts - start)
        return min(len(out), self.num_tokens - start)

    def _between(self, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield starts and lengths of the documents between two places, cut there."""
        first, last = _documents_between(self._rows(), start, stop)
        for low in range(first, last, _ROWS_AT_ONCE):
            part = self._read(low, min(low + _ROWS_AT_ONCE, last))
            starts = np.maximum(part["at"], start)
            lengths = np.minimum(part["at"] + part["tokens"], stop) - starts
            yield starts[lengths > 0], lengths[lengths > 0]

    def copy_pieces(
        self, out: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Copy pieces, each within one document, to their places in ``out``; each unit is opened once for many."""
        for first in range(0, len(starts), _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            self._copy_some(out, starts[some], lengths[some], places[some])

    def _copy_some(
        self, out: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        rows = self._read(*_documents_between(self._rows(), int(starts.min()), int(starts.max()) + 1))
        document = rows["at"].searchsorted(starts, "right") - 1
        units = rows["unit"][document]
        sources = rows["start"][document] + starts - rows["at"][document]
        by_unit = np.argsort(units, kind="stable")
        for here in np.split(by_unit, np.flatnonzero(np.diff(units[by_unit])) + 1):
            copy_tokens(self.stage, int(units[here[0]]), out, sources[here], lengths[here], places[here])


def _documents_between(rows: NDArray[Any], start: int, stop: int) -> tuple[int, int]:
    """Return the first document with tokens between two places, and the last plus one; looks at few rows only."""
    first = bisect.bisect_right(rows, start, key=lambda row: int(row["at"])) - 1
    return max(first, 0), bisect.bisect_left(rows, stop, key=lambda row: int(row["at"]))


def shuffled(stream: Stream, seed: int, path: Path, *, bucket_documents: int = _BUCKET_DOCUMENTS) -> Shuffled | Stream:
    """Return the stream in the order of a seed, which is written to ``path``; an empty stream as it is."""
    count = sum(len(documents) for documents in stream.documents())
    if not count:
        return stream
    buckets = min(-(-count // bucket_documents), _MOST_BUCKETS)
    files = [path.with_name(f"{path.name}.{number}") for number in range(buckets)]
    _scatter(stream, seed, files)
    at = 0
    with open(path, "wb") as out:
        for file in files:
            rows = np.fromfile(file, _KEYED)
            file.unlink()
            order = np.argsort(rows["key"], kind="stable")
            for first in range(0, len(order), _ROWS_AT_ONCE):
                some = rows[order[first : first + _ROWS_AT_ONCE]]
                ordered = np.empty(len(some), _ROW)
                for name in ("unit", "tokens", "start", "hash"):
                    ordered[name] = some[name]
                ends = at + np.cumsum(some["tokens"], dtype=np.int64)
                ordered["at"] = ends - some["tokens"]
                at = int(ends[-1])
                out.write(ordered.data)
    return Shuffled(stream._replace(parts=()), str(path), at, 0, count)


def _scatter(stream: Stream, seed: int, files: list[Path]) -> None:
    """Write every document's row, with its key, to the file of the range that its key lies in."""
    seed_key = key("shuffle", seed, stream.domain, stream.side)
    width = -(-(1 << 64) // len(files))
    number = 0
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(file, "wb")) for file in files]
        for part, _ in stream.parts:
            table = load_kept(stream.stage, part, stream.keep)
            chosen = np.flatnonzero(stream.chosen(table))
            rows = np.zeros(len(chosen), _KEYED)
            rows["key"] = _keys(seed_key, number, len(chosen))
            rows["unit"], rows["start"] = part.unit, table.starts[chosen]
            rows["tokens"], rows["hash"] = table.documents["tokens"][chosen], table.documents["hash"][chosen]
            number += len(chosen)
            for place, file in enumerate(opened):
                low, high = np.uint64(place * width), np.uint64(min((place + 1) * width, 1 << 64) - 1)
                file.write(rows[(rows["key"] >= low) & (rows["key"] <= high)].tobytes())


def _keys(seed_key: int, first: int, count: int) -> NDArray[np.uint64]:
    """Return the keys of the documents numbered from ``first`` on."""
    with np.errstate(over="ignore"):
        shifted = np.uint64(seed_key) + np.uint64(first) * np.uint64(0x9E3779B97F4A7C15)  # the counter of splitmix64
    return random_bits(int(shifted), count)
