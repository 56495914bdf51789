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
from algorithms.rules.settings import number
from algorithms.rules.steps import Vector, field, hold, mean_into, mean_of, means, normalized, weights_of
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


def lookahead(rate: float = 1e-3, tau: float = 0.1) -> UpdateRule:
    """Return lookahead DRO.

    Args:
        rate: r, the learning rate of the step looked ahead at (a few steps' worth may be summed into it).
        tau: strength of the entropy; higher trains on more domains. Nats.

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

    def init(domains: Domains | Sequence[str]) -> LookaheadState:
        size = len(as_domains(domains).names)
        return LookaheadState(np.zeros(size), np.zeros(size), uniform(size), uniform(size), np.zeros((size, size)), 0)

    def update(state: LookaheadState, signals: Signals) -> tuple[LookaheadState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, state.weights
        loss, seen = hold(fresh, present, state.loss, state.seen)
        products = gram_of(signals, state.products)
        weights = look_ahead(loss, rate * products, tau)
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


def look_ahead(losses: Vector, gains: Vector, tau: float) -> Vector:
    """Return argmin_q max_i [loss_i - (gains q)_i] - tau * entropy(q), by Newton steps on the dual.

    A barrier keeps p inside. It and the entropy start strong and fall together: at once, strong gains and a weak
    entropy make the dual a function of kinks, on which no gradient step gets anywhere.

    Args:
        losses: (D,) nats.
        gains: (D, D), how much a unit of weight on column j lowers the loss of row i.
    """
    scale = max(float(np.ptp(losses)), float(np.ptp(gains)), tau)
    p, barrier, entropy, least = uniform(losses.size), scale, scale, _TOLERANCE * scale / losses.size
    while True:
        is_last = barrier <= least and entropy <= tau
        p, q = _centred(p, losses, gains, barrier, entropy, to_the_end=is_last)
        if is_last:
            return q
        barrier, entropy = max(0.1 * barrier, least), max(0.2 * entropy, tau)


def _centred(
    p: Vector, losses: Vector, gains: Vector, barrier: float, entropy: float, to_the_end: bool
) -> tuple[Vector, Vector]:
    """Return p, near the top of p . l - entropy * logsumexp(gains^T p / entropy) + barrier * sum log p, and its q."""

    def height(p: Vector) -> float:
        z = gains.T @ p / entropy
        top = np.max(z)
        return float(p @ losses - entropy * (top + np.log(np.sum(np.exp(z - top)))) + barrier * np.sum(np.log(p)))

    for _ in range(_MOST_STEPS):
        q = weights_of(gains.T @ p / entropy)
        left = losses - gains @ q
        slope = left + barrier / p
        root = p[:, None] * (gains - (gains @ q)[:, None]) * np.sqrt(q / entropy)
        curvature = root @ root.T + barrier * np.eye(p.size)  # numpy computes half of a product with its own transpose
        free, of_sum = np.linalg.solve(curvature, np.stack([p * slope, p], axis=1)).T
        move = p * (free - (p @ free) / (p @ of_sum) * of_sum)  # leaves the sum of p at 1
        rise, lowest = float(slope @ move), float(np.min(move / p))
        if (np.max(left) - p @ left <= 2 * barrier * p.size) if to_the_end else rise <= 0.1 * barrier:
            break
        step, here = min(1.0, -0.99 / lowest) if lowest < 0 else 1.0, height(p)
        while step > 1e-9 and height(p + step * move) < here - 1e-14 * abs(here):
            step *= 0.5
        p = normalized(p + step * move)
    return p, weights_of(gains.T @ p / entropy)


_TOLERANCE = 1e-7  # of the optimum, in units of the largest difference between losses or gains
_MOST_STEPS = 50  # per strength of the barrier; a few suffice
