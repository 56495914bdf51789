"""Reading shards: the right rows from every layout, and one clear error for everything wrong with a file."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mixer import MixtureLoader, mds
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest
from mixer.shards import DomainShards, open_domain
from tests.helpers import row_of, write_domain, write_shards

RNG = np.random.default_rng(0)
ROWS = RNG.integers(0, 60_000, (50, 16))


def mds_folder(path, rows, columns=None, **options):
    write_domain(path, rows, columns=columns, samples_per_shard=20, **options)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_rows_come_back_in_any_order(tmp_path, dtype, compression):
    rows = ROWS.astype(dtype)
    shards = DomainShards("web", "train", mds_folder(tmp_path, rows, compression=compression))
    assert (shards.num_samples, shards.seq_len, shards.dtype, shards.columns) == (
        50,
        16,
        np.dtype(dtype),
        {"tokens": f"ndarray:{dtype}:16"},
    )
    indices = RNG.integers(0, 50, 200)
    got = shards.read(indices)
    assert got.dtype == dtype and got.flags.aligned and got.flags.writeable
    np.testing.assert_array_equal(got, rows[indices])
    assert shards.read(np.zeros(0, np.int64)).shape == (0, 16)


LAYOUTS = {
    "raw bytes of int64, as llm-foundry wrote": ({"tokens": "bytes"}, lambda i, row: {"tokens": row.tobytes()}),
    "ndarray:int32 of dynamic shape, as it writes now": (
        {"tokens": "ndarray:int32"},
        lambda i, row: {"tokens": row.astype(np.int32)},
    ),
    "ndarray of dynamic dtype": ({"tokens": "ndarray"}, lambda i, row: {"tokens": row.astype(np.uint16)}),
    "input_ids among other fixed columns": (
        {"input_ids": "ndarray:int64:16", "a": "int", "z": "float32"},
        lambda i, row: {"input_ids": row, "a": i, "z": 1.5},
    ),
    "after a column of varying length": (
        {"tokens": "ndarray:uint16:16", "doc_starts": "ndarray:uint16"},
        lambda i, row: {"tokens": row.astype(np.uint16), "doc_starts": np.arange(i % 5 + 1, dtype=np.uint16)},
    ),
    "between columns of varying length": (
        {"tokens": "ndarray:uint16:16", "a": "str", "text": "str"},
        lambda i, row: {"tokens": row.astype(np.uint16), "a": "x" * i, "text": "y" * (i % 3)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_token_column_is_read(tmp_path, name):
    columns, sample = LAYOUTS[name]
    mds_folder(tmp_path, [sample(i, row) for i, row in enumerate(ROWS)], columns)
    shards = DomainShards("web", "train", tmp_path)
    np.testing.assert_array_equal(shards.read(np.arange(50)[::-1]).astype(np.int64), ROWS[::-1])


def test_shards_travel_to_another_process(tmp_path):
    shards = DomainShards("web", "train", mds_folder(tmp_path, ROWS))
    shards.read(np.array([1]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards)).read(np.array([49])), ROWS[49:])


def test_shards_at_hand_keep_no_files_open(tmp_path):
    """A process may have 1,024 by default, and twenty domains of long samples have more shards at hand than that."""
    before = len(os.listdir("/dev/fd"))
    write_domain(tmp_path, ROWS.astype(np.uint16), samples_per_shard=1)
    shards = DomainShards("web", "train", tmp_path)
    np.testing.assert_array_equal(shards.read(np.arange(50)), ROWS)
    assert len(os.listdir("/dev/fd")) < before + 10


def test_sample_outside_the_domain_is_refused(tmp_path):
    shards = DomainShards("web", "train", mds_folder(tmp_path, ROWS))
    for index in (-1, 50):
        with pytest.raises(InputError, match="'web' has samples 0…49"):
            shards.read(np.array([0, index]))


def test_decompressed_shards_lie_beside_the_compressed_ones_and_leave_no_parts(tmp_path):
    DomainShards("web", "train", mds_folder(tmp_path, ROWS, compression="zstd")).read(np.arange(50))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", *sorted(f"shard.{i:05}.mds{end}" for i in range(3) for end in ("", ".zstd"))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_decompressed_to_the_cache(tmp_path, monkeypatch):
    check_cache_is_used(tmp_path, monkeypatch, lambda folder: folder.chmod(0o500))


def test_folder_that_refuses_writes_is_decompressed_to_the_cache(tmp_path, monkeypatch):
    import mixer.shards

    real = mixer.shards._write_atomically

    def refuse(path, content):
        if path.is_relative_to(tmp_path / "shards"):
            raise OSError(30, "Read-only file system")
        return real(path, content)

    monkeypatch.setattr(mixer.shards, "_write_atomically", refuse)
    check_cache_is_used(tmp_path, monkeypatch, lambda folder: None)


def check_cache_is_used(tmp_path, monkeypatch, close):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = mds_folder(tmp_path / "shards", ROWS, compression="zstd")
    before = sorted(folder.iterdir())
    close(folder)
    for _ in range(2):
        shards = DomainShards("web", "train", folder)
        np.testing.assert_array_equal(shards.read(np.arange(50)), ROWS)
    assert sorted(folder.iterdir()) == before
    assert len(list(shards.cache_folder().glob("*.mds"))) == 3


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(folder, end):
    one, two, spare = folder / f"shard.00000.mds{end}", folder / f"shard.00001.mds{end}", folder / "spare"
    one.rename(spare), two.rename(one), spare.rename(two)


FAULTS = {
    "bit flipped in a sample": (lambda f, e: flip(f / f"shard.00001.mds{e}"), "xxh64"),
    "bit flipped in an offset": (lambda f, e: flip(f / f"shard.00001.mds{e}", 9), "xxh64"),
    "truncated": (lambda f, e: os.truncate(f / f"shard.00001.mds{e}", 100), "has 100 bytes, its index says"),
    "empty": (lambda f, e: os.truncate(f / f"shard.00001.mds{e}", 0), "has 0 bytes"),
    "missing": (lambda f, e: (f / f"shard.00001.mds{e}").unlink(), "is missing"),
    "swapped with another": (swap, "xxh64|its index says"),
    "a folder": (
        lambda f, e: ((f / f"shard.00001.mds{e}").unlink(), (f / f"shard.00001.mds{e}").mkdir()),
        "cannot be read: Is a dir",
    ),
}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ahead", [False, True])
def test_damaged_shard_is_named_before_any_of_its_samples_is_delivered(tmp_path, fault, compression, ahead):
    damage, text = FAULTS[fault]
    mds_folder(tmp_path, ROWS, compression=compression)
    damage(tmp_path, ".zstd" if compression else "")
    shards = DomainShards("web", "train", tmp_path)
    if ahead:
        shards.prepare([0, 1, 2])
    for _ in range(2):  # a failed check is not forgotten
        with pytest.raises(
            DataError, match=rf"domain 'web', shard .*shard\.0000[01]\.mds.*({text}).*restore it"
        ) as error:
            shards.read(np.arange(50))
        assert "\n" not in str(error.value)
    if "swapped" not in fault:
        np.testing.assert_array_equal(shards.read(np.arange(40, 50)), ROWS[40:])


def test_flipped_bit_without_a_recorded_hash_is_found_by_the_frame_checksum(tmp_path):
    mds_folder(tmp_path, ROWS, compression="zstd", hashes=())
    flip(tmp_path / "shard.00001.mds.zstd", 60)
    with pytest.raises(DataError, match=r"shard\.00001\.mds\.zstd: does not decompress"):
        DomainShards("web", "train", tmp_path).read(np.arange(50))


@pytest.mark.parametrize("damage", [lambda p: flip(p), lambda p: os.truncate(p, 10)])
def test_damaged_raw_copy_of_a_compressed_shard_is_made_anew(tmp_path, damage):
    mds_folder(tmp_path, ROWS, compression="zstd")
    DomainShards("web", "train", tmp_path).read(np.arange(50))
    damage(tmp_path / "shard.00001.mds")
    np.testing.assert_array_equal(DomainShards("web", "train", tmp_path).read(np.arange(50)), ROWS)


def test_verify_never_checks_sizes_and_offsets_but_no_hashes(tmp_path):
    mds_folder(tmp_path, ROWS)
    flip(tmp_path / "shard.00001.mds")
    DomainShards("web", "train", tmp_path, verify="never").read(np.arange(50))
    flip(tmp_path / "shard.00001.mds", 9)
    with pytest.raises(DataError, match="offsets"):
        DomainShards("web", "train", tmp_path, verify="never").read(np.arange(50))


def test_full_disk_while_decompressing_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    mds_folder(tmp_path, ROWS, compression="zstd")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match=r"cannot write the decompressed shard .*No space left on device.*Free space"):
        DomainShards("web", "train", tmp_path).read(np.arange(3))
    assert not list(tmp_path.glob(".*"))


LITTLE_ROOM = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from mixer.errors import DataError
from mixer.shards import DomainShards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the kernel refuses to write more
try:
    DomainShards("web", "train", Path(sys.argv[1])).read(np.arange(3))
except DataError as error:
    print(error)
"""


