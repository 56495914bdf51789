"""What the trainer tells an update rule: sums per domain since the last update.

Sums, not means, because sums add over micro-batches, ranks and steps in any split. A domain that was absent has
``num_tokens == 0``; nothing is NaN and nothing is a magic value. A rule names the optional fields it needs
(``UpdateRule.needs``), and only those are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["HISTOGRAM_EDGES", "Signals", "loss_histogram"]

Vector = NDArray[np.float64]

# Edges of the bins, in nats per token, that per-sequence losses are counted in; the outer bins take what lies beyond.
HISTOGRAM_EDGES: Vector = np.linspace(-8.0, 24.0, 513)


def loss_histogram(losses: NDArray[np.floating], domain_ids: NDArray[np.integer], num_domains: int) -> Vector:
    """Return how many sequences of each domain fall into each bin of ``HISTOGRAM_EDGES``, (D, 512) float64.

    Args:
        losses: (N,) mean token loss per sequence, minus the reference's where there is one.
        domain_ids: (N,) integers below ``num_domains``.

    >>> loss_histogram(np.array([-9.0, 0.01, 0.02]), np.array([0, 1, 1]), 2).sum(axis=1).tolist()
    [1.0, 2.0]
    """
    num_bins = HISTOGRAM_EDGES.size - 1
    bins = np.clip(np.searchsorted(HISTOGRAM_EDGES, losses, side="right") - 1, 0, num_bins - 1)
    flat = np.bincount(np.asarray(domain_ids) * num_bins + bins, minlength=num_domains * num_bins)
    return flat.astype(np.float64).reshape(num_domains, num_bins)


class Signals(NamedTuple):
    """Per-domain sums, each float64 of shape (D,) in the order of ``Domains.names``, in nats and tokens.

    Attributes:
        num_tokens: tokens that bear a loss.
        loss: sum of the token losses.
        num_sequences: samples.
        loss_squared: sum of squared per-sequence mean losses, for standard errors.
        reference_loss: sum of the reference's token losses (needs "reference").
        clipped_excess: sum of max(loss − reference loss, 0) per token (needs "reference").
        heldout_loss, heldout_tokens: sums over held-out windows evaluated at this update (needs "heldout").
        heldout_reference_loss: the reference's sum over the same windows; without a reference, that of the model before
            its first step (needs "heldout_reference").
        behaviour: sum over batches of the weights their samples were drawn by; only its direction matters, so it may
            be added once per batch or once per rank (needs "behaviour").
        gradient_products: (D, D) sum over measurements of the inner products of the domains' mean-loss gradients, each
            gradient already reduced over micro-batches and ranks, rows and columns of absent domains 0 (needs
            "gradients").
        gradient_counts: (D, D) measurements in which both domains were present.
        gradient_variance: sum over measurements of the per-sequence gradient variance (trace of the covariance) of
            each domain (needs "gradient_variance").
        excess_squared: sum of squared per-sequence mean excess losses, for standard errors (needs "reference").
        histogram: (D, 512) sequences by mean loss, see ``loss_histogram`` (needs "histogram").
    """

    num_tokens: Vector
    loss: Vector
    num_sequences: Vector | None = None
    loss_squared: Vector | None = None
    reference_loss: Vector | None = None
    clipped_excess: Vector | None = None
    heldout_loss: Vector | None = None
    heldout_tokens: Vector | None = None
    heldout_reference_loss: Vector | None = None
    behaviour: Vector | None = None
    gradient_products: Vector | None = None
    gradient_counts: Vector | None = None
    gradient_variance: Vector | None = None
    histogram: Vector | None = None
    excess_squared: Vector | None = None

    def __add__(self, other: object) -> Signals:
        """Add field by field; a field is kept only where both sides have it."""
        if not isinstance(other, Signals):
            return NotImplemented
        return Signals(*(None if a is None or b is None else a + b for a, b in zip(self, other)))  # type: ignore[arg-type]
