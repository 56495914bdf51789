"""Samples of different lengths: the right tokens, padded; weights are shares of tokens, kept by what was drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer import InputError, MixtureLoader, mds
from mixer.folders import load_manifest
from mixer.manifest import Domain, Manifest, Split, TokenizerInfo
from mixer.mixer import Mixer
from mixer.padding import Padding
from mixer.token_allocation import allocate_by_tokens
from tests.helpers import assert_resumes, assert_same, write_domain

SIZES = {"book": 9, "chat": 300, "web": 500}
LONGEST = {"book": 900, "chat": 12, "web": 120}


def length_of(domain, i):
    return 1 + (i * 7919 + sum(domain.encode())) % LONGEST[domain]


def row_of(domain, i):
    return ((np.arange(length_of(domain, i)) * 31 + i * 13 + sum(domain.encode())) % 60_000).astype(np.uint16)


ENCODINGS = {
    "ndarray:uint16": lambda row: row,
    "ndarray": lambda row: row,
    "bytes": lambda row: row.astype(np.int64).tobytes(),
}


def write(folder, encoding="ndarray:uint16", *, manifest=True, text=False, compression=None):
    domains = {}
    for domain, count in SIZES.items():
        samples = [{"tokens": ENCODINGS[encoding](row_of(domain, i))} for i in range(count)]
        columns = {"tokens": encoding}
        if text:
            samples = [{**sample, "text": f"{domain} " * (i % 4)} for i, sample in enumerate(samples)]
            columns["text"] = "str"
        path = folder / domain / "train"
        write_domain(path, samples, columns=columns, samples_per_shard=64, compression=compression)
        tokens = sum(length_of(domain, i) for i in range(count))
        fingerprint = "sha256:" + mds.hash_hex("sha256", (path / "index.json").read_bytes())
        split = Split(f"{domain}/train", count, tokens, count, -(-count // 64), 0, fingerprint)
        domains[domain] = Domain({"train": split})
    if manifest:
        dtype = "int64" if encoding == "bytes" else "uint16"
        tokenizer = TokenizerInfo("test", "", 60_000, 5)
        Manifest(domains, max(LONGEST.values()), dtype, tokenizer, variable_length=True).save(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


def make(shards, **options):
    return MixtureLoader(shards, **{"mixture": "uniform", "global_batch_size": 12, "seed": 3, **options})


def batches(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def as_list(samples):
    return samples


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("manifest", [True, False])
def test_samples_are_the_tokens_that_the_ids_name_and_padding_bears_no_loss(tmp_path, encoding, manifest):
    root = write(tmp_path, encoding, manifest=manifest, text=encoding == "ndarray:uint16")
    columns = ["text"] if encoding == "ndarray:uint16" else []
    loader = make(root, columns=columns)
    for batch in batches(loader, 20):
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        assert ids.dtype == mask.dtype == labels.dtype == torch.int64 and ids.shape == mask.shape == labels.shape
        for i, (domain, sample) in enumerate(zip(batch["domain_ids"].tolist(), batch["sample_ids"].tolist())):
            row = row_of(loader.domains[domain], sample)
            assert ids[i, : len(row)].tolist() == labels[i, : len(row)].tolist() == row.tolist()
            assert (ids[i, len(row) :] == (5 if manifest else 0)).all() and (labels[i, len(row) :] == -100).all()
            assert mask[i].tolist() == [1] * len(row) + [0] * (ids.shape[1] - len(row))
            assert not columns or batch["text"][i] == f"{loader.domains[domain]} " * (sample % 4)
        assert ids.shape[1] % 8 == 0 and ids.shape[1] - int(mask.sum(axis=1).max()) < 8


def test_every_sample_of_an_epoch_appears_once(shards):
    loader = make(shards, mixture={"book": 0, "chat": 1, "web": 0}, global_batch_size=10)
    for _ in range(2):
        seen = torch.cat([batch["sample_ids"] for batch in batches(loader, 30)])
        assert sorted(seen.tolist()) == list(range(300))


def test_static_shapes_are_held_or_refused(shards):
    loader = make(shards, collate=Padding(pad_id=1, length=1024))
    assert {batch["input_ids"].shape for batch in batches(loader, 5)} == {(12, 1024)}
    with pytest.raises(
        InputError, match=r"a sample has \d+ tokens and batches are padded to 100: give a greater length"
    ):
        batches(make(shards, collate=Padding(length=100)), 20)
    with pytest.raises(InputError, match="multiple and length >= 1"):
        Padding(multiple=0)


def test_own_collate_gets_samples_and_then_the_transform(shards):
    samples = next(iter(make(shards, collate=as_list, dtype="stored")))
    assert len(samples) == 12 and set(samples[0]) == {"input_ids", "domain_ids", "sample_ids"}
    for sample in samples:
        domain, index = ("book", "chat", "web")[sample["domain_ids"]], int(sample["sample_ids"])
        assert sample["input_ids"].dtype == torch.uint16
        np.testing.assert_array_equal(sample["input_ids"].numpy(), row_of(domain, index))
    assert next(iter(make(shards, collate=as_list, transform=len))) == 12


def test_collate_works_for_samples_of_one_length_too(tmp_path):
    from tests.helpers import write_shards

    root = write_shards(tmp_path, {"web": 50})
    loader = MixtureLoader(root, global_batch_size=4, collate=Padding())
    plain = MixtureLoader(root, global_batch_size=4)
    for padded, batch in zip(batches(loader, 3), batches(plain, 3)):
        assert_same({name: padded[name] for name in batch}, batch)
        assert_same(padded["labels"], batch["input_ids"])


def test_folder_without_a_manifest_is_found_to_vary(tmp_path):
    manifest = load_manifest(write(tmp_path, manifest=False))
    assert manifest.variable_length and manifest.dtype == "uint16"
    exact = sum(length_of("web", i) for i in range(500))
    assert 0.7 < manifest.domains["web"].splits["train"].num_tokens / exact < 1.3


def test_lengths_that_only_later_shards_show_are_found_too(tmp_path):
    samples = [{"tokens": np.zeros(8 if i < 64 else 9, np.uint16)} for i in range(100)]
    write_domain(tmp_path / "a" / "train", samples, columns={"tokens": "ndarray:uint16"}, samples_per_shard=64)
    assert load_manifest(tmp_path).variable_length
    assert {
        batch["attention_mask"].sum().item() for batch in batches(MixtureLoader(tmp_path, global_batch_size=1), 50)
    } == {8, 9}


@pytest.mark.parametrize(
    ("encoding", "value", "text"),
    [
        ("ndarray", np.zeros(3, np.int32), "not all of them are of uint16"),
        ("ndarray:uint16", np.zeros((2, 2), np.uint16), "not all of them have one dimension"),
        ("bytes", b"1234567", "no multiples of 8 bytes"),
    ],
)
def test_values_that_are_no_tokens_are_found(tmp_path, encoding, value, text):
    from mixer import DataError

    good = {"ndarray": np.zeros(4, np.uint16), "ndarray:uint16": np.zeros(4, np.uint16), "bytes": bytes(16)}[encoding]
    longer = {"ndarray": np.zeros(5, np.uint16), "ndarray:uint16": np.zeros(5, np.uint16), "bytes": bytes(24)}[encoding]
    samples = [{"tokens": v} for v in [good, longer] * 10]
    samples[17] = {"tokens": value}
    write_domain(tmp_path / "a" / "train", samples, columns={"tokens": encoding}, samples_per_shard=10)
    with pytest.raises(
        DataError, match=rf"domain 'a', shard .*shard\.00001\.mds: has values of column 'tokens' .*{text}"
    ):
        batches(MixtureLoader(tmp_path, global_batch_size=2), 10)


# --- weights are shares of tokens ----------------------------------------------------------------------------------


def test_shares_of_tokens_follow_the_weights_at_every_batch(shards):
    weights = {"book": 0.3, "chat": 0.5, "web": 0.2}
    loader = make(shards, mixture=weights)
    counted = np.zeros(3)
    for step in range(150):
        batch = next(iter(loader))
        np.add.at(counted, batch["domain_ids"].numpy(), batch["attention_mask"].sum(axis=1).numpy())
        stats = loader.stats()
        assert [stats["domains"][name]["tokens"] for name in loader.domains] == counted.tolist()
        error = counted - counted.sum() * np.array(list(weights.values()))
        assert np.abs(error).max() <= 1.5 * max(LONGEST.values()), step
    assert abs(stats["domains"]["chat"]["share"] - 0.5) < 0.01 and stats["tokens"] == counted.sum()
    # Short samples are many: half of the tokens are far more than half of the samples.
    assert stats["domains"]["chat"]["samples"] > 0.9 * stats["samples"]


def test_proportional_is_to_tokens_and_sees_every_domain_equally_often(shards):
    loader = make(shards, mixture="proportional")
    batches(loader, 200)
    epochs = [row["epochs"] for row in loader.stats()["domains"].values()]
    assert max(epochs) - min(epochs) < 0.15


LENGTHS = st.sampled_from([(1, 1), (1, 30), (100, 120), (1, 5000), (3, 65_536)])


@given(
    domains=st.lists(st.tuples(LENGTHS, st.sampled_from([1e-9, 1e-3, 0.1, 1.0, 20.0])), min_size=1, max_size=12),
    batch_size=st.sampled_from([1, 2, 7, 64, 300]),
    seed=st.integers(0, 2**32 - 1),
    moving=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_error_in_tokens_stays_within_one_and_a_half_longest_samples(domains, batch_size, seed, moving):
    rng = np.random.default_rng(seed)
    data = [rng.integers(low, high + 1, 997) for (low, high), _ in domains]
    means, weights = np.array([row.mean() for row in data]), np.array([weight for _, weight in domains])
    credit, taken = np.zeros(len(data)), np.zeros(len(data), int)
    target = np.zeros(len(data))
    for _ in range(40):
        w = rng.permutation(weights) if moving else weights
        w = w / w.sum()
        counts, tokens = allocate_by_tokens(
            w,
            credit,
            batch_size,
            means,
            lambda d, n, at=taken: np.take(data[d], np.arange(at[d], at[d] + n), mode="wrap"),
        )
        assert counts.sum() == batch_size and (counts >= 0).all()
        for d, row in enumerate(data):
            assert tokens[d] == np.take(row, np.arange(taken[d], taken[d] + counts[d]), mode="wrap").sum()
        credit, taken, target = credit + w * int(tokens.sum()) - tokens, taken + counts, target + w * tokens.sum()
        assert np.abs(credit).max() <= 1.5 * max(row.max() for row in data)


@given(
    weights=st.lists(st.sampled_from([0.01, 0.3, 1.0, 3.0]), min_size=1, max_size=8),
    batch_size=st.integers(1, 50),
    length=st.integers(1, 5000),
)
@settings(max_examples=50, deadline=None)
def test_samples_of_one_length_are_shared_out_as_if_counted(weights, batch_size, length):
    names = [f"d{i}" for i in range(len(weights))]
    options = {"weights": weights, "batch_size": batch_size, "seed": 1}
    by_tokens = Mixer(dict.fromkeys(names, 1000), mean_tokens=dict.fromkeys(names, length), **options)
    by_samples = Mixer(dict.fromkeys(names, 1000), **options)
    for _ in range(20):
        by_tokens.next_batch(), by_samples.next_batch()
        assert np.abs(by_tokens.credit / length).max() <= 1.5 and np.abs(by_tokens.drawn - by_samples.drawn).max() <= 2


# --- ranks, workers, restarts --------------------------------------------------------------------------------------


def moving(loader):
    if loader.step % 3 == 1:
        loader.set_weights([1, 2, loader.step])
    return next(iter(loader))


def test_loader_resumes_at_every_step_to_the_bit(shards):
    assert_resumes(lambda: make(shards), 25, moving)
    assert_resumes(lambda: make(shards, on_exhausted="drop", max_epochs=2), 20, moving)


@pytest.mark.parametrize("world", [2, 3, 12])
def test_ranks_share_the_same_global_batches_through_restarts(shards, world):
    whole = batches(make(shards), 8)
    state = None
    for first, ranks in ((0, world), (3, 1), (5, world)):
        loaders = [make(shards, rank=rank, world_size=ranks) for rank in range(ranks)]
        for rank, loader in enumerate(loaders):
            if state is not None:
                loader.load_state_dict(state)
            for step, batch in enumerate(batches(loader, 3 if first == 0 else 2)):
                expected = whole[first + step]
                assert_same(batch["sample_ids"], expected["sample_ids"][rank::ranks])
                width = batch["input_ids"].shape[1]
                assert_same(batch["labels"], expected["labels"][rank::ranks, :width])
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[-1]


def test_workers_collate_and_change_nothing(shards):
    expected = batches(make(shards, collate=Padding(pad_id=5), read_ahead=4), 10)
    for workers in (1, 2):
        loader = make(shards, collate=Padding(pad_id=5), read_ahead=4, num_workers=workers)
        assert loader.num_workers == workers
        assert_same(batches(loader, 10), expected)


def test_gap_free_when_the_batch_size_changes(shards):
    loader, seen = make(shards, mixture={"book": 0, "chat": 1, "web": 1}), []
    for size, count in ((12, 5), (30, 3), (7, 6)):
        other = make(shards, mixture="uniform", global_batch_size=size)
        other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        loader = other
        for batch in batches(loader, count):
            seen += [s for d, s in zip(batch["domain_ids"].tolist(), batch["sample_ids"].tolist()) if d == 1]
    assert len(seen) == len(set(seen)) == loader.stats()["domains"]["chat"]["samples"] < 300


def test_no_domain_is_read_past_its_epochs(shards):
    loader = make(shards, on_exhausted="drop", max_epochs=2)
    seen = {name: [] for name in SIZES}
    for batch in loader:
        for domain, sample in zip(batch["domain_ids"].tolist(), batch["sample_ids"].tolist()):
            seen[loader.domains[domain]].append(sample)
    assert sum(map(len, seen.values())) == 2 * sum(SIZES.values()) // 12 * 12
    for name, size in SIZES.items():
        assert np.bincount(seen[name], minlength=size).max() <= 2


def test_state_counts_tokens_stays_small_and_is_refused_where_samples_are_counted(shards):
    loader = make(shards)
    batches(loader, 5)
    state = loader.state_dict()
    assert state["domains"]["web"]["tokens"] == loader.stats()["domains"]["web"]["tokens"]
    by_samples = Mixer(SIZES, batch_size=12, seed=3)
    with pytest.raises(InputError, match="the state counts credit in tokens, this run in samples"):
        by_samples.load_state_dict(state)


# --- curricula by tokens -------------------------------------------------------------------------------------------


def test_stage_begins_with_the_first_batch_after_its_tokens(shards, tmp_path):
    stages = [
        {"from_tokens": 0, "weights": {"book": 0, "chat": 1, "web": 1}},
        {"from_tokens": 3000, "ramp_tokens": 1000, "weights": {"book": 0, "chat": 0, "web": 1}},
        {"from_tokens": "9K", "weights": {"book": 1, "chat": 0, "web": 0}},
    ]
    path = tmp_path / "staged.json"
    path.write_text(json.dumps({"schema": 1, "stages": stages}))

    def run(loader):
        before, weights = loader.stats()["tokens"], list(loader.weights.values())
        batch = next(iter(loader))
        return before, weights, batch

    loader = make(shards, mixture=path)
    for _ in range(60):
        before, weights, _ = run(loader)
        moved = min(max((before - 2000) / 1000, 0), 1)
        expected = [0, 0.5 - moved / 2, 0.5 + moved / 2] if before < 9000 else [1, 0, 0]
        np.testing.assert_allclose(weights, expected, atol=1e-12)
    assert before > 9000
    assert_resumes(lambda: make(shards, mixture=path), 40, run)


def test_simulation_counts_tokens_and_opens_no_shard(shards, tmp_path):
    from click.testing import CliRunner

    from mixer.commands import simulate

    for path in shards.rglob("index.json"):
        (tmp_path / path.relative_to(shards)).parent.mkdir(parents=True)
    (tmp_path / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    out = CliRunner().invoke(
        simulate,
        [str(tmp_path), "--mixture", "uniform", "--batches", "200", "--batch-size", "12"],
        catch_exceptions=False,
    )
    rows = [line.split() for line in out.output.splitlines() if line.strip()]
    shares = [float(row[3]) for row in rows if row[0] in SIZES]
    assert len(shares) == 3 and max(abs(share - 1 / 3) for share in shares) < 0.02
    assert "in tokens. Shares are of" in " ".join(out.output.split())


def test_plan_counts_tokens(shards):
    plan = make(shards, mixture="proportional").plan(1000)
    tokens = [sum(length_of(name, i) for i in range(size)) for name, size in SIZES.items()]
    np.testing.assert_allclose(plan.shares, np.array(tokens) / sum(tokens))
    np.testing.assert_allclose(plan.epochs, 1000 / sum(tokens))
