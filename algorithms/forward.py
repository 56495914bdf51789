"""Run a Composer model on a batch of one's own, beside the trainer's loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from composer.core import State, get_precision_context
from composer.models import HuggingFaceModel
from composer.utils import dist
from torch import Tensor, nn

from algorithms.heldout import HeldOutWindows
from algorithms.losses import token_losses
from algorithms.references.frozen import is_encoder_decoder, language_model, logits_of, unwrapped

__all__ = ["evaluate_windows", "evaluation_mode", "losses_on", "model_inputs"]


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
    with evaluation_mode(state.model):
        return windows.evaluate(
            lambda batch: losses_on(state, state.model, batch), dist.get_global_rank(), dist.get_world_size()
        )
