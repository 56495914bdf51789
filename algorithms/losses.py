"""Per-domain losses of one optimiser step, and a loss that weighs domains: the same functions for every training loop.

    losses = DomainLosses(loader.domains, reference=reference)
    state = rule.init(loader.domains)
    for batch in loader:
        losses(model(input_ids=batch["input_ids"]).logits, batch, rule.weights(state)).backward()
        optimizer.step(), optimizer.zero_grad()
        state, weights = rule.update(state, losses.signals())

The weighted loss is L = Σ_d w_d · Σ_{tokens of d} loss / N_d with N_d the tokens of domain d in the *global* batch.
Counts are known before the first forward, so every micro-batch of every rank contributes its exact part of L: the
gradient does not depend on how the batch is split. A mean per domain inside each micro-batch is off by half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from algorithms.cross_entropy import IGNORED, cross_entropy
from algorithms.signals import HISTOGRAM_EDGES, Signals
from mixer.errors import DataError, InputError

if TYPE_CHECKING:
    from algorithms.references import Reference

__all__ = [
    "IGNORED",
    "DomainLosses",
    "all_reduce",
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
OnNonfinite = Literal["fail", "skip"]


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
    """Return per-domain sums, float64 (4, D), or (6, D) with a reference; ``to_signals`` names the rows.

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
    rows = [tokens, losses, tokens > 0, (losses / tokens.clamp(min=1)).square(), *rest]
    sums = torch.stack([row.sum(0, dtype=losses.dtype) for row in rows])
    if not histogram:
        return sums
    excess = losses - rest[0] if rest else losses
    return torch.cat([sums, _histogram(excess / tokens.clamp(min=1), tokens > 0)])


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
    reference, clipped = (*rest, None, None)[:2]
    return Signals(tokens, loss, sequences, squared, reference, clipped, histogram=histogram)


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


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all ranks, on the device it came from; itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    # NCCL moves GPU tensors only; counts are made on the CPU.
    total = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor.clone()
    dist.all_reduce(total)
    return total.to(tensor.device)


