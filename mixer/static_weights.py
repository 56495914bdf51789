"""Weights from sizes alone, before anything has been trained.

uniform        every domain the same
proportional   by size, so that every domain sees the same number of epochs
temperature    size^(1/τ): between the two (τ = 1 proportional, τ → ∞ uniform)
unimax         uniform, but no domain beyond ``max_epochs`` (Chung et al. 2023, arXiv:2304.09151, algorithm 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixer.errors import InputError
from mixer.projection import project

__all__ = ["STATIC_WEIGHTS", "proportional", "temperature", "uniform", "unimax"]

Vector = NDArray[np.float64]


def uniform(num_domains: int) -> Vector:
    """Return 1/D for each of D domains.

    >>> uniform(4).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if num_domains < 1:
        raise InputError(f"weights need at least one domain; got {num_domains}.")
    return np.full(num_domains, 1.0 / num_domains)


def proportional(sizes: ArrayLike) -> Vector:
    """Return each domain's share of the total size. Sizes (D,) ≥ 0, in any unit.

    >>> proportional([30, 10]).tolist()
    [0.75, 0.25]
    """
    n = _sizes(sizes)
    return n / n.sum()


def temperature(sizes: ArrayLike, tau: float) -> Vector:
    """Return weights proportional to ``size^(1/τ)``. τ > 0; above 1 it lifts small domains.

    >>> temperature([400, 100], tau=2).round(4).tolist()
    [0.6667, 0.3333]
    """
    if not tau > 0:
        raise InputError(f"the temperature must be > 0; got {tau}. 1 is size-proportional, large is uniform.")
    n = _sizes(sizes)
    raised = (n / n.max()) ** (1.0 / tau)
    return raised / raised.sum()


def unimax(sizes: ArrayLike, budget: float, max_epochs: ArrayLike, *, names: Sequence[str] | None = None) -> Vector:
    """Return weights as uniform as possible with no domain read more than ``max_epochs`` times within ``budget``.

    Args:
        sizes: (D,) tokens (or samples) per domain.
        budget: tokens (or samples) of the whole run, same unit.
        max_epochs: a number > 0, or one per domain.
        names: names of the domains, for errors.
    Raises: InputError: if all domains together hold less than the budget at ``max_epochs``.

    >>> unimax([1000, 1000, 10], budget=1000, max_epochs=4).round(3).tolist()
    [0.48, 0.48, 0.04]
    """
    n, epochs = _sizes(sizes), np.asarray(max_epochs, np.float64)
    if not budget > 0 or not (epochs > 0).all():
        raise InputError(f"budget and max_epochs must be > 0; got {budget} and {epochs.tolist()}.")
    available = float((n * epochs).sum())
    if available < budget:
        raise InputError(
            f"the budget of {budget:,.0f} is more than the domains hold at {epochs.tolist()} epochs: {n.sum():,.0f} a"
            f" single time, {available:,.0f} in all. Lower the budget or raise max_epochs to at least"
            f" {budget / n.sum():.3g}."
        )
    return project(uniform(len(n)), upper=epochs * n / budget, names=names)


# name: (function, what it takes beside the sizes). A new row enters `mixer weigh` and the shared tests.
STATIC_WEIGHTS: dict[str, tuple[Callable[..., Vector], tuple[str, ...]]] = {
    "uniform": (lambda sizes: uniform(len(_sizes(sizes))), ()),
    "proportional": (proportional, ()),
    "temperature": (temperature, ("tau",)),
    "unimax": (unimax, ("budget", "max_epochs")),
}


def _sizes(sizes: ArrayLike) -> Vector:
    n = np.asarray(sizes, np.float64)
    if n.ndim != 1 or not n.size or not np.isfinite(n).all() or (n < 0).any() or not n.any():
        raise InputError(f"sizes must be finite numbers >= 0, at least one positive; got {n.tolist()!s:.200}.")
    return n
