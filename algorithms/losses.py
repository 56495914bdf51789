"""Losses per token and their sums per domain; and the loss that weighs domains. Pure functions on tensors.

The weighted loss is L = Σ_d w_d · Σ_{tokens of d} loss / N_d with N_d the tokens of domain d in the *global* batch.
``DomainLosses`` puts these together for one optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.cross_entropy import IGNORED, cross_entropy
from algorithms.signals import HISTOGRAM_EDGES, Signals
from mixer.errors import DataError, InputError

__all__ = [
    "IGNORED",
    "Normalization",
    "domain_ids_of",
    "domain_sums",
    "labels_of",
    "loss_coefficients",
    "loss_mask",
    "target_domains",
    "to_signals",
    "token_losses",
    "tokens_per_domain",
    "weighted_loss",
]

Normalization = Literal["domain", "tokens"]


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels (B, T) of a batch: its own, or its ``input_ids`` with padding marked as ``IGNORED``.

    Raises: InputError: if the batch has neither.
    """
    if "labels" in batch:
        return batch["labels"]
    if "input_ids" not in batch:
        raise InputError(f"a batch needs 'labels' or 'input_ids' to have a loss; it has {sorted(batch)}.")
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return labels


def domain_ids_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the domain of each sample of a batch, int64 (B,), or of each of its labels, int64 (B, T).

    Raises: InputError: if there are none, or they are no integers of one of these shapes (or (B, 1)).

    >>> domain_ids_of({"input_ids": torch.zeros(2, 3), "domain_ids": torch.tensor([[1], [0]])})
    tensor([1, 0])
    """
    if "domain_ids" not in batch:
        raise InputError(f"a batch needs 'domain_ids', the index of each sample's domain; it has {sorted(batch)}.")
    ids, (rows, length) = batch["domain_ids"], labels_of(batch).shape
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"'domain_ids' have to be a tensor of integers that index the list of domains; got {kind}.")
    if ids.shape not in ((rows,), (rows, 1), (rows, length)):
        # A token's domain is read at its label, so of ids of another length some other would be taken.
        raise InputError(
            f"'domain_ids' have the shape {tuple(ids.shape)}: expected one per sample, ({rows},), or one per label, "
            f"({rows}, {length})."
        )
    return ids.flatten().long() if ids.shape[1:] == (1,) else ids.long()


def token_losses(logits: Tensor, labels: Tensor, *, shift: bool = True) -> Tensor:
    """Return the cross-entropy of each predicted token in nats, float32; 0 where the label is ``IGNORED``.

    Args:
        logits: shape (B, T, V), any float type; computed in float32.
        labels: shape (B, T).
        shift: position t predicts label t + 1, as in causal models: shape (B, T − 1). Otherwise, as in
            encoder-decoder models, position t predicts label t: shape (B, T).

    >>> token_losses(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]])).exp()
    tensor([[4., 1.]])
    """
    if shift:
        # Moving the labels, not the logits, avoids a copy of the largest tensor of the step.
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    flat = cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device))
    losses = flat.view(labels.shape)
    return losses[:, :-1] if shift else losses


def loss_mask(labels: Tensor, *, shift: bool = True) -> Tensor:
    """Return which entries of ``token_losses`` bear a loss: bool (B, T − 1), or (B, T) without ``shift``."""
    return (labels[:, 1:] if shift else labels) != IGNORED


def target_domains(domain_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the domain of each sample (B,), or of each predicted token (B, S) where ids are given per token (B, T)."""
    return domain_ids if domain_ids.ndim == 1 else domain_ids[:, -mask.shape[1] :]


def tokens_per_domain(mask: Tensor, domain_ids: Tensor, num_domains: int) -> Tensor:
    """Return the loss-bearing tokens of each domain: int64 (D,).

    Raises: DataError: if an id is outside [0, D).
    """
    domains = target_domains(domain_ids, mask)
    if domains.numel() and not 0 <= int(domains.min()) <= int(domains.max()) < num_domains:
        raise DataError(
            f"domain_ids of a batch lie in [{int(domains.min())}, {int(domains.max())}], but there are {num_domains} "
            "domains. Give the loader's own list of domains."
        )
    counts = mask.sum(1) if domains.ndim == 1 else mask.flatten().long()
    return torch.zeros(num_domains, dtype=torch.int64, device=mask.device).index_add_(0, domains.flatten(), counts)