def test_file_that_cannot_grow_while_decompressing_is_one_sentence_and_leaves_no_part(tmp_path):
    mds_folder(tmp_path, ROWS, compression="zstd")
    done = subprocess.run([sys.executable, "-c", LITTLE_ROOM, tmp_path], capture_output=True, text=True)
    assert re.match(r"domain 'web': cannot write the decompressed shard .*File too large", done.stdout), done.stderr
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".zstd", ".zstd", ".zstd"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=64", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # an error holds on to what was mapped


def test_full_file_system_is_one_sentence_in_the_training_process_and_room_lets_it_go_on(small_disk):
    rows = np.random.default_rng(0).integers(0, 16, (800, 16)).astype(np.uint16)  # four bits of sixteen: zstd halves it
    write_domain(small_disk, rows, samples_per_shard=400, compression="zstd")
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass
    before = sorted(small_disk.iterdir())
    loader = MixtureLoader(small_disk, global_batch_size=8)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"^domain 'disk': cannot write .*shard\.0.*No space left on device\. Free [^\n]*$"
        ):
            next(iter(loader))
        assert sorted(small_disk.iterdir()) == before and loader.step == 0
    ballast.unlink()
    batch = next(iter(loader))
    np.testing.assert_array_equal(batch["input_ids"].numpy(), rows[batch["sample_ids"].numpy()])


