"""Arrow and Parquet come back row by row, few at a time, whatever their batches and pages; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.arrow_files import arrow_slices, parquet_slices
from converters.options import StageOptions
from converters.plan import make_plan
from converters.readers import Bad
from converters.stage import documents_of
from mixer.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LIMIT = 1000


def texts(count: int = 300) -> list[str]:
    """Short texts, among them a run of long ones."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 40, count)
    sizes[100:160] = 900
    return ["é" * int(size // 2) + str(n) for n, size in enumerate(sizes)]


def table(**extra: object) -> pyarrow.Table:
    rows = texts()
    return pyarrow.table({"text": rows, "other": ["x" * 50] * len(rows), **extra})


def read(found) -> tuple[list[str], list[int], int]:
    """Return the texts, the numbers of the rows, and the most bytes that came at once."""
    parts = [(at, part) for at, part in found]
    rows = [text for _, part in parts for text in part.column(0).to_pylist()]
    numbers = [at + n for at, part in parts for n in range(part.num_rows)]
    return rows, numbers, max(part.nbytes for _, part in parts)


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", [None, "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_parquet_gives_fewer_rows_at_a_time_where_they_are_large(tmp_path, dictionary, version, encoding):
    path = tmp_path / "a.parquet"
    how = {
        "data_page_version": version,
        "data_page_size": 500,
        "write_batch_size": 1,
        "row_group_size": 170,
        "dictionary_pagesize_limit": 900,
    }
    how |= {"column_encoding": {"text": encoding, "other": "PLAIN"}} if encoding else {}
    parquet.write_table(table(), path, use_dictionary=dictionary and not encoding, **how)
    rows, numbers, most = read(parquet_slices(str(path), 0, None, frozenset({"text"}), LIMIT))
    assert rows == texts()
    assert numbers == list(range(1, 301))
    assert most <= 4 * LIMIT + 100  # and not 16 rows of 900
    rows, numbers, _ = read(parquet_slices(str(path), 1, None, frozenset({"text"}), LIMIT))
    assert (rows, numbers) == (texts()[170:], list(range(171, 301)))


def test_large_page_of_parquet_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["short", "x" * 100_000], "other": ["y" * 200_000] * 2}), path)
    columns = frozenset({"text"})
    with pytest.raises(DataError, match=r"a.parquet: a page of column 'text' in row group 0 takes 100,0.*--max-record"):
        list(parquet_slices(str(path), 0, None, columns, 20_000))
    assert read(parquet_slices(str(path), 0, None, columns, 26_000))[0][0] == "short"  # whatever the other column holds


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("nested", [False, True])
def test_arrow_batches_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch, kind, compression, nested):
    monkeypatch.setattr("converters.arrow_files._SLICE_BYTES", 4000)
    path = tmp_path / "a.arrow"
    content = table(list=[["a", "b"]] * 300, code=pyarrow.array(["x", "y", "z"] * 100).dictionary_encode())
    write_arrow(path, content, kind, compression, 120)
    columns = frozenset({"text", "list", "code"} if nested else {"text"})
    rows, numbers, most = read(arrow_slices(str(path), 1, 3, columns, 1 << 20))
    assert (rows, numbers) == (texts()[120:], list(range(121, 301)))
    assert most <= 4000


def write_arrow(path: Path, content: pyarrow.Table, kind: str, compression: str | None, rows: int = 1 << 20) -> None:
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(str(path), "wb") as file, make(file, content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=rows)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_large_compressed_batch_is_refused_by_what_is_wanted_of_it(tmp_path, kind):
    path = tmp_path / "a.arrow"
    content = pyarrow.table({"large": ["y" * 500_000] * 2, "text": ["short", "x" * 90_000], "n": [1, 2]})
    write_arrow(path, content, kind, "zstd")
    with pytest.raises(DataError, match=r"a.arrow: record batch 0 takes 90,0.*not compressed .*--max-record 1MiB"):
        list(arrow_slices(str(path), 0, None, frozenset({"text"}), 20_000))
    assert read(arrow_slices(str(path), 0, None, frozenset({"text", "n"}), 30_000))[0][0] == "short"
    write_arrow(path, content, kind, None)
    assert read(arrow_slices(str(path), 0, None, frozenset({"text"}), 20_000))[0][0] == "short"


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_row_beyond_the_limit_is_oversized(tmp_path, suffix):
    content = pyarrow.table({"text": ["first", "x" * 3000, "last"]})
    path = tmp_path / f"a.{suffix}"
    parquet.write_table(content, path) if suffix == "parquet" else write_arrow(path, content, "stream", None)
    options = StageOptions(max_record_bytes=2000)
    (unit,) = make_plan([path], options, {}).units
    rows = list(documents_of(unit.pieces[0], options))
    assert [row.reason if isinstance(row, Bad) else row.text for row in rows] == ["first", "oversized", "last"]
