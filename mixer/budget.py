"""What a run of a given length will see of each domain, before it starts.

Repeated text is worth less than new text: Muennighoff et al. 2023 (arXiv:2305.16264, equation 5) fit the data that U
unique tokens are worth after R further epochs as D' = U + U · R* · (1 − exp(−R / R*)), with R* = 15.39.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.errors import InputError
from mixer.projection import project

__all__ = ["REPETITION_DECAY", "Plan", "effective_size", "plan_budget"]

Vector = NDArray[np.float64]
REPETITION_DECAY = 15.387756  # R*_D of the fit


class Plan(NamedTuple):
    """One row per domain, in the unit that was asked in (tokens or samples).

    Attributes:
        names: domains.
        asked, shares: (D,) weights asked for, and the share of the run each domain will have given.
        amounts, epochs: (D,) what is drawn of each domain, and how often that reads it.
        effective: (D,) what it is worth in unique data.
        capped: (D,) bool, domains held at their limit; their weight went to the others.
        budget: what the run draws in all; less than asked if it ends early.
        note: why it ends early or stops with an error, or "".
    """

    names: tuple[str, ...]
    asked: Vector
    shares: Vector
    amounts: Vector
    epochs: Vector
    effective: Vector
    capped: NDArray[np.bool_]
    budget: float
    note: str


def effective_size(unique: Vector, epochs: Vector) -> Vector:
    """Return the unique data that ``unique`` is worth when read ``epochs`` times (a part of it, below one epoch).

    >>> effective_size(np.array([100.0, 100.0]), np.array([0.5, 4.0])).round(1).tolist()
    [50.0, 372.6]
    """
    again = np.maximum(epochs - 1.0, 0.0)
    return unique * np.minimum(epochs, 1.0) + unique * REPETITION_DECAY * -np.expm1(-again / REPETITION_DECAY)


def plan_budget(
    names: Sequence[str], weights: Vector, sizes: Vector, budget: float, max_epochs: Vector, on_exhausted: str = "drop"
) -> Plan:
    """Return what a run of ``budget`` draws from each domain under fixed weights.

    Args:
        names, weights, sizes, max_epochs: (D,); weights sum to 1, sizes in the unit of the budget.
        budget: length of the run, > 0.
        on_exhausted: "drop" gives the weight of used-up domains to the others; any other ends the run there.

    >>> plan = plan_budget(["a", "b"], np.array([0.5, 0.5]), np.array([10.0, 1000.0]), 100, np.array([2.0, 2.0]))
    >>> plan.shares.tolist(), plan.epochs.tolist(), plan.capped.tolist()
    ([0.2, 0.8], [2.0, 0.08], [True, False])
    """
    if not budget > 0:
        raise InputError(f"the budget must be > 0; got {budget}.")
    limits = sizes * max_epochs
    with np.errstate(divide="ignore", invalid="ignore"):
        lasts = np.where(weights > 0, limits / weights, np.inf)  # the length of a run at which a domain is used up
    end, note = float(budget), ""
    if on_exhausted == "drop":
        available = float(limits[weights > 0].sum())
        if available < budget:
            end, note = available, f"every domain is used up after {available:,.0f} of {budget:,.0f}"
        shares = project(weights, upper=limits / end, names=names)
    else:
        shares, first = weights, int(lasts.argmin())
        if lasts[first] < budget:
            end = float(lasts[first])
            note = (
                f"{names[first]!r} is used up after {end:,.0f} of {budget:,.0f}: on_exhausted={on_exhausted!r} ends"
                " there"
            )
    with np.errstate(divide="ignore", invalid="ignore"):
        epochs = np.where(sizes > 0, shares * end / sizes, 0.0)
    capped = (weights > 0) & (shares * end >= limits * (1 - 1e-9))
    return Plan(tuple(names), weights, shares, shares * end, epochs, effective_size(sizes, epochs), capped, end, note)
