"""Our shards are MDSWriter's shards, byte for byte, and StreamingDataset reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mixer import mds
from mixer.errors import DataError, InputError

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 60_000, (7, 16))
# name: (columns, n samples as rows)
COLUMN_SETS = {
    "uint16": ({"tokens": "ndarray:uint16:16"}, [{"tokens": row.astype(np.uint16)} for row in TOKENS]),
    "uint32": ({"tokens": "ndarray:uint32:16"}, [{"tokens": row.astype(np.uint32)} for row in TOKENS]),
    "int64": ({"tokens": "ndarray:int64:16"}, [{"tokens": row} for row in TOKENS]),
    "matrix": ({"x": "ndarray:float32:2,3"}, [{"x": np.full((2, 3), i, np.float32)} for i in range(5)]),
    "bytes": ({"tokens": "bytes"}, [{"tokens": row.tobytes()} for row in TOKENS]),
    "fixed and variable": (
        {"tokens": "ndarray:uint16:16", "doc_starts": "ndarray:uint16", "text": "str", "n": "int", "loss": "float32"},
        [
            {
                "tokens": row.astype(np.uint16),
                "doc_starts": np.arange(i + 1, dtype=np.uint16),
                "text": "é" * i,
                "n": i,
                "loss": i / 3,
            }
            for i, row in enumerate(TOKENS)
        ],
    ),
    "dynamic arrays": ({"x": "ndarray"}, [{"x": np.zeros((300, 2), np.float16)}, {"x": np.arange(3)}]),
    "several fixed": (
        {"b": "uint8", "a": "ndarray:float16:3"},
        [{"b": i, "a": np.full(3, i, np.float16)} for i in range(4)],
    ),
    "text kinds": ({"j": "json", "i": "str_int", "f": "str_float"}, [{"j": {"a": [1, 2]}, "i": 10**30, "f": 0.1}]),
}


def write_by_streaming(folder, columns, rows, **options):
    streaming = pytest.importorskip("streaming", exc_type=ImportError)
    writer = streaming.MDSWriter(out=str(folder), columns=columns, **options)
    for row in rows:
        writer.write(row)
    writer.finish()
    return (folder / "shard.00000.mds").read_bytes(), (folder / "index.json").read_text()


@pytest.mark.parametrize("name", COLUMN_SETS)
def test_shard_and_index_are_mdswriters_byte_for_byte(tmp_path, name):
    columns, rows = COLUMN_SETS[name]
    options = {"hashes": ["sha256", "xxh64"], "size_limit": 1 << 20}
    theirs, their_index = write_by_streaming(tmp_path / "theirs", columns, rows, **options)
    ours = mds.encode_shard(columns, rows, **options)
    assert ours == theirs
    entry = mds.shard_entry(columns, "shard.00000.mds", ours, num_samples=len(rows), **options)
    assert mds.write_index(tmp_path, [entry]).read_text() == their_index


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_array_of_samples_gives_the_same_bytes_as_rows(dtype):
    columns = {"tokens": mds.token_encoding(dtype, 16)}
    array = TOKENS.astype(dtype)
    assert mds.encode_shard(columns, array) == mds.encode_shard(columns, [{"tokens": row} for row in array])
    assert mds.encode_shard(columns, np.asfortranarray(array)) == mds.encode_shard(columns, {"tokens": array})


def test_ragged_column_gives_the_same_bytes_as_its_vectors():
    lengths = np.array([1, 255, 256, 3, 65_535, 65_536])
    values = np.arange(lengths.sum()).astype(np.uint16)
    rows = np.split(values, np.cumsum(lengths)[:-1])
    columns = {"a": "ndarray:uint16", "id": "uint64", "tokens": "ndarray:uint16:2", "z": "str"}
    rest = {"id": np.arange(6, dtype=np.uint64), "tokens": values[:12].reshape(6, 2), "z": list("abcdef")}
    expected = mds.encode_shard(columns, [dict(zip(columns, row)) for row in zip(rows, *rest.values())])
    assert mds.encode_shard(columns, {"a": mds.Ragged(values, lengths), **rest}) == expected
    assert mds.encode_shard(columns, {"a": rows, **rest}) == expected
    for wrong in (values.astype(np.int32), values[:-1].reshape(-1, 1)[:0, 0]):
        with pytest.raises(InputError, match="cannot hold empty vectors, or"):
            mds.encode_shard(columns, {"a": mds.Ragged(wrong, lengths if len(wrong) else lengths * 0), **rest})


def test_array_of_samples_is_copied_once():
    import tracemalloc

    array = np.zeros((1 << 12, 1 << 10), np.uint16)
    tracemalloc.start()
    raw = mds.encode_shard({"tokens": "ndarray:uint16:1024"}, array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(raw) <= peak < 1.2 * len(raw)


def test_streaming_dataset_reads_compressed_shards_with_hash_validation(tmp_path):
    streaming = pytest.importorskip("streaming", exc_type=ImportError)
    columns, options = {"tokens": "ndarray:uint16:16"}, {"compression": "zstd:3", "hashes": ["xxh64"]}
    entries = []
    for i in range(2):
        raw = mds.encode_shard(columns, TOKENS.astype(np.uint16) + i, **options)
        zipped = mds.compress("zstd:3", raw)
        entries.append(mds.shard_entry(columns, f"shard.{i:05}.mds", raw, num_samples=7, zipped=zipped, **options))
        (tmp_path / entries[-1]["zip_data"]["basename"]).write_bytes(zipped)
    mds.write_index(tmp_path, entries)
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(tmp_path), validate_hash="xxh64", batch_size=1)
    got = np.stack([dataset[i]["tokens"] for i in range(14)])
    assert (got == np.concatenate([TOKENS, TOKENS + 1]).astype(np.uint16)).all()


def test_header_gives_offsets_and_columns():
    columns, rows = COLUMN_SETS["fixed and variable"]
    raw = mds.encode_shard(columns, rows)
    header = mds.parse_header(raw)
    assert header.num_samples == len(rows) and header.offsets[-1] == len(raw)
    assert header.config["column_names"] == sorted(columns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:6],
        lambda raw: b"\xff" + raw[1:],
        lambda raw: raw[:4] + b"\x01" + raw[5:],
        lambda raw: raw + b"x",
    ],
)
def test_damaged_header_is_refused_by_name(damage):
    raw = mds.encode_shard({"tokens": "ndarray:uint16:16"}, TOKENS.astype(np.uint16))
    with pytest.raises(DataError, match=r"shard\.7"):
        mds.parse_header(damage(raw), "shard.7")


@pytest.mark.parametrize(
    ("columns", "samples", "text"),
    [
        ({"a": "ndarray:uint16:4"}, np.zeros((2, 5), np.uint16), r"column 'a'.*\(2, 5\)"),
        ({"a": "ndarray:uint16:4"}, np.zeros((2, 4), np.int64), "int64"),
        ({"a": "ndarray:uint16"}, [{"a": np.zeros(0, np.uint16)}], "at least one element"),
        ({"a": "ndarray:float8:4"}, [], "not an ndarray encoding"),
        ({"a": "int", "b": "int"}, np.zeros((2, 4)), "fits one column"),
        ({"a": "int", "b": "int"}, [{"a": 1}], r"missing \['b'\]"),
        ({"a": "int"}, {"a": [1], "b": [1]}, "do not fit"),
        ({"a": "pil"}, [{"a": 1}], "encoded bytes"),
        ({"a": "str"}, [{"a": 1}], "cannot hold 1"),
        ({"a": "int"}, [{"a": b"123"}], "takes 8 bytes"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_column(columns, samples, text):
    with pytest.raises(InputError, match=text):
        mds.encode_shard(columns, samples)


def test_unknown_hash_and_compression_are_refused():
    with pytest.raises(InputError, match="sorted"):
        mds.encode_shard({"a": "int"}, [{"a": 1}], hashes=["xxh64", "md5"])
    with pytest.raises(InputError, match="crc7"):
        mds.hash_hex("crc7", b"")
    with pytest.raises(InputError, match="'zstd'"):
        mds.compress("zstd:40", b"")
    with pytest.raises(InputError, match="contradict"):
        mds.shard_entry({"a": "int"}, "shard.00000.mds", b"", num_samples=0, compression="zstd")


def test_empty_index_is_valid_json(tmp_path):
    assert json.loads(mds.write_index(tmp_path, []).read_text()) == {"version": 2, "shards": []}
