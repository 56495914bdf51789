"""Rows of Arrow and Parquet files in bounded memory, whatever the size of their batches, row groups and pages.

Arrow IPC is memory-mapped, from a temporary file if it is compressed or behind a URL, and taken a few rows at a time.
What it or Parquet can only unpack whole, a compressed batch or a page, is looked at first, and refused where it is too
large: no reader could stay within bounds there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from converters.files import compression_suffix, open_bytes, open_raw, status
from converters.thrift import read_struct
from converters.urls import is_url
from mixer.errors import DataError

__all__ = [
    "arrow_columns",
    "arrow_slices",
    "count_arrow_batches",
    "count_row_groups",
    "parquet_columns",
    "parquet_slices",
]

_ROWS, _SLICE_BYTES = 128, 4 << 20  # of a batch at a time
_PARQUET_ROWS = 16  # decoded at a time; fewer where they are large


def most_unpacked(max_record_bytes: int) -> int:
    """Return how many bytes may be unpacked at once."""
    return 4 * max_record_bytes


def _slices(batch: Any, limit: int) -> Iterator[tuple[int, Any]]:
    """Yield (first row, slice) of a batch: of a few rows and few bytes, and one row that is larger.

    Nothing is touched that was not checked: damaged offsets would make Arrow read outside its memory.
    """
    import pyarrow

    batch.validate()
    for column in batch.columns:
        if pyarrow.types.is_string_view(
            column.type
        ):  # a text that is no UTF-8 is one bad record, and not looked for here
            column.cast(pyarrow.binary_view()).validate(full=True)
        elif not _is_flat(pyarrow, column.type):
            column.validate(full=True)
    at, count = 0, _ROWS
    while at < batch.num_rows:
        count = min(2 * count, _ROWS, batch.num_rows - at)
        while count > 1 and batch.slice(at, count).nbytes > _SLICE_BYTES:
            count //= 2
        part = batch.slice(at, count)
        is_too_long = count == 1 and any(_view_bytes(pyarrow, column) > limit for column in part.columns)
        yield at, part if is_too_long else _dense(pyarrow, part)  # a copy, which such a text is not worth
        at += count


def _view_bytes(pyarrow: Any, column: Any) -> int:
    """Return the bytes of the text in a column of views of one row; 0 for other columns."""
    is_view = pyarrow.types.is_string_view(column.type) or pyarrow.types.is_binary_view(column.type)
    if not is_view or column.null_count:
        return 0
    return int.from_bytes(column.buffers()[1].slice(16 * column.offset, 4).to_pybytes(), "little", signed=True)


def _is_flat(pyarrow: Any, kind: Any) -> bool:
    if pyarrow.types.is_struct(kind):
        return all(_is_flat(pyarrow, field.type) for field in kind)
    return not (pyarrow.types.is_nested(kind) or _is_shared(pyarrow, kind))


def _is_shared(pyarrow: Any, kind: Any) -> bool:
    """Return whether a column keeps its values beside its rows, so that a slice holds on to those of all rows."""
    types = pyarrow.types
    return types.is_dictionary(kind) or types.is_string_view(kind) or types.is_binary_view(kind)


def _dense(pyarrow: Any, rows: Any) -> Any:
    """Return rows that hold their own values only."""
    kinds = [_dense_type(pyarrow, kind) for kind in rows.schema.types]
    if kinds == rows.schema.types:
        return rows
    columns = [column if column.type == kind else column.cast(kind) for column, kind in zip(rows.columns, kinds)]
    return pyarrow.RecordBatch.from_arrays(columns, names=rows.schema.names)


def _dense_type(pyarrow: Any, kind: Any) -> Any:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _dense_type(pyarrow, kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pyarrow.large_string() if types.is_string_view(kind) else pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_dense_type(pyarrow, field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(_dense_type(pyarrow, kind.value_type)))
    return kind


# --- Arrow IPC -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    plain = not is_url(path) and not compression_suffix(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb")) if plain else _copied(path, status(path).version)
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped when no batch needs it any more


@functools.lru_cache(maxsize=1)  # for the next unit of the same file
def _copied(path: str, version: str) -> IO[bytes]:
    """Return an unpacked copy of a file, which the system removes when it is not used any more."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with open_bytes(path) as file:
        shutil.copyfileobj(file, copy, 1 << 20)
    copy.flush()
    return copy


