"""Input formats: one function per format, one row in ``FORMATS``.

A reader turns a piece of a file into rows, or into ``Bad`` where a record cannot be read, and never stops early: a
container that ends too soon (a truncated .gz, a damaged Parquet file) raises ``DataError`` naming the file.

    def read_x(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]

To add a format, write such a function and a row. The row also enters the format into the shared round-trip and damage
tests.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import orjson

from mixer.errors import DataError

__all__ = ["Bad", "FORMATS", "Format", "Piece", "Row", "open_bytes", "place"]

MAX_RECORD_BYTES = 64 << 20


class Piece(NamedTuple):
    """A part of one input file: all of it (``stop`` None), a byte range of lines, or a range of row groups.

    ``name`` is what people and domain rules see: the path below the input it was found in.
    """

    path: str
    name: str
    root: str
    format: str
    size_bytes: int
    modified_ns: int = 0
    start: int = 0
    stop: int | None = None


class Row(NamedTuple):
    """One record: its fields, its line or row within the piece (from 1), its byte offset, and its raw bytes."""

    fields: Mapping[str, Any]
    at: int
    offset: int = 0
    raw: bytes = b""


class Bad(NamedTuple):
    """A record that cannot be read: why in one word, what exactly, where, and its raw bytes."""

    reason: str
    detail: str
    at: int
    offset: int = 0
    raw: bytes = b""


Reader = Callable[[Piece, frozenset[str]], Iterator["Row | Bad"]]


@dataclass(frozen=True)
class Format:
    """One input format.

    Args:
        read: the reader.
        extensions: of file names, without a compression suffix.
        unit: what ``start`` and ``stop`` count: ``bytes``, ``groups`` (of rows) or ``file`` (cannot be split).
        place: what ``at`` counts, for messages.
    """

    read: Reader
    extensions: tuple[str, ...]
    unit: str = "file"
    place: str = "line"


def oversized(at: int, offset: int, raw: bytes) -> Bad:
    """Return the verdict on a record that would not fit in a worker's memory; keeps the first bytes only."""
    return Bad("oversized", f"longer than {MAX_RECORD_BYTES >> 20} MiB", at, offset, raw[:4096])


# --- bytes ---------------------------------------------------------------------------------------------------------


class _ZstdFile(io.RawIOBase):
    """Decompress zstd frames; unlike ``zstandard``'s own reader, an input that ends inside a frame is an error."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame is None or self._frame.eof:
                data = (self._frame.unused_data if self._frame else b"") or self._file.read(1 << 18)
                if not data:
                    return 0
                self._frame = zstandard().ZstdDecompressor().decompressobj()
            elif not (data := self._file.read(1 << 18)):
                raise EOFError("the file ends inside a zstd frame")
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def zstandard() -> Any:
    """Import zstandard when it is needed."""
    import zstandard

    return zstandard


COMPRESSIONS: dict[str, Callable[[str], Any]] = {
    ".gz": lambda path: gzip.open(path, "rb"),  # noqa: SIM115
    ".zst": lambda path: io.BufferedReader(_ZstdFile(path), 1 << 18),
    ".bz2": lambda path: bz2.open(path, "rb"),  # noqa: SIM115
    ".xz": lambda path: lzma.open(path, "rb"),  # noqa: SIM115
}


def compression_suffix(name: str) -> str:
    """Return ``.gz``, ``.zst``, ``.bz2``, ``.xz`` or nothing.

    >>> compression_suffix("web.jsonl.zst"), compression_suffix("web.jsonl")
    ('.zst', '')
    """
    return next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, decompressing by its suffix."""
    suffix = compression_suffix(path)
    return COMPRESSIONS[suffix](path) if suffix else open(path, "rb")


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn the many ways in which reading a damaged archive fails into one error that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # bz2 and gzip report bad data as OSError without a number
            raise _damaged(path, error) from error
        raise DataError(
            f"cannot read {path}: {error.strerror}. Finished work is kept; make it readable and run the same command"
            " again, or leave it out with --exclude."
        ) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # without importing zstandard for every format
            raise _damaged(path, error) from error
        raise


