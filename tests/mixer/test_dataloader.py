"""What the loader delivers, from real shards: the right samples, in the same order however it is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from mixer import DataError, ExhaustedError, InputError, Mixture, MixtureLoader
from tests.helpers import assert_resumes, assert_same, row_of, write_domain, write_shards

SIZES = {"book": 3, "code": 150, "web": 400}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES, validation={"code": 10, "web": 20})


def make(shards, **options):
    return MixtureLoader(shards, **{"mixture": "uniform", "global_batch_size": 12, "seed": 3, **options})


def batches(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_rows_are_the_samples_that_the_ids_name(shards):
    loader = make(shards)
    for batch in batches(loader, 20):
        assert set(batch) == {"input_ids", "domain_ids", "sample_ids"}
        assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (12, 16)
        assert batch["domain_ids"].dtype == batch["sample_ids"].dtype == torch.int64
        for row, domain, sample in zip(batch["input_ids"].numpy(), batch["domain_ids"], batch["sample_ids"]):
            np.testing.assert_array_equal(row, row_of(loader.domains[domain], int(sample), 16).astype(np.int64))


def test_every_sample_of_an_epoch_appears_once(shards):
    loader = make(shards, mixture={"book": 0, "code": 1, "web": 0}, global_batch_size=10)
    for _ in range(2):
        seen = torch.cat([batch["sample_ids"] for batch in batches(loader, 15)])
        assert sorted(seen.tolist()) == list(range(150))


def test_loader_says_what_it_holds(shards):
    loader = make(shards)
    assert loader.domains == ("book", "code", "web") and loader.num_samples == SIZES
    assert loader.manifest.seq_len == 16 and loader.step == 0 and loader.global_batch_size == 12
    assert isinstance(loader, torch.utils.data.DataLoader) and loader.batch_size == 12
    with pytest.raises(TypeError, match="no length"):
        len(loader)


def test_loader_resumes_at_every_step_to_the_bit(shards):
    def moving(loader):
        if loader.step % 3 == 1:
            loader.set_weights([1, 2, loader.step])
        return next(iter(loader))

    assert_resumes(lambda: make(shards), 25, moving)


def test_loader_resumes_where_domains_run_out(shards):
    assert_resumes(lambda: make(shards, on_exhausted="drop"), 30, lambda loader: next(iter(loader)))


def test_iterating_again_goes_on_and_never_rewinds(shards):
    whole = batches(make(shards), 6)
    loader = make(shards)
    for batch in whole:
        assert_same(next(iter(loader)), batch)


def test_set_weights_decides_the_very_next_batch(shards):
    loader = make(shards)
    iterator = iter(loader)
    next(iterator)
    loader.set_weights({"book": 0, "code": 1, "web": 0})
    assert next(iterator)["domain_ids"].tolist() == [1] * 12
    loader.set_weights([0, 0, 1])
    assert next(iterator)["domain_ids"].tolist() == [2] * 12
    assert loader.weights == {"book": 0, "code": 0, "web": 1}


def test_samples_of_a_domain_do_not_depend_on_the_weights(shards):
    def of_web(mixture, count):
        found = torch.cat(
            [b["sample_ids"][b["domain_ids"] == 2] for b in batches(make(shards, mixture=mixture), count)]
        )
        return found.tolist()

    few, many = of_web({"book": 0, "code": 9, "web": 1}, 20), of_web({"book": 1, "code": 1, "web": 8}, 4)
    # Within a batch the rows are shuffled, so compare what the batches have used up.
    shortest = min(len(few), len(many)) // 12 * 12
    assert set(few[: shortest - 12]) <= set(many) or set(many[: shortest - 12]) <= set(few)


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 64])
def test_ranks_share_the_same_global_batches(shards, world):
    size = 192
    whole = batches(make(shards, global_batch_size=size), 3)
    for rank in {0, 1 % world, world // 2, world - 1}:
        loader = make(shards, rank=rank, world_size=world, global_batch_size=size)
        assert loader.batch_size == size // world
        for step, batch in enumerate(batches(loader, 3)):
            assert_same(batch, {name: value[rank::world] for name, value in whole[step].items()})


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 6)), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_global_order_survives_any_sequence_of_restarts_on_other_ranks(shards, legs):
    whole = batches(make(shards), sum(count for _, count in legs))
    state, done = None, 0
    for world, count in legs:
        loaders = [make(shards, rank=rank, world_size=world) for rank in range(world)]
        for rank, loader in enumerate(loaders):
            if state is not None:
                loader.load_state_dict(state)
            for step, batch in enumerate(batches(loader, count)):
                assert_same(batch, {name: value[rank::world] for name, value in whole[done + step].items()})
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert all(other == states[0] for other in states)
        state, done = states[-1], done + count


def rank_main(rank, world, shards, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    loader = make(shards)
    got = []
    for batch in loader:
        got.append(batch)
        loader.set_weights([1, 1, loader.step])
        if loader.step == 5:
            break
    torch.save(got, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_gloo_ranks_deliver_the_batches_of_one(shards, tmp_path):
    mp.spawn(rank_main, args=(2, shards, 29_000 + os.getpid() % 1000, tmp_path), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    loader = make(shards)
    for step, batch in enumerate(loader):
        for rank in range(2):
            assert_same(parts[rank][step], {name: value[rank::2] for name, value in batch.items()})
        loader.set_weights([1, 1, loader.step])
        if loader.step == 5:
            break


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0, "world_size": 5}, "global_batch_size 12 does not divide by world_size 5; use for example 10"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size; got 2 of 2"),
        ({"rank": 1}, "given together"),
        ({"global_batch_size": 0}, "global_batch_size must be at least 1 sample; got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more; got -1"),
        ({"mixture": "best"}, "cannot read the mixture best"),
        ({"mixture": {"code": 1}}, r"says nothing of the domains \['book', 'web'\]"),
        ({"mixture": Mixture({"code": 1, "wiki": 1, "book": 1, "web": 1})}, r"without shards: \['wiki'\]"),
        ({"split": "validation"}, r"without a sample in split 'validation' cannot have a weight: \['book'\]"),
        ({"split": "test"}, "no domain has a sample in split 'test'"),
        ({"verify": "maybe"}, "verify must be"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(shards, options, text):
    with pytest.raises(InputError, match=text) as error:
        make(shards, **options)
    assert "\n" not in str(error.value)


def test_mixture_of_another_tokenizer_is_refused_unless_forced(shards, tmp_path):
    weights = {"book": 0.1, "code": 0.4, "web": 0.5}
    path = Mixture(weights, {"tokenizer": "sha256:other"}).save(tmp_path / "mixture.json")
    with pytest.raises(InputError, match=r"sha256:other, the shards for sha256:000"):
        make(shards, mixture=path)
    loader = make(shards, mixture=path, force=True)
    assert loader.weights == weights and "sha256:other" in loader.mixture.provenance["forced"][0]


def test_validation_split_is_read_with_weights_for_those_who_have_it(shards):
    loader = make(shards, split="validation", mixture={"book": 0, "code": 1, "web": 1})
    batch = next(iter(loader))
    for row, domain, sample in zip(batch["input_ids"].numpy(), batch["domain_ids"], batch["sample_ids"]):
        name = loader.domains[domain]
        np.testing.assert_array_equal(row, row_of(name, SIZES[name] + int(sample), 16))


# --- the end of the data -------------------------------------------------------------------------------------------


def test_stopped_loader_ends_and_then_says_so_instead_of_ending_at_once(shards):
    loader = make(shards, on_exhausted="stop")
    total = sum(1 for _ in loader)
    assert total == 0 and loader.step == 0
    with pytest.raises(ExhaustedError, match=r"this loader has ended \(used up: 'book' after 1 epochs\)"):
        iter(loader)
    other = make(shards, on_exhausted="stop", mixture="proportional", global_batch_size=10)
    assert 50 <= sum(1 for _ in other) <= 55


def test_ended_loader_goes_on_from_an_earlier_state(shards):
    loader = make(shards, on_exhausted="drop")
    state = loader.state_dict()
    total = sum(1 for _ in loader)
    loader.load_state_dict(state)
    assert sum(1 for _ in loader) == total == 553 // 12


def test_limit_with_repeat_is_an_error_in_the_training_process(shards):
    with pytest.raises(ExhaustedError, match="'book' after 1 epochs"):
        batches(make(shards, max_epochs=1), 10)


# --- what training frameworks ask for ------------------------------------------------------------------------------


def test_batches_have_one_shape_for_which_a_model_is_compiled_once(shards):
    counter = CompileCounter()
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(60_000, 2)
    compiled = torch.compile(lambda batch: embedding(batch["input_ids"]).sum(), backend=counter, fullgraph=True)
    for batch in batches(make(shards, on_exhausted="drop", max_epochs=0.5), 10):
        compiled(batch)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_every_batch_is_whole_to_the_end(shards):
    sizes = {len(batch["input_ids"]) for batch in make(shards, on_exhausted="drop", global_batch_size=50)}
    assert sizes == {50}


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_pinning_memory_is_harmless_without_a_gpu(shards):
    assert_same(batches(make(shards, pin_memory=True), 3), batches(make(shards), 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_memory_holds_the_same_batches(shards):
    for pinned, batch in zip(batches(make(shards, pin_memory=True), 3), batches(make(shards), 3)):
        assert all(value.is_pinned() for value in pinned.values())
        assert_same(pinned, batch)


@pytest.mark.parametrize("transform", [len, lambda batch: (batch["input_ids"], batch["domain_ids"])])
def test_transform_may_return_anything(shards, transform):
    assert next(iter(make(shards, transform=transform))) is not None


# --- damage --------------------------------------------------------------------------------------------------------


def test_damaged_shard_stops_the_loader_and_leaves_its_state_before_the_batch(tmp_path):
    root = write_shards(tmp_path, {"code": 150, "web": 400})
    expected = batches(make(root), 40)
    path = root / "web" / "train" / "shard.00003.mds"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    loader, delivered = make(root), []
    with pytest.raises(DataError, match=r"domain 'web', shard .*shard\.00003\.mds: has xxh64"):
        for batch in loader:
            delivered.append(batch)
    assert_same(delivered, expected[: len(delivered)])
    path.write_bytes(sound)
    assert_same(batches(loader, 40 - len(delivered)), expected[len(delivered) :])


def test_state_of_other_shards_is_refused(shards, tmp_path):
    state = make(shards).state_dict()
    other = write_shards(tmp_path, SIZES, seq_len=8)
    with pytest.raises(InputError, match="domain 'book' had fingerprint"):
        make(other).load_state_dict(state)
    with pytest.raises(InputError, match="state has seed 3, this run 4"):
        make(shards, seed=4).load_state_dict(state)


def test_domains_are_added_dropped_and_grown_on_resume_keeping_what_was_read(tmp_path):
    before = write_shards(tmp_path / "before", {"code": 128, "old": 64, "web": 640})
    after = write_shards(tmp_path / "after", {"code": 320, "new": 64, "web": 640})
    loader = make(before, mixture={"code": 0.5, "old": 0.25, "web": 0.25})
    seen = {"code": [], "web": []}
    drawn = batches(loader, 10)

    def collect(loader, found):
        for batch in found:
            for domain, sample in zip(batch["domain_ids"], batch["sample_ids"].tolist()):
                seen.setdefault(loader.domains[domain], []).append(sample)

    collect(loader, drawn)
    other = make(after, mixture={"code": 0.5, "new": 0.25, "web": 0.25})
    with pytest.raises(InputError, match="'code' had 128 samples, has 320"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())), remap=True)
    assert other.step == 10 and other.weights == {"code": 0.5, "new": 0.25, "web": 0.25}
    state = other.state_dict()
    collect(other, batches(other, 43))
    # 53 batches take 318 of 320 samples of code, 192 of which came later, and none twice.
    assert len(seen["code"]) == len(set(seen["code"])) == 318 and len(set(seen["web"])) == len(seen["web"])
    assert set(seen["new"]) == set(range(64))

    def grown():
        thing = make(after)
        thing.load_state_dict(state)
        return thing

    assert_resumes(grown, 8, lambda thing: next(iter(thing)))


TRAIN = """
import json, os, sys, time
from mixer import MixtureLoader
shards, log, state = sys.argv[1:]
loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12, seed=3)
if os.path.exists(state):
    loader.load_state_dict(json.load(open(state)))