def _messages(pyarrow: Any, data: Any, is_file: bool) -> Iterator[Any]:
    """Yield the messages that hold batches, in order; their contents stay where they are."""
    reader = pyarrow.ipc.MessageReader.open_stream(pyarrow.BufferReader(data.slice(8) if is_file else data))
    return (message for message in reader if message.type == "record batch")


def _opened(path: str, mapped: mmap.mmap) -> tuple[Any, Any, bool]:
    """Return pyarrow, the bytes and whether it is the file format, and not that of streams (as datasets are saved)."""
    import pyarrow

    return pyarrow, pyarrow.py_buffer(mapped), mapped[:6] == b"ARROW1"


def count_arrow_batches(path: str) -> int:
    """Return the record batches of an Arrow file or stream."""
    with _mapped(path) as mapped:
        pyarrow, data, is_file = _opened(path, mapped)
        if is_file:
            return pyarrow.ipc.open_file(pyarrow.BufferReader(data)).num_record_batches
        return sum(1 for _ in _messages(pyarrow, data, is_file))


def arrow_columns(path: str) -> list[str]:
    """Return the names of the columns of an Arrow file or stream."""
    with _mapped(path) as mapped:
        pyarrow, data, is_file = _opened(path, mapped)
        opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        return opened(pyarrow.BufferReader(data)).schema.names


def arrow_slices(
    path: str, start: int, stop: int | None, columns: frozenset[str], limit: int
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first row, a few rows) of the record batches ``start`` to ``stop``.

    Raises: DataError: if a batch is compressed and takes more than ``most_unpacked``.
    """
    with _mapped(path) as mapped:
        pyarrow, data, is_file = _opened(path, mapped)
        opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        schema = opened(pyarrow.BufferReader(data)).schema
        wanted = [n for n, name in enumerate(schema.names) if name in columns]
        options = pyarrow.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        whole, chosen = opened(pyarrow.BufferReader(data)), opened(pyarrow.BufferReader(data), options=options)
        at, consumed = 1, 0
        for number, message in enumerate(_messages(pyarrow, data, is_file)):
            if stop is not None and number >= stop:
                return
            facts = _Batch(message)
            if is_file and number < start:
                at += facts.num_rows
                continue
            size = facts.unpacked_bytes(pyarrow, schema, wanted)
            if size > most_unpacked(limit):
                how = "buffers that are not compressed (compression=None), or in shorter batches"
                raise _too_large(path, f"record batch {number}", size, limit, how)
            # The file format copies what it chooses from; that is no use but where it unpacks.
            if not is_file:
                batch = chosen.read_next_batch()
            else:
                batch = chosen.get_batch(number) if size else whole.get_batch(number).select(wanted)
            for first, part in _slices(batch, limit) if number >= start else ():
                yield at + first, part
                consumed += part.nbytes
                if consumed > 2 * _SLICE_BYTES:
                    mapped.madvise(mmap.MADV_DONTNEED)  # else what was read stays with this process
                    consumed = 0
            at += batch.num_rows


class _Batch:
    """What the message of a record batch says of it: a FlatBuffer, see ``Message.fbs`` of Arrow's format."""

    def __init__(self, message: Any) -> None:
        self._data, self._body = memoryview(message.metadata), message.body
        self._table = self._follow(self._field(self._int("<I", 0), 2))
        self.num_rows = self._int("<q", self._field(self._table, 0))

    def unpacked_bytes(self, pyarrow: Any, schema: Any, wanted: Sequence[int]) -> int:
        """Return the bytes that the wanted columns take once they are decompressed; 0 if they are not compressed."""
        if not self._field(self._table, 3):
            return 0
        first = self._follow(self._field(self._table, 2))
        counts = [_num_buffers(pyarrow, kind) for kind in schema.types]
        known = [count for count in counts if count is not None]
        is_wanted = [n in wanted for n, count in enumerate(counts) for _ in range(count or 0)]
        total = 0
        for n in range(self._int("<I", first)):
            offset, length = struct.unpack_from("<qq", self._data, first + 4 + 16 * n)
            if length >= 8 and (len(known) < len(counts) or (n < len(is_wanted) and is_wanted[n])):
                size = int.from_bytes(self._body.slice(offset, 8).to_pybytes(), "little", signed=True)
                total += length if size < 0 else size
        return total

    def _int(self, form: str, at: int) -> int:
        return struct.unpack_from(form, self._data, at)[0] if at else struct.unpack_from("<I", self._data)[0]

    def _follow(self, at: int) -> int:
        return at + self._int("<I", at)

    def _field(self, table: int, number: int) -> int:
        """Return where a table's field lies, 0 if it has none."""
        fields = table - self._int("<i", table)
        if 4 + 2 * number >= self._int("<H", fields):
            return 0
        offset = self._int("<H", fields + 4 + 2 * number)
        return table + offset if offset else 0