def domain_sums(
    token_loss: Tensor,
    mask: Tensor,
    domain_ids: Tensor,
    num_domains: int,
    reference_loss: Tensor | None = None,
    *,
    clip: bool = True,
    histogram: bool = False,
) -> Tensor:
    """Return per-domain sums, float64 (4, D), or (7, D) with a reference; ``to_signals`` names the rows.

    Args:
        token_loss: shape (B, S), from ``token_losses``.
        mask: shape (B, S), which tokens count.
        domain_ids: shape (B,), or (B, T) where a sample holds tokens of several domains.
        reference_loss: shape (B, S).
        clip: False leaves out the clipped excess, for references whose losses of single tokens mean nothing.
        histogram: append 512 rows, the samples by mean loss (minus the reference's), as in ``loss_histogram``.
    """
    zero = torch.zeros((), device=token_loss.device)
    loss = torch.where(mask, token_loss.detach().float(), zero)
    parts = [mask, loss]
    if reference_loss is not None:
        reference = torch.where(mask, reference_loss.detach().to(loss), zero)
        parts += [reference, (loss - reference).clamp(min=0)] if clip else [reference]
    tokens, losses, *rest = (_by_sample_and_domain(part, domain_ids, num_domains) for part in parts)
    count = tokens.clamp(min=1)
    excess = (losses - rest[0] if rest else losses) / count
    rows = [tokens, losses, tokens > 0, (losses / count).square()]
    rows += [rest[0], excess.square(), *rest[1:]] if rest else []
    sums = torch.stack([row.sum(0, dtype=losses.dtype) for row in rows])
    return torch.cat([sums, _histogram(excess, tokens > 0)]) if histogram else sums


def _histogram(means: Tensor, present: Tensor) -> Tensor:
    """Return (512, D): how many of the (B, D) means that are present fall into each bin."""
    num_bins, num_domains = len(HISTOGRAM_EDGES) - 1, means.shape[1]
    edges = torch.as_tensor(HISTOGRAM_EDGES, device=means.device).to(means.dtype)
    bins = (torch.searchsorted(edges, means.contiguous(), right=True) - 1).clamp(0, num_bins - 1)
    flat = torch.zeros(num_bins * num_domains, dtype=means.dtype, device=means.device)
    columns = torch.arange(num_domains, device=means.device)
    return flat.index_add_(0, (bins * num_domains + columns)[present], present[present].to(flat)).view(num_bins, -1)


def _by_sample_and_domain(values: Tensor, domain_ids: Tensor, num_domains: int) -> Tensor:
    """Return (B, D): the sum over each sample's tokens of each domain."""
    sums = torch.zeros(len(values), num_domains, dtype=_exact(values), device=values.device)
    domains = target_domains(domain_ids, values).to(values.device)
    if domains.ndim == 1:
        return sums.scatter_(1, domains[:, None], values.sum(1, keepdim=True, dtype=sums.dtype))
    return sums.scatter_add_(1, domains, values.to(sums.dtype))


def _exact(tensor: Tensor) -> torch.dtype:
    # Apple's GPUs have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def to_signals(sums: Tensor) -> Signals:
    """Return the rows of ``domain_sums`` as ``Signals`` (numpy, float64)."""
    rows = sums.detach().to("cpu", torch.float64).numpy()
    num_bins = len(HISTOGRAM_EDGES) - 1
    histogram = rows[-num_bins:].T.copy() if len(rows) > num_bins else None
    tokens, loss, sequences, squared, *rest = rows if histogram is None else rows[:-num_bins]
    reference, excess_squared, clipped = (*rest, None, None, None)[:3]
    return Signals(
        tokens, loss, sequences, squared, reference, clipped, histogram=histogram, excess_squared=excess_squared
    )


def loss_coefficients(
    weights: Tensor, num_tokens: Tensor, normalization: Normalization = "domain", sampling: Tensor | None = None
) -> Tensor:
    """Return what to multiply each token loss by, per domain: float64 (D,), 0 for absent domains.

    Args:
        weights: shape (D,), the rule's weights.
        num_tokens: shape (D,), loss-bearing tokens in the global batch.
        normalization: "domain": w_d / N_d, so that L = Σ_d w_d · (mean loss of d), the form of the papers;
            "tokens": w_d / Σ w_d N_d, one weighted mean over all tokens, the form of the official DoReMi code.
        sampling: shape (D,), shares that samples are drawn by. "tokens" weighs a domain by w_d N_d, so weights are
            divided by the shares first; "domain" does not depend on them.

    >>> loss_coefficients(torch.tensor([0.5, 0.5]), torch.tensor([8, 0])).tolist()
    [0.0625, 0.0]
    """
    if normalization not in ("domain", "tokens"):
        raise InputError(f'normalization must be "domain" or "tokens"; got {normalization!r}.')
    tokens = num_tokens.to(weights)
    if normalization == "domain":
        return torch.where(tokens > 0, weights / tokens.clamp(min=1), torch.zeros_like(weights))
    if sampling is not None:
        weights = torch.where(sampling > 0, weights / sampling.to(weights), torch.zeros_like(weights))
    total = (weights * tokens).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.where(tokens > 0, weights / total, torch.zeros_like(weights))


def weighted_loss(token_loss: Tensor, mask: Tensor, domain_ids: Tensor, coefficients: Tensor) -> Tensor:
    """Return Σ over tokens of coefficient[domain] · loss, a float32 scalar with gradient."""
    domains = target_domains(domain_ids, mask).to(token_loss.device)
    per_token = coefficients.to(token_loss.device, torch.float32)[domains]
    if per_token.ndim == 1:
        per_token = per_token[:, None]
    return torch.where(mask, token_loss * per_token, torch.zeros((), device=token_loss.device)).sum()
