"""What is written is read by others: mosaicml-streaming with its hashes checked, and llm-foundry's columns.

llm-foundry itself is not installed here; ``tokens_for_llm_foundry`` does what its text dataset does with the column
``tokens`` of a sample: an array is taken as it is, bytes are raw ids of a stated type (int64 unless told otherwise);
both are cut at the maximal length and become int64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from converters import convert
from converters.inspecting import read_samples
from converters.training import train_bpe
from mixer.manifest import Manifest
from tests.converters.corpora import documents, write_corpus

streaming = pytest.importorskip("streaming")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    vocabulary = train_bpe(documents("web", 100), 300)
    (folder / "wide.json").write_text(vocabulary.replace('"vocab": {', '"vocab": {"<unused>": 70000,', 1))
    return write_corpus(folder / "in").parent


def tokens_for_llm_foundry(sample: dict, max_seq_len: int, token_encoding_type: str = "int64") -> torch.Tensor:
    tokens = sample["tokens"]
    if isinstance(tokens, bytes):
        tokens = np.frombuffer(tokens, token_encoding_type)
    return torch.from_numpy(tokens[:max_seq_len].copy()).to(torch.int64)


@pytest.mark.parametrize(
    "shards", [{"compression": None, "hashes": ("sha1", "xxh64")}, {"compression": "zstd:3"}], ids=str
)
@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
@pytest.mark.parametrize(
    "more",
    [{}, {"doc_starts": True, "sample_ids": True}, {"tokenizer": "wide.json"}],
    ids=["tokens alone", "all columns", "uint32"],
)
def test_streaming_and_llm_foundry_read_every_kind_of_output(tmp_path, corpus, packing, more, shards):
    given = {"tokenizer": "bytes", "seq_len": 128, "shard_size": 9000, **shards, **more}
    given |= {"tail": "pad"} if packing == "concat" else {}
    if given["tokenizer"] == "wide.json":
        given["tokenizer"] = corpus / "wide.json"
    manifest = convert([corpus / "in"], tmp_path / "out", packing=packing, **given)
    assert manifest.dtype == ("uint32" if "tokenizer" in more else "uint16")
    for split in ("train", "validation"):
        folder = tmp_path / "out" / "web" / split
        copy = {"remote": str(folder), "local": str(tmp_path / "copy" / split)}  # hashes are checked on the way
        dataset = streaming.StreamingDataset(**copy, batch_size=1, validate_hash="xxh64")
        ours = read_samples(folder, "tokens", 1 << 30)
        assert len(dataset) == len(ours) == Manifest.load(tmp_path / "out").split("web", split).num_samples
        for number, row in enumerate(ours):
            sample = dataset[number]
            ids = tokens_for_llm_foundry(sample, max_seq_len=100)
            assert ids.dtype == torch.int64
            assert ids.tolist() == row[:100].tolist()
            if "sample_ids" in more:
                assert sample["sample_id"] == number
                assert sample["doc_starts"][0] == 0


def test_bytes_of_llm_foundry_come_in_and_the_same_ids_go_out(tmp_path):
    """Its converters write ``tokens`` as raw int64 bytes or int32 arrays; both are packed again here."""
    rows = np.random.default_rng(0).integers(0, 256, (40, 64))
    rows[:, -1] = 256
    with streaming.MDSWriter(out=str(tmp_path / "theirs"), columns={"tokens": "bytes"}) as writer:
        for row in rows:
            writer.write({"tokens": row.astype(np.int64).tobytes()})
    given: dict = {"tokenizer": "bytes", "tokens_from": "bytes", "seq_len": 64, "held_out": 0}
    convert([f"web={tmp_path / 'theirs'}"], tmp_path / "ours", **given)
    ours, theirs = (
        streaming.StreamingDataset(local=str(folder), batch_size=1)
        for folder in (tmp_path / "ours" / "web" / "train", tmp_path / "theirs")
    )
    assert [tokens_for_llm_foundry(ours[n], 64).tolist() for n in range(40)] == rows.tolist()
    assert [tokens_for_llm_foundry(theirs[n], 64).tolist() for n in range(40)] == rows.tolist()
