"""Agnostic federated learning: minimise the worst mixture of domains by projected gradient ascent on the mixture.

    q_t = Proj(q_{t-1} + eta * (mean loss of each domain))      Proj: nearest mixture within lower <= q <= upper
    result = (q_1 + ... + q_T) / T

Mohri, Sivek, Suresh 2019, arXiv:1902.00146 (Stochastic-AFL with per-domain gradients, averages returned). The box is
one case of their convex set of mixtures. Unlike Group DRO's multiplicative step this reaches exact zeros: with
sampling by the weights, a domain at 0 is never seen again, so give a ``lower`` bound there.

What differs in the code of fair_flearn: it averages the model, not q; and its projection counts the positive entries
with one term missing, so that some of its q sum to more than 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import by_name, number
from algorithms.rules.steps import Vector, euclidean, hold, mean_into, mean_of, normalized
from algorithms.signals import Signals

__all__ = ["AgnosticState", "agnostic"]


class AgnosticState(NamedTuple):
    """(D,) vectors: q_t, its bounds, the last losses, 1 where ever seen, the mean of q_1..q_t; and t."""

    weights: Vector
    lower: Vector
    upper: Vector
    loss: Vector
    seen: Vector
    average: Vector
    num_updates: int


def agnostic(
    eta: float = 0.01,
    lower: Mapping[str, float] | float = 0.0,
    upper: Mapping[str, float] | float = 1.0,
) -> UpdateRule:
    """Return the rule of agnostic federated learning.

    Args:
        eta: step size of the ascent.
        lower, upper: bounds of the mixture, for all domains or by name (missing names: 0 and 1).

    Raises: InputError: at ``init``, if no mixture lies within the bounds.

    >>> rule = agnostic(eta=0.1)
    >>> rule.update(rule.init(["a", "b"]), Signals(np.ones(2), np.array([4.0, 2.0])))[1].round(12).tolist()
    [0.6, 0.4]
    """
    settings = dict(locals())
    eta = number(eta, "eta", low=0)

    def init(domains: Domains | Sequence[str]) -> AgnosticState:
        known = as_domains(domains)
        low, high = by_name(lower, known, "lower", default=0.0), by_name(upper, known, "upper", default=1.0)
        start, zeros = euclidean(uniform(low.size), low, high), np.zeros(low.size)
        return AgnosticState(start, low, high, zeros, zeros, start, 0)

    def update(state: AgnosticState, signals: Signals) -> tuple[AgnosticState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, normalized(state.weights)
        loss, seen = hold(fresh, present, state.loss, state.seen)
        weights = euclidean(state.weights + eta * (loss - np.max(loss)), state.lower, state.upper)
        count = state.num_updates + 1
        average = mean_into(state.average, weights, count)
        new = AgnosticState(weights, state.lower, state.upper, loss, seen, average, count)
        return new, normalized(weights)

    return UpdateRule(
        name="agnostic",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: normalized(state.weights),
        result=lambda state: normalized(state.average),
    )
