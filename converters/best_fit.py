"""Pack documents into samples without cutting any that fits: best-fit decreasing.

Documents longer than a sample give as many full samples as they fill; what is left of them, and every shorter
document, goes whole into the fullest sample that still has room, longest first. What stays empty is padding. The work
is done in windows of consecutive documents, so that memory does not grow with the corpus and a shard reads few units.
After Johnson et al. 1974; for language models Ding et al. 2024 (arXiv:2404.10830).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.locations import read_items

__all__ = ["Layout", "best_fit", "lay_out", "load_layout", "load_layouts"]

WINDOW_TOKENS = 64 << 20
WINDOW_DOCUMENTS = 1 << 17


class Layout(NamedTuple):
    """Which pieces of the stream make up each sample.

    Args:
        start, length: (pieces,) of the stream, in tokens; the pieces of a sample follow one another.
        first: (samples + 1,) where each sample's pieces begin.
        is_document: (pieces,) whether a document begins with this piece.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    first: NDArray[np.int64]
    is_document: NDArray[np.bool_]

    @property
    def num_samples(self) -> int:
        return len(self.first) - 1


def lay_out(lengths: Iterable[NDArray[np.int64]], seq_len: int, path: Path) -> int:
    """Write the layout of a stream whose documents have these lengths (arrays of them, in order); return its samples.

    The files are to be read by ``load_layout``; only one window is in memory at a time.
    """
    at = pieces = samples = 0
    files = _files(path)
    with open(files[0], "wb") as rows, open(files[1], "wb") as firsts:
        for window in _windows(lengths):
            part = best_fit(window, seq_len)
            table = np.empty(len(part.start), _PIECE)
            table["start"], table["length"], table["is_document"] = part.start + at, part.length, part.is_document
            rows.write(table.tobytes())
            firsts.write((part.first[:-1] + pieces).tobytes())
            at += int(window.sum())
            pieces += len(part.start)
            samples += part.num_samples
        firsts.write(np.int64(pieces).tobytes())
    return samples


def load_layout(path: str | os.PathLike[str], start: int, stop: int) -> Layout:
    """Return the samples ``start`` to ``stop`` of a layout, read where they lie in its files; ``first`` begins at 0."""
    first = read_items(f"{os.fspath(path)}.first", np.dtype(np.int64), start, stop - start + 1)
    table = read_items(f"{os.fspath(path)}.pieces", _PIECE, int(first[0]), int(first[-1] - first[0]))
    return Layout(table["start"], table["length"].astype(np.int64), first - first[0], table["is_document"])


_PIECES_AT_ONCE = 1 << 17


def load_layouts(path: str | os.PathLike[str], start: int, stop: int) -> Iterator[Layout]:
    """Yield what ``load_layout`` returns in parts of some ``_PIECES_AT_ONCE``: a sample may hold thousands."""
    first = read_items(f"{os.fspath(path)}.first", np.dtype(np.int64), start, stop - start + 1)
    low = 0
    while low < stop - start:
        high = int(first.searchsorted(first[low] + _PIECES_AT_ONCE, "right")) - 1
        high = min(max(high, low + 1), stop - start)
        yield load_layout(path, start + low, start + high)
        low = high


_PIECE = np.dtype([("start", "<i8"), ("length", "<u4"), ("is_document", "?")])


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".pieces"), path.with_suffix(".first")


def _windows(lengths: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Regroup arrays of lengths into windows that depend on the documents alone, not on how they were grouped."""
    waiting: list[int] = []
    tokens = 0
    for array in lengths:
        for length in array.tolist():
            waiting.append(length)
            tokens += length
            if tokens >= WINDOW_TOKENS or len(waiting) >= WINDOW_DOCUMENTS:
                yield np.array(waiting, np.int64)
                waiting, tokens = [], 0
    if waiting:
        yield np.array(waiting, np.int64)


def best_fit(lengths: NDArray[np.int64], seq_len: int) -> Layout:
    """Return the layout of one window.

    >>> layout = best_fit(np.array([3, 9, 4, 1]), 4)
    >>> [layout.length[a:b].tolist() for a, b in zip(layout.first[:-1], layout.first[1:])]
    [[3, 1], [4], [4], [4], [1]]
    """
    starts = np.cumsum(lengths) - lengths
    samples: list[list[tuple[int, int, bool]]] = []
    left = []
    for start, length in zip(starts.tolist(), lengths.tolist()):
        full = length // seq_len
        samples += [[(start + n * seq_len, seq_len, n == 0)] for n in range(full)]
        if length % seq_len:
            left.append((start + full * seq_len, length - full * seq_len, full == 0))
    left.sort(key=lambda piece: (-piece[1], piece[0]))
    samples += _fill(left, seq_len)
    samples.sort(key=lambda sample: min(sample)[0])  # roughly the order of the input
    pieces = [piece for sample in samples for piece in sorted(sample)]
    first = np.cumsum([0, *map(len, samples)])
    start_, length_, is_document = zip(*pieces) if pieces else ((), (), ())
    return Layout(
        np.array(start_, np.int64), np.array(length_, np.int64), first.astype(np.int64), np.array(is_document, np.bool_)
    )


def _fill(pieces: list[tuple[int, int, bool]], seq_len: int) -> list[list[tuple[int, int, bool]]]:
    """Put each piece into the fullest sample with room for it. ``rooms`` has bit r set if some sample has r left."""
    samples: list[list[tuple[int, int, bool]]] = []
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    for piece in pieces:
        fitting = rooms >> piece[1]
        if fitting:
            room = piece[1] + (fitting & -fitting).bit_length() - 1
            sample = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, sample = seq_len, len(samples)
            samples.append([])
        samples[sample].append(piece)
        room -= piece[1]
        if room:
            with_room[room].append(sample)
            rooms |= 1 << room
    return samples