def test_sample_of_another_length_is_found(tmp_path):
    rows = [{"tokens": row.astype(np.int32)} for row in ROWS]
    rows[30] = {"tokens": np.zeros(15, np.int32)}
    mds_folder(tmp_path, rows, {"tokens": "ndarray:int32"})
    with pytest.raises(DataError, match=r"shard\.00001\.mds: has samples of column 'tokens' that are not 16 tokens"):
        DomainShards("web", "train", tmp_path).read(np.arange(50))


# --- the index -----------------------------------------------------------------------------------------------------


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def set_name(name):
    def change(index):
        index["shards"][1]["raw_data"]["basename"] = name

    return change


BAD_INDEXES = {
    "a name outside": (set_name("../../etc/passwd"), "points outside its folder"),
    "an absolute name": (set_name("/etc/passwd"), "points outside its folder"),
    "no shards": (lambda index: index["shards"].clear(), "lists no shards"),
    "other columns": (lambda index: index["shards"][1].update(column_names=["x"]), "the first one"),
    "another version": (lambda index: index["shards"][0].update(version=1), "expected version 2"),
    "a missing field": (lambda index: index["shards"][0].pop("samples"), "samples"),
    "negative samples": (lambda index: index["shards"][0].update(samples=-1), "fewer than 0"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_unusable_index_is_refused_by_domain_and_path(tmp_path, name):
    change, text = BAD_INDEXES[name]
    mds_folder(tmp_path, ROWS)
    edit_index(tmp_path, change)
    with pytest.raises(DataError, match=rf"domain 'web': .*index\.json is not a usable MDS index.*{text}"):
        DomainShards("web", "train", tmp_path)


def test_index_that_is_not_json_or_missing_is_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"shards": [')
    with pytest.raises(DataError, match="not a usable MDS index"):
        DomainShards("web", "train", tmp_path)
    with pytest.raises(InputError, match=r"domain 'web': cannot read .*nowhere"):
        DomainShards("web", "train", tmp_path / "nowhere")


def test_index_with_wrong_number_of_samples_is_found_when_the_shard_is_used(tmp_path):
    mds_folder(tmp_path, ROWS)
    edit_index(tmp_path, lambda index: index["shards"][1].update(samples=21))
    with pytest.raises(DataError, match=r"shard\.00001\.mds: holds 20 samples, its index says 21"):
        DomainShards("web", "train", tmp_path).read(np.arange(50))


def test_large_index_is_parsed_in_blocks_to_the_same_tables(tmp_path, monkeypatch):
    import mixer.index

    mds_folder(tmp_path, ROWS, compression="zstd", hashes=("sha256", "xxh64"))
    whole = mixer.index.read_index(tmp_path, "web")
    monkeypatch.setattr(mixer.index, "_BLOCK_BYTES", 100)
    blocks = mixer.index.read_index(tmp_path, "web")
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(blocks, name), value)
    assert whole.algorithm == "xxh64" and whole.zip_name(2) == "shard.00002.mds.zstd"


def test_tables_of_a_large_index_are_kept_for_the_next_start_and_only_for_that_very_file(tmp_path, monkeypatch):
    import mixer.index

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mixer.index, "_WORTH_KEEPING", 10)
    mds_folder(tmp_path / "web", ROWS, compression="zstd")
    parsed = mixer.index.read_index(tmp_path / "web", "web")
    (kept,) = (tmp_path / "cache" / "domain-mixer" / "index").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(mixer.index, "_tables", None)
        recalled = mixer.index.read_index(tmp_path / "web", "web")
    for name, value in vars(parsed).items():
        np.testing.assert_array_equal(getattr(recalled, name), value)
    kept.write_bytes(b"damaged")
    assert mixer.index.read_index(tmp_path / "web", "web").fingerprint == parsed.fingerprint
    edit_index(tmp_path / "web", lambda index: index["shards"].pop())
    assert len(mixer.index.read_index(tmp_path / "web", "web").samples) == 2


@pytest.mark.parametrize(
    "columns", [{"text": "str"}, {"tokens": "pkl"}, {"a": "ndarray:int32:4", "b": "ndarray:int32:4"}]
)
def test_folder_without_a_clear_token_column_is_refused(tmp_path, columns):
    values = {"str": "x", "pkl": pickle.dumps(1), "ndarray:int32:4": np.zeros(4, np.int32)}
    mds_folder(tmp_path, [{name: values[kind] for name, kind in columns.items()}], columns)
    with pytest.raises(InputError, match="domain 'web' has no column of token ids"):
        DomainShards("web", "train", tmp_path)


# --- folders -------------------------------------------------------------------------------------------------------


def test_open_domain_reads_what_the_manifest_names(tmp_path):
    root = write_shards(tmp_path, {"a b/c": 30, "web": 70}, validation={"web": 5})
    shards = open_domain(root, "a b/c")
    np.testing.assert_array_equal(shards.read(np.array([29]))[0], row_of("a b/c", 29, 16))
    np.testing.assert_array_equal(open_domain(root, "web", "validation").read(np.array([0]))[0], row_of("web", 70, 16))
    with pytest.raises(InputError, match=r"'a b/c' has no split 'validation'"):
        open_domain(root, "a b/c", "validation")


def test_index_that_is_not_the_manifests_is_refused(tmp_path):
    root = write_shards(tmp_path, {"web": 70})
    edit_index(root / "web" / "train", lambda index: index["shards"].reverse())
    with pytest.raises(
        DataError, match=r"'web': .*index\.json has fingerprint .* the manifest .* says .* same command"
    ):
        open_domain(root, "web")


@pytest.mark.parametrize("layout", ["{d}/train", "{d}"])
def test_folders_without_a_manifest_get_one(tmp_path, layout):
    for domain, count in (("code", 30), ("web", 50)):
        mds_folder(tmp_path / layout.format(d=domain), ROWS[:count].astype(np.int32))
    manifest = load_manifest(tmp_path)
    assert manifest.names == ("code", "web") and manifest.seq_len == 16 and manifest.dtype == "int32"
    assert manifest.split("code", "train").num_samples == 30
    np.testing.assert_array_equal(open_domain(tmp_path, "web").read(np.array([49]))[0], ROWS[49])


def test_single_mds_folder_is_one_domain(tmp_path):
    mds_folder(tmp_path / "corpus" / "train", ROWS)
    assert load_manifest(tmp_path / "corpus").names == ("corpus",)


def test_domains_of_different_shapes_are_refused(tmp_path):
    mds_folder(tmp_path / "a", ROWS)
    mds_folder(tmp_path / "b", ROWS[:, :8])
    with pytest.raises(InputError, match="differ in token column, dtype or length"):
        load_manifest(tmp_path)


def test_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder of shards"):
        load_manifest(tmp_path / "nowhere")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        load_manifest(tmp_path)


def test_hash_algorithms_of_streaming_are_known():
    hashing = pytest.importorskip("streaming.base.hashing", exc_type=ImportError)
    for algorithm in hashing.get_hashes():
        assert mds.hash_hex(algorithm, b"some bytes") == hashing.get_hash(algorithm, b"some bytes")
