"""Packing accounts for every token, wherever units begin and end."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.inspecting import read_samples
from converters.options import PackOptions
from converters.packing import choose_held_out, held_out_samples, pack_shard, pack_tasks, plan_splits
from converters.stage import DOCUMENT, unit_folder
from mixer.mds import write_index
from tests.converters.corpora import tree_hash


def write_unit(stage: Path, number: int, blocks: list[tuple[str, list[tuple[int, int]]]]) -> dict[str, list[tuple]]:
    """Write a stage unit of blocks (domain, [(tokens, hash)]); token values count up so that each is recognisable."""
    folder = unit_folder(stage, number)
    os.makedirs(folder)
    rows = [(domain, tokens, key) for domain, documents in blocks for tokens, key in documents]
    total = sum(tokens for _, tokens, _ in rows)
    ids = (np.arange(total) + 1000 * number).astype(np.uint16)
    ids.tofile(folder / "tokens.bin")
    documents = np.array([(tokens, tokens, key) for _, tokens, key in rows], DOCUMENT)
    documents.tofile(folder / "documents.bin")
    summary = {
        "blocks": [(domain, len(rows), sum(tokens for tokens, _ in rows)) for domain, rows in blocks],
        "domains": {domain: {} for domain, _ in blocks},
    }
    (folder / "unit.json").write_bytes(orjson.dumps(summary))
    starts = np.cumsum([0, *(tokens for _, tokens, _ in rows)])
    streams: dict[str, list[tuple]] = {}
    for (domain, _, key), start, stop in zip(rows, starts[:-1], starts[1:]):
        streams.setdefault(domain, []).append((key, ids[start:stop]))
    return streams


documents = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**64 - 1)), min_size=1, max_size=12)
units = st.lists(st.lists(st.tuples(st.sampled_from(["a", "b"]), documents), max_size=4), min_size=1, max_size=4)


@mock.patch("os.fsync", lambda descriptor: None)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(units=units, seq_len=st.integers(1, 12), share=st.sampled_from([0, 0.1, 0.5]), shard=st.integers(1, 5))
def test_samples_are_the_stream_and_nothing_else_is_missing(tmp_path_factory, units, seq_len, share, shard):
    folder = tmp_path_factory.mktemp("pack")
    streams: dict[str, list[tuple]] = {}
    for number, blocks in enumerate(units):
        for domain, rows in write_unit(folder, number, blocks).items():
            streams.setdefault(domain, []).extend(rows)
    options = PackOptions(seq_len, held_out=share, min_held_out=2, compression=None, shard_bytes=1, allow_empty=True)
    for plan in plan_splits(str(folder), range(len(units)), options):
        rows = streams[plan.domain]
        tokens_in = sum(len(ids) for _, ids in rows)
        assert tokens_in == sum(seq_len * split.num_samples + split.dropped_tokens for split in plan.splits)
        assert tokens_in == sum(split.tokens_in for split in plan.splits)
        assert plan.documents == len(rows) == sum(split.num_documents for split in plan.splits)
        for split in plan.splits:
            out = folder / plan.domain / split.split
            arguments = {"stage": str(folder), "folder": out, "records": folder / "records" / plan.domain / split.split}
            tasks = list(pack_tasks(split, dtype="uint16", options=options, **arguments))
            entries = [pack_shard(task) for task in tasks]
            assert [entry["samples"] for entry in entries] == [1] * split.num_samples  # shards of one sample each
            if entries:
                write_index(out, entries)
                written = np.concatenate(read_samples(out, "tokens", split.num_samples))
                chosen = [ids for key, ids in rows if _belongs(key, split)]
                expected = np.concatenate(chosen)[split.first : split.first + split.num_samples * seq_len]
                assert (written == expected).all()


def _belongs(key: int, split) -> bool:
    return split.side == "all" or (key < split.threshold) == (split.side == "below")


@given(documents=st.integers(0, 10**6), below=st.integers(0, 10**4), share=st.floats(1e-6, 0.5))
def test_floor_of_documents_takes_at_most_a_tenth(documents, below, share):
    options = PackOptions(512, held_out=share, min_held_out=8)
    held_out = choose_held_out(documents, below, list(range(8)), options)
    if held_out.by == "documents" and held_out.share != share:
        assert held_out.share <= 0.1
    if held_out.by == "samples":
        assert below < 8
        assert documents < 80


@given(samples=st.integers(0, 10**6), share=st.floats(1e-6, 0.99))
def test_training_keeps_a_sample_and_validation_gets_one_where_there_are_two(samples, share):
    held = held_out_samples(samples, PackOptions(512, held_out=share))
    assert held <= max(samples - 1, 0)
    assert held >= 1 or samples < 2


@pytest.mark.parametrize("shard_bytes", [1000, 5000, 1 << 20])
def test_shards_are_those_that_mdswriter_writes(tmp_path, shard_bytes):
    streaming = pytest.importorskip("streaming")
    write_unit(tmp_path / "stage", 0, [("a", [(7, n) for n in range(300)])])
    options = PackOptions(16, held_out=0, compression=None, hashes=("sha1", "xxh64"), shard_bytes=shard_bytes)
    (plan,) = plan_splits(str(tmp_path / "stage"), [0], options)
    arguments = {"stage": str(tmp_path / "stage"), "folder": tmp_path / "ours", "records": tmp_path / "records"}
    entries = [pack_shard(task) for task in pack_tasks(plan.splits[0], dtype="uint16", options=options, **arguments)]
    write_index(tmp_path / "ours", entries)
    ids = np.fromfile(unit_folder(tmp_path / "stage", 0) / "tokens.bin", np.uint16)
    how = {"columns": {"tokens": "ndarray:uint16:16"}, "hashes": ["sha1", "xxh64"], "size_limit": shard_bytes}
    with streaming.MDSWriter(out=str(tmp_path / "theirs"), **how) as writer:
        for row in ids[: len(ids) // 16 * 16].reshape(-1, 16):
            writer.write({"tokens": row})
    assert tree_hash(tmp_path / "ours") == tree_hash(tmp_path / "theirs")
