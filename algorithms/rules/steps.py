"""The steps that update rules are composed of, each a pure function on float64 vectors of shape (D,).

    score  ->  hold  ->  mirror step  ->  mix in  ->  bounds

``score`` is what a rule maximises (a loss, an excess loss, a gradient product). ``hold`` gives absent domains a score.
The mirror step is ``exponentiated`` (entropy), ``euclidean`` (projected ascent) or a best response (``balls.py``).
``mix_in`` pulls towards a prior so that no weight vanishes. ``bounds.py`` adds floors, ceilings and epoch caps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = [
    "euclidean",
    "exponentiated",
    "field",
    "filled",
    "hold",
    "mean_into",
    "mean_of",
    "means",
    "mix_in",
    "moving_average",
    "normalized",
    "weights_of",
]

Vector = NDArray[np.float64]
Present = NDArray[np.bool_]


def field(signals: Signals, name: str, num_domains: int) -> Vector:
    """Return ``signals.name``, a finite array of D rows.

    Raises: InputError: naming the field, what it holds and what was expected.
    """
    value = getattr(signals, name)
    if value is None:
        raise InputError(
            f"this update rule needs Signals.{name}, which was not gathered. Pass it, or use another rule."
        )
    array = np.asarray(value, dtype=np.float64)
    if array.shape[:1] != (num_domains,):
        raise InputError(f"Signals.{name} has shape {array.shape}; the rule was made for {num_domains} domains.")
    if not np.all(np.isfinite(array)):
        raise InputError(
            f"Signals.{name} is not finite: {array.tolist()}. Give a domain whose loss is not finite 0 tokens and "
            "0 loss, so that it counts as absent."
        )
    return array


def mean_of(signals: Signals, total: str, count: str, num_domains: int) -> tuple[Vector, Present]:
    """Return the mean per domain of the field ``total``, 0 where absent, and which domains are present.

    Raises: InputError: if a field is missing, not finite or of the wrong shape, or a count is negative.

    >>> mean_of(Signals(np.array([2.0, 0.0]), np.array([6.0, 0.0])), "loss", "num_tokens", 2)[0].tolist()
    [3.0, 0.0]
    """
    counts = field(signals, count, num_domains)
    if np.any(counts < 0):
        raise InputError(f"Signals.{count} must be >= 0; got {counts.tolist()}.")
    return means(field(signals, total, num_domains), counts), counts > 0


def means(total: Vector, count: Vector) -> Vector:
    """Return ``total / count``, and 0 where ``count`` is 0.

    >>> means(np.array([6.0, 0.0]), np.array([3.0, 0.0])).tolist()
    [2.0, 0.0]
    """
    return np.divide(total, count, out=np.zeros(np.shape(total)), where=np.asarray(count) > 0)


def hold(score: Vector, present: Present, last: Vector, seen: Vector) -> tuple[Vector, Vector]:
    """Return a score for every domain, and which domains have ever been seen (0 or 1).

    A domain that is absent keeps its last score. One that was never seen gets the mean score of those present, which
    moves its weight as little as possible; any constant (official DoReMi uses ln V) would hand it the whole mixture.

    >>> hold(np.array([4.0, 2.0, 0.0]), np.array([True, True, False]), np.zeros(3), np.zeros(3))[0].tolist()
    [4.0, 2.0, 3.0]
    """
    seen = np.where(present, 1.0, seen)
    held = np.where(present, score, last)
    if present.any():
        held = np.where(seen > 0, held, np.mean(score[present]))
    return held, seen


def moving_average(average: Vector, seen: Vector, fresh: Vector, present: Present, newest: float) -> Vector:
    """Return the exponential moving average with share ``newest`` for ``fresh``; the first value starts it.

    >>> old, seen, fresh = np.array([4.0, 0.0, 7.0]), np.array([1.0, 0.0, 1.0]), np.array([8.0, 5.0, 0.0])
    >>> moving_average(old, seen, fresh, np.array([True, True, False]), newest=0.25).tolist()
    [5.0, 5.0, 7.0]
    """
    moved = np.where(seen > 0, (1 - newest) * average + newest * fresh, fresh)
    return np.where(present, moved, average)


def filled(values: Vector, seen: Vector) -> Vector:
    """Return ``values`` with the mean of the seen ones where a domain was never seen; all 0 if none was.

    >>> filled(np.array([4.0, 2.0, 0.0]), np.array([1.0, 1.0, 0.0])).tolist()
    [4.0, 2.0, 3.0]
    """
    known = seen > 0
    return np.where(known, values, np.mean(values[known]) if known.any() else 0.0)


def exponentiated(log_weights: Vector, step: Vector) -> Vector:
    """Return the log of w·exp(step) / Σ w·exp(step): one step of exponentiated gradient, stable for any step.

    >>> np.exp(exponentiated(np.log([0.5, 0.5]), np.array([np.log(3), 0]))).round(12).tolist()
    [0.75, 0.25]
    """
    moved = log_weights + (step - np.max(step))
    top = np.max(moved)
    return moved - (top + np.log(np.sum(np.exp(moved - top))))


def mix_in(log_weights: Vector, amount: float, prior: Vector) -> Vector:
    """Return the log of (1 − amount)·w + amount·prior, so that every weight is at least amount·prior.

    >>> np.exp(mix_in(np.log([0.9, 0.1]), 0.5, np.array([0.5, 0.5]))).round(12).tolist()
    [0.7, 0.3]
    """
    if amount == 0:
        return log_weights
    if amount == 1:
        return np.log(prior)
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-amount) + log_weights, np.log(amount * prior))


def weights_of(log_weights: Vector) -> Vector:
    """Return weights that sum to 1 from log weights.

    >>> weights_of(np.log([0.2, 0.6])).round(12).tolist()
    [0.25, 0.75]
    """
    return normalized(np.exp(log_weights - np.max(log_weights)))


def normalized(weights: Vector) -> Vector:
    """Return ``weights`` divided by their sum.

    Raises: InputError: if an entry is negative or not finite, or nothing is positive.

    >>> normalized(np.array([1.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
        raise InputError(f"weights must be finite, >= 0 and not all 0; got {weights.tolist()}.")
    return weights / weights.sum()


def euclidean(point: Vector, lower: Vector | float = 0.0, upper: Vector | float = 1.0) -> Vector:
    """Return the mixture nearest to ``point`` with ``lower`` <= w <= ``upper``; it may have exact zeros.

    It is clip(point - t, lower, upper) for the one t that leaves a sum of 1. The sum is piecewise linear in t with
    kinks at point - lower and point - upper, so t is found exactly by interpolation between two kinks.

    Raises: InputError: if no mixture lies within the bounds.

    >>> euclidean(np.array([0.9, 0.5, -1.0])).round(12).tolist()
    [0.7, 0.3, 0.0]
    >>> euclidean(np.array([0.9, 0.5, -1.0]), upper=0.6).round(12).tolist()
    [0.6, 0.4, 0.0]
    """
    shifted = point - np.max(point)
    low, high = np.broadcast_to(lower, shifted.shape), np.broadcast_to(np.minimum(upper, 1.0), shifted.shape)
    if np.any(low > high) or low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12:
        raise InputError(f"no mixture has weights between {np.min(low):g} and {np.max(high):g} that sum to 1.")
    kinks = np.unique(np.concatenate([shifted - high, shifted - low]))
    sums = np.clip(shifted - kinks[:, None], low, high).sum(axis=1)
    threshold = np.interp(-1.0, -sums, kinks)
    return np.clip(shifted - threshold, low, high)


def mean_into(average: Vector, value: Vector, count: int) -> Vector:
    """Return the mean of ``count`` values of which ``average`` covers all but the last, ``value``."""
    return average + (value - average) / count