def world_size() -> int:
    """Return the number of ranks, 1 outside of torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class DomainLosses:
    """The per-domain losses of one optimiser step, and the weighted loss to take the gradient of.

    Args:
        domains: names in the order of ``domain_ids``.
        reference: gives the losses to compare with; needed by rules that say so.
        normalization: see ``loss_coefficients``; use the rule's own.
        on_nonfinite: what ``signals`` does with a domain whose loss is NaN or infinite: "fail" raises DataError,
            "skip" reports it as absent and counts it in ``num_nonfinite`` (D,).
        shift: False for encoder-decoder models, see ``token_losses``.
        histogram: gather ``Signals.histogram`` too.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        reference: Reference | None = None,
        normalization: Normalization = "domain",
        on_nonfinite: OnNonfinite = "fail",
        shift: bool = True,
        histogram: bool = False,
    ) -> None:
        if on_nonfinite not in ("fail", "skip"):
            raise InputError(f'on_nonfinite must be "fail" or "skip"; got {on_nonfinite!r}.')
        self.domains = tuple(domains)
        self.reference = reference
        if reference is not None:
            reference.shift = shift
        self.normalization = normalization
        self.on_nonfinite = on_nonfinite
        self.shift = shift
        self.histogram = histogram
        self.num_nonfinite: NDArray[np.int64] = np.zeros(len(self.domains), dtype=np.int64)
        self.num_tokens: NDArray[np.float64] | None = None  # (D,) over all ranks, while a step runs
        self.num_rows = 0.0  # mean number of samples of a rank in this step
        self._sums: Tensor | None = None
        self._counted_by_call = False

    def start(self, *batches: Mapping[str, Any], num_samples: NDArray[np.int64] | None = None) -> None:
        """Begin a step: count the tokens of each domain in this rank's whole share of it, over all ranks.

        Needed before the first of several micro-batches; a step of one micro-batch may go without.

        Args:
            batches: the whole batch, or all of its micro-batches.
            num_samples: (D,) whole samples of each domain over all ranks, where the loader knows: saves the ranks from
                asking each other. Only for samples of one length without masked tokens.
        """
        if num_samples is not None:
            length = batches[0]["input_ids"].shape[1] - self.shift
            self.num_tokens = num_samples.astype(np.float64) * length
            self.num_rows = int(num_samples.sum()) / world_size()
            self.reset()
            return
        counts = torch.zeros(len(self.domains) + 1, dtype=torch.int64)
        for batch in batches:
            mask = loss_mask(labels_of(batch), shift=self.shift)
            counts[:-1] += tokens_per_domain(mask, self._ids(batch), len(self.domains)).cpu()
            counts[-1] += len(mask)
        *tokens, rows = all_reduce(counts).tolist()
        self.num_tokens = np.array(tokens, dtype=np.float64)
        self.num_rows = rows / world_size()
        self.reset()

    def reset(self) -> None:
        """Forget the micro-batches of this step but not its counts, as when a step is tried again."""
        self._sums = None
        self._counted_by_call = False

    def __call__(self, logits: Tensor, batch: Mapping[str, Any], weights: NDArray[np.float64] | None = None) -> Tensor:
        """Return this micro-batch's part of the weighted loss, and keep its sums.

        It is multiplied by the number of ranks, because DistributedDataParallel averages gradients over them.

        Args:
            logits: shape (B, T, V).
            weights: shape (D,); None for the plain mean over tokens.

        Raises: InputError: on a second micro-batch without ``start``.
        """
        if self._counted_by_call:
            raise InputError(
                "a second micro-batch in one step: call start(batch) with the whole batch before the first one, so "
                "that its tokens are counted, and signals() after the step."
            )
        by_call = self.num_tokens is None
        if by_call:
            self.start(batch)
        labels = labels_of(batch).to(logits.device)
        mask = loss_mask(labels, shift=self.shift)
        loss = token_losses(logits, labels, shift=self.shift)
        reference_loss = None if self.reference is None else self.reference.token_losses(batch)
        ids = self._ids(batch)
        self.add(loss, mask, ids, reference_loss)
        self._counted_by_call = by_call
        return weighted_loss(loss, self.usable(loss, mask), ids, self.coefficients(weights)) * world_size()

    def add(self, token_loss: Tensor, mask: Tensor, domain_ids: Tensor, reference_loss: Tensor | None = None) -> None:
        """Keep the sums of one micro-batch."""
        clip = self.reference is None or self.reference.per_token
        options = {"clip": clip, "histogram": self.histogram}
        sums = domain_sums(token_loss, mask, domain_ids, len(self.domains), reference_loss, **options)
        self._sums = sums if self._sums is None else self._sums + sums

    def usable(self, token_loss: Tensor, mask: Tensor) -> Tensor:
        """Return ``mask`` without the non-finite tokens where those are skipped."""
        return mask & token_loss.detach().isfinite() if self.on_nonfinite == "skip" else mask

    def coefficients(self, weights: NDArray[np.float64] | None, sampling: NDArray[np.float64] | None = None) -> Tensor:
        """Return the coefficient of each domain's tokens in this step, float64 (D,) on the CPU."""
        if self.num_tokens is None:
            raise InputError("start(batch) has to be called before the coefficients of a step are known.")
        tokens = torch.from_numpy(self.num_tokens)
        if weights is None:
            return torch.full_like(tokens, 1.0 / max(tokens.sum().item(), 1.0))
        shares = None if sampling is None else torch.as_tensor(sampling)
        return loss_coefficients(
            torch.as_tensor(np.asarray(weights, dtype=np.float64)), tokens, self.normalization, shares
        )

    def signals(self) -> Signals:
        """Return the sums of the step over all ranks (one all-reduce), and begin the next step.

        Raises: DataError: on a non-finite loss with ``on_nonfinite="fail"``, on every rank alike.
        """
        if self._sums is None:
            raise InputError("no losses were added since the last call of signals().")
        signals = to_signals(all_reduce(self._sums))
        self.num_tokens = None
        self.reset()
        return self._finite(signals)

    def _finite(self, signals: Signals) -> Signals:
        bad = ~np.isfinite([row for row in signals if row is not None and row.ndim == 1]).all(axis=0)
        if not bad.any():
            return signals
        if self.on_nonfinite == "fail":
            raise DataError(
                f"{_describe(self.domains, bad, signals)}. Lower the learning rate, clip gradients, or look at the "
                "last samples; in Python, on_nonfinite='skip' leaves such a domain out of the update instead."
            )
        self.num_nonfinite = self.num_nonfinite + bad
        # Domains are the first axis of every field.
        return Signals(*(None if row is None else np.where(bad, 0.0, row.T).T for row in signals))  # type: ignore[arg-type]

    def _ids(self, batch: Mapping[str, Any]) -> Tensor:
        if "domain_ids" not in batch:
            raise InputError(f"a batch needs 'domain_ids', the index of each sample's domain; it has {sorted(batch)}.")
        return batch["domain_ids"]


def _describe(domains: Sequence[str], bad: NDArray[np.bool_], signals: Signals) -> str:
    names = [name for name, is_bad in zip(domains, bad) if is_bad]
    who = "the reference's loss" if np.isfinite(signals.loss[bad]).all() else "the training loss"
    values = signals.reference_loss if who != "the training loss" else signals.loss
    found = "not finite" if values is None else str(values[bad][0])
    return f"{who} of domain {names[0]!r} is {found}" if len(names) == 1 else f"{who} of domains {names} is {found}"
