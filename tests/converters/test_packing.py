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

from converters.best_fit import best_fit, lay_out
from converters.inspecting import read_samples
from converters.options import PackOptions
from converters.packing import pack_shard, pack_tasks
from converters.splits import choose_held_out, held_out_samples, plan_splits
from converters.stage import DOCUMENT, unit_folder
from mixer.mds import write_index
from tests.converters.corpora import tree_hash


def write_unit(stage: Path, number: int, blocks: list[tuple[str, list[tuple[int, int]]]]) -> dict[str, list[tuple]]:
    """Write a stage unit of blocks (domain, [(tokens, hash)]); token values count up so that each is recognisable."""
    folder = unit_folder(stage, number)
    os.makedirs(folder)
    rows = [(domain, tokens, key) for domain, documents in blocks for tokens, key in documents]
    total = sum(tokens for _, tokens, _ in rows)
    ids = (np.arange(total) + 5000 * number).astype(np.uint16)
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


EOS = 65_535  # in no document: token values count up from 5000 x unit


@mock.patch("os.fsync", lambda descriptor: None)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    units=units,
    seq_len=st.integers(1, 12),
    share=st.sampled_from([0, 0.1, 0.5]),
    packing=st.sampled_from(["concat", "best_fit"]),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_every_token_is_in_one_sample_or_counted_as_dropped(tmp_path_factory, units, seq_len, share, packing, tail):
    folder = tmp_path_factory.mktemp("pack")
    streams: dict[str, list[tuple]] = {}
    for number, blocks in enumerate(units):
        for domain, rows in write_unit(folder, number, blocks).items():
            streams.setdefault(domain, []).extend(rows)
    options = PackOptions(
        seq_len, held_out=share, min_held_out=2, compression=None, shard_bytes=1, packing=packing, tail=tail
    )
    for plan in plan_splits(str(folder), range(len(units)), options, scratch=folder):
        rows = streams[plan.domain]
        assert sum(len(ids) for _, ids in rows) == sum(split.tokens_in for split in plan.splits)
        assert plan.documents == len(rows) == sum(split.num_documents for split in plan.splits)
        written = {}
        for split in plan.splits:
            samples = written_samples(folder, split, options)
            assert samples.shape == (split.num_samples, seq_len)
            assert split.tokens_in == samples.size - split.padding_tokens + split.dropped_tokens
            assert (samples == EOS).sum() == split.padding_tokens
            written[split.split] = samples[samples != EOS]
            if packing == "concat":
                expected = np.concatenate([np.empty(0, int), *(ids for key, ids in rows if _belongs(key, split))])
                start = split.first_sample * seq_len
                assert (written[split.split] == expected[start:][: samples.size - split.padding_tokens]).all()
                assert split.padding_tokens == 0 or tail == "pad"
            else:
                assert split.dropped_tokens == 0
                _assert_uncut(samples, [ids for key, ids in rows if _belongs(key, split)], seq_len)
        dropped = sum(split.dropped_tokens for split in plan.splits)
        everything = np.concatenate([ids for _, ids in rows])
        out = np.concatenate(list(written.values()))
        assert len(out) + dropped == len(everything)
        assert np.isin(out, everything).all()
        assert len(np.unique(out)) == len(out)  # no token twice


def written_samples(folder: Path, split, options: PackOptions) -> np.ndarray:
    out = folder / split.domain / split.split
    records = folder / "records" / split.domain / split.split
    tasks = list(pack_tasks(split, folder=out, records=records, dtype="uint16", eos_id=EOS, options=options))
    entries = [pack_shard(task) for task in tasks]
    assert [entry["samples"] for entry in entries] == [1] * split.num_samples  # shards of one sample each
    if not entries:
        return np.empty((0, options.seq_len), np.uint16)
    write_index(out, entries)
    return np.stack(read_samples(out, "tokens", split.num_samples))


def _belongs(key: int, split) -> bool:
    side = split.stream.side
    return side == "all" or (key < split.stream.threshold) == (side == "below")


def _assert_uncut(samples: np.ndarray, documents: list[np.ndarray], seq_len: int) -> None:
    """Every document that fits lies in one sample, or (the domain being split by samples) in none of this split."""
    flat = [row.tolist() for row in samples]
    for ids in documents:
        if len(ids) <= seq_len:
            holders = [row for row in flat if ids[0] in row]
            for row in holders:
                at = row.index(ids[0])
                assert row[at : at + len(ids)] == ids.tolist()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), seq_len=st.integers(1, 16))
def test_best_fit_wastes_less_than_one_bin_in_two(lengths, seq_len):
    layout = best_fit(np.array(lengths), seq_len)
    used = np.add.reduceat(layout.length, layout.first[:-1])
    assert used.max() <= seq_len
    assert used.sum() == sum(lengths)
    assert layout.is_document.sum() == len(lengths)
    assert (used <= seq_len / 2).sum() <= 1  # two such samples would have been one


def test_layout_does_not_depend_on_how_documents_are_grouped():
    lengths = np.random.default_rng(1).integers(1, 90, 500)
    one = lay_out([lengths], 64)
    many = lay_out(np.split(lengths, [3, 3, 200, 499]), 64)
    assert all((a == b).all() for a, b in zip(one, many))


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
    (plan,) = plan_splits(str(tmp_path / "stage"), [0], options, scratch=tmp_path)
    how = {"dtype": "uint16", "eos_id": EOS, "options": options}
    tasks = pack_tasks(plan.splits[0], folder=tmp_path / "ours", records=tmp_path / "records", **how)
    entries = [pack_shard(task) for task in tasks]
    write_index(tmp_path / "ours", entries)
    ids = np.fromfile(unit_folder(tmp_path / "stage", 0) / "tokens.bin", np.uint16)
    theirs = {"columns": {"tokens": "ndarray:uint16:16"}, "hashes": ["sha1", "xxh64"], "size_limit": shard_bytes}
    with streaming.MDSWriter(out=str(tmp_path / "theirs"), **theirs) as writer:
        for row in ids[: len(ids) // 16 * 16].reshape(-1, 16):
            writer.write({"tokens": row})
    assert tree_hash(tmp_path / "ours") == tree_hash(tmp_path / "theirs")
