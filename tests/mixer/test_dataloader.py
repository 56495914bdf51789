"""What the loader delivers, from real shards: the right samples, in the same order however it is run."""

from __future__ import annotations


import numpy as np
import pytest
import torch

from mixer import MixtureLoader
from tests.helpers import assert_resumes, assert_same, row_of, write_shards

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
        assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (12, 16)
        for row, domain, sample in zip(batch["input_ids"].numpy(), batch["domain_ids"], batch["sample_ids"]):
            np.testing.assert_array_equal(row, row_of(loader.domains[domain], int(sample), 16).astype(np.int64))


def test_loader_resumes_at_every_step_to_the_bit(shards):
    assert_resumes(lambda: make(shards), 25, lambda loader: next(iter(loader)))


def test_set_weights_decides_the_very_next_batch(shards):
    loader = make(shards)
    iterator = iter(loader)
    next(iterator)
    loader.set_weights({"book": 0, "code": 1, "web": 0})
    assert next(iterator)["domain_ids"].tolist() == [1] * 12
    loader.set_weights([0, 0, 1])
    assert next(iterator)["domain_ids"].tolist() == [2] * 12
    assert loader.weights == {"book": 0, "code": 0, "web": 1}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_ranks_share_the_same_global_batches(shards, world):
    whole = batches(make(shards), 5)
    parts = [batches(make(shards, rank=rank, world_size=world), 5) for rank in range(world)]
    for step in range(5):
        for rank in range(world):
            mine = {name: value[rank::world] for name, value in whole[step].items()}
            assert_same(parts[rank][step], mine)
