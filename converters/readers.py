"""Input formats: one function per format, one row in ``FORMATS``.

A reader turns a piece of a file into rows, or into ``Bad`` where a record cannot be read, and never stops early: a
container that ends too soon (a truncated .gz, a damaged Parquet file) raises ``DataError`` naming the file.

    def read_x(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]

To add a format, write such a function and a row. The row also enters the format into the shared round-trip and damage
tests.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import orjson

from converters.arrow_files import (
    arrow_columns,
    arrow_slices,
    count_arrow_batches,
    count_row_groups,
    parquet_columns,
    parquet_slices,
)
from converters.files import damaged, naming, open_bytes, skip
from converters.mds_files import ShardFile
from converters.separated import records

__all__ = ["Bad", "FORMATS", "Format", "Piece", "Row", "place"]

MAX_RECORD_BYTES = 8 << 20  # by default: a text takes up to four times as much, and a worker is to stay below 200 MB


class Piece(NamedTuple):
    """A part of one input file: all of it (``stop`` None), a byte range of lines, or a range of row groups.

    ``name`` is what people and domain rules see: the path below the input it was found in. ``digest`` tells the file's
    content, as far as a changed one is noticed.
    """

    path: str
    name: str
    root: str
    format: str
    size_bytes: int
    version: str = ""
    start: int = 0
    stop: int | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    digest: str = ""


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
        extensions: of file names, without a compression suffix; none for formats that must be named.
        unit: what ``start`` and ``stop`` count: ``bytes``, ``groups`` (of rows) or ``file`` (cannot be split).
        place: what ``at`` counts, for messages.
        is_text: rows hold the one field ``text``.
        count_groups: the number of row groups in a file, where ``unit`` is ``groups``.
        columns: the names of all columns in a file, where rows hold only those that are wanted.
    """

    read: Reader
    extensions: tuple[str, ...] = ()
    unit: str = "file"
    place: str = "line"
    is_text: bool = False
    count_groups: Callable[[str], int] | None = None
    columns: Callable[[str], Iterable[str]] | None = None


def oversized(limit: int, at: int, offset: int, raw: bytes) -> Bad:
    """Return the verdict on a record that would not fit in a worker's memory; keeps the first bytes only."""
    return Bad(
        "oversized", f"longer than {limit:,} bytes (--max-record, at 9 bytes of memory each)", at, offset, raw[:4096]
    )


def place(piece: Piece, at: int) -> str:
    """Return where a record is, for people: ``line 31``. Counts the lines before the piece."""
    return f"{FORMATS[piece.format].place} {at + _records_before(piece)}"


def _records_before(piece: Piece) -> int:
    if FORMATS[piece.format].unit != "bytes" or not piece.start:
        return 0
    number, left, last = 0, piece.start, b""
    with open_bytes(piece.path) as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
    return number + (last != b"\n")  # a line cut by the start belongs to the piece before