with open(log, "a", buffering=1) as out:
    for batch in loader:
        out.write(json.dumps([loader.step, batch["domain_ids"].tolist(), batch["sample_ids"].tolist()]) + "\\n")
        if loader.step % 5 == 0:
            json.dump(loader.state_dict(), open(state + ".tmp", "w"))
            os.replace(state + ".tmp", state)
        time.sleep(0.002)
"""


def test_kill_9_and_restart_gives_the_same_samples(tmp_path):
    root = write_shards(tmp_path / "shards", SIZES, compression="zstd")
    log, state = tmp_path / "log", tmp_path / "state.json"
    for lines in (30, 80):
        process = subprocess.Popen([sys.executable, "-c", TRAIN, root, log, state], cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < lines:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    seen = {}
    for line in log.read_text().splitlines()[:-1]:  # the last one may be cut
        step, *draws = json.loads(line)
        assert seen.setdefault(step, draws) == draws
    loader = make(root)
    for step, batch in enumerate(batches(loader, max(seen)), 1):
        assert seen[step] == [batch["domain_ids"].tolist(), batch["sample_ids"].tolist()]


# --- others' shards ------------------------------------------------------------------------------------------------


def test_folder_of_llm_foundry_shards_is_mixed(tmp_path):
    rows = np.arange(40 * 8).reshape(40, 8)
    for domain in ("a", "b"):
        samples = [{"tokens": row.tobytes()} for row in rows]
        write_domain(tmp_path / domain / "train", samples, columns={"tokens": "bytes"}, hashes=())
    batch = next(iter(MixtureLoader(tmp_path, global_batch_size=8)))
    np.testing.assert_array_equal(batch["input_ids"].numpy(), rows[batch["sample_ids"].numpy()])


def test_stats_follow_what_was_delivered(shards):
    loader = make(shards)
    seen = torch.cat([batch["domain_ids"] for batch in batches(loader, 7)])
    stats = loader.stats()
    assert stats["step"] == 7 and stats["samples"] == 84
    for i, name in enumerate(loader.domains):
        one, count = stats["domains"][name], int((seen == i).sum())
        assert (one["samples"], one["tokens"], one["share"]) == (count, count * 16, count / 84)
        assert one["epochs"] == count / SIZES[name] and abs(one["target_share"] - 1 / 3) < 1e-9
        assert one["exhausted"] is False
