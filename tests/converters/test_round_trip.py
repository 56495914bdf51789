"""Document -> shard -> sample -> text: for every format and every tokenizer the text that comes out is what went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.inspecting import read_samples, shards_encoder
from converters.tiktoken_ranks import as_tokenizer_json, load_ranks
from converters.training import train_bpe
from mixer.manifest import Manifest
from tests.converters.corpora import documents
from tests.converters.formats import MUST_BE_NAMED, WRITERS

# Line breaks within a document do not survive formats that divide by lines, so the texts here have none.
TEXTS = [
    " ".join(text.split()) for text in [*documents("web", 40), "<|endoftext|> </s> spelled out", "cafe\u0301 \u212b"]
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "hf.json").write_text(train_bpe(TEXTS, 400))
    (folder / "lines.txt").write_text("\n".join(TEXTS))
    return folder


def tokenizer_of(name: str, folder: Path) -> dict:
    if name == "bytes":
        return {"tokenizer": "bytes"}
    if name == "tiktoken":
        pytest.importorskip("bpe_openai")
        few = {token: rank for token, rank in load_ranks("cl100k_base").items() if rank < 2000}  # all load too slowly
        (folder / "tiktoken.json").write_text(json.dumps(as_tokenizer_json("cl100k_base", few)))
        return {"tokenizer": folder / "tiktoken.json"}
    if name == "gigatoken":
        pytest.importorskip("gigatoken")
        return {"tokenizer": folder / "hf.json", "backend": "gigatoken"}
    if name == "sentencepiece" and not (folder / "spm.model").exists():
        sentencepiece = pytest.importorskip("sentencepiece")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "lines.txt"), model_prefix=str(folder / "spm"), vocab_size=300, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
        )  # fmt: skip
    return {"tokenizer": folder / {"hf": "hf.json", "sentencepiece": "spm.model"}[name]}


def write_inputs(folder: Path, kinds: list[str]) -> list[str]:
    inputs = []
    for kind in kinds:
        where = folder / kind
        where.mkdir(parents=True)
        if kind == "text":
            for number, text in enumerate(TEXTS):
                (where / f"{number:03}.txt").write_text(text, encoding="utf-8")
        else:
            name, write = WRITERS[kind]
            write(where / name, TEXTS)
        inputs.append(f"{kind}={where}")
    return inputs


@pytest.mark.parametrize("tokenizer", ["bytes", "hf", "gigatoken", "sentencepiece", "tiktoken"])
def test_every_document_comes_back_from_every_format(tmp_path, tokenizers, tokenizer):
    by_name = [kind for kind in [*WRITERS, "text"] if kind not in MUST_BE_NAMED]
    for number, kinds in enumerate([by_name, *([kind] for kind in MUST_BE_NAMED)]):
        out = tmp_path / f"shards-{number}"
        named = {} if len(kinds) > 1 else {"format": kinds[0]}
        given = {**tokenizer_of(tokenizer, tokenizers), "seq_len": 2000, "packing": "none", "held_out": 0, **named}
        manifest = convert(write_inputs(tmp_path / "in", kinds), out, **given)
        assert manifest.names == tuple(sorted(kinds))
        encoder = shards_encoder(out, manifest)
        for kind in kinds:
            rows = read_samples(out / kind / "train", "tokens", 1 << 30)
            assert all(row[-1] == manifest.tokenizer.eos_id for row in rows)
            assert [encoder.decode(row[:-1].tolist()) for row in rows] == TEXTS
            assert manifest.domains[kind].text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_every_document_comes_back_from_every_packing(tmp_path, tokenizers, packing, shuffle_seed):
    (tmp_path / "in" / "web").mkdir(parents=True)
    WRITERS["jsonl"][1](tmp_path / "in" / "web" / "a.jsonl", TEXTS)
    given: dict = {"packing": packing, "shuffle_seed": shuffle_seed, "held_out": 0, "seq_len": 1200}
    given |= {"tail": "pad"} if packing == "concat" else {}
    convert([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizers / "hf.json", **given)
    manifest = Manifest.load(tmp_path / "out")
    stream = np.concatenate(read_samples(tmp_path / "out" / "web" / "train", "tokens", 1 << 30))
    parts = np.split(stream, np.flatnonzero(stream == manifest.tokenizer.eos_id) + 1)
    encoder = shards_encoder(tmp_path / "out", manifest)
    found = [encoder.decode(part[:-1].tolist()) for part in parts if len(part) > 1]  # padding is ends of text alone
    assert sorted(found) == sorted(TEXTS)
    assert (found == TEXTS) == (shuffle_seed is None and packing != "best_fit")