# --- lines ---------------------------------------------------------------------------------------------------------


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) for every line that starts in the piece; offsets count decompressed bytes.

    A line belongs to the piece in which it starts. A line longer than ``max_record_bytes`` comes back cut to one byte
    more than that, so that no file can fill the memory.
    """
    at = max(piece.start - 1, 0)
    for line, length in _cut_lines(piece, at):
        if piece.stop is not None and at >= piece.stop:
            return
        if at >= piece.start:
            yield at, line
        at += length
        del line  # here and in all that follows: before the next one is read, as two large records are too many


def _cut_lines(piece: Piece, at: int) -> Iterator[tuple[bytes, int]]:
    limit = piece.max_record_bytes
    with naming(piece.path), open_bytes(piece.path) as file:
        if at:
            file.seek(at)
        while line := file.readline(limit + 1):
            length = len(line)
            while length > limit and not line.endswith(b"\n") and (rest := file.readline(1 << 20)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield line, length
            del line


def read_jsonl(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """One JSON object per line; blank lines are no records."""
    for at, (offset, line) in enumerate(_lines(piece), start=1):
        if offset == 0 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line.strip():
            continue
        if len(line) > piece.max_record_bytes:
            yield oversized(piece.max_record_bytes, at, offset, line)
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
        del fields, line


def _json_verdict(line: bytes, at: int, offset: int, error: Exception) -> Bad:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return Bad("utf8", f"not valid UTF-8: {wrong.reason} at byte {wrong.start} of the line", at, offset, line)
    return Bad("json", f"not valid JSON: {error}", at, offset, line)


def _decoded(piece: Piece, raw: bytes, at: int, offset: int) -> Row | Bad:
    if len(raw) > piece.max_record_bytes:
        return oversized(piece.max_record_bytes, at, offset, raw)
    if b"\0" in raw:
        return Bad("binary", "holds a NUL byte, so it is not text", at, offset, raw)
    try:
        return Row({"text": raw.decode("utf-8-sig" if offset == 0 else "utf-8")}, at, offset, raw)
    except UnicodeDecodeError as error:
        return Bad("utf8", f"not valid UTF-8: {error.reason} at byte {error.start}", at, offset, raw)


def read_text(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """The whole file is one document: plain text, source code."""
    with naming(piece.path), open_bytes(piece.path) as file:
        raw = file.read(piece.max_record_bytes + 1)
    yield _decoded(piece, raw, 1, 0)


def read_text_lines(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Every line that is not blank is one document."""
    for at, (offset, line) in enumerate(_lines(piece), start=1):
        if line.strip():
            yield _decoded(piece, line.rstrip(b"\r\n"), at, offset)
        del line


