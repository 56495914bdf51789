"""Per-domain losses of one optimiser step, and a loss that weighs domains: the same for every training loop.

    losses = DomainLosses(loader, reference=reference)
    state = rule.init(loader)
    for batch in loader:
        losses(model(input_ids=batch["input_ids"]).logits, batch, rule.weights(state)).backward()
        optimizer.step(), optimizer.zero_grad()
        state, weights = rule.update(state, losses.signals())

Under a rule that samples the loss takes no weights, ``losses(logits, batch)``, and ``loader.set_weights`` takes them.

Tokens per domain are counted over the whole batch of all ranks before the first forward, so every micro-batch of every
rank contributes its exact part of the weighted loss: the gradient does not depend on how the batch is split. A mean per
domain inside each micro-batch is off by half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from algorithms.losses import (
    Normalization,
    domain_ids_of,
    domain_sums,
    labels_of,
    loss_coefficients,
    loss_mask,
    to_signals,
    token_losses,
    tokens_per_domain,
    weighted_loss,
)
from algorithms.ranks import all_reduce, all_reduce_checked, world_size
from algorithms.signals import Signals
from mixer.errors import DataError, InputError

if TYPE_CHECKING:
    from algorithms.references import Reference

__all__ = ["DomainLosses", "OnNonfinite"]

OnNonfinite = Literal["fail", "skip"]


class DomainLosses:
    """The per-domain losses of one optimiser step, and the weighted loss to take the gradient of.

    Args:
        domains: the loader, or names in the order of ``domain_ids``.
        reference: gives the losses to compare with; needed by rules that say so. One that belongs to certain shards or
            to a tokenizer is compared with the loader's.
        normalization: see ``loss_coefficients``; use the rule's own.
        on_nonfinite: what ``signals`` does with a domain whose loss is NaN or infinite: "fail" raises DataError,
            "skip" reports it as absent and counts it in ``num_nonfinite`` (D,).
        shift: False for encoder-decoder models, see ``token_losses``.
        histogram: gather ``Signals.histogram`` too.

    Raises: InputError: if the reference does not fit the domains or the loader.
    """

    def __init__(
        self,
        domains: Sequence[str] | Any,
        *,
        reference: Reference | None = None,
        normalization: Normalization = "domain",
        on_nonfinite: OnNonfinite = "fail",
        shift: bool = True,
        histogram: bool = False,
    ) -> None:
        if on_nonfinite not in ("fail", "skip"):
            raise InputError(f'on_nonfinite must be "fail" or "skip"; got {on_nonfinite!r}.')
        loader = domains if hasattr(domains, "domains") else None
        self.domains: tuple[str, ...] = tuple(domains if loader is None else loader.domains)
        self.reference = reference
        if reference is not None:
            reference.shift = shift
            reference.bind(self.domains, loader)
        self.normalization = normalization
        self.on_nonfinite = on_nonfinite
        self.shift = shift
        self.histogram = histogram
        self.num_nonfinite: NDArray[np.int64] = np.zeros(len(self.domains), dtype=np.int64)
        self.num_tokens: NDArray[np.float64] | None = None  # (D,) over all ranks, while a step runs
        self.num_rows = 0.0  # mean number of samples of a rank in this step
        self._sums: Tensor | None = None
        self._counted_by_call = False
        self._weights_digest = 0

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
            counts[:-1] += tokens_per_domain(mask, domain_ids_of(batch), len(self.domains)).cpu()
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
        ids = domain_ids_of(batch)
        batch = {**batch, "domain_ids": ids}
        reference_loss = None if self.reference is None else self.reference.token_losses(batch)
        self.add(loss, mask, ids, reference_loss)
        self._counted_by_call = by_call
        self._weights_digest = 0 if weights is None else xxhash.xxh3_64(np.asarray(weights).tobytes()).intdigest()
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

    def signals(self, signature: int | None = None) -> Signals:
        """Return the sums of the step over all ranks (one all-reduce), and begin the next step.

        Args:
            signature: a digest of what all ranks should hold alike, see ``all_reduce_checked``; by default of the
                weights that this step was called with.

        Raises: DataError: on a non-finite loss with ``on_nonfinite="fail"``, or signatures that differ; on every rank.
        """
        if self._sums is None:
            raise InputError("no losses were added since the last call of signals().")
        mine = self._weights_digest if signature is None else signature
        signals = to_signals(all_reduce_checked(self._sums, mine))
        self.num_tokens = None
        self.reset()
        return self._finite(signals)

    def _finite(self, signals: Signals) -> Signals:
        bad = ~np.isfinite([row for row in signals if row is not None and row.ndim == 1]).all(axis=0)
        if not bad.any():
            return signals
        if self.on_nonfinite == "fail":
            raise DataError(
                f"{_describe(self.domains, bad, signals)}; on_nonfinite='skip' (--on-nonfinite skip) leaves such a "
                "domain out of the update instead."
            )
        self.num_nonfinite = self.num_nonfinite + bad
        # Domains are the first axis of every field.
        return Signals(*(None if row is None else np.where(bad, 0.0, row.T).T for row in signals))  # type: ignore[arg-type]


def _describe(domains: Sequence[str], bad: NDArray[np.bool_], signals: Signals) -> str:
    """Say whose loss is not finite, and what to do about it."""
    names = [name for name, is_bad in zip(domains, bad) if is_bad]
    who, values = "the training loss", signals.loss
    advice = "Lower the learning rate, clip gradients, or look at the last samples"
    if signals.reference_loss is not None and np.isfinite(signals.loss[bad]).all():
        who, values = "the reference's loss", signals.reference_loss
        advice = "Look at the reference: it has diverged, or overflows in half precision"
    what = f"domain {names[0]!r}" if len(names) == 1 else f"domains {names}"
    return f"{who} of {what} is {values[~np.isfinite(values)][0]}. {advice}"
