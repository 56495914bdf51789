"""The cross-entropy of every row of logits, in passes that stay in a processor's cache.

Logits are the largest tensor of a step on small models: 16 samples of 512 tokens with 50,000 ids take 1.6 GB. Rows are
taken in parts, each part's log-softmax goes into the same small buffer, and the backward pass computes softmax anew
from the logits, which exist anyway, straight into the gradient. Every value is the one of ``F.cross_entropy``, whose
two further copies of all logits are never written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORED", "cross_entropy"]

IGNORED = -100  # label of a token that bears no loss, as in PyTorch and Hugging Face


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each row in nats, float32 (N,), with gradient; 0 where the label is ``IGNORED``.

    Args:
        logits: shape (N, V), any float type; computed in float32.
        labels: int64 (N,), on the same device.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, IGNORED])).exp()
    tensor([4., 1.])
    """
    return _CrossEntropy.apply(logits, labels) if logits.requires_grad else _losses(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return _losses(logits, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        factors, targets = _column(gradient, labels), labels.clamp(min=0)[:, None]
        out, parts = torch.empty_like(logits), _parts(logits)
        # Gradients in half precision are rounded once, at the end.
        buffer = None if out.dtype == torch.float32 else _buffer(logits, parts)
        for rows in parts:
            change = out[rows] if buffer is None else buffer[: len(out[rows])]
            torch.softmax(logits[rows].float(), 1, out=change)
            change.scatter_add_(1, targets[rows], torch.full_like(factors[rows], -1.0))
            change.mul_(factors[rows])
            if buffer is not None:
                out[rows] = change
        # 0 times a NaN is a NaN: a row that was left out of the loss must not reach the others through the weights.
        return out.index_fill_(0, (factors[:, 0] == 0).nonzero()[:, 0], 0.0), None


def _column(gradient: Tensor, labels: Tensor) -> Tensor:
    return gradient.masked_fill(labels == IGNORED, 0.0)[:, None]


@torch.no_grad()
def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    parts, targets = _parts(logits), labels.clamp(min=0)[:, None]
    buffer, chosen = _buffer(logits, parts), torch.empty(len(logits), 1, device=logits.device)
    for rows in parts:
        logarithms = buffer[: len(targets[rows])]
        torch.log_softmax(logits[rows].float(), 1, out=logarithms)
        torch.gather(logarithms, 1, targets[rows], out=chosen[rows])
    return chosen[:, 0].neg().masked_fill(labels == IGNORED, 0.0)


def _buffer(logits: Tensor, parts: list[slice]) -> Tensor:
    return torch.empty(min(parts[0].stop, len(logits)) if parts else 0, logits.shape[-1], device=logits.device)


def _parts(logits: Tensor) -> list[slice]:
    elements = 1 << 18 if logits.device.type == "cpu" else 1 << 26
    size = max(1, elements // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
