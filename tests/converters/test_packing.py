"""Packing accounts for every token, wherever units begin and end."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import orjson
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.best_fit import best_fit, lay_out, load_layout
from converters.inspecting import read_samples
from converters.options import PackOptions
from converters.packing import check_accounting, pack_shard, pack_tasks, shard_columns
from converters.shuffling import shuffled
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
    parts, at = [], 0
    for domain, some in blocks:  # each block a part of its own
        digest = xxhash.xxh3_64_hexdigest(documents[at : at + len(some)].tobytes())
        parts.append({"blocks": [(domain, len(some), sum(tokens for tokens, _ in some))], "hash": digest})
        at += len(some)
    summary = {"parts": parts, "domains": {domain: {} for domain, _ in blocks}}
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
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    units=units,
    seq_len=st.integers(1, 12),
    share=st.sampled_from([0, 0.1, 0.5]),
    packing=st.sampled_from(["concat", "best_fit", "none"]),
    tail=st.sampled_from(["drop", "pad"]),
    seed=st.sampled_from([None, 1]),
)
def test_every_token_is_in_one_sample_or_counted_as_dropped(
    tmp_path_factory, units, seq_len, share, packing, tail, seed
):
    folder = tmp_path_factory.mktemp("pack")
    streams: dict[str, list[tuple]] = {}
    for number, blocks in enumerate(units):
        for domain, rows in write_unit(folder, number, blocks).items():
            streams.setdefault(domain, []).extend(rows)
    options = PackOptions(
        seq_len, held_out=share, min_held_out=2, compression=None, shard_bytes=1, packing=packing, tail=tail,
        shuffle_seed=seed,
    )  # fmt: skip
    for plan in plan_splits(str(folder), range(len(units)), options, scratch=folder):
        rows = streams[plan.domain]
        assert sum(len(ids) for _, ids in rows) == sum(split.tokens_in for split in plan.splits)
        assert plan.documents == len(rows) == sum(split.num_documents for split in plan.splits)
        written = {}
        for split in plan.splits:
            samples = written_samples(folder, split, options)
            flat = np.concatenate([np.empty(0, np.uint16), *samples])
            assert len(samples) == split.num_samples
            assert packing == "none" or all(len(row) == seq_len for row in samples)
            assert split.tokens_in == len(flat) - split.padding_tokens + split.dropped_tokens
            assert len(flat) == split.num_tokens
            assert (flat == EOS).sum() == split.padding_tokens
            written[split.split] = flat[flat != EOS]
            mine = [ids for key, ids in rows if _belongs(key, split)]
            if packing == "concat":
                ordered = np.concatenate([np.empty(0, int), *(mine if seed is None else _as_found(flat, mine))])
                start = split.first_token if seed is None else 0
                assert (written[split.split] == ordered[start:][: len(flat) - split.padding_tokens]).all()
                assert split.padding_tokens == 0 or tail == "pad"
            else:
                assert split.dropped_tokens == 0
                _assert_uncut(samples, mine, seq_len)
            if packing == "none":
                assert split.padding_tokens == 0
                assert all(any(set(row) <= set(ids) for ids in mine) for row in samples)  # one document each
        dropped = sum(split.dropped_tokens for split in plan.splits)
        everything = np.concatenate([ids for _, ids in rows])
        out = np.concatenate(list(written.values()))
        assert len(out) + dropped == len(everything)
        assert np.isin(out, everything).all()
        assert len(np.unique(out)) == len(out)  # no token twice


def _as_found(flat: np.ndarray, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Return what ``flat`` holds of each document, in the order in which they stand there."""
    held = [ids[np.isin(ids, flat)] for ids in documents]
    places = {int(token): place for place, token in enumerate(flat)}
    return sorted((ids for ids in held if len(ids)), key=lambda ids: places[int(ids[0])])


def written_samples(folder: Path, split, options: PackOptions) -> list[np.ndarray]:
    out = folder / split.domain / split.split
    records = folder / "records" / split.domain / split.split
    tasks = list(pack_tasks(split, folder=out, records=records, dtype="uint16", eos_id=EOS, options=options))
    done = [pack_shard(task) for task in tasks]
    check_accounting(split, done)
    assert [record["samples"] for record in done] == [1] * split.num_samples  # shards of one sample each
    if not done:
        return []
    write_index(out, [record["entry"] for record in done])
    return read_samples(out, "tokens", split.num_samples)


def _belongs(key: int, split) -> bool:
    stream = getattr(split.stream, "base", split.stream)
    return stream.side == "all" or (key < stream.threshold) == (stream.side == "below")


def _assert_uncut(samples: list[np.ndarray], documents: list[np.ndarray], seq_len: int) -> None:
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


def test_layout_does_not_depend_on_how_documents_are_grouped(tmp_path):
    lengths = np.random.default_rng(1).integers(1, 90, 500)
    samples = lay_out([lengths], 64, tmp_path / "one")
    assert lay_out(np.split(lengths, [3, 3, 200, 499]), 64, tmp_path / "many") == samples
    one, many = (load_layout(tmp_path / name, 0, samples) for name in ("one", "many"))
    assert all((a == b).all() for a, b in zip(one, many))


