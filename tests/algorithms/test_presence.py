"""How often updates lack a domain, and the warning that says so."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from algorithms import DomainReweighting, doremi, group_dro, warn_of_absences
from algorithms.presence import absence_warning, absent_shares
from algorithms.rules import UPDATE_RULES
from mixer.dataloader import MixtureLoader
from mixer.mixer import Mixer
from tests.algorithms.test_domain_reweighting_loader import shards  # noqa: F401
from tests.algorithms.tiny import llama
from tests.algorithms.training_helpers import fit

WEIGHTS = np.array([0.6, 0.3, 0.07, 0.03])
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_shares_are_those_of_the_mixers_own_draws(independent: bool, batches: int) -> None:
    mixer = Mixer(
        dict.fromkeys(NAMES, 1000), weights=dict(zip(NAMES, WEIGHTS)), batch_size=8, seed=3, independent=independent
    )
    counts = np.array([np.sum([mixer.next_batch().counts for _ in range(batches)], axis=0) for _ in range(1500)])
    expected = absent_shares(WEIGHTS, 8 * batches, independent=independent)
    np.testing.assert_allclose((counts == 0).mean(axis=0), expected, atol=0.03)


@pytest.mark.parametrize(("batch_size", "chance"), [(64, 0.71), (128, 0.056), (512, 1e-9)])
def test_independent_draws_of_22_domains_alike_lack_one_as_often_as_known(batch_size: int, chance: float) -> None:
    text = absence_warning([f"d{i}" for i in range(22)], np.full(22, 1 / 22), batch_size, independent=True)
    if chance < 0.01:
        assert text == ""
    else:
        assert float(text.split("%")[0].split()[-1]) / 100 == pytest.approx(chance, abs=0.04)


def test_the_samples_asked_for_are_enough() -> None:
    for independent in (False, True):
        text = absence_warning(NAMES, WEIGHTS, 8, independent=independent)
        assert "most often 'd' (weight 0.03" in text
        needed = int(text.split(" samples or more")[0].split()[-1].replace(",", ""))
        assert absence_warning(NAMES, WEIGHTS, needed, independent=independent) == ""
        assert absence_warning(NAMES, WEIGHTS, needed * 0.7, independent=independent) != ""


def test_training_warns_once_and_only_where_the_rule_scores_batches(
    shards: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    def warnings(algorithm: DomainReweighting, batch_size: int) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="algorithms.presence"):
            fit(algorithm, loader=MixtureLoader(shards, mixture="uniform", global_batch_size=batch_size), steps=4)
        return [record.getMessage() for record in caplog.records if record.name.startswith("algorithms")]

    (text,) = warnings(DomainReweighting(doremi(), reference=llama(seed=1)), 2)
    assert text.startswith("about 100% of the updates, of 2 samples each, will lack some domain, most often 'books'")
    assert text.endswith("take 3 samples or more per update, by a larger batch or a longer interval (every=, --every).")
    assert not warnings(DomainReweighting(group_dro()), 3)
    assert not warnings(DomainReweighting(group_dro(), every=2), 2)
    assert not warnings(DomainReweighting(UPDATE_RULES["on_demand"](), heldout=shards, every=1), 2)
    assert not warnings(DomainReweighting(), 2)


def test_a_loop_of_ones_own_is_warned_alike(shards: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=2)
    warn_of_absences(doremi(), loader)
    (record,) = caplog.records
    assert "100% of the updates, of 2 samples each, will lack some domain" in record.getMessage()
    caplog.clear()
    warn_of_absences(doremi(), loader, num_samples=4)
    warn_of_absences(UPDATE_RULES["on_demand"](), loader)
    warn_of_absences(doremi(), [{"input_ids": None}])
    assert not caplog.records
