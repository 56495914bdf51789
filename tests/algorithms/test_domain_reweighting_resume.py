"""A run that is stopped and continued is the run that was not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import reproducibility

from algorithms import DomainReweighting, doremi, group_dro
from algorithms.random_state import random_state, restore_random_state
from algorithms.signals import Signals
from algorithms.trajectory import Trajectory
from mixer.errors import InputError
from tests.algorithms.tiny import Loader, gpt2, llama, wrap
from tests.algorithms.training_helpers import fit, make_trainer, parameters


def searching(apply: str = "loss", **options: Any) -> DomainReweighting:
    if apply == "sampling":
        return DomainReweighting(group_dro(eta=1.0), apply="sampling", **options)
    return DomainReweighting(doremi(), reference=llama(seed=1), **options)


def dropping_out() -> Any:
    """A model whose result depends on the random generator at every step."""
    return wrap(gpt2(dropout=0.2))


def builtins_of(state: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return json.dumps(state, default=plain, sort_keys=True)


def test_weights_of_a_model_alone_start_the_rule_anew(tmp_path: Path) -> None:
    trained = parameters(fit(searching(), steps=2, save_folder=str(tmp_path), save_interval="2ba"))
    again, loader = searching(), Loader()
    checkpoint = str(tmp_path / "ep0-ba2-rank0.pt")
    trainer = fit(again, loader=loader, steps=1, lr=0.0, load_path=checkpoint, load_weights_only=True)
    assert torch.equal(parameters(trainer), trained)
    assert again.trajectory.steps.tolist() == [0] and loader.dataset.position == 12


@pytest.mark.parametrize("apply", ["loss", "sampling"])
def test_a_resumed_run_is_the_same_to_the_bit(apply: str, tmp_path: Path) -> None:
    whole = searching(apply, every="2ba")
    expected = parameters(fit(whole, model=dropping_out(), steps=6, micro=4))
    fit(
        searching(apply, every="2ba"),
        model=dropping_out(),
        steps=3,
        micro=4,
        save_folder=str(tmp_path),
        save_interval="1ba",
    )
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"ep0-ba{step}-rank0.pt"
        reproducibility.seed_all(99)  # a new process has other random numbers
        resumed, loader = searching(apply, every="2ba"), Loader()
        trainer = fit(resumed, model=dropping_out(), loader=loader, steps=6, micro=4, load_path=str(checkpoint), seed=7)
        assert torch.equal(parameters(trainer), expected), f"parameters differ after resuming at step {step}"
        assert builtins_of(resumed.state_dict()) == builtins_of(whole.state_dict())
        np.testing.assert_array_equal(resumed.weights, whole.weights)
        assert loader.dataset.position >= 6 * 12


def test_without_restoring_the_generators_dropout_differs(tmp_path: Path) -> None:
    """Composer alone does not restore them in the middle of an epoch: the reason for ``restore_rng``."""
    expected = parameters(fit(searching(), model=dropping_out(), steps=4))
    fit(searching(), model=dropping_out(), steps=2, save_folder=str(tmp_path), save_interval="2ba")
    trainer = fit(
        searching(restore_rng=False),
        model=dropping_out(),
        steps=4,
        load_path=str(tmp_path / "ep0-ba2-rank0.pt"),
        seed=7,
    )
    assert not torch.equal(parameters(trainer), expected)


def test_fit_called_twice_is_fit_called_once() -> None:
    once, twice = searching(), searching()
    expected = parameters(fit(once, steps=6, micro=4))
    trainer = make_trainer(twice, steps=3, micro=4)
    trainer.fit()
    trainer.fit(duration="3ba")
    assert torch.equal(parameters(trainer), expected)
    assert builtins_of({**twice.state_dict(), "rng": None}) == builtins_of({**once.state_dict(), "rng": None})


def test_state_holds_builtins_and_tensors_only() -> None:
    algorithm = searching()
    fit(algorithm, steps=2)
    file = io.BytesIO()
    torch.save(algorithm.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert builtins_of(loaded) == builtins_of(algorithm.state_dict())
    restored = searching()
    restored.load_state_dict(loaded)
    assert builtins_of(restored.state_dict()) == builtins_of(loaded), "saved again before training goes on"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: DomainReweighting(group_dro(), reference=llama(seed=1)), "rule 'doremi', this run has 'group_dro'"),
        (lambda: DomainReweighting(doremi(eta=0.5), reference=llama(seed=1)), "settings .*'eta': 1.0.*'eta': 0.5"),
        (lambda: DomainReweighting(doremi(), reference=llama(seed=2)), "reference 'xxh3:.*', this run has 'xxh3:"),
        (lambda: searching(apply="loss", domains=["a", "b", "c"]), r"domains \['books'.*this run has \['a'"),
    ],
)
def test_a_state_of_another_run_is_refused(other: Any, message: str) -> None:
    class Nameless(Loader):
        domains = None  # type: ignore[assignment]

    algorithm = searching()
    fit(algorithm, steps=1)
    stranger = other()
    stranger.load_state_dict(algorithm.state_dict())
    with pytest.raises(InputError, match=message):
        fit(stranger, steps=2, loader=Nameless() if "domains" in message else Loader())


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="version 0, this is version 1"):
        searching().load_state_dict({"version": 0})


def test_a_checkpoint_from_before_the_first_step_starts_anew(tmp_path: Path) -> None:
    algorithm = searching()
    algorithm.load_state_dict(searching().state_dict())
    fit(algorithm, steps=1)
    assert len(algorithm.trajectory.steps) == 1


def test_state_size_does_not_grow_with_the_run() -> None:
    history = Trajectory(2, max_rows=4)
    for step in range(1000):
        history.append(step, np.array([0.5, 0.5]), Signals(np.array([1.0, 0.0]), np.array([float(step), 0.0])))
        assert len(history) <= 4
    rows = history.rows()
    assert np.nansum(rows.num_tokens) == 1000, "no update is lost when rows are merged"
    assert (rows.loss[:, 0] * rows.num_tokens[:, 0]).sum() == sum(range(1000))
    assert rows.steps[-1] == 999 and len(set(np.diff(rows.steps[:-1]))) == 1
    assert np.isnan(rows.loss[:, 1]).all() and np.isnan(rows.excess).all()


def test_a_history_resumes_at_every_step() -> None:
    def run(history: Trajectory, steps: range) -> Trajectory:
        for step in steps:
            history.append(step, np.array([step, 1.0]), Signals(np.ones(2), np.array([step, 2.0])))
        return history

    expected = run(Trajectory(2, max_rows=4), range(20)).state_dict()
    for stop in range(20):
        resumed = Trajectory(2, max_rows=4)
        resumed.load_state_dict(run(Trajectory(2, max_rows=4), range(stop)).state_dict())
        assert builtins_of(run(resumed, range(stop, 20)).state_dict()) == builtins_of(expected)
    with pytest.raises(InputError, match="made for other domains"):
        Trajectory(3).load_state_dict(expected)


def test_random_state_restores_every_generator() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(1).item()

    np.random.standard_normal()  # leaves a cached second number behind
    saved = random_state()
    first = draw()
    file = io.BytesIO()
    torch.save(saved, file)
    draw()
    restore_random_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert draw() == first