def test_layout_is_the_same_wherever_it_is_read_from(tmp_path, monkeypatch):
    monkeypatch.setattr("converters.best_fit.WINDOW_TOKENS", 500)
    lengths = np.random.default_rng(2).integers(1, 90, 100)
    samples = lay_out([lengths], 32, tmp_path / "layout")
    whole = load_layout(tmp_path / "layout", 0, samples)
    for start, stop in [(0, 1), (5, 20), (samples - 3, samples), (7, 7)]:
        part = load_layout(tmp_path / "layout", start, stop)
        assert part.length.tolist() == whole.length[whole.first[start] : whole.first[stop]].tolist()
        assert part.start.tolist() == whole.start[whole.first[start] : whole.first[stop]].tolist()


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


@pytest.mark.parametrize("packing", ["concat", "none"])
@pytest.mark.parametrize("columns", [(), ("sample_ids",), ("doc_starts", "sample_ids")], ids="+".join)
@pytest.mark.parametrize("shard_bytes", [1000, 5000, 1 << 20])
def test_shards_are_those_that_mdswriter_writes(tmp_path, shard_bytes, columns, packing):
    streaming = pytest.importorskip("streaming")
    if packing == "concat" and "doc_starts" in columns:
        shard_bytes = 1 << 20  # MDSWriter counts their bytes, we do not, so shards end elsewhere
    lengths = np.random.default_rng(3).integers(1, 40, 300)
    lengths[7] = 900  # a length that takes two bytes, and many samples
    write_unit(tmp_path / "stage", 0, [("a", [(int(tokens), n) for n, tokens in enumerate(lengths)])])
    options = PackOptions(
        300, held_out=0, compression=None, hashes=("sha1", "xxh64"), shard_bytes=shard_bytes, packing=packing,
        **dict.fromkeys(columns, True),
    )  # fmt: skip
    (plan,) = plan_splits(str(tmp_path / "stage"), [0], options, scratch=tmp_path)
    how = {"dtype": "uint16", "eos_id": EOS, "options": options}
    tasks = pack_tasks(plan.splits[0], folder=tmp_path / "ours", records=tmp_path / "records", **how)
    write_index(tmp_path / "ours", [pack_shard(task)["entry"] for task in tasks])
    theirs = {"columns": shard_columns("uint16", options), "hashes": ["sha1", "xxh64"], "size_limit": shard_bytes}
    ids = np.fromfile(unit_folder(tmp_path / "stage", 0) / "tokens.bin", np.uint16)
    with streaming.MDSWriter(out=str(tmp_path / "theirs"), **theirs) as writer:
        for number, row in enumerate(cut_as_said(ids, lengths, packing)):
            sample = {"tokens": row, "sample_id": np.uint64(number), "doc_starts": np.zeros(1, np.uint16)}
            writer.write({name: sample[name] for name in theirs["columns"]})
    assert tree_hash(tmp_path / "ours") == tree_hash(tmp_path / "theirs")


def cut_as_said(ids: np.ndarray, lengths: np.ndarray, packing: str) -> list[np.ndarray]:
    """Cut a stream into samples of 300 tokens the plain way."""
    if packing == "concat":
        return list(ids[: len(ids) // 300 * 300].reshape(-1, 300))
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    return [document[at : at + 300] for document in documents for at in range(0, len(document), 300)]


@pytest.mark.parametrize("bucket", [1, 7, 100, 1 << 20])
def test_shuffled_order_is_a_permutation_that_depends_on_the_seed_alone(tmp_path, bucket):
    rows = [(3 + n % 5, n) for n in range(100)]
    write_unit(tmp_path / "one", 0, [("a", rows)])
    for number in range(4):
        write_unit(tmp_path / "four", number, [("a", rows[25 * number : 25 * number + 25])])
    options = PackOptions(8, held_out=0)
    streams = {}
    for name, units in (("one", [0]), ("four", [0, 1, 2, 3])):
        (plan,) = plan_splits(str(tmp_path / name), units, options, scratch=tmp_path)
        streams[name] = plan.splits[0].stream
    orders = {}
    for name, seed in (("one", 1), ("four", 1), ("four", 2)):
        stream = shuffled(streams[name], seed, tmp_path / f"order-{name}-{seed}", bucket_documents=bucket)
        orders[name, seed] = np.concatenate([part["hash"] for part in stream.documents()]).tolist()
        assert np.concatenate(list(stream.document_lengths())).sum() == stream.num_tokens == streams[name].num_tokens
    assert orders["one", 1] == orders["four", 1] != orders["four", 2]
    assert sorted(orders["four", 2]) == list(range(100)) != orders["four", 2]
    assert np.corrcoef(orders["four", 2], range(100))[0, 1] < 0.4
    assert orders["one", 1] == reference_order(tmp_path, streams["one"])


def reference_order(tmp_path: Path, stream) -> list[int]:
    whole = shuffled(stream, 1, tmp_path / "whole")
    return np.concatenate([part["hash"] for part in whole.documents()]).tolist()
