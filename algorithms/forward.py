"""Run a Composer model on a batch of one's own, beside the trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from composer.core import State, get_precision_context
from composer.models import HuggingFaceModel
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.domain_gradients import GradientSums, measure_gradients, measured_parameters
from algorithms.heldout import HeldOutWindows
from algorithms.losses import loss_mask, token_losses
from algorithms.references.base import Reference
from algorithms.references.frozen import is_encoder_decoder, language_model, logits_of, unwrapped

__all__ = [
    "evaluate_windows",
    "evaluation_mode",
    "gradients_on",
    "losses_on",
    "model_inputs",
    "predicts_next",
    "reference_on_windows",
]


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch to call the model with: a Hugging Face model without labels, so that it computes no loss."""
    if not isinstance(unwrapped(model), HuggingFaceModel):
        return dict(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inner = language_model(model)
    if is_encoder_decoder(inner) and "decoder_input_ids" not in batch:
        # It replaces ignored labels in place.
        inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=batch["labels"].clone())
    return inputs


def predicts_next(model: nn.Module) -> bool:
    """Return whether position t of the model's logits predicts label t + 1, as in causal models."""
    return not is_encoder_decoder(language_model(model))


def losses_on(state: State, model: nn.Module, batch: Mapping[str, Any], *, shift: bool = True) -> Tensor:
    """Return the token losses (B, S) of ``model`` on a batch with labels, in the precision of the run.

    Args:
        model: ``state.model``, or the module inside it where DistributedDataParallel should not take part.
    """
    batch = state.device.batch_to_device(dict(batch))
    with get_precision_context(state.precision, state.precision_config):
        outputs = model(model_inputs(model, batch))
    return token_losses(logits_of(outputs), batch["labels"], shift=shift)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, which would be noise and would use up random numbers; and on again where it was on."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def evaluate_windows(state: State, windows: HeldOutWindows) -> tuple[Any, Any]:
    """Return the sums of the held-out losses and the tokens of each domain, (D,) each, under the model in training."""
    shift = predicts_next(state.model)
    windows.check(windows.domains, shift=shift)
    with evaluation_mode(state.model):
        return windows.evaluate(
            lambda batch: losses_on(state, state.model, batch, shift=shift),
            dist.get_global_rank(),
            dist.get_world_size(),
            shift=shift,
        )


def reference_on_windows(state: State, reference: Reference | None, windows: HeldOutWindows) -> Any:
    """Return the sums (D,) of the reference's losses on the windows; None without one that knows them."""
    if reference is None or not reference.for_any_batch:
        return None

    def losses(batch: dict[str, Tensor]) -> Tensor:
        with get_precision_context(state.precision, state.precision_config):
            return reference.token_losses(state.device.batch_to_device(batch))

    return windows.evaluate(losses, dist.get_global_rank(), dist.get_world_size(), shift=reference.shift)[0]


def gradients_on(
    state: State,
    batch: Mapping[str, Any],
    num_tokens: NDArray[np.float64],
    *,
    of: str | Callable[[str], bool],
    variance: bool,
    shift: bool,
) -> GradientSums:
    """Return the inner products of the domains' gradients on ``batch``, see ``measure_gradients``."""
    model = unwrapped(state.model)

    def losses(part: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found = losses_on(state, model, part, shift=shift)
        return found, loss_mask(part["labels"], shift=shift).to(found.device)

    with evaluation_mode(model):
        return measure_gradients(
            losses,
            batch,
            torch.from_numpy(num_tokens),
            measured_parameters(model, of),
            rows_at_once=int(state.device_train_microbatch_size or len(batch["labels"])),
            variance=variance,
        )