def _num_buffers(pyarrow: Any, kind: Any) -> int | None:
    """Return how many buffers a column of this type has; None for types that are rare in texts."""
    types = pyarrow.types
    if types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind):
        inner = [_num_buffers(pyarrow, field.type) for field in kind] if types.is_struct(kind) else []
        inner += [] if types.is_struct(kind) else [_num_buffers(pyarrow, kind.value_type)]
        own = 1 if types.is_struct(kind) else 2
        return None if None in inner else own + sum(count for count in inner if count is not None)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return 3
    return 2 if types.is_primitive(kind) or types.is_fixed_size_binary(kind) or types.is_dictionary(kind) else None


def _too_large(path: str, what: str, size: int, limit: int, how: str) -> DataError:
    return DataError(
        f"{path}: {what} takes {size:,} bytes, which are unpacked whole, and {most_unpacked(limit):,} are allowed: four"
        f" times --max-record. Write the file again with {how}, or give --max-record {-(-size // (4 << 20))}MiB and"
        f" some {(3 * size >> 20) + 100:,} MiB of memory per worker."
    )


# --- Parquet -------------------------------------------------------------------------------------------------------


def count_row_groups(path: str) -> int:
    """Return the row groups of a Parquet file."""
    import pyarrow.parquet

    with open_raw(path) as file:
        return pyarrow.parquet.ParquetFile(file).num_row_groups


def parquet_columns(path: str) -> list[str]:
    """Return the names of the columns of a Parquet file."""
    import pyarrow.parquet

    with open_raw(path) as file:
        return pyarrow.parquet.ParquetFile(file).schema_arrow.names


def parquet_slices(
    path: str, start: int, stop: int | None, columns: frozenset[str], limit: int
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first row, a few rows) of the row groups ``start`` to ``stop``.

    Raises: DataError: if a page takes more than ``most_unpacked``.
    """
    import pyarrow.parquet

    with open_raw(path) as raw:
        pages = _WatchedPages(raw, path, limit)
        file = pyarrow.parquet.ParquetFile(pages, buffer_size=1 << 20)  # else a column of a row group is read at once
        chunks = _chunks(path, status(path).version)
        wanted = [name for name in file.schema_arrow.names if name in columns]
        at = 1 + sum(file.metadata.row_group(group).num_rows for group in range(start))
        for group in range(start, file.num_row_groups if stop is None else stop):
            watched = [chunk for chunk in chunks[group] if chunk.path[0] in wanted]
            for batch in _group_batches(file, pages, group, wanted, watched):
                for first, part in _slices(_dense(pyarrow, batch), limit):
                    yield at + first, part
                at += batch.num_rows


class _ChunkFacts(NamedTuple):
    """Where a column of a row group lies in the file, and its names from the outermost on."""

    path: tuple[str, ...]
    start: int
    end: int


@functools.lru_cache(maxsize=1)
def _chunks(path: str, version: str) -> list[list[_ChunkFacts]]:
    """Return the columns of every row group of a Parquet file.

    Read from the footer here, because the library ends the process where what it says of a column is damaged.
    """
    with open_raw(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - length, 0))
        footer = file.read(length)
    groups: list[list[_ChunkFacts]] = []
    try:
        read_struct(footer, 0, {4: lambda group: groups.append([_chunk_facts(column[3]) for column in group[1]])})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its footer makes no sense: {error!r}") from error
    return groups


def _chunk_facts(facts: Mapping[int, Any]) -> _ChunkFacts:
    first, data = facts.get(11), int(facts[9])
    start = first if first and first < data else data
    return _ChunkFacts(tuple(name.decode("utf-8") for name in facts[3]), start, start + int(facts[7]))


def _group_batches(
    file: Any, pages: _WatchedPages, group: int, wanted: list[str], watched: Sequence[_ChunkFacts]
) -> Iterator[Any]:
    """Yield the rows of a row group, fewer at a time once its pages are found to hold large ones."""
    rows, done = _PARQUET_ROWS, 0
    while True:
        pages.watch(group, watched, rows)
        at = 0
        try:
            for batch in file.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
                new = batch.slice(max(done - at, 0))
                at += batch.num_rows
                if new.num_rows:
                    done = at
                    yield new
            return
        except _LargeRows as found:
            rows = found.rows


class _LargeRows(Exception):
    """So many rows are enough at a time."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


