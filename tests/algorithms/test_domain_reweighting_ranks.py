"""Two gloo ranks do what one process does: DDP, FSDP2, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.algorithms import rank_jobs
from tests.algorithms.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All jobs in one pair of processes: starting them costs more than training."""
    return run_ranks(["ddp", "resume", "fsdp2", "gathered"], 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return rank_jobs.ddp(Path(), 0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gradient_on_two_ranks_is_that_of_one(ranks: Any, alone: Any) -> None:
    for rank in ranks:
        for ours, expected in zip(rank["ddp"]["gradients"], alone["gradients"], strict=True):
            assert distance(ours, expected) < 1e-6
        assert distance(rank["ddp"]["parameters"], alone["parameters"]) < 1e-6
        assert rank["ddp"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_weights_on_two_ranks_are_those_of_one(ranks: Any, alone: Any) -> None:
    for rank in ranks:
        np.testing.assert_array_equal(rank["ddp"]["tokens"], alone["tokens"])
        np.testing.assert_allclose(rank["ddp"]["weights"], alone["weights"], rtol=1e-6)


def test_ranks_hold_equal_weights_to_the_bit(ranks: Any) -> None:
    assert (ranks[0]["ddp"]["weights"] == ranks[1]["ddp"]["weights"]).all()
    assert ranks[0]["gathered"][0] == ranks[0]["gathered"][1]


def test_two_ranks_resume_to_the_bit_with_dropout(ranks: Any) -> None:
    for rank in ranks:
        assert torch.equal(rank["resume"]["whole"], rank["resume"]["resumed"])


def test_fsdp2_finds_the_same_weights_and_resumes(ranks: Any, alone: Any) -> None:
    for rank in ranks:
        sharded = rank["fsdp2"]
        np.testing.assert_allclose(sharded["weights"], alone["weights"], rtol=1e-6)
        assert distance(sharded["parameters"], alone["parameters"]) < 1e-6
        np.testing.assert_array_equal(sharded["resumed_weights"], sharded["weights"])
        assert torch.equal(sharded["resumed_parameters"], sharded["parameters"])
