"""Lookahead DRO: choose the weights whose next gradient step leaves the smallest worst loss, widely spread.

    q_t = argmin over mixtures q of  max_i [ l_i - r * sum_j G_ij q_j ] - tau * entropy(q)       G_ij = <grad_i, grad_j>

r is the learning rate: after a step of r on sum_j q_j l_j, the loss of i falls by about r * sum_j G_ij q_j. Solved in
the dual, a concave problem over mixtures p of the worst loss:

    p* = argmax_p  p . l - tau * logsumexp(r * G p / tau)          q_t = softmax(r * G p* / tau)

A domain that no gradient can improve does not attract weight, where Group DRO would go one-hot on it and stall.

This is a reconstruction: of Michel, Ruder, Yogatama 2021, arXiv:2110.05838, only the abstract was at hand (a
re-weighting that looks ahead at the interaction of tasks, leads to the smallest worst-case loss and trains on as many
tasks as possible), not the algorithm; there is no official code to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import number, whole
from algorithms.rules.steps import Vector, exponentiated, field, hold, mean_into, mean_of, means, normalized, weights_of
from algorithms.signals import Signals

__all__ = ["LookaheadState", "gram_of", "look_ahead", "lookahead"]


class LookaheadState(NamedTuple):
    """(D,) vectors: the last losses, 1 where ever seen, the weights in force and their mean; the (D, D) inner products
    of gradients; and t."""

    loss: Vector
    seen: Vector
    weights: Vector
    average: Vector
    products: Vector
    num_updates: int


def lookahead(rate: float = 1e-3, tau: float = 0.1, iterations: int = 300) -> UpdateRule:
    """Return lookahead DRO.

    Args:
        rate: r, the learning rate of the step looked ahead at (a few steps' worth may be summed into it).
        tau: strength of the entropy; higher trains on more domains. Nats.
        iterations: steps of the dual solver.

    Orthogonal gradients of norm 1: after a step of 1 by (0.6, 0.4) both losses are 0.6.

    >>> rule = lookahead(rate=1.0, tau=0.1)
    >>> signals = Signals(
    ...     np.ones(2), np.array([1.2, 1.0]), gradient_products=np.diag([1.0, 1.0]), gradient_counts=np.ones((2, 2))
    ... )
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(2).tolist()
    [0.6, 0.4]
    """
    settings = dict(locals())
    rate, tau = number(rate, "rate", low=0), number(tau, "tau", low=1e-9)
    steps = whole(iterations, "iterations", low=1)

    def init(domains: Domains | Sequence[str]) -> LookaheadState:
        size = len(as_domains(domains).names)
        return LookaheadState(np.zeros(size), np.zeros(size), uniform(size), uniform(size), np.zeros((size, size)), 0)

    def update(state: LookaheadState, signals: Signals) -> tuple[LookaheadState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, state.weights
        loss, seen = hold(fresh, present, state.loss, state.seen)
        products = gram_of(signals, state.products)
        weights = look_ahead(loss, rate * products, tau, steps)
        count = state.num_updates + 1
        return LookaheadState(loss, seen, weights, mean_into(state.average, weights, count), products, count), weights

    return UpdateRule(
        name="lookahead",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.weights,
        result=lambda state: normalized(state.average),
        needs=frozenset({"gradients"}),
    )


def gram_of(signals: Signals, last: Vector) -> Vector:
    """Return the mean inner products of gradients, (D, D), with the last known value where a pair was not measured."""
    size = last.shape[0]
    counts = field(signals, "gradient_counts", size)
    return np.where(counts > 0, means(field(signals, "gradient_products", size), counts), last)


def look_ahead(losses: Vector, gains: Vector, tau: float, iterations: int = 300) -> Vector:
    """Return argmin_q max_i [loss_i - (gains q)_i] - tau * entropy(q), by mirror ascent on the dual.

    The step doubles while the dual value rises and halves until it does, so that no scale has to be known. It ends
    where no step that still changes the value raises it.

    Args:
        losses: (D,) nats.
        gains: (D, D), how much a unit of weight on column j lowers the loss of row i.
    """

    def dual(log_p: Vector) -> tuple[float, Vector]:
        p = weights_of(log_p)
        z = gains.T @ p / tau
        top = np.max(z)
        return float(p @ losses - tau * (top + np.log(np.sum(np.exp(z - top))))), weights_of(z)

    log_p = np.log(uniform(losses.size))
    value, q = dual(log_p)
    step = 1.0 / max(float(np.ptp(losses)), tau)
    for _ in range(iterations):
        moved = exponentiated(log_p, step * (losses - gains @ q))
        new_value, new_q = dual(moved)
        if new_value > value:
            log_p, value, q, step = moved, new_value, new_q, 2.0 * step
        else:
            step *= 0.25
            if step * float(np.ptp(losses - gains @ q)) < 1e-15:
                break
    return q