class _Chunk:
    """A column of a row group: where its next page begins, and where it ends."""

    def __init__(self, facts: _ChunkFacts) -> None:
        self.name = ".".join(facts.path)
        self.next, self.end = facts.start, facts.end


class _WatchedPages:
    """A file that looks at the headers of the pages that Parquet reads from it, before they are unpacked."""

    def __init__(self, file: IO[bytes], path: str, limit: int) -> None:
        self._file, self._path, self._limit = file, path, limit
        self._chunks: list[_Chunk] = []
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.closed, self.mode = False, "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def watch(self, group: int, columns: Sequence[_ChunkFacts], rows: int) -> None:
        """Look at these columns of a row group, of which so many rows are read at a time."""
        self._group, self._rows = group, rows
        self._chunks = [_Chunk(facts) for facts in columns]

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = self._file.read(size)
        for chunk in self._chunks:
            while start <= chunk.next < min(start + len(data), chunk.end):
                self._look(chunk, data[chunk.next - start : chunk.next - start + (1 << 12)])
        return data

    def _look(self, chunk: _Chunk, data: bytes) -> None:
        """Check the page that begins there, and go on to the next."""
        after = self._file.tell()
        try:
            for size in (1 << 16, 1 << 20, 1 << 24):
                with contextlib.suppress(IndexError):
                    header, length = read_struct(data, 0)
                    break
                self._file.seek(chunk.next)  # it is longer than what was read of it
                data = self._file.read(size)
            else:
                header, length = {}, chunk.end
        except ValueError:
            header, length = {}, chunk.end  # damaged, as Parquet will say
        header = _page_facts(header)
        self._file.seek(after)
        chunk.next += length + max(header.get(3, 0), 0)
        self._check(chunk.name, header)

    def _check(self, name: str, header: Mapping[int, Any]) -> None:
        size, most = header.get(2, 0), most_unpacked(self._limit)
        if size > most:
            how = "smaller pages (in pyarrow, write_batch_size=16)"
            raise _too_large(
                self._path, f"a page of column {name!r} in row group {self._group}", size, self._limit, how
            )
        values = header.get(5) or header.get(8) or header.get(7) or {}
        count = 1 if header.get(7) else max(values.get(1, 1), 1)  # any value may be as large as all of a dictionary
        encoding = values.get(4 if header.get(8) else 2)
        rows = 1 if encoding == _DELTA_BYTE_ARRAY and not header.get(7) else max(1, most * count // max(size, 1))
        if rows < self._rows:
            raise _LargeRows(rows)


def _page_facts(header: Mapping[int, Any]) -> dict[int, Any]:
    """Return sizes and structs of numbers of a page's header, without what damage made of them.

    >>> _page_facts({1: 0, 2: True, 3: 9, 5: 7, 8: {1: 20, 2: b"?"}})
    {3: 9, 8: {1: 20}}
    """
    sizes = {key: header[key] for key in (2, 3) if type(header.get(key)) is int}
    structs = {key: header[key] for key in (5, 7, 8) if isinstance(header.get(key), Mapping)}
    return sizes | {key: {n: value for n, value in each.items() if type(value) is int} for key, each in structs.items()}


_DELTA_BYTE_ARRAY = 7  # values given by what differs from the one before may be longer than their page
