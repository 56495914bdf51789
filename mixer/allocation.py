"""How many samples each domain gives to the next batch.

A domain is owed ``batch_size · weight`` samples per batch. It gets the whole samples of what it is owed; the samples
that remain go, one each, to those owed most; what is over or missing is carried. So every prefix stays near its target,
a domain of weight 1e-4 appears on schedule, and nothing depends on luck.

How near: for weights that do not aim at the allocation, less than 1.5 samples for each domain at every batch (0.6–1.4
measured over fixed, random, alternating and drifting weights with 3 to 1,000 domains). No rule that must act before it
knows the later weights can promise that against an opponent who moves weight onto the domains that were just passed
over: he reaches 1/2 + 1/3 + … + 1/D at batch size 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixer.errors import InputError
from mixer.randomness import key, random_bits

__all__ = ["allocate", "allocate_independently"]

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]


def allocate(weights: Vector, credit: Vector, batch_size: int) -> tuple[Counts, Vector]:
    """Return how many samples each domain gives to the next batch, and the credit left over.

    Only elementwise arithmetic decides, so every rank comes to the same result on any machine. Equal claims go to the
    domain with the lower id. A domain of weight 0 gets nothing, whatever it is owed.

    Args:
        weights: (D,), ≥ 0, sum 1.
        credit: (D,), samples owed from earlier batches (negative: received too early).
        batch_size: samples in the batch, ≥ 1.
    Returns: counts (D,) int64 ≥ 0 that sum to ``batch_size``; new credit (D,) = credit + batch_size · weights − counts.
    Raises: InputError: if no weight is positive or the batch size is below 1.

    >>> counts, credit = allocate(np.array([0.75, 0.25]), np.zeros(2), 2)
    >>> counts.tolist(), credit.tolist()
    ([2, 0], [-0.5, 0.5])
    >>> allocate(np.array([0.75, 0.25]), credit, 2)[0].tolist()
    [1, 1]
    """
    owed = weights * batch_size
    owed += credit
    whole = np.floor(owed)
    np.maximum(whole, 0.0, out=whole)
    whole[weights == 0.0] = 0.0
    counts = whole.astype(np.int64)
    rest = batch_size - int(counts.sum())
    if rest > 0:
        _give(counts, owed, weights, rest)
    elif rest < 0:
        _take(counts, owed, -rest)
    owed -= counts
    return counts, owed


def _give(counts: Counts, owed: Vector, weights: Vector, rest: int) -> None:
    """Give one sample each to the ``rest`` domains that are owed most; in rounds if there are fewer domains."""
    claims = np.where(weights > 0.0, counts - owed, np.inf)
    available = int(np.count_nonzero(weights > 0.0))
    if available == 0 or rest < 0:
        raise InputError(f"cannot fill a batch: no domain has a positive weight; got {weights.tolist()!s:.200}.")
    while rest > 0:
        chosen = claims.argsort(kind="stable")[: min(rest, available)]
        counts[chosen] += 1
        claims[chosen] += 1.0
        rest -= len(chosen)


def _take(counts: Counts, owed: Vector, excess: int) -> None:
    """Take one sample each from the domains that can best wait, when more whole samples are owed than fit."""
    while excess > 0:
        claims = np.where(counts > 0, owed - counts, np.inf)
        chosen = claims.argsort(kind="stable")[: min(excess, int(np.count_nonzero(counts)))]
        counts[chosen] -= 1
        excess -= len(chosen)


def allocate_independently(weights: Vector, batch_size: int, seed: int, step: int) -> Counts:
    """Return counts (D,) as if every sample were drawn by the weights on its own (multinomial), keyed by (seed, step).

    >>> allocate_independently(np.array([0.5, 0.5]), 100, seed=0, step=0).sum()
    np.int64(100)
    """
    chances = (random_bits(key(seed, "independent", step), batch_size) >> np.uint64(11)) * 2.0**-53
    edges = np.cumsum(weights)
    drawn = np.searchsorted(edges, chances * edges[-1], side="right")
    return np.bincount(np.minimum(drawn, np.flatnonzero(weights)[-1]), minlength=len(weights))
