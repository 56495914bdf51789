"""How many samples each domain gives to the next batch when samples differ in length and weights are shares of tokens.

A batch holds a fixed number of samples. Credit is in tokens and is debited by the very samples that are drawn, so no
error adds up. Sample k of a domain is taken when its middle lies within what the domain is owed:

    claim(d, k) = (owed_d − tokens of the domain's samples before k − length of k / 2) / mean length of the domain
    owed_d      = credit_d + weight_d · T        T: tokens of the batch

The ``batch_size`` largest claims are taken; T is searched until it is what they hold. Lengths and T are whole numbers
and claims are compared one by one, so every rank and machine decides alike. For samples of one length it is the rule of
``mixer.allocation``.

How near: at every batch each domain is within 1.5 of the longest samples of the mixture from its share of the tokens
drawn so far, for weights that do not aim at the allocation (at most 1.0 measured, over fixed, skewed and moving
weights, 2 to 300 domains, lengths uniform, heavy-tailed and up to 65,536 apart). Much less is not possible: a single
sample of that length moves every domain's target by its share of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mixer.errors import InputError

__all__ = ["UpcomingLengths", "allocate_by_tokens", "even_lengths"]

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]
UpcomingLengths = Callable[[int, int], Counts]  # (domain id, n) → lengths of its next n samples, (n,)

_GUESSES = 8  # by slope, before the search only halves


def allocate_by_tokens(
    weights: Vector, credit: Vector, batch_size: int, means: Vector, lengths: UpcomingLengths
) -> tuple[Counts, Counts]:
    """Return how many samples each domain gives to the next batch, and the tokens they hold.

    The new credit is ``credit + weights · tokens.sum() − tokens``. A domain of weight 0 gets nothing.

    Args:
        weights: (D,), ≥ 0, sum 1; shares of tokens.
        credit: (D,), tokens owed from earlier batches.
        batch_size: samples in the batch, ≥ 1.
        means: (D,), about the mean tokens of a sample, > 0.
        lengths: of the samples that each domain would give next.
    Returns: counts (D,) int64 that sum to ``batch_size``; tokens (D,) int64.
    Raises: InputError: if no weight is positive.

    >>> def lengths(domain, count):
    ...     return np.resize([[30, 10, 20], [5, 5, 5]][domain], count)
    >>> counts, tokens = allocate_by_tokens(np.array([0.5, 0.5]), np.zeros(2), 10, np.array([20.0, 5.0]), lengths)
    >>> counts.tolist(), tokens.tolist()
    ([2, 8], [40, 40])
    """
    active = np.flatnonzero(weights > 0)
    if not len(active):
        raise InputError(f"cannot fill a batch: no domain has a positive weight; got {weights.tolist()!s:.200}.")
    w, c, m = weights[active], credit[active], means[active]
    per_token = math.fsum((w / m).tolist())  # samples in a token of the mixture
    guess = (batch_size - math.fsum((c / m).tolist())) / per_token
    search = _Search(math.floor(guess), max(per_token * math.fsum(m.tolist()) / len(active), 1.0))
    near_enough = float((m / w).min()) / 8  # moves no domain by more than an eighth of a sample
    queue = _Queue(active.tolist(), lengths)
    while not search.settles(queue.take(c + w * search.total, m, batch_size), near_enough):
        pass
    counts, tokens = np.zeros((2, len(weights)), np.int64)
    counts[active], tokens[active] = search.best
    return counts, tokens


class _Search:
    """Look for the T that agrees with the tokens of the samples taken for T.

    The excess of those over T falls as T grows, but in steps, so its change of sign is enclosed: at first by guesses
    along the slope, then by halving. ``best`` are the samples taken where both were nearest.
    """

    def __init__(self, guess: int, slope: float) -> None:
        self.total, self._slope, self._tries = max(guess, 0), slope, 0
        self._low, self._high = -1.0, math.inf
        self._distance, self.best = math.inf, (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def settles(self, taken: tuple[Counts, Counts], near_enough: float) -> bool:
        """Take in what was found for ``total``; go on to another one and return False, unless this is near enough."""
        excess, self._tries = int(taken[1].sum()) - self.total, self._tries + 1
        if abs(excess) < self._distance:
            self._distance, self.best = abs(excess), taken
        if excess > 0:
            self._low = self.total
        else:
            self._high = self.total
        if abs(excess) <= near_enough or self._high - self._low <= 1:
            return True
        guess = self.total + round(excess / self._slope)
        if math.isfinite(self._high) and (self._tries > _GUESSES or not self._low < guess < self._high):
            guess = int(self._low + self._high) // 2
        elif guess == self.total or self._tries > _GUESSES:
            guess = self.total * 2 + 1  # T is above all that was tried
        self.total = max(guess, 0)
        return False


class _Queue:
    """The next samples of the active domains, as many as claims have reached so far."""

    def __init__(self, domains: list[int], lengths: UpcomingLengths) -> None:
        self._domains, self._lengths = domains, lengths
        self._sizes = np.zeros(len(domains), np.int64)
        self._parts = [np.zeros(0, np.int64)] * len(domains)

    def take(self, owed: Vector, means: Vector, batch_size: int) -> tuple[Counts, Counts]:
        """Return how many samples of each domain are among the ``batch_size`` largest claims, and their tokens."""
        wanted = np.clip(owed / means * 1.25, 0, batch_size - 1).astype(np.int64) + 4
        self._know(np.minimum(wanted, batch_size))
        while True:
            claims = np.repeat(owed, self._sizes)
            claims -= self._middles
            claims /= np.repeat(means, self._sizes)
            chosen = (-claims).argsort(kind="stable")[:batch_size]
            counts = np.bincount(self._owners[chosen], minlength=len(owed))
            all_taken = (counts == self._sizes) & (counts < batch_size)
            if not all_taken.any():
                return counts, self._ends[self._firsts + counts] - self._ends[self._firsts]
            self._know(np.where(all_taken, np.minimum(self._sizes * 2, batch_size), 0))

    def _know(self, sizes: Counts) -> None:
        """Look up at least so many samples of each domain."""
        more = np.flatnonzero(sizes > self._sizes).tolist()
        if not more:
            return
        for i in more:
            self._parts[i] = self._lengths(self._domains[i], int(sizes[i]))
        self._sizes = np.maximum(self._sizes, sizes)
        values = np.concatenate(self._parts)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._ends = np.concatenate([[0], np.cumsum(values)])
        self._middles = self._ends[1:] - values / 2 - np.repeat(self._ends[self._firsts], self._sizes)


def even_lengths(mean: float, first: int, count: int) -> Counts:
    """Return lengths for samples ``first`` to ``first + count − 1`` that follow a mean as whole numbers can.

    For planning without data.

    >>> even_lengths(2.5, 0, 4).tolist()
    [2, 3, 2, 3]
    """
    return np.diff(np.floor(np.arange(first, first + count + 1) * mean)).astype(np.int64)
