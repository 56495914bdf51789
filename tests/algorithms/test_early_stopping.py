"""Stopping by the worst domain's held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import DomainReweighting
from algorithms.early_stopping import WorstDomainEarlyStopping
from algorithms.heldout import HeldOutWindows
from mixer.errors import InputError
from tests.algorithms.test_domain_reweighting import heldout_windows
from tests.algorithms.tiny import DOMAINS, SEQ_LEN, llama
from tests.algorithms.training_helpers import Metrics, fit, parameters


def run(stopper: WorstDomainEarlyStopping, lr: float, steps: int = 12, **options: Any) -> tuple[int, Metrics]:
    log = Metrics()
    trainer = fit(DomainReweighting(), callbacks=[stopper], loggers=[log], lr=lr, steps=steps, **options)
    return trainer.state.timestamp.batch.value, log


def test_a_run_that_gets_no_better_ends_after_patience_evaluations() -> None:
    steps, log = run(WorstDomainEarlyStopping(heldout_windows(), every="2ba", patience=2), lr=0.0)
    assert steps == 6, "evaluated at 2 (the best), 4 and 6"
    windows = heldout_windows()
    worst = max(
        llama()(input_ids=ids, labels=ids).loss.item()
        for ids in (windows.input_ids[windows.domain_ids == index] for index in range(3))
    )
    assert log.series["worst_domain/loss"] == [(step, pytest.approx(worst, rel=1e-5)) for step in (1, 3, 5)]


def test_a_run_that_gets_better_goes_on() -> None:
    common = np.random.default_rng(0).integers(0, 4, (5, SEQ_LEN))  # tokens of every domain's training samples
    windows = HeldOutWindows(dict.fromkeys(DOMAINS, common))
    steps, log = run(WorstDomainEarlyStopping(windows, every=3, patience=1), lr=0.05)
    losses = [value for _, value in log.series["worst_domain/loss"]]
    assert steps == 12 and losses == sorted(losses, reverse=True) and len(losses) == 4


def test_targets_decide_which_domain_is_worst() -> None:
    targets = dict(zip(DOMAINS, (0.0, 0.0, -5.0)))
    _, log = run(WorstDomainEarlyStopping(heldout_windows(), targets=targets, every=1), lr=0.0, steps=1)
    windows = heldout_windows()
    ids = windows.input_ids[windows.domain_ids == 2]
    expected = llama()(input_ids=ids, labels=ids).loss.item() + 5
    assert log.series["worst_domain/loss"][0][1] == pytest.approx(expected, rel=1e-5)


def test_patience_is_resumed(tmp_path: Path) -> None:
    def stopper() -> WorstDomainEarlyStopping:
        return WorstDomainEarlyStopping(heldout_windows(), every="2ba", patience=2)

    run(stopper(), lr=0.0, steps=5, save_folder=str(tmp_path), save_interval="5ba")
    steps, _ = run(stopper(), lr=0.0, load_path=str(tmp_path / "ep0-ba5-rank0.pt"))
    assert steps == 6


def rising(**options: Any) -> WorstDomainEarlyStopping:
    """A stopper whose windows are of tokens that training never shows: their loss only rises."""
    unseen = np.random.default_rng(0).integers(28, 32, (5, SEQ_LEN))
    return WorstDomainEarlyStopping(
        HeldOutWindows(dict.fromkeys(DOMAINS, unseen)), every="2ba", patience=2, restore_best=True, **options
    )


def test_the_model_of_the_best_evaluation_is_put_back() -> None:
    expected = parameters(fit(DomainReweighting(), lr=1.0, steps=2))
    stopper = rising()
    trainer = fit(DomainReweighting(), callbacks=[stopper], lr=1.0, steps=12)
    assert trainer.state.timestamp.batch.value == 6 and stopper.best_step == 1
    assert torch.equal(parameters(trainer), expected)


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4, 5, 6])
def test_the_best_model_is_resumed_and_a_run_that_had_ended_stays_so(saved_at: int, tmp_path: Path) -> None:
    expected = parameters(fit(DomainReweighting(), lr=1.0, steps=2))
    options: dict[str, Any] = {"save_folder": str(tmp_path), "save_interval": "1ba", "lr": 1.0, "steps": 12}
    fit(DomainReweighting(), callbacks=[rising()], **options)
    stopper = rising()
    options = {"lr": 1.0, "steps": 12, "load_path": str(tmp_path / f"ep0-ba{saved_at}-rank0.pt")}
    resumed = fit(DomainReweighting(), callbacks=[stopper], **options)
    assert resumed.state.timestamp.batch.value == 6 and stopper.best_step == 1 and stopper.num_worse == 2
    assert torch.equal(parameters(resumed), expected)


def test_a_checkpoint_without_the_best_model_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    def plain() -> WorstDomainEarlyStopping:
        return WorstDomainEarlyStopping(rising().heldout, every="2ba", patience=2)

    options: dict[str, Any] = {"lr": 1.0, "steps": 12}
    fit(DomainReweighting(), callbacks=[plain()], save_folder=str(tmp_path), save_interval="3ba", **options)
    checkpoint = str(tmp_path / "ep0-ba3-rank0.pt")
    with pytest.raises(InputError, match="has no model of step 1, the best so far"):
        fit(DomainReweighting(), callbacks=[rising()], load_path=checkpoint, **options)
    with_it = tmp_path / "with"
    whole = fit(DomainReweighting(), callbacks=[rising()], save_folder=str(with_it), save_interval="3ba", **options)
    last = fit(DomainReweighting(), callbacks=[plain()], load_path=str(with_it / "ep0-ba3-rank0.pt"), **options)
    assert not torch.equal(parameters(last), parameters(whole)), "who does not ask for the best model keeps the last"


def test_the_last_step_is_a_candidate_too() -> None:
    common = np.random.default_rng(0).integers(0, 4, (5, SEQ_LEN))
    windows = HeldOutWindows(dict.fromkeys(DOMAINS, common))
    stopper = WorstDomainEarlyStopping(windows, every=3, patience=1, restore_best=True)
    trainer = fit(DomainReweighting(), callbacks=[stopper], lr=0.05, steps=5)
    assert stopper.best_step == 4
    assert torch.equal(parameters(trainer), parameters(fit(DomainReweighting(), lr=0.05, steps=5)))


def test_an_objective_of_ones_own_is_watched_in_place_of_the_worst_domain() -> None:
    objective = {"books": 0.0, "code": 1.0, "web": 3.0}
    stopper = WorstDomainEarlyStopping(heldout_windows(), objective=objective, every=1)
    _, log = run(stopper, lr=0.0, steps=1)
    windows = heldout_windows()
    losses = [
        llama()(input_ids=ids, labels=ids).loss.item()
        for ids in (windows.input_ids[windows.domain_ids == index] for index in (1, 2))
    ]
    assert log.series["objective/loss"][0][1] == pytest.approx((losses[0] + 3 * losses[1]) / 4, rel=1e-5)
    with pytest.raises(InputError, match=r"no weight in the objective for the domains \['books', 'web'\]"):
        WorstDomainEarlyStopping(heldout_windows(), objective={"code": 1.0})


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="patience must be >= 1"):
        WorstDomainEarlyStopping(heldout_windows(), patience=0)
    with pytest.raises(InputError, match=r"no target loss for the domains \['books', 'web'\]"):
        WorstDomainEarlyStopping(heldout_windows(), targets={"code": 1.0})
    assert np.isinf(WorstDomainEarlyStopping(heldout_windows()).best)
