"""Packing options, end to end: what is asked for is in the shards, for any workers and units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.inspecting import raw_shard, read_index, read_samples
from converters.verifying import verify
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mds import sample_values
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl

EOS = 256


def converted(tmp_path: Path, name: str = "shards", **options: object) -> Path:
    if not (tmp_path / "corpus").exists():
        write_corpus(tmp_path / "corpus")
    given: dict = {"tokenizer": "bytes", "seq_len": 512, "shard_size": 20_000, **options}
    convert([tmp_path / "corpus"], tmp_path / name, **given)
    return tmp_path / name


def samples_of(shards: Path, domain: str, split: str = "train") -> np.ndarray:
    manifest = Manifest.load(shards)
    return np.stack(read_samples(shards / manifest.split(domain, split).path, "tokens", 1 << 30))


@pytest.mark.parametrize(
    "options",
    [
        {"packing": "best_fit", "doc_starts": True},
        {"tail": "pad", "dedupe": True},
        {"packing": "none", "sample_ids": True},
        {"shuffle_seed": 7},
        {"packing": "best_fit", "shuffle_seed": 7, "dedupe": True},
        {"packing": "none", "shuffle_seed": 7, "held_out": 0.1},
    ],
    ids=lambda options: "+".join(options),
)
def test_workers_and_units_do_not_change_a_byte_of_any_packing(tmp_path, options):
    one = converted(tmp_path, "one", **options)
    two = converted(tmp_path, "two", workers=2, unit_size=3000, **options)
    assert tree_hash(one) == tree_hash(two)
    assert verify(one, deep=True) == []


def test_best_fit_cuts_no_document_that_fits(tmp_path):
    shards = converted(tmp_path, packing="best_fit", held_out=0)
    rows = [bytes(row[row < 256].astype(np.uint8)) for row in samples_of(shards, "web")]
    texts = [text.encode() for text in documents("web", 300)]
    assert max(map(len, texts)) > 511
    for text in texts:
        if len(text) < 512:
            assert sum(text in row for row in rows) >= 1
    manifest = Manifest.load(shards)
    assert manifest.domains["web"].padding_tokens["train"] < 0.03 * samples_of(shards, "web").size
    concat = samples_of(converted(tmp_path, "concat", held_out=0), "web")
    whole = sum(any(text in bytes(row[row < 256].astype(np.uint8)) for row in concat) for text in texts)
    assert whole < 0.8 * len(texts)  # joining cuts many of them


def test_padded_tail_keeps_every_token(tmp_path):
    shards = converted(tmp_path, tail="pad", held_out=0)
    domain = Manifest.load(shards).domains["code"]
    assert domain.dropped_tokens == {"train": 0}
    assert 0 < domain.padding_tokens["train"] < 512
    stream = samples_of(shards, "code").reshape(-1)
    padding = domain.padding_tokens["train"]
    expected = b"".join(text.encode() for text in documents("code", 90))
    assert bytes(stream[stream < 256].astype(np.uint8)) == expected
    assert (stream[-padding - 1 :] == EOS).all()


def test_domain_shorter_than_a_sample_is_kept_by_padding(tmp_path):
    write_jsonl(tmp_path / "corpus" / "tiny" / "a.jsonl", ["short"])
    manifest = Manifest.load(converted(tmp_path, tail="pad", held_out=0))
    assert manifest.domains["tiny"].splits["train"].num_samples == 1
    assert manifest.domains["tiny"].padding_tokens == {"train": 512 - 6}


@pytest.mark.parametrize("packing", [{"tail": "pad"}, {"packing": "best_fit"}], ids=str)
def test_document_starts_are_a_column_that_streaming_reads(tmp_path, packing):
    streaming = pytest.importorskip("streaming")
    shards = converted(tmp_path, doc_starts=True, held_out=0, **packing)
    dataset = streaming.StreamingDataset(local=str(shards / "web" / "train"), batch_size=1, validate_hash="xxh64")
    starts = 0
    for number in range(len(dataset)):
        sample = dataset[number]
        assert sample["doc_starts"].dtype == np.uint16
        assert sample["doc_starts"][0] == 0
        ends = sample["doc_starts"][1:] - 1
        assert (sample["tokens"][ends] == EOS).all()
        starts += len(sample["doc_starts"])
    assert starts >= 300
    assert samples_of(shards, "web").shape == (len(dataset), 512)


def test_without_packing_each_document_is_a_sample(tmp_path):
    shards = converted(tmp_path, packing="none", held_out=0, seq_len=700)
    manifest = Manifest.load(shards)
    assert manifest.variable_length
    split = manifest.split("web", "train")
    rows = read_samples(shards / split.path, "tokens", 1 << 30)
    expected = [[*text.encode(), EOS] for text in documents("web", 300)]
    pieces = [ids[at : at + 700] for ids in expected for at in range(0, len(ids), 700)]
    assert len(pieces) > len(expected)
    assert [row.tolist() for row in rows] == pieces
    assert (split.num_samples, split.num_tokens) == (len(pieces), sum(map(len, expected)))
    assert manifest.domains["web"].dropped_tokens == manifest.domains["web"].padding_tokens == {"train": 0}
    assert verify(shards, deep=True) == []


def test_streaming_reads_samples_of_any_length_with_their_numbers(tmp_path):
    streaming = pytest.importorskip("streaming")
    shards = converted(tmp_path, packing="none", sample_ids=True, held_out=0)
    dataset = streaming.StreamingDataset(local=str(shards / "web" / "train"), batch_size=1, validate_hash="xxh64")
    ours = read_samples(shards / "web" / "train", "tokens", 1 << 30)
    assert len(dataset) == len(ours) > 300
    for number, row in enumerate(ours):
        assert dataset[number]["sample_id"] == number
        assert dataset[number]["tokens"].dtype == np.uint16
        assert (dataset[number]["tokens"] == row).all()


def test_another_shuffle_seed_orders_the_same_documents_anew_without_tokenising(tmp_path, monkeypatch):
    stage = {"stage": tmp_path / "stage", "packing": "none", "held_out": 0}
    orders = []
    for seed in (None, 1, 2):
        shards = converted(tmp_path, f"seed-{seed}", shuffle_seed=seed, **stage)
        rows = read_samples(shards / "web" / "train", "tokens", 1 << 30)
        orders.append([bytes(row[row < EOS].astype(np.uint8)) for row in rows])
        monkeypatch.setattr("converters.tokenizing.stage_unit", None)  # from here on all units are there
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_shuffle_keeps_which_documents_are_held_out(tmp_path):
    held = []
    for seed in (None, 5):
        shards = converted(tmp_path, f"seed-{seed}", packing="none", shuffle_seed=seed, held_out=0.1)
        rows = read_samples(shards / "web" / "validation", "tokens", 1 << 30)
        held.append(sorted(row.tolist() for row in rows))
    assert held[0] == held[1]


def test_sample_numbers_go_on_in_an_extension(tmp_path):
    converted(tmp_path, packing="none", sample_ids=True)
    write_jsonl(tmp_path / "corpus" / "web" / "new.jsonl", documents("code", 50))
    shards = converted(tmp_path, packing="none", sample_ids=True, extend=True)
    split = Manifest.load(shards).split("web", "train")
    entries = read_index(shards / split.path)
    numbers = [number for entry in entries for number in column_of(shards / split.path, entry, "sample_id")]
    assert numbers == list(range(split.num_samples))
    assert len(entries) > 1


def column_of(folder: Path, entry: dict, column: str) -> list:
    raw = memoryview(raw_shard(folder, entry))
    columns = dict(zip(entry["column_names"], entry["column_encodings"]))
    return [sample_values(raw, row, columns, [column])[0] for row in range(entry["samples"])]


def test_deduplication_keeps_the_first_copy_in_each_domain(tmp_path):
    texts = documents("web", 60)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", [*texts, *texts[:25]])
    write_jsonl(tmp_path / "corpus" / "web" / "b.jsonl", texts[:5])
    write_jsonl(tmp_path / "corpus" / "code" / "a.jsonl", texts)
    shards = converted(tmp_path, dedupe=True, held_out=0, seq_len=64)
    manifest = Manifest.load(shards)
    assert manifest.converter["skipped"] == {"duplicate": 30}
    assert manifest.domains["web"].skipped == {"duplicate": 30}
    assert (samples_of(shards, "web") == samples_of(shards, "code")).all()


def test_copies_of_held_out_documents_in_other_domains_are_counted(tmp_path):
    texts = documents("web", 300)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", texts)
    shards = converted(tmp_path, "alone", held_out=0.1, seq_len=64)
    held = Manifest.load(shards).split("web", "validation").num_documents
    assert Manifest.load(shards).converter["copies_across_splits"] == 0
    write_jsonl(tmp_path / "corpus" / "tiny" / "a.jsonl", texts[:20])  # split by samples, so some are trained on
    manifest = Manifest.load(converted(tmp_path, "both", held_out=0.1, seq_len=64))
    assert manifest.domains["tiny"].held_out["by"] == "samples"
    assert 1 <= manifest.converter["copies_across_splits"] <= held + 20


def test_unknown_packing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"packing 'tetris' is not one of \['concat', 'best_fit', 'none'\]"):
        converted(tmp_path, packing="tetris")


def test_several_hashes_in_any_order_are_recorded_sorted(tmp_path):
    import json

    shards = converted(tmp_path, hashes=["xxh64", "sha1", "xxh64"])
    entry = json.loads((shards / "web" / "train" / "index.json").read_text())["shards"][0]
    assert entry["hashes"] == ["sha1", "xxh64"]
    assert verify(shards, deep=True) == []


@pytest.mark.parametrize(
    "options",
    [
        {"dedupe": True},
        {"doc_starts": True, "sample_ids": True, "tail": "pad"},
        {"packing": "best_fit"},
        {"packing": "best_fit", "doc_starts": True, "shuffle_seed": 3},
        {"packing": "none", "doc_starts": True},
        {"packing": "none", "sample_ids": True, "shuffle_seed": 3},
        {"shuffle_seed": 3},
    ],
    ids=str,
)
def test_parts_of_a_unit_do_not_change_a_byte(tmp_path, monkeypatch, options):
    write_corpus(tmp_path / "corpus")
    given = {"tokenizer": "bytes", "seq_len": 64, "held_out": 0.1, "domain": "folder", **options}
    manifest = convert([tmp_path / "corpus"], tmp_path / "one", unit_size="1GB", keep_stage=True, **given)
    monkeypatch.setattr("converters.stage.PART_DOCUMENTS", 7)
    monkeypatch.setattr("converters.stage._BATCH_CHARACTERS", 2000)
    for name, value in {
        "packing._CHUNK_TOKENS": 300,
        "best_fit._PIECES_AT_ONCE": 9,
        "shuffling._ROWS_AT_ONCE": 9,
    }.items():
        monkeypatch.setattr(f"converters.{name}", value)
    convert([tmp_path / "corpus"], tmp_path / "many", unit_size="1GB", keep_stage=True, **given)
    units = [json.loads(path.read_text()) for path in sorted((tmp_path / "many").rglob("unit.json"))]
    assert max(len(unit["parts"]) for unit in units) > 5
    for name in manifest.names:
        assert tree_hash(tmp_path / "one" / name) == tree_hash(tmp_path / "many" / name)
