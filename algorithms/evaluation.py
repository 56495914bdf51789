"""Held-out log-perplexity per domain: the mean loss in nats per token on the validation split.

The same samples for every model, so that two mixtures are compared on equal terms: all samples of a split, or
``max_samples`` of them spread evenly over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from algorithms.losses import loss_mask, token_losses
from algorithms.models import samples_per_forward
from algorithms.samples import evenly_spread
from mixer.errors import DataError
from mixer.manifest import Manifest

__all__ = ["HeldOut", "heldout_losses", "heldout_samples"]


class HeldOut(NamedTuple):
    """Loss of one domain: nats per token, over ``num_tokens`` predicted tokens of ``num_samples`` samples."""

    loss: float
    num_tokens: int
    num_samples: int


def heldout_samples(
    shards: str | os.PathLike[str], domain: str, *, split: str = "validation", max_samples: int = 256
) -> NDArray[np.int64]:
    """Return (n, T) token ids: every sample of the split, or ``max_samples`` spread evenly over it."""
    return evenly_spread(shards, domain, split=split, max_samples=max_samples)["input_ids"].numpy()


@torch.no_grad()
def heldout_losses(
    model: torch.nn.Module,
    shards: str | os.PathLike[str],
    *,
    split: str = "validation",
    max_samples: int = 256,
    on_domain: Callable[[str], None] = lambda domain: None,
) -> dict[str, HeldOut]:
    """Return the held-out loss of every domain under a Hugging Face causal LM.

    Args:
        model: called as ``model(input_ids=...)`` and expected to return ``.logits`` (B, T, V).
        shards: folder with ``manifest.json``.
        max_samples: per domain.
        on_domain: called with each domain's name when it is done.

    Raises:
        InputError: a domain has no such split.
        DataError: a loss is not finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = {}
    manifest = Manifest.load(shards)
    batch_size = min(32, samples_per_forward(manifest.tokenizer.vocab_size, manifest.seq_len))
    for domain in manifest.names:
        rows = evenly_spread(shards, domain, split=split, max_samples=max_samples)
        total, count, num_samples = 0.0, 0, len(rows["input_ids"])
        for start in range(0, num_samples, batch_size):
            batch = {name: values[start : start + batch_size].to(device) for name, values in rows.items()}
            labels = batch.pop("labels", batch["input_ids"])
            total += token_losses(model(**batch).logits, labels).double().sum().item()
            count += int(loss_mask(labels).sum())
        if not np.isfinite(total):
            raise DataError(
                f"the held-out loss of domain {domain!r} is {total}: the model has diverged. "
                "Train with a lower learning rate."
            )
        losses[domain] = HeldOut(total / max(count, 1), count, num_samples)
        on_domain(domain)
    model.train(was_training)
    return losses
