"""Columns beside the shards: every sample gets its own value back, and nothing that belongs elsewhere is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from converters import cli, convert
from converters.columns import add_column
from converters.verifying import verify
from mixer import MixtureLoader
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest
from mixer.side_columns import SideColumn
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl


@pytest.fixture
def shards(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "shards", tokenizer="bytes", seq_len=64, shard_size=4000)
    return tmp_path / "shards"


def sizes(shards: Path, split: str = "train") -> dict[str, int]:
    manifest = Manifest.load(shards)
    return {name: manifest.split(name, split).num_samples for name in manifest.names}


def value_of(domain: str, sample: int) -> float:
    return len(domain) + sample / 1024


def rows_of(shards: Path, split: str = "train") -> list[dict]:
    rows = [
        {"domain": domain, "sample_id": sample, "quality": value_of(domain, sample)}
        for domain, size in sizes(shards, split).items()
        for sample in range(size)
    ]
    return [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]


def write_table(path: Path, rows: list[dict]) -> Path:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_loader_delivers_the_value_of_each_sample(shards, tmp_path, suffix):
    before = {name: tree_hash(shards / name) for name in sizes(shards)}
    add_column(shards, "quality", [write_table(tmp_path / f"q.{suffix}", rows_of(shards))])
    assert {name: tree_hash(shards / name) for name in sizes(shards)} == before
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=32, columns=["quality"])
    for _, batch in zip(range(20), loader):
        expected = [
            value_of(loader.domains[d], s) for d, s in zip(batch["domain_ids"].tolist(), batch["sample_ids"].tolist())
        ]
        assert batch["quality"].tolist() == pytest.approx(expected)
    assert verify(shards, deep=True) == []


def test_arrays_by_domain_keep_their_dtype_and_shape(shards, tmp_path):
    sources = []
    for name, size in sizes(shards).items():
        np.save(tmp_path / f"{name}.npy", np.arange(3 * size, dtype=np.float16).reshape(size, 3))
        sources.append(f"{name}={tmp_path / name}.npy")
    add_column(shards, "scores", sources)
    batch = next(iter(MixtureLoader(shards, global_batch_size=8, columns=["scores"])))
    assert batch["scores"].shape == (8, 3)
    assert str(batch["scores"].dtype) == "torch.float16"
    firsts = batch["scores"][:, 0].tolist()
    assert firsts == [np.float16(3 * sample) for sample in batch["sample_ids"].tolist()]


def test_columns_at_hand_keep_no_files_open_and_are_limited_in_number(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mixer.side_columns._AT_HAND", 2)
    add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", rows_of(shards))])
    column, before = SideColumn(shards / ".columns" / "quality" / "train"), len(os.listdir("/dev/fd"))
    for name, size in sizes(shards).items():
        values = column.read(name, np.arange(size))
        assert values.tolist() == pytest.approx([value_of(name, sample) for sample in range(size)])
    assert sum(map(len, column.files.values())) > 2 == len(column._tables)
    assert len(os.listdir("/dev/fd")) == before


def test_column_in_the_shards_and_one_beside_them_come_in_the_order_asked(tmp_path):
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "s", tokenizer="bytes", seq_len=64, sample_ids=True)
    add_column(tmp_path / "s", "quality", [write_table(tmp_path / "q.jsonl", rows_of(tmp_path / "s"))])
    batch = next(iter(MixtureLoader(tmp_path / "s", global_batch_size=8, columns=["quality", "sample_id"])))
    assert batch["sample_id"].tolist() == batch["sample_ids"].tolist()
    names = Manifest.load(tmp_path / "s").names
    pairs = zip(batch["domain_ids"].tolist(), batch["sample_ids"].tolist())
    assert batch["quality"].tolist() == pytest.approx([value_of(names[d], s) for d, s in pairs])


def test_scores_of_a_reference_become_a_column_in_the_same_format(shards, tmp_path):
    from mixer.side_columns import file_digest, shards_facts

    scores, files = tmp_path / "scores", {}
    manifest = Manifest.load(shards)
    for name in manifest.names:  # what `mixer score --per sample` writes
        (scores / name).mkdir(parents=True)
        entries = json.loads((shards / name / "train" / "index.json").read_text())["shards"]
        files[name] = []
        for number, entry in enumerate(entries):
            path = scores / name / f"{number:05}.npy"
            np.save(path, np.full(entry["samples"], number, np.float32))
            files[name].append([path.name, entry["samples"], file_digest(path)])
    settings = {"command": "score", "kind": "sample", "reference": "r", **shards_facts(manifest, "train")}
    (scores / "run.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="scores is unfinished"):
        add_column(shards, "reference_loss", [scores])
    (scores / "result.json").write_text(json.dumps({"files": files}))
    folder = add_column(shards, "reference_loss", [scores])
    assert tree_hash(folder) == tree_hash(scores)
    assert "reference_loss" in next(iter(MixtureLoader(shards, global_batch_size=8, columns=["reference_loss"])))
    (scores / "web" / "00000.npy").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"00000.npy is damaged"):
        add_column(shards, "reference_loss", [scores], replace=True)
    assert tree_hash(folder) != tree_hash(scores)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"domain": "news"}, r"q.jsonl, line 1: no domain 'news' with this split; there are \['book', 'code', 'web'\]"),
        ({"sample_id": 9999}, r"line 1: domain '\w+' has samples 0 to \d+, not 9999"),
        ({"sample_id": -1}, r"line 1: domain '\w+' has samples 0 to \d+, not -1"),
        ({"sample_id": 1.5}, r"line 1: domain '\w+' has samples 0 to \d+, not 1.5"),
        ({"quality": "good"}, r"line 1: 'good' is no value of float32"),
        ({"quality": 1e39}, r"line 1: 1e\+39 does not fit into float32, or is not finite"),
        ({"quality": None}, r"line 1: no value for \['quality'\]"),
        ({"quality": [1, 2]}, r"line 2: a value of shape \(\), those before have \(2,\)"),
    ],
)
def test_wrong_row_is_named_and_nothing_is_written(shards, tmp_path, change, message):
    rows = sorted(rows_of(shards), key=lambda row: row["domain"])
    with pytest.raises(InputError, match=message):
        add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", [rows[0] | change, *rows[1:]])])
    assert not (shards / ".columns" / "quality" / "train").exists()


def test_missing_and_double_values_are_refused_unless_there_is_one_for_them(shards, tmp_path):
    rows = rows_of(shards)
    table = write_table(tmp_path / "q.jsonl", rows[:-3])
    with pytest.raises(InputError, match=r"of \d+ samples of domain '\w+' have no value, the first is \d+.*--fill"):
        add_column(shards, "quality", [table])
    with pytest.raises(InputError, match=r"a second value for sample \d+"):
        add_column(shards, "quality", [table, table])
    nulls = write_table(tmp_path / "nulls.jsonl", [*rows[:-3], rows[-3] | {"quality": None}])
    with pytest.raises(InputError, match="no value for"):
        add_column(shards, "quality", [nulls])
    folder = add_column(shards, "quality", [nulls], fill=-1)
    for row in rows[-3:]:
        assert SideColumn(folder).read(row["domain"], np.array([row["sample_id"]])).tolist() == [-1]
    with pytest.raises(InputError, match=r"there is a column 'quality' beside train.*--replace"):
        add_column(shards, "quality", [table], fill=0)
    add_column(shards, "quality", [table], fill=0, replace=True)


@pytest.mark.parametrize("dtype, value", [("uint8", 256), ("int8", 1.5), ("uint16", -1)])
def test_integer_column_takes_only_what_it_can_hold(shards, tmp_path, dtype, value):
    rows = [row | {"quality": 7} for row in rows_of(shards)]
    folder = add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", rows)], dtype=dtype)
    assert SideColumn(folder).read("web", np.array([0])).dtype == dtype
    rows[0]["quality"] = value
    with pytest.raises(InputError, match=f"{value} does not fit into {dtype}"):
        add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", rows)], dtype=dtype, replace=True)


@pytest.mark.parametrize("name", ["tokens", "input_ids", "../x", "", "a b", ".x"])
def test_name_that_would_collide_is_refused(shards, tmp_path, name):
    with pytest.raises(InputError, match="column"):
        add_column(shards, name, [write_table(tmp_path / "q.jsonl", rows_of(shards))])


def test_column_does_not_outlive_its_shards(shards, tmp_path):
    add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", rows_of(shards))])
    write_jsonl(tmp_path / "corpus" / "web" / "new.jsonl", documents("code", 90))
    options: dict = {"tokenizer": "bytes", "seq_len": 64, "shard_size": 4000}
    convert([tmp_path / "corpus"], shards, extend=True, **options)
    with pytest.raises(InputError, match=r"quality/train belongs to shards .*Run `mixer add-column` for these"):
        MixtureLoader(shards, global_batch_size=8, columns=["quality"])
    (finding,) = verify(shards)
    assert "belongs to shards" in finding.what
    assert "mixer add-column quality --split train --replace" in finding.repair
    convert([tmp_path / "corpus"], shards, fresh=True, **options)
    assert not (shards / ".columns").exists()


def test_damage_is_found_by_the_loader_and_by_verify(shards, tmp_path):
    folder = add_column(shards, "quality", [write_table(tmp_path / "q.jsonl", rows_of(shards))])
    file = folder / "web" / "00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify(shards) == []
    (finding,) = verify(shards, deep=True)
    assert finding.path == str(file)
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=64, columns=["quality"])
    with pytest.raises(DataError, match=r"web/00000.npy is missing or damaged.*`mixer add-column` again"):
        for _, _ in zip(range(100), loader):
            pass
    file.unlink()
    assert [finding.what for finding in verify(shards)] == ["is missing"]
    shutil.copy(folder / "run.json", folder / "result.json")
    assert "holds no values per sample" in verify(shards)[0].what


def test_command_says_what_it_wrote_and_inspect_shows_it(shards, tmp_path):
    table = write_table(tmp_path / "q.parquet", rows_of(shards, "validation"))
    arguments = [str(shards), "quality", "--from", str(table), "--split", "validation"]
    result = CliRunner().invoke(cli.add_column, arguments, catch_exceptions=False)
    assert result.output.startswith(f"Wrote {sum(sizes(shards, 'validation').values()):,} values to ")
    shown = CliRunner().invoke(cli.inspect, [str(shards)], catch_exceptions=False).output
    assert "Beside the samples: quality (validation)." in shown
