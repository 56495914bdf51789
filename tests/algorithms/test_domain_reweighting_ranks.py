"""Two gloo ranks do what one process does: DDP, FSDP2, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import DomainReweighting
from algorithms.references import FrozenModel, as_reference
from tests.algorithms import rank_jobs
from tests.algorithms.every_rule import assert_equal_runs, weights_of_every_rule
from tests.algorithms.ranks import JOBS, run_ranks
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.tiny import VOCAB, Loader, batch
from tests.algorithms.training_helpers import fit, parameters
from tests.helpers import write_shards


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """All jobs in one pair of processes: starting them costs more than training."""
    return run_ranks(list(JOBS), 2, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    sizes, held_out = {"books": 7, "code": 50, "web": 200}, {"books": 2, "code": 5, "web": 9}
    write_shards(path / "shards", sizes, seq_len=12, vocab_size=VOCAB, validation=held_out, rows=row)
    rank_jobs.continued(path, steps=2, save_folder=str(path / "one"), save_interval="2ba")
    return path


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


def test_every_rule_finds_on_two_ranks_what_it_finds_on_one(ranks: Any) -> None:
    expected = weights_of_every_rule()
    for rank in ranks:
        assert_equal_runs(rank["every_rule"], expected)


def test_four_ranks_do_what_one_does(alone: Any, tmp_path: Path) -> None:
    every_rule = weights_of_every_rule()
    for rank in run_ranks(["ddp", "every_rule", "hybrid"], 4, tmp_path):
        assert_equal_sums(rank["hybrid"])
        assert_equal_runs(rank["every_rule"], every_rule)
        for ours, expected in zip(rank["ddp"]["gradients"], alone["gradients"], strict=True):
            assert distance(ours, expected) < 1e-6
        np.testing.assert_allclose(rank["ddp"]["weights"], alone["weights"], rtol=1e-6)


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


def test_fsdp1_finds_the_same_weights_and_refuses_gradients_of_domains(ranks: Any, alone: Any) -> None:
    for rank in ranks:
        np.testing.assert_allclose(rank["fsdp1"]["weights"], alone["weights"], rtol=1e-6)
        assert distance(rank["fsdp1"]["parameters"], alone["parameters"]) < 1e-6
        assert "cannot be measured under FSDP1, whose parameters are flattened" in rank["fsdp1"]["refused"]
        assert "restore_best cannot keep the parameters of FSDP1" in rank["fsdp1"]["best"]


def test_the_best_model_is_put_back_under_fsdp2_also_after_a_resumption(ranks: Any) -> None:
    alone = parameters(fit(DomainReweighting(), lr=1.0, steps=2))
    for rank in ranks:
        expected = rank["best_model"].pop("expected")
        assert distance(expected, alone) < 1e-6
        assert rank["best_model"].keys() == {"whole", *(f"resumed from {step}" for step in (1, 3, 6))}
        for found in rank["best_model"].values():
            assert torch.equal(found, expected)


def test_a_rank_that_goes_its_own_way_is_named_on_every_rank(ranks: Any) -> None:
    for rank in ranks:
        found = rank["diverged"]
        assert "DataError: at step 2 rank 1 holds other domain weights" in found["state"]
        assert "DataError: rank 1 holds other domain weights" in found["plain_loop"]
        assert "DataError: at step 0 rank 1 holds other domain weights" in found["loader"]
        assert "has settings {'eta': 0." in found["settings"] and "All ranks need the same" in found["settings"]


@pytest.mark.parametrize("job", ["signals", "fsdp2_signals"])
def test_everything_a_rule_may_ask_for_is_the_same_on_two_ranks(job: str, ranks: Any) -> None:
    for rank in ranks:
        assert_equal_signals(rank[job])


def assert_equal_signals(found: list[Any]) -> None:
    """Compare with those of one process, for as many needs as there are."""
    for ours, expected in zip(found, rank_jobs.signals(Path(), 0, 1)):
        for step, alone_step in zip(ours, expected, strict=True):
            for name, value in step._asdict().items():
                if value is not None:
                    np.testing.assert_allclose(value, getattr(alone_step, name), rtol=2e-5, atol=1e-7, err_msg=name)


def test_gradients_of_domains_are_the_same_on_ranks_that_hold_copies(ranks: Any) -> None:
    for rank in ranks:
        assert_equal_sums(rank["hybrid"])


def assert_equal_sums(found: dict[str, Any]) -> None:
    assert found["placements"] == "(Replicate(), Shard(dim=0))"
    for ours, expected in zip(found["sums"], rank_jobs.hybrid(Path(), 0, 1)["sums"], strict=True):
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)


def test_the_real_loader_is_driven_alike_on_two_ranks(ranks: Any, folder: Path) -> None:
    alone = rank_jobs.mixture_loader(folder, 0, 1)
    for rank in ranks:
        np.testing.assert_allclose(rank["mixture_loader"]["weights"], alone["weights"], rtol=1e-6)
        assert distance(rank["mixture_loader"]["parameters"], alone["parameters"]) < 1e-5
    assert ranks[0]["mixture_loader"]["state"] == ranks[1]["mixture_loader"]["state"]


def test_a_sharded_reference_finds_the_same_weights(ranks: Any, alone: Any) -> None:
    for rank in ranks:
        np.testing.assert_allclose(rank["sharded_reference"]["weights"], alone["weights"], rtol=1e-6)
        assert rank["sharded_reference"]["share"] < 0.6, "each rank holds about half"


def test_a_search_on_two_ranks_writes_what_one_writes(ranks: Any, folder: Path) -> None:
    alone = rank_jobs.search(folder, 0, 1)
    assert ranks[0]["search"] == ranks[1]["search"] == pytest.approx(alone, rel=1e-5)
    files = [{path.relative_to(out) for path in out.rglob("*")} for out in (folder / "search-1", folder / "search-2")]
    assert files[0] == files[1] and Path("round-1/proxy/model/model.safetensors") in files[0]


def test_the_worst_part_of_a_batch_is_the_same_on_two_ranks(ranks: Any) -> None:
    alone = rank_jobs.worst_subset(Path(), 0, 1)
    for rank in ranks:
        assert distance(rank["worst_subset"], alone) < 1e-6


def test_what_one_process_began_two_ranks_continue(ranks: Any, folder: Path) -> None:
    trajectory, expected = rank_jobs.continued(folder, steps=5)
    for rank in ranks:
        np.testing.assert_allclose(rank["elastic"][0].weights, trajectory.weights, rtol=1e-6)
        assert distance(rank["elastic"][1], expected) < 1e-6


def test_a_sharded_checkpoint_is_a_reference(ranks: Any, folder: Path) -> None:
    """Two steps under FSDP2, against the same two steps in one process."""
    trained = fit(rank_jobs.searching(), loader=Loader(padded=True), micro=2, steps=2).state.model.model
    expected, part = FrozenModel(trained).token_losses(batch()), batch()
    found = as_reference(folder / "fsdp2" / "ep0-ba2").token_losses(part)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
