"""Gradients of each domain's mean loss, their inner products, and their variance over samples.

For rules that look at how domains pull on the parameters (DoGE, PiKE, lookahead DRO). One measurement costs as much as
the forward and backward pass of one step, or one pass per sample where the variance is asked for; take them every
20 or more steps. Memory: D vectors of the size of the parameters measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.losses import target_domains, weighted_loss
from algorithms.ranks import all_reduce
from mixer.errors import InputError

__all__ = ["GradientSums", "measure_gradients", "measured_parameters"]

# Maps rows of a batch to their token losses and mask, (B, S) each, with gradient.
LossesOf = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


class GradientSums(NamedTuple):
    """One measurement, the same on every rank: products and counts (D, D), variance (D,); 0 for absent domains."""

    products: NDArray[Any]
    counts: NDArray[Any]
    variance: NDArray[Any]


def measured_parameters(model: nn.Module, of: str | Callable[[str], bool]) -> list[nn.Parameter]:
    """Return the trainable parameters of ``model`` to take gradients of: "all", or those whose name ``of`` accepts.

    Raises: InputError: if there are none, or they are sharded over ranks.
    """
    accepts = (lambda name: True) if of == "all" else of
    if isinstance(accepts, str):
        raise InputError(f'gradients are measured of "all" parameters or of those a function accepts; got {of!r}.')
    chosen = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and accepts(name)]
    if not chosen:
        raise InputError("no trainable parameter was chosen to measure gradients of.")
    if any(hasattr(parameter, "full_tensor") for parameter in chosen):
        raise InputError("gradients of single domains cannot be measured on sharded parameters (FSDP). Use DDP.")
    return chosen


def measure_gradients(
    losses_of: LossesOf,
    batch: Mapping[str, Any],
    num_tokens: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    rows_at_once: int,
    variance: bool,
) -> GradientSums:
    """Return one measurement on ``batch``, this rank's rows of the global batch.

    Args:
        num_tokens: (D,) loss-bearing tokens over all ranks.
        rows_at_once: samples per forward pass.
        variance: measure each sample on its own. A domain's gradient is then the mean over samples, not over tokens.
    """
    if variance:
        return _per_sample(losses_of, batch, len(num_tokens), parameters)
    gradients = []
    for domain in range(len(num_tokens)):
        coefficients = torch.zeros(len(num_tokens), dtype=torch.float64)
        coefficients[domain] = 1.0 / max(float(num_tokens[domain]), 1.0)
        total = _zeros(parameters)
        rows = _rows_of(batch, domain)
        for start in range(0, len(rows), rows_at_once):
            part = _take(batch, rows[start : start + rows_at_once])
            loss, mask = losses_of(part)
            total += _flat_gradient(weighted_loss(loss, mask, part["domain_ids"], coefficients), parameters)
        gradients.append(total)
    matrix = all_reduce(torch.stack(gradients))
    return _sums(matrix, num_tokens > 0, torch.zeros(len(num_tokens)))


def _per_sample(
    losses_of: LossesOf, batch: Mapping[str, Any], num_domains: int, parameters: Sequence[nn.Parameter]
) -> GradientSums:
    if batch["domain_ids"].ndim != 1:
        raise InputError(
            "the variance of gradients over samples needs one domain per sample: domain_ids of shape (B,)."
        )
    sums = torch.stack([_zeros(parameters)] * num_domains)
    squares, counts = torch.zeros(num_domains, dtype=torch.float64), torch.zeros(num_domains, dtype=torch.float64)
    for row, domain in enumerate(batch["domain_ids"].tolist()):
        loss, mask = losses_of(_take(batch, torch.tensor([row])))
        gradient = _flat_gradient((loss * mask).sum() / mask.sum().clamp(min=1), parameters)
        sums[domain] += gradient
        squares[domain] += gradient.double().square().sum().item()
        counts[domain] += 1
    sums, squares, counts = all_reduce(sums), all_reduce(squares), all_reduce(counts)
    mean = sums / counts.clamp(min=1)[:, None].to(sums)
    spread = squares - counts * mean.double().square().sum(1).cpu()
    return _sums(mean, counts > 0, spread.clamp(min=0) / (counts - 1).clamp(min=1))


def _sums(gradients: Tensor, present: Tensor, variance: Tensor) -> GradientSums:
    both = (present[:, None] & present[None, :]).double().cpu()
    return GradientSums((gradients @ gradients.T).double().cpu().numpy(), both.numpy(), variance.double().numpy())


def _rows_of(batch: Mapping[str, Any], domain: int) -> Tensor:
    ids = target_domains(batch["domain_ids"], batch["labels"])
    return torch.nonzero(ids == domain if ids.ndim == 1 else (ids == domain).any(1)).flatten()


def _take(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}


def _zeros(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)


def _flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    # autograd.grad leaves .grad and the hooks of DistributedDataParallel alone.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients)]
    )
