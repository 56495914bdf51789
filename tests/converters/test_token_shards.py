"""Shards of token ids as input: packed again they are what the text would have given; nothing changes sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.inspecting import read_samples
from converters.options import StageOptions
from converters.plan import make_plan
from converters.readers import Bad
from converters.stage import Document, documents_of
from converters.tokenizers import describe
from converters.training import train_bpe
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest
from mixer.mds import encode_shard
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl

EOS = 256


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus")


def same_shards(one: Path, two: Path) -> bool:
    names = Manifest.load(one).names
    assert names == Manifest.load(two).names
    return all(tree_hash(one / name) == tree_hash(two / name) for name in names)


def documents_in(shards: Path, domain: str, split: str) -> list[bytes]:
    rows = read_samples(shards / domain / split, "tokens", 1 << 30)
    stream = np.concatenate(rows)
    parts = np.split(stream, np.flatnonzero(stream == EOS) + 1)
    return [bytes(part[part != EOS].astype(np.uint8)) for part in parts if (part != EOS).any()]


ALL = {"tokenizer": "bytes", "held_out": 0, "tail": "pad"}  # no token is lost, so all can come back
SMALL = {"seq_len": 100, "shard_size": 4000}


@pytest.mark.parametrize("options", [{"workers": 2, "unit_size": 2000}, {}], ids=["small units", "one unit"])
@pytest.mark.parametrize("source", [{"packing": "none"}, {"compression": None}, {"packing": "best_fit"}], ids=str)
def test_packed_again_they_are_the_shards_that_the_text_gives(tmp_path, corpus, source, options):
    # Small shards, so that most documents begin in one and end in another; whole ones where samples are filled best.
    size = {"seq_len": 4000, "shard_size": 10_000} if source.get("packing") == "best_fit" else SMALL
    first = {**ALL, **size, **source}
    if "packing" in source:
        del first["tail"]  # is of concat alone
    convert([corpus], tmp_path / "short", **first)
    convert([corpus], tmp_path / "direct", seq_len=300, shard_size=20_000, **ALL)
    convert([tmp_path / "short"], tmp_path / "again", seq_len=300, shard_size=20_000, **ALL, **options)
    if source.get("packing") != "best_fit":
        assert same_shards(tmp_path / "again", tmp_path / "direct")
    else:  # which orders documents by how they fit
        for name in ("web", "code"):
            both = (sorted(documents_in(tmp_path / out, name, "train")) for out in ("again", "direct"))
            assert next(both) == next(both)
    again, direct = (Manifest.load(tmp_path / name).domains["web"] for name in ("again", "direct"))
    assert (again.text_bytes, again.tokens_in) == (direct.text_bytes, direct.tokens_in)


def test_held_out_documents_stay_held_out(tmp_path, corpus):
    given = {"tokenizer": "bytes", "held_out": 0.1, "tail": "pad"}
    convert([corpus], tmp_path / "short", seq_len=100, shard_size=4000, **given)
    again = convert([tmp_path / "short"], tmp_path / "again", seq_len=50, **(given | {"held_out": 0.01}))
    for name in ("web", "code"):
        for split in ("train", "validation"):
            before, after = (documents_in(tmp_path / out, name, split) for out in ("short", "again"))
            assert after == before
        assert again.domains[name].held_out["by"] == "given"
    rows = read_samples(tmp_path / "again" / "book" / "validation", "tokens", 1 << 30)
    assert rows  # split by samples before: its last samples are still apart


def test_one_split_or_domain_alone_keeps_its_name(tmp_path, corpus):
    convert([corpus], tmp_path / "short", tokenizer="bytes", seq_len=100)
    for below in ("web", "web/train"):
        out = tmp_path / below.replace("/", "-")
        manifest = convert([tmp_path / "short" / below], out, tokenizer="bytes", seq_len=64, allow_empty=True)
        assert manifest.names == ("web",)


def test_encoded_anew_they_are_the_shards_of_the_other_tokenizer(tmp_path, corpus):
    (tmp_path / "bpe.json").write_text(train_bpe(documents("web", 100), 400))
    convert([corpus], tmp_path / "bytes", seq_len=100, shard_size=4000, **ALL)
    other = {**ALL, "tokenizer": tmp_path / "bpe.json", "seq_len": 64}
    with pytest.raises(InputError, match=r"made by the tokenizer sha256:.*--retokenize to decode them"):
        convert([tmp_path / "bytes"], tmp_path / "again", **other)
    convert([tmp_path / "bytes"], tmp_path / "again", retokenize=True, fresh=True, **other)
    convert([corpus], tmp_path / "direct", **other)
    assert same_shards(tmp_path / "again", tmp_path / "direct")


def foreign(folder: Path, texts: list[str], column: str, seq_len: int = 64) -> None:
    """Write shards as llm-foundry does: ids joined and cut, as raw int64 bytes or as arrays of int32."""
    streaming = pytest.importorskip("streaming")
    stream = np.concatenate([np.array([*text.encode(), EOS]) for text in texts])
    stream = np.append(stream, np.full(-len(stream) % seq_len, EOS))
    with streaming.MDSWriter(out=str(folder), columns={"tokens": column}, size_limit=5000) as writer:
        for row in stream.reshape(-1, seq_len):
            writer.write({"tokens": row.astype(np.int64).tobytes() if column == "bytes" else row.astype(np.int32)})


@pytest.mark.parametrize("column", ["bytes", "ndarray:int32:64", "ndarray:int32", "ndarray"])
def test_ids_that_others_wrote_are_read_once_their_tokenizer_is_named(tmp_path, column):
    texts = documents("web", 120)
    foreign(tmp_path / "mds", texts, column)
    given: dict = {**ALL, "seq_len": 100}
    with pytest.raises(InputError, match=r"mds holds token ids, and no manifest says.*--tokens-from"):
        convert([f"web={tmp_path / 'mds'}"], tmp_path / "out", **given)
    convert([f"web={tmp_path / 'mds'}"], tmp_path / "out", tokens_from="bytes", fresh=True, **given)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", texts)
    convert([tmp_path / "corpus"], tmp_path / "direct", **given)
    assert same_shards(tmp_path / "out", tmp_path / "direct")


def test_extension_may_add_shards_to_text(tmp_path, corpus):
    convert([corpus / "web"], tmp_path / "more", seq_len=100, **ALL)
    given: dict = {**ALL, "seq_len": 64}
    before = convert([corpus / "code"], tmp_path / "out", **given)
    after = convert([corpus / "code", tmp_path / "more"], tmp_path / "out", extend=True, **given)
    assert before.names == ("code",)
    assert after.names == ("code", "web")
    assert after.domains["web"].tokens_in == Manifest.load(tmp_path / "more").domains["web"].tokens_in


def test_raw_shard_beside_its_compressed_one_is_read_once(tmp_path, corpus):
    from mixer.shards import open_domain

    convert([corpus], tmp_path / "short", seq_len=100, **ALL)
    open_domain(tmp_path / "short", "web").read(np.array([0]))  # leaves a raw copy beside it
    assert list((tmp_path / "short" / "web").rglob("*.mds"))
    again = convert([tmp_path / "short"], tmp_path / "again", seq_len=64, **ALL)
    assert again.domains["web"].tokens_in == Manifest.load(tmp_path / "short").domains["web"].tokens_in


def test_damaged_or_wrong_shards_are_named(tmp_path, corpus):
    convert([corpus], tmp_path / "short", seq_len=100, compression=None, shard_size=8000, **ALL)
    path = tmp_path / "short" / "web" / "train" / "shard.00001.mds"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"shard.00001.mds is truncated or damaged"):
        convert([tmp_path / "short"], tmp_path / "again", seq_len=64, **ALL)
    path.unlink()
    with pytest.raises(DataError, match=r"shard.00001.mds"):
        convert([tmp_path / "short"], tmp_path / "again", seq_len=64, fresh=True, **ALL)


def test_ids_that_never_end_a_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("converters.token_shards.MAX_DOCUMENT_TOKENS", 5000)
    foreign(tmp_path / "mds", ["x" * 20_000], "bytes")
    with pytest.raises(DataError, match=r"no end of text \(id 256\) in 5,000 tokens before shard"):
        convert([f"web={tmp_path / 'mds'}"], tmp_path / "out", tokens_from="bytes", seq_len=64, **ALL)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns={"tokens": "ndarray:int32"}) as writer:
        writer.write({"tokens": np.array([1, 2, 900, EOS], np.int32)})
    with pytest.raises(DataError, match=r"shard.00000.mds .*holds token id 900, the tokenizer has 257"):
        convert([f"web={tmp_path / 'mds'}"], tmp_path / "out", tokens_from="bytes", seq_len=2, **ALL)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_bytes_give_documents_or_one_named_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    columns = {"tokens": ["ndarray:uint16:16", "ndarray:uint16", "bytes", "ndarray"][seed % 4]}
    rows = np.arange(160, dtype=np.uint16).reshape(10, 16) % 200
    rows[::3, 5] = EOS
    values = [row.astype(np.int64).tobytes() for row in rows] if columns["tokens"] == "bytes" else list(rows)
    path = tmp_path / "web" / "shard.00000.mds"
    path.parent.mkdir()
    raw = bytearray(encode_shard(columns, {"tokens": values}))
    places = rng.integers(0, [len(raw), 120][seed % 2], 3)  # anywhere, or in the header
    for place in places:
        raw[place] = rng.integers(256)
    path.write_bytes(raw[: rng.integers(1, len(raw))] if seed % 5 == 0 else raw)
    options = StageOptions(tokens_from=describe("bytes"))
    try:
        plan = make_plan([tmp_path / "web"], options, {})
        found = [row for unit in plan.units for piece in unit.pieces for row in documents_of(piece, options)]
    except (DataError, InputError) as error:
        assert "shard.00000.mds" in str(error)
    else:
        assert all(isinstance(row, Document | Bad) for row in found)


def test_document_beyond_the_limit_is_oversized_and_those_around_it_are_kept(tmp_path):
    texts = ["first", "x" * 3000, "last", "y" * 900]
    foreign(tmp_path / "mds", texts, "ndarray:int32:64")
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", ["first", "last", "y" * 900])
    given: dict = {**ALL, "seq_len": 100}
    options = {"max_record": 1000, "on_bad_record": "skip", "max_bad": 1, "tokens_from": "bytes"}
    manifest = convert([f"web={tmp_path / 'mds'}"], tmp_path / "out", **given, **options)
    assert manifest.converter["skipped"] == {"oversized": 1}
    convert([tmp_path / "corpus"], tmp_path / "direct", **given)
    assert same_shards(tmp_path / "out", tmp_path / "direct")


def test_shard_with_a_large_table_of_samples_is_read_as_any_other(tmp_path, monkeypatch):
    texts = documents("web", 120)
    foreign(tmp_path / "mds", texts, "ndarray:int32")
    given: dict = {**ALL, "seq_len": 100, "tokens_from": "bytes"}
    convert([f"web={tmp_path / 'mds'}"], tmp_path / "one", **given)
    monkeypatch.setattr("converters.mds_files._TABLE_BYTES", 12)
    monkeypatch.setattr("converters.token_shards._GROUP_BYTES", 100)
    convert([f"web={tmp_path / 'mds'}"], tmp_path / "two", **given)
    assert same_shards(tmp_path / "one", tmp_path / "two")
