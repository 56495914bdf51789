"""Worst mixtures within a distance of a prior: q = argmax { q . losses : distance(q, prior) <= radius }.

Each solver is exact to rounding, takes float64 (D,) vectors and ignores the scale and the offset of the losses.

    kl_ball           KL(q || p) <= radius                       q_i ~ p_i exp(loss_i / tau)
    chi2_ball         (1/2) sum p_i (q_i / p_i - 1)^2 <= radius   q_i ~ p_i max(loss_i - lambda, 0)
    cvar_ball         q_i <= p_i / alpha                         p_i / alpha for the highest losses
    wasserstein_ball  cost of moving p to q <= radius            the moves with the highest gain per cost

tau and lambda are found by bisection on the distance, which grows as q concentrates. Sources: Namkoong and Duchi 2016
(chi-square); Zhou, Levy, Li, Ghazvininejad, Neubig 2021, arXiv:2109.04020 (chi-square over languages, resampled once
per epoch); Oren, Sagawa, Hashimoto, Liang 2019, arXiv:1909.02060 (CVaR over topics).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from algorithms.rules.steps import Vector, normalized

__all__ = ["chi2_ball", "chi2_divergence", "cvar_ball", "kl_ball", "kl_divergence", "wasserstein_ball"]

# exp(-40) is below float64 resolution against 1, so these ends mean "all of the prior" and "only the highest loss".
SHARPNESS = (-40.0, 40.0)


def kl_divergence(weights: Vector, prior: Vector) -> float:
    """Return KL(weights || prior) in nats; entries of 0 weight add nothing.

    >>> round(kl_divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])), 6)
    0.693147
    """
    used = weights > 0
    return float(np.sum(weights[used] * np.log(weights[used] / prior[used])))


def chi2_divergence(weights: Vector, prior: Vector) -> float:
    """Return (1/2) sum p (w / p - 1)^2, over the entries with a positive prior.

    >>> chi2_divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    0.5
    """
    used = prior > 0
    return float(0.5 * np.sum(prior[used] * (weights[used] / prior[used] - 1.0) ** 2))


def kl_ball(losses: Vector, prior: Vector, radius: float, min_ratio: float = 0.0) -> Vector:
    """Return the worst mixture within KL ``radius`` of ``prior``; no q_i / p_i falls below about ``min_ratio``.

    >>> kl_ball(np.array([1.0, 0.0]), np.array([0.5, 0.5]), radius=10.0).tolist()  # room for everything on one
    [1.0, 0.0]
    """

    def tilted(sharpness: float) -> Vector:
        return prior * np.exp(_below_top(losses, prior) * np.exp(sharpness))

    return _sharpest(tilted, prior, radius, min_ratio, kl_divergence)


def chi2_ball(losses: Vector, prior: Vector, radius: float, min_ratio: float = 0.0) -> Vector:
    """Return the worst mixture within chi-square ``radius`` of ``prior``; no q_i / p_i falls below about ``min_ratio``.

    Two equal domains have q_1 = (1 + sqrt(2 radius)) / 2:

    >>> chi2_ball(np.array([3.0, 1.0]), np.array([0.5, 0.5]), radius=0.08).round(9).tolist()
    [0.7, 0.3]
    """

    def tilted(sharpness: float) -> Vector:
        return prior * np.maximum(_below_top(losses, prior) + np.exp(-sharpness), 0.0)

    return _sharpest(tilted, prior, radius, min_ratio, chi2_divergence)


def cvar_ball(losses: Vector, prior: Vector, alpha: float) -> Vector:
    """Return the worst mixture with q_i <= p_i / ``alpha``: the mean of the worst share ``alpha`` of the prior.

    Equal losses at the boundary share what is left in proportion to the prior, so the order of domains is irrelevant.

    >>> cvar_ball(np.array([3.0, 2.0, 1.0]), np.array([0.1, 0.2, 0.7]), alpha=0.2).round(12).tolist()
    [0.5, 0.5, 0.0]
    """
    order = np.argsort(-losses, kind="stable")
    reached = np.searchsorted(np.cumsum(prior[order]), alpha * (1 - 1e-12))
    boundary = losses[order[min(int(reached), losses.size - 1)]]
    above, at = losses > boundary, losses == boundary
    weights = np.where(above, prior / alpha, 0.0)
    weights[at] = max(1.0 - weights.sum(), 0.0) * normalized(prior[at]) if prior[at].sum() > 0 else 0.0
    return normalized(weights)


def wasserstein_ball(losses: Vector, prior: Vector, distances: Vector, radius: float) -> Vector:
    """Return the worst mixture that ``prior`` can be moved to at a cost of at most ``radius``.

    The linear programme max { sum_ij M_ij loss_j : M 1 = p, sum_ij M_ij distance_ij <= radius } is a fractional
    knapsack: each source i moves along the upper concave hull of its (distance_ij, loss_j) points, and the steps of
    all sources are taken in order of gain per cost. Steps of equal gain per cost share the rest of the budget.

    Args:
        distances: (D, D), cost of moving a unit from i to j: >= 0, 0 on the diagonal.

    >>> two_apart = np.array([[0.0, 2.0], [2.0, 0.0]])
    >>> wasserstein_ball(np.array([1.0, 0.0]), np.array([0.5, 0.5]), two_apart, radius=0.4).round(12).tolist()
    [0.7, 0.3]
    """
    moves, weights = [], np.zeros(prior.size)
    for source in np.nonzero(prior > 0)[0]:
        corners = _hull(distances[source], losses, source)
        weights[corners[0]] += prior[source]
        for here, there in pairwise(corners):
            cost = distances[source, there] - distances[source, here]
            moves.append(((losses[there] - losses[here]) / cost, prior[source] * cost, prior[source], here, there))
    moves.sort(key=lambda move: -move[0])
    left, first = float(radius), 0
    while first < len(moves) and left > 0:
        last = first
        while last < len(moves) and moves[last][0] >= moves[first][0] * (1 - 1e-12):
            last += 1
        share = min(1.0, left / sum(move[1] for move in moves[first:last]))
        for _, cost, mass, here, there in moves[first:last]:
            weights[here] -= share * mass
            weights[there] += share * mass
            left -= share * cost
        first = last
    return normalized(np.maximum(weights, 0.0))


def _below_top(losses: Vector, prior: Vector) -> Vector:
    """Return the losses moved and scaled into [-1, 0], with 0 at the highest one that has prior mass."""
    top = np.max(losses[prior > 0])
    spread = top - np.min(losses[prior > 0])
    return np.minimum((losses - top) / (spread if spread > 0 else 1.0), 0.0)


def _sharpest(
    tilted: Callable[[float], Vector],
    prior: Vector,
    radius: float,
    min_ratio: float,
    divergence: Callable[[Vector, Vector], float],
) -> Vector:
    """Return the most concentrated ``tilted`` mixture whose divergence from the prior is at most ``radius``."""

    def mixture(sharpness: float) -> Vector:
        weights = normalized(tilted(sharpness))
        return normalized(np.maximum(weights, min_ratio * prior)) if min_ratio > 0 else weights

    low, high = SHARPNESS
    if divergence(mixture(high), prior) <= radius:
        return mixture(high)
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if divergence(mixture(middle), prior) <= radius else (low, middle)
    return mixture(low)


def _hull(costs: Vector, gains: Vector, source: int) -> list[int]:
    """Return the corners of the upper concave hull of (cost, gain), from the best free one on, gains rising."""
    free = np.nonzero(costs <= 0)[0]
    best = free[np.argmax(gains[free])] if free.size else source
    corners = [int(best if gains[best] > gains[source] else source)]
    while True:
        here = corners[-1]
        better = np.nonzero((gains > gains[here]) & (costs > costs[here]))[0]
        if not better.size:
            return corners
        slopes = (gains[better] - gains[here]) / (costs[better] - costs[here])
        steepest = better[slopes >= slopes.max() * (1 - 1e-12)]
        corners.append(int(steepest[np.argmax(costs[steepest])]))