def _damaged(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is truncated or damaged ({error}). Fetch it again, or leave it out with --exclude.")


def _read_all(path: str) -> bytes:
    """Return the file's bytes, decompressed; at most one more than ``MAX_RECORD_BYTES``."""
    with _naming(path), open_bytes(path) as file:
        return file.read(MAX_RECORD_BYTES + 1)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) for every line that starts in the piece; offsets count decompressed bytes.

    A line belongs to the piece in which it starts. A line longer than ``MAX_RECORD_BYTES`` comes back cut to one byte
    more than that, so that no file can fill the memory.
    """
    at = max(piece.start - 1, 0)
    for line, length in _checked_pairs(piece, at):
        if piece.stop is not None and at >= piece.stop:
            return
        if at >= piece.start:
            yield at, line
        at += length


def _checked_pairs(piece: Piece, at: int) -> Iterator[tuple[bytes, int]]:
    with _naming(piece.path), open_bytes(piece.path) as file:
        if at:
            file.seek(at)
        while line := file.readline(MAX_RECORD_BYTES + 1):
            length = len(line)
            while length > MAX_RECORD_BYTES and not line.endswith(b"\n") and (rest := file.readline(1 << 20)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield line, length


def place(piece: Piece, at: int) -> str:
    """Return where a record is, for people: ``line 31``. Counts the lines before the piece."""
    return f"{FORMATS[piece.format].place} {at + _records_before(piece)}"


def _records_before(piece: Piece) -> int:
    if FORMATS[piece.format].unit != "bytes" or not piece.start:
        return 0
    number, left = 0, piece.start
    with open_bytes(piece.path) as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    with open_bytes(piece.path) as file:  # a line cut by the start belongs to the piece before
        file.seek(piece.start - 1)
        return number + (file.read(1) != b"\n")


# --- formats -------------------------------------------------------------------------------------------------------


def read_jsonl(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """One JSON object per line; blank lines are no records."""
    for at, (offset, line) in enumerate(_lines(piece), start=1):
        if offset == 0 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line.strip():
            continue
        if len(line) > MAX_RECORD_BYTES:
            yield oversized(at, offset, line)
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield _json_verdict(line, at, offset, error)
            continue
        if isinstance(fields, dict):
            yield Row(fields, at, offset, line)
        else:
            yield Bad("json", f"a JSON {type(fields).__name__}, not an object", at, offset, line)


def _json_verdict(line: bytes, at: int, offset: int, error: Exception) -> Bad:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return Bad("utf8", f"not valid UTF-8: {wrong.reason} at byte {wrong.start} of the line", at, offset, line)
    return Bad("json", f"not valid JSON: {error}", at, offset, line)


def read_text(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """The whole file is one document: plain text, source code."""
    raw = _read_all(piece.path)
    if len(raw) > MAX_RECORD_BYTES:
        yield oversized(1, 0, raw)
    elif b"\0" in raw:
        yield Bad("binary", "holds a NUL byte, so it is not text", 1, 0, raw)
    else:
        try:
            yield Row({"text": raw.decode("utf-8-sig")}, 1, 0, raw)
        except UnicodeDecodeError as error:
            yield Bad("utf8", f"not valid UTF-8: {error.reason} at byte {error.start}", 1, 0, raw)


def read_parquet(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Row groups ``start`` to ``stop``; only the columns that text and domain need are read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
            wanted = [name for name in file.schema_arrow.names if name in columns]
            at = 1 + sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            for group in groups:
                for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                    yield from _arrow_rows(batch, at)
                    at += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(piece.path, error) from error


def _arrow_rows(batch: Any, at: int) -> Iterator[Row | Bad]:
    try:
        for row in batch.to_pylist():
            yield Row(row, at)
            at += 1
        return
    except UnicodeDecodeError:  # somewhere in the batch; find it row by row
        pass
    for number in range(batch.num_rows):
        try:
            yield Row(batch.slice(number, 1).to_pylist()[0], at + number)
        except UnicodeDecodeError as error:
            yield Bad("utf8", f"not valid UTF-8: {error.reason}", at + number, 0, bytes(error.object))


FORMATS: dict[str, Format] = {
    "jsonl": Format(read_jsonl, (".jsonl", ".ndjson"), unit="bytes", place="line"),
    "parquet": Format(read_parquet, (".parquet",), unit="groups", place="row"),
    "text": Format(read_text, ()),
}
