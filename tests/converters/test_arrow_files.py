"""Arrow and Parquet come back row by row, few at a time, whatever their batches and pages; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters.arrow_files import _chunks, arrow_slices, parquet_slices
from converters.options import StageOptions
from converters.plan import make_plan
from converters.readers import Bad
from converters.stage import documents_of
from mixer.errors import DataError, InputError

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


SHARED = {
    "view": lambda rows: pyarrow.array(rows, pyarrow.string_view()),
    "dictionary": lambda rows: pyarrow.array(rows).dictionary_encode(),
    "struct of views": lambda rows: pyarrow.array(
        [{"t": row, "more": [row[:2]]} for row in rows],
        pyarrow.struct([("t", pyarrow.string_view()), ("more", pyarrow.list_(pyarrow.string_view()))]),
    ),
}


def write(path: Path, found: pyarrow.Table) -> None:
    if path.suffix == ".arrow":
        write_arrow(path, found, "file", None)
    else:
        parquet.write_table(found, path, write_batch_size=1, data_page_size=500, dictionary_pagesize_limit=900)


def documents_in(path: Path, **options: object) -> list:
    given = StageOptions(**options)  # type: ignore[arg-type]
    (unit,) = make_plan([path], given, {}).units
    return [row for piece in unit.pieces for row in documents_of(piece, given)]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_rows_count_with_their_own_text_where_it_is_kept_beside_them(tmp_path, kind, suffix):
    """As Polars writes texts, and pandas categories: a slice holds on to the texts of all rows."""
    if (kind, suffix) == ("struct of views", "parquet"):
        pytest.skip("Parquet has no such lists")
    rows, path = texts(), tmp_path / f"a.{suffix}"
    found = pyarrow.table({"text": SHARED[kind](rows)})
    write(path, found)
    field = "text.t" if "struct" in kind else "text"
    assert [getattr(row, "text", row) for row in documents_in(path, text_field=field, max_record_bytes=20_000)] == rows
    if (kind, suffix) == ("dictionary", "parquet"):
        return  # all of it is one page
    bad = [row for row in documents_in(path, text_field=field, max_record_bytes=400) if isinstance(row, Bad)]
    assert {row.reason for row in bad} == {"oversized"}
    assert len(bad) == 60


def test_text_among_views_that_is_no_utf8_is_one_bad_record(tmp_path):
    raw = pyarrow.array([b"fine", b"caf\xe9 and more than twelve bytes", b"\xff", b"good"], pyarrow.binary_view())
    views = pyarrow.Array.from_buffers(pyarrow.string_view(), len(raw), raw.buffers())
    write(tmp_path / "a.arrow", pyarrow.table({"text": views}))
    rows = documents_in(tmp_path / "a.arrow")
    assert [row.reason if isinstance(row, Bad) else row.text for row in rows] == ["fine", "utf8", "utf8", "good"]


def test_text_beyond_the_limit_among_views_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr("converters.arrow_files._SLICE_BYTES", LIMIT)
    rows = ["a", "x" * 50_000, None, "b"]
    write(tmp_path / "a.arrow", pyarrow.table({"text": pyarrow.array(rows, pyarrow.string_view())}))
    found = arrow_slices(str(tmp_path / "a.arrow"), 0, None, frozenset({"text"}), LIMIT)
    kinds = [str(part.column(0).type) for _, part in found]
    assert kinds == ["large_string", "string_view", "large_string", "large_string"]
    reasons = [getattr(row, "reason", None) for row in documents_in(tmp_path / "a.arrow", max_record_bytes=LIMIT)]
    assert reasons == [None, "oversized", "no_text", None]


def test_column_that_is_there_twice_is_no_crash(tmp_path):
    write(tmp_path / "a.arrow", pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], ["text", "text"]))
    assert [row.text for row in documents_in(tmp_path / "a.arrow")] == ["two"]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damaged_bytes_give_rows_or_one_named_error(tmp_path, kind, compression):
    path = tmp_path / "a.arrow"
    write_arrow(path, pyarrow.table({"text": SHARED[kind](texts(12))}), "file", compression)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(raw)
        for at in rng.integers(0, len(raw), rng.integers(1, 5)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            documents_in(path, text_field="text.t" if "struct" in kind else "text")
        except (DataError, InputError) as error:
            assert path.name in str(error)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_path_leads_into_a_map(tmp_path, suffix):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    meta = pyarrow.array([[("set", "web"), ("t", "one")], [("set", "code")], [], None], kind)
    write(tmp_path / f"a.{suffix}", pyarrow.table({"meta": meta}))
    first, *others = documents_in(tmp_path / f"a.{suffix}", domain="field:meta.set", text_field="meta.t")
    assert (first.text, first.domain) == ("one", "web")
    assert [row.reason for row in others] == ["no_text", "domain", "domain"]


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_quarantine_keeps_what_was_read_of_a_row(tmp_path, suffix):
    found = pyarrow.table({"text": ["fine", "lost", "x" * 9000], "set": ["web", None, "web"]})
    path = tmp_path / f"a.{suffix}"
    write(path, found)
    _, lost, large = documents_in(path, domain="field:set", max_record_bytes=5000)
    assert (lost.reason, lost.raw) == ("domain", b"{'text': 'lost', 'set': None}")
    assert large.reason == "oversized"
    assert b"xxx" in large.raw
    assert len(large.raw) < 5000


def test_columns_lie_where_the_library_says(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(meta=[{"set": "a", "more": ["x"]}] * 300), path, row_group_size=70)
    metadata = parquet.ParquetFile(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    theirs = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    ours = _chunks(str(path), "")
    assert [[".".join(chunk.path) for chunk in group] for group in ours] == [
        [chunk.path_in_schema for chunk in group] for group in theirs
    ]
    assert [[(chunk.start, chunk.end - chunk.start) for chunk in group] for group in ours] == [
        [(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size) for chunk in group]
        for group in theirs
    ]


def test_damaged_footer_of_parquet_is_an_error_and_not_the_end_of_the_process(tmp_path):
    path = tmp_path / "a.parquet"
    found = pyarrow.table({"text": ["a", "b"], "n": [1, None], "meta": [{"set": "a", "more": ["x"]}] * 2})
    parquet.write_table(found, path)
    raw = path.read_bytes()
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    errors = 0
    for at in range(start, start + 120):  # the schema: where it does not fit the rest, the library gives up
        damaged = bytearray(raw)
        damaged[at] = 0
        path.write_bytes(damaged)
        try:
            documents_in(path, domain="field:meta.set")
        except (DataError, InputError) as error:
            assert path.name in str(error)
            errors += 1
    assert errors > 50
