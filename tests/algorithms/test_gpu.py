"""On a real GPU: running out of memory, half precision, and resuming; skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import DomainReweighting, doremi
from algorithms.references import FrozenModel
from tests.algorithms.tiny import Loader, gpt2, llama, wrap
from tests.algorithms.training_helpers import fit, parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "gpu"


def searching() -> DomainReweighting:
    return DomainReweighting(doremi(), reference=llama(seed=1))


@pytest.fixture(autouse=True)
def leave_no_process_group() -> Iterator[None]:
    yield
    end_process_group()


def end_process_group() -> None:
    """A process has one backend at a time: NCCL for a GPU, gloo for the processor."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(algorithm: DomainReweighting, **options: Any) -> Any:
    end_process_group()
    return fit(algorithm, **{"device": DEVICE, "loader": Loader(padded=True), **options})


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Allow 256 MiB beyond what is taken: too little for 1,024 samples of ``wide``, enough for 64."""
    torch.cuda.init()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def wide() -> Any:
    """A model that keeps about 0.8 MB of activations per sample."""
    return wrap(llama(intermediate_size=4096))


def test_a_step_that_ran_out_of_memory_is_counted_once(little_memory: None) -> None:
    found = []
    for micro in ("auto", 64):
        algorithm = searching()
        trainer = run(algorithm, model=wide(), loader=Loader(global_batch_size=1024), micro=micro)
        found.append((algorithm.weights, algorithm.trajectory.num_tokens, parameters(trainer).cpu()))
        if micro == "auto":
            assert trainer.state.device_train_microbatch_size < 1024, "there was memory enough for the whole batch"
    (retried, retried_tokens, retried_parameters), (calm, calm_tokens, calm_parameters) = found
    np.testing.assert_array_equal(retried_tokens, calm_tokens)
    np.testing.assert_allclose(retried, calm, rtol=1e-4)
    torch.testing.assert_close(retried_parameters, calm_parameters, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("amp_bf16", 2e-2), ("amp_fp16", 1e-2)])
def test_losses_and_weights_are_those_of_the_processor(precision: str, tolerance: float) -> None:
    expected, found = searching(), searching()
    run(expected, device="cpu", lr=0.0)
    run(found, precision=precision, micro=5, lr=0.0)
    np.testing.assert_allclose(found.trajectory.loss, expected.trajectory.loss, rtol=tolerance)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=tolerance)


def test_a_reference_in_half_precision_gives_finite_losses_near_those_of_the_whole_one() -> None:
    half = DomainReweighting(doremi(), reference=FrozenModel(llama(seed=1), dtype=torch.bfloat16))
    whole = searching()
    run(half)
    run(whole)
    np.testing.assert_allclose(half.weights, whole.weights, rtol=2e-2)


def test_a_run_with_dropout_resumes_with_the_generator_of_the_gpu(tmp_path: Path) -> None:
    def dropping_out() -> Any:
        return wrap(gpt2(dropout=0.2))

    whole, again = searching(), searching()
    expected = run(whole, model=dropping_out(), steps=4, save_folder=str(tmp_path), save_interval="2ba")
    resumed = run(again, model=dropping_out(), steps=4, load_path=str(tmp_path / "ep0-ba2-rank0.pt"))
    np.testing.assert_allclose(again.weights, whole.weights, rtol=1e-6)
    torch.testing.assert_close(parameters(resumed), parameters(expected), rtol=1e-5, atol=1e-6)
