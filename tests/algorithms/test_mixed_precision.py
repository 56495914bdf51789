"""bf16 and fp16 training in Composer, with the processor in place of the GPU that Composer asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import precision
from composer.trainer import trainer

from algorithms import DomainReweighting, doremi
from algorithms.rules import UPDATE_RULES
from mixer.errors import InputError
from tests.algorithms.test_domain_reweighting import constant, distance, written_out
from tests.algorithms.tiny import Loader, batch, llama
from tests.algorithms.training_helpers import Gradients, fit, flat, parameters


@pytest.fixture(autouse=True)
def autocast_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer enters autocast on a GPU only, and refuses other precisions than fp32 without one."""
    stand_in = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True),
        bfloat16=torch.bfloat16,
        float16=torch.float16,
        autocast=lambda device, dtype=torch.float16, **options: torch.autocast("cpu", dtype=dtype, **options),
    )
    monkeypatch.setattr(precision, "torch", stand_in)
    monkeypatch.setattr(trainer, "_validate_precision", lambda *_: None)


def run(algorithm: DomainReweighting, **options: object) -> object:
    return fit(algorithm, loader=Loader(padded=True), **{"precision": "amp_bf16", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_gradient_is_the_papers_within_the_rounding_of_bf16(micro: int) -> None:
    seen = Gradients()
    run(DomainReweighting(constant()), micro=micro, steps=1, callbacks=[seen])
    exact = written_out(llama(), batch(padded=True))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = written_out(llama(), batch(padded=True))
    assert distance(seen.steps[0], rounded) < 0.01
    assert 1e-4 < distance(seen.steps[0], exact) < 0.02


def test_losses_of_proxy_and_reference_are_both_taken_in_the_precision_of_the_run() -> None:
    """A proxy that is its own reference has no excess loss; in two precisions it would have some everywhere."""
    algorithm = DomainReweighting(doremi(clip="none"), reference=llama())
    run(algorithm, micro=12, steps=1, lr=0.0)
    np.testing.assert_allclose(algorithm.trajectory.excess[0], 0, atol=1e-6)
    exact = DomainReweighting(doremi(), reference=llama(seed=1))
    run(exact, precision="fp32", steps=1)
    half = DomainReweighting(doremi(), reference=llama(seed=1))
    run(half, steps=1)
    assert half.trajectory.loss.dtype == np.float64
    np.testing.assert_allclose(half.trajectory.loss, exact.trajectory.loss, rtol=2e-3)
    assert not np.array_equal(half.trajectory.loss, exact.trajectory.loss)


def test_weights_hardly_depend_on_the_micro_batch() -> None:
    found = []
    for micro in (12, 5, 1):
        algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
        run(algorithm, micro=micro, steps=3)
        found.append(algorithm.weights)
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=5e-3)


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    def algorithm() -> DomainReweighting:
        return DomainReweighting(doremi(), reference=llama(seed=1))

    whole, again = algorithm(), algorithm()
    expected = run(whole, micro=5, steps=4, save_folder=str(tmp_path), save_interval="2ba")
    resumed = run(again, micro=5, steps=4, load_path=str(tmp_path / "ep0-ba2-rank0.pt"))
    np.testing.assert_array_equal(again.weights, whole.weights)
    assert torch.equal(parameters(resumed), parameters(expected))  # type: ignore[arg-type]


def scaled_by(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "GradScaler", lambda: torch.amp.GradScaler("cpu", init_scale=factor))


@pytest.mark.parametrize("micro", [12, 5])
def test_the_scale_of_fp16_is_taken_off_the_gradient_again(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_by(1024.0, monkeypatch)
    seen = Gradients()
    trained = run(DomainReweighting(constant()), precision="amp_fp16", micro=micro, steps=1, callbacks=[seen])
    assert trained.state.scaler.get_scale() == 1024.0, "the scaler has to have been at work"  # type: ignore[attr-defined]
    assert 1e-5 < distance(seen.steps[0], written_out(llama(), batch(padded=True))) < 5e-3


def test_where_the_scaler_skips_a_step_its_losses_still_move_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_by(1e30, monkeypatch)  # gradients overflow until the scaler has come down
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1), on_nonfinite="skip")
    before = flat(llama().parameters())
    trained = run(algorithm, precision="amp_fp16", steps=2)
    assert torch.equal(parameters(trained), before)  # type: ignore[arg-type]
    assert trained.state.scaler.get_scale() == pytest.approx(1e30 / 4)  # type: ignore[attr-defined]
    assert np.isfinite(algorithm.trajectory.loss).all() and np.ptp(algorithm.trajectory.weights, axis=0).max() > 0
    assert algorithm.num_skipped_steps == 0 and not any(algorithm.num_nonfinite.values()), "nothing of ours was skipped"


def test_gradients_of_domains_are_refused_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_by(1024.0, monkeypatch)
    with pytest.raises(InputError, match="too small for float16"):
        run(DomainReweighting(UPDATE_RULES["doge"]()), precision="amp_fp16")