def read_text_blocks(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Lines up to the next blank line are one document."""
    block: list[bytes] = []
    size = start = first = 0
    for at, (offset, line) in enumerate(_lines(piece), start=1):
        if line.strip():
            if not block:
                start, first = offset, at
            if size <= piece.max_record_bytes:  # one line too many is enough to see that it is oversized
                block.append(line)
                size += len(line)
        elif block:
            yield _decoded(piece, b"".join(block).rstrip(b"\r\n"), first, start)
            block, size = [], 0
    if block:
        yield _decoded(piece, b"".join(block).rstrip(b"\r\n"), first, start)


def read_csv(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Comma-separated values with a header line; quoted fields may hold line breaks."""
    return _read_separated(piece, ",")


def read_tsv(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Tab-separated values with a header line."""
    return _read_separated(piece, "\t")


_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that stand for themselves


def _read_separated(piece: Piece, delimiter: str) -> Iterator[Row | Bad]:
    header: list[str] | None = None
    with naming(piece.path):
        for values, problem, at, offset, raw in records(piece.path, delimiter, piece.max_record_bytes):
            if problem is not None and header is None:
                raise damaged(piece.path, f"its header is {problem[0]}: {problem[1]}")
            if problem is not None and problem[0] == "oversized":
                yield oversized(piece.max_record_bytes, at, offset, raw)
            elif problem is not None:
                yield Bad(*problem, at, offset, raw)
            elif header is None:
                header = values
            elif len(values) != len(header):
                yield Bad("csv", f"{len(values)} fields, the header has {len(header)}", at, offset, raw)
            elif any(map(_NOT_UTF8.search, values)):
                yield Bad("utf8", "not valid UTF-8", at, offset, raw)
            else:
                yield Row(dict(zip(header, values)), at, offset, raw)
            del values, raw


# --- Arrow ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    import pyarrow

    try:
        with naming(path):
            yield
    except (pyarrow.ArrowException, ValueError, IndexError, struct.error) as error:
        raise damaged(path, error) from error


def count_groups(path: str) -> int:
    """Return the row groups of a Parquet file."""
    with _arrow_errors(path):
        return count_row_groups(path)


def read_parquet(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Row groups ``start`` to ``stop``; only the columns that text and domain need are read."""
    return _arrow_rows(piece, parquet_slices(piece.path, piece.start, piece.stop, columns, piece.max_record_bytes))


def count_batches(path: str) -> int:
    """Return the record batches of an Arrow file."""
    with _arrow_errors(path):
        return count_arrow_batches(path)


def read_arrow(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Record batches ``start`` to ``stop`` of Arrow IPC, file or stream; what ``Dataset.save_to_disk`` writes."""
    return _arrow_rows(piece, arrow_slices(piece.path, piece.start, piece.stop, columns, piece.max_record_bytes))


def _arrow_rows(piece: Piece, slices: Iterator[tuple[int, Any]]) -> Iterator[Row | Bad]:
    with _arrow_errors(piece.path):
        for at, rows in slices:
            if rows.num_rows == 1 and rows.nbytes > piece.max_record_bytes:
                yield oversized(piece.max_record_bytes, at, 0, repr(_raw_texts(rows, 4096)).encode())
            elif rows.nbytes <= _ARROW_BYTES and _is_valid(rows):
                for number, fields in enumerate(rows.to_pylist()):
                    yield Row(fields, at + number)
            else:  # few at a time, or a text among them is not valid: row by row
                for number in range(rows.num_rows):
                    yield _arrow_row(rows.slice(number, 1), at + number)


_ARROW_BYTES = 1 << 20  # that become Python texts at once, which may take four times as much


def _is_valid(rows: Any) -> bool:
    """Return whether all texts are UTF-8; what else is wrong is an error."""
    import pyarrow

    try:
        rows.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        return False
    return True


def _arrow_row(row: Any, at: int) -> Row | Bad:

    if _is_valid(row):
        return Row(row.to_pylist()[0], at)
    return Bad("utf8", "not valid UTF-8", at, 0, repr(_raw_texts(row)).encode())


def _raw_texts(row: Any, most: int | None = None) -> dict[str, bytes | None]:
    """Return the bytes of every text of one row, or the first of them, as they are no UTF-8 or too many."""
    import pyarrow
    import pyarrow.compute

    texts = {}
    for name, column in zip(row.schema.names, row.columns):
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            is_large = pyarrow.types.is_large_string(column.type)
            raw = column.cast(pyarrow.large_binary() if is_large else pyarrow.binary())  # without a copy
            texts[name] = (raw if most is None else pyarrow.compute.binary_slice(raw, 0, most)).to_pylist()[0]
    return texts


# --- web archives --------------------------------------------------------------------------------------------------

_NOT_DOCUMENTS = ("warcinfo", "request", "metadata", "revisit", "continuation")


def read_warc(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Extracted text of a crawl (WET): ``conversion`` and ``resource`` records of plain text, with their headers.

    Raw responses hold HTML, whose text is not extracted here; each is a bad record.
    """
    at = offset = 0
    with naming(piece.path), open_bytes(piece.path) as file:
        while first := file.readline(1 << 16):
            offset += len(first)
            if not first.strip():
                continue
            at += 1
            headers, size = _warc_headers(piece.path, first, file)
            offset += size
            length = headers["content-length"]
            body = file.read(min(length, piece.max_record_bytes + 1))
            size = len(body)
            while size < length and (rest := file.read(min(length - size, 1 << 20))):
                size += len(rest)
            if size < length:
                raise EOFError(f"record {at} has {size} of {length} bytes")
            if headers.get("warc-type") not in _NOT_DOCUMENTS:
                yield _warc_row(piece, headers, body, at, offset)
            del body
            offset += length


_WARC_HEADER_BYTES = 1 << 20


def _warc_headers(path: str, first: bytes, file: Any) -> tuple[dict[str, Any], int]:
    if not first.startswith(b"WARC/"):
        raise damaged(path, f"expected 'WARC/1.0', found {first[:40]!r}")
    headers: dict[str, Any] = {}
    size = 0
    while (line := file.readline(1 << 16)).strip():
        size += len(line)
        if size > _WARC_HEADER_BYTES:
            raise damaged(path, f"a record's headers go on for {size:,} bytes")
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip()
    if not re.fullmatch("[0-9]{1,18}", headers.get("content-length", "")):
        raise damaged(path, f"a record without a valid Content-Length: {headers}")
    headers["content-length"] = int(headers["content-length"])
    return headers, size + len(line)


def _warc_row(piece: Piece, headers: dict[str, Any], body: bytes, at: int, offset: int) -> Row | Bad:
    if headers.get("warc-type") == "response" or not headers.get("content-type", "").startswith("text/plain"):
        what = f"{headers.get('warc-type')} of {headers.get('content-type')}"
        return Bad("not_text", f"a {what}, not plain text; extract the text first (WET)", at, offset, body)
    row = _decoded(piece, body.rstrip(b"\r\n"), at, offset)
    return row if isinstance(row, Bad) else row._replace(fields={**headers, **row.fields})


# --- MDS -----------------------------------------------------------------------------------------------------------

_MDS_VALUES: dict[str, Callable[[bytes], Any]] = {
    "str": lambda raw: raw.decode("utf-8"),
    "bytes": lambda raw: raw.decode("utf-8"),
    "json": orjson.loads,
    "int": lambda raw: int.from_bytes(raw, "little", signed=True),
}


def read_mds(piece: Piece, columns: frozenset[str]) -> Iterator[Row | Bad]:
    """Samples of an MDS shard that hold text (``str``, ``bytes`` or ``json`` columns), to tokenise again."""
    limit = piece.max_record_bytes
    with naming(piece.path), ShardFile(piece.path) as shard:
        for at, (offset, size, file) in enumerate(shard.samples(), start=1):
            raw = b"" if size > limit else file.read(size)  # of a large one, the wanted columns may be small
            source = io.BytesIO(raw) if size <= limit else file
            values = _mds_values(shard, source, size, columns, limit)
            if values is None:
                yield oversized(limit, at, offset, raw)
                continue
            try:
                fields = {name: _MDS_VALUES[shard.columns[name]](value) for name, value in values.items()}
            except UnicodeDecodeError as error:
                yield Bad("utf8", f"not valid UTF-8: {error.reason} at byte {error.start}", at, offset, raw)
            except orjson.JSONDecodeError as error:
                yield Bad("json", f"not valid JSON: {error}", at, offset, raw)
            else:
                yield Row(fields, at, offset, raw)
                del fields
            del source, values, raw


def shard_columns(path: str) -> list[str]:
    """Return the names of the columns of an MDS shard."""
    with naming(path), ShardFile(path) as shard:
        return list(shard.columns)


def _mds_values(
    shard: ShardFile, file: IO[bytes], size: int, columns: frozenset[str], limit: int
) -> dict[str, bytes] | None:
    """Read all of one sample; return the wanted values, or None if one is too long."""
    found: dict[str, bytes] = {}
    too_long = False
    for name, length in zip(shard.columns, shard.value_lengths(file, size)):
        wanted = name in columns and shard.columns[name] in _MDS_VALUES
        if wanted and length <= limit:
            found[name] = file.read(length)
        if (len(found[name]) if name in found else skip(file, length)) < length:
            raise EOFError("it ends inside a sample")
        too_long |= wanted and length > limit
    return None if too_long else found


FORMATS: dict[str, Format] = {
    "jsonl": Format(read_jsonl, (".jsonl", ".ndjson"), unit="bytes"),
    "parquet": Format(read_parquet, (".parquet",), "groups", "row", count_groups=count_groups, columns=parquet_columns),
    "arrow": Format(
        read_arrow, (".arrow", ".feather"), "groups", "row", count_groups=count_batches, columns=arrow_columns
    ),
    "csv": Format(read_csv, (".csv",)),
    "tsv": Format(read_tsv, (".tsv",)),
    "warc": Format(read_warc, (".warc", ".wet"), place="record"),
    "mds": Format(read_mds, (".mds",), place="sample", columns=shard_columns),
    "text": Format(read_text, is_text=True),
    "text-lines": Format(read_text_lines, unit="bytes", is_text=True),
    "text-blocks": Format(read_text_blocks, is_text=True),
}
