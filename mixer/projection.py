"""Floors and ceilings on weights: the one place where imbalance is handled.

``project`` finds the nearest mixture (in KL divergence) to the weights that were asked for, among those that give every
domain at least its floor and at most its ceiling. UniMax is this with uniform weights and the ceiling
``max_epochs · size / budget``; every update rule's floor is this with a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixer.errors import InputError

__all__ = ["project"]

Vector = NDArray[np.float64]
_SLACK = 1e-9  # bounds that miss a sum of 1 by no more than this miss it by rounding


def project(
    weights: ArrayLike, lower: ArrayLike = 0.0, upper: ArrayLike = 1.0, *, names: Sequence[str] | None = None
) -> Vector:
    """Return the weights nearest to ``weights`` in KL divergence that sum to 1 and lie within the bounds.

    The minimiser of ``Σ x log(x / w)`` is ``x_i = clip(s · w_i, lower_i, upper_i)``, with the one scale s that makes
    the sum 1. Which entries are clipped is found by bisection over the 2 D places where s meets a bound, in logarithms,
    so that weights of 1e-300 are as exact as others. A domain of weight 0 keeps its floor and gets nothing more.

    Args:
        weights: (D,), finite, ≥ 0, any positive sum.
        lower, upper: scalars or (D,), shares; ``upper`` may be infinite.
        names: names of the domains, for errors.
    Returns: (D,) float64, sum 1 up to rounding.
    Raises: InputError: if no weights can satisfy the bounds, with the arithmetic.

    >>> project([0.7, 0.2, 0.1], upper=0.5).round(4).tolist()
    [0.5, 0.3333, 0.1667]
    >>> project([1, 0, 0], lower=0.1).round(4).tolist()
    [0.8, 0.1, 0.1]
    """
    w, lo, hi = _checked(weights, lower, upper, names)
    positive = w > 0
    if lo.sum() >= 1.0 - 1e-15:
        return lo / lo.sum()
    reachable = math.fsum(np.where(positive, hi, lo))
    if reachable < 1.0 - _SLACK:
        raise InputError(
            f"the ceilings leave no mixture: the domains of positive weight may take {reachable:.6g} in all, less than"
            f" 1 ({_list(names, np.minimum(hi, 1.0))}). Raise the ceilings, or give the other domains a weight."
        )
    if reachable <= 1.0:
        return np.where(positive, hi, lo) / reachable
    return _clip_to_one(w, lo, hi, positive)


def _clip_to_one(w: Vector, lo: Vector, hi: Vector, positive: NDArray[np.bool_]) -> Vector:
    with np.errstate(divide="ignore", invalid="ignore"):
        log_w = np.where(positive, np.log(np.where(positive, w, 1.0)), -np.inf)
        enters, leaves = np.log(lo) - log_w, np.log(hi) - log_w  # log s at which an entry meets its floor, its ceiling
    places = np.unique(np.concatenate([enters[positive], leaves[positive]]))
    places = places[np.isfinite(places)]
    first, last = 0, len(places)  # the first place whose sum is at least 1 lies in [first, last]
    while first < last:
        middle = (first + last) // 2
        with np.errstate(over="ignore"):
            total = np.where(positive, np.clip(np.exp(places[middle] + log_w), lo, hi), lo).sum()
        first, last = (first, middle) if total >= 1.0 else (middle + 1, last)
    # Between two neighbouring places the same entries are free; they share what the clipped ones leave.
    below = places[first - 1] if first > 0 else -np.inf
    above = places[first] if first < len(places) else np.inf
    at_floor = ~positive | (enters >= above)
    at_ceiling = positive & (leaves <= below)
    free = ~at_floor & ~at_ceiling
    x = np.where(at_floor, lo, hi)
    if free.any():
        scaled = w[free] / w[free].max()
        x[free] = (1.0 - math.fsum(x[~free])) * (scaled / math.fsum(scaled))
    return np.clip(x, lo, hi)


def _checked(
    weights: ArrayLike, lower: ArrayLike, upper: ArrayLike, names: Sequence[str] | None
) -> tuple[Vector, Vector, Vector]:
    w = np.array(weights, np.float64)
    if w.ndim != 1 or not w.size or not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise InputError(
            f"weights must be a vector of finite numbers >= 0, at least one positive; got {w.tolist()!s:.200}."
        )
    try:
        lo = np.broadcast_to(np.asarray(lower, np.float64), w.shape).copy()
        hi = np.broadcast_to(np.asarray(upper, np.float64), w.shape).copy()
    except ValueError as error:
        raise InputError(f"floors and ceilings must be numbers or one per domain ({w.size}): {error}.") from error
    bad = ~((lo >= 0) & (lo <= hi))
    if bad.any():
        raise InputError(
            f"floors must be >= 0 and at most their ceilings; got floors {_list(names, lo, bad)}, ceilings"
            f" {_list(names, hi, bad)}."
        )
    if lo.sum() > 1.0 + _SLACK:
        raise InputError(
            f"the floors leave no mixture: they sum to {lo.sum():.6g} > 1 ({_list(names, lo)}). Lower them."
        )
    return w / w.max(), lo, hi


def _list(names: Sequence[str] | None, values: Vector, where: NDArray[np.bool_] | None = None, limit: int = 8) -> str:
    """Return ``code 0.1, web 0.2, … (22 domains)`` for errors."""
    chosen = np.flatnonzero(where) if where is not None else np.arange(len(values))
    parts = [f"{names[i] if names else f'domain {i}'} {values[i]:.6g}" for i in chosen[:limit]]
    return ", ".join(parts) + (f", … ({len(chosen)} domains)" if len(chosen) > limit else "")
