"""A micro-batch on its way through Composer's events, and how its part of a sum becomes the loss to train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from composer.core import Precision, State
from composer.utils import dist
from torch import Tensor, nn

from algorithms.losses import labels_of
from mixer.errors import InputError

__all__ = ["MicroBatch", "add_labels", "auxiliary_loss", "drop_broken_gradients", "share_of_the_sum"]


class MicroBatch(NamedTuple):
    """The micro-batch between its forward and its backward."""

    labels: Tensor
    mask: Tensor
    domain_ids: Tensor
    reference_loss: Tensor | None
    token_loss: Tensor | None = None


def add_labels(state: State) -> None:
    """Give the batch labels: those of a language model are its inputs, and ``MixtureLoader``'s batches have none."""
    if not isinstance(state.batch, Mapping):
        raise InputError(
            f"batches have to be mappings with 'input_ids' and 'domain_ids'; got {type(state.batch).__name__}."
        )
    if "labels" not in state.batch:
        # A copy: Composer's metrics shift the labels in place, which must not reach the inputs.
        state.batch = {**state.batch, "labels": labels_of(state.batch).clone()}


def share_of_the_sum(loss: Tensor, state: State, share: float) -> Tensor:
    """Return ``loss``, a part of a sum over micro-batches and ranks, so that Composer optimises and logs that sum.

    Composer multiplies each micro-batch loss by its share of the rows (of the tokens, with
    ``accumulate_train_batch_on_tokens``), as a mean needs, and gradients are averaged over ranks. The gradient is set
    to what a sum needs, whatever that factor was; the value undoes it, for the log.
    """
    ranks = dist.get_world_size()
    scale = state.scaler.get_scale() if state.precision == Precision.AMP_FP16 and state.scaler is not None else 1.0
    loss.register_hook(lambda gradient: torch.full_like(gradient, ranks * scale))
    return loss * (ranks / share)


def auxiliary_loss(state: State, model: nn.Module) -> Tensor | None:
    """Return what the model adds to the cross-entropy, such as the load balancing of a mixture of experts."""
    if isinstance(state.loss, Mapping):
        parts = [value for name, value in state.loss.items() if name not in ("total", "loss")]
        return torch.stack(parts).sum() if parts else None
    auxiliary = state.outputs.get("aux_loss") if isinstance(state.outputs, Mapping) else None
    return None if auxiliary is None else auxiliary * getattr(model.config, "router_aux_loss_coef", 1.0)  # type: ignore[union-attr]


def drop_broken_gradients(state: State) -> bool:
    """Remove all gradients if one of them is not finite, so that the optimiser leaves every parameter alone.

    A NaN inside the network reaches every gradient through its matrix products, also where its own loss was left out.
    Ranks decide alike: averaged gradients are the same on all of them, and of sharded ones each tells the others.
    """
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    local = [getattr(gradient, "to_local", lambda gradient=gradient: gradient)() for gradient in gradients]
    broken = any(not bool(part.isfinite().all()) for part in local)
    if state.fsdp_enabled and dist.get_world_size() > 1:
        flag = torch.tensor([float(broken)], device=next(state.model.parameters()).device)
        dist.all_reduce(flag, reduce_operation="MAX")
        broken = bool(flag.item())
    if broken:
        state.model.zero_grad(set_to_none=True)
    return broken
