"""What the trainer tells an update rule: sums per domain since the last update.

Sums, not means, because sums add over micro-batches, ranks and steps in any split. A domain that was absent has
``num_tokens == 0``; nothing is NaN and nothing is a magic value. A rule names the optional fields it needs
(``UpdateRule.needs``), and only those are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Signals"]

Vector = NDArray[np.float64]


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
    """

    num_tokens: Vector
    loss: Vector
    num_sequences: Vector | None = None
    loss_squared: Vector | None = None
    reference_loss: Vector | None = None
    clipped_excess: Vector | None = None
    heldout_loss: Vector | None = None
    heldout_tokens: Vector | None = None

    def __add__(self, other: object) -> Signals:
        """Add field by field; a field is kept only where both sides have it."""
        if not isinstance(other, Signals):
            return NotImplemented
        return Signals(*(None if a is None or b is None else a + b for a, b in zip(self, other)))  # type: ignore[arg-type]
