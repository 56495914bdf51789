"""Mirror ascent with held scores: the core that most rules share; they differ in the score they ascend.

    z_t = log w_{t-1} + eta * score          w_t = (1 - c) * softmax(z_t) + c * prior

An absent domain keeps its last score; one never seen gets the mean score of those present (``steps.hold``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.steps import Present, Vector, exponentiated, hold, mean_into, mix_in, normalized, weights_of
from algorithms.signals import Signals

__all__ = ["AscentState", "ascend", "ascent_rule", "begin", "uniform"]


class AscentState(NamedTuple):
    """(D,) vectors: log w_t, what smoothing pulls to, the last scores, 1 where ever seen, mean of w_1..w_t; and t."""

    log_weights: Vector
    prior: Vector
    score: Vector
    seen: Vector
    average: Vector
    num_updates: int


def uniform(num_domains: int) -> Vector:
    """Return 1/D for each of D domains."""
    return np.full(num_domains, 1.0 / num_domains)


def begin(weights: Vector, prior: Vector | None = None) -> AscentState:
    """Return the state with ``weights`` (D,) in force and nothing seen; the prior is uniform unless given."""
    zeros = np.zeros(weights.size)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    return AscentState(log_weights, uniform(weights.size) if prior is None else prior, zeros, zeros, weights, 0)


def ascend(state: AscentState, score: Vector, present: Present, eta: float, smoothing: float) -> AscentState:
    """Return the state after one update by ``score`` (D,), valid where ``present`` (D,).

    With no domain present nothing was learnt and nothing changes.
    """
    if not np.any(present):
        return state
    held, seen = hold(score, present, state.score, state.seen)
    log_weights = mix_in(exponentiated(state.log_weights, eta * held), smoothing, state.prior)
    count = state.num_updates + 1
    average = mean_into(state.average, weights_of(log_weights), count)
    return AscentState(log_weights, state.prior, held, seen, average, count)


def ascent_rule(
    name: str,
    settings: Mapping[str, Any],
    score: Callable[[Signals, int], tuple[Vector, Present]],
    eta: float,
    smoothing: float,
    needs: frozenset[str] = frozenset(),
    applies: Literal["loss", "sampling"] = "loss",
    result: Literal["average", "last"] = "average",
) -> UpdateRule:
    """Return a rule that ascends ``score(signals, D) -> (scores, present)`` from uniform weights."""

    def init(domains: Domains | Sequence[str]) -> AscentState:
        return begin(uniform(len(as_domains(domains).names)))

    def update(state: AscentState, signals: Signals) -> tuple[AscentState, Vector]:
        new = ascend(state, *score(signals, state.score.size), eta, smoothing)
        return new, weights_of(new.log_weights)

    def frozen(state: AscentState) -> Vector:
        return normalized(state.average) if result == "average" else weights_of(state.log_weights)

    return UpdateRule(name, settings, init, update, lambda state: weights_of(state.log_weights), frozen, needs, applies)
