"""Adaptive data optimisation: sample where the fitted scaling curves say the loss falls fastest per token.

    L_d(n) = e_d + b_d n^-a_d   fitted per domain to its training losses over its tokens n, again and again
    s_d    = p_d * h_d^0.5 * (-dL_d/dn)         p: prior; h: moving average (0.1 newest) of the realised shares
    rho    = s / sum(s), at least 0.01 each     rho_bar: mean of all rho so far
    pi     = 0.1 * rho + 0.9 * rho_bar

Until the first fit pi is the prior. Jiang, Zhou, Feng, Malladi, Kolter 2024, arXiv:2410.11820, Algorithm 1 and eq. 2-6.

What differs in the official code (``variant="official"`` has the first four): n counts the samples of all domains for
each of them; the credit is sqrt(h (1 - h)); a is at least 0.05 in the slope; the minimum is lost again by normalising
after it (here it holds). Its fit keeps e above exp(0.5) nats, and its loss curves grow with the run (here 128 points
per domain, merged in pairs when full).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.power_law import fit_power_law
from algorithms.rules.settings import choice, number, whole
from algorithms.rules.steps import Vector, field, mean_into, normalized
from algorithms.signals import Signals
from mixer.projection import project

__all__ = ["ADOState", "ado"]

NUM_POINTS = 128
FEWEST_POINTS = 8  # that a curve is fitted to


class ADOState(NamedTuple):
    """(D,) vectors: prior, tokens seen, realised shares h, the mean of rho, the weights in force, their mean; (D, 3)
    fitted (e, b, a), all 0 before the first fit; (128, D) tokens and loss sums per point of the curves; points filled,
    updates per point and in the open point; and t."""

    prior: Vector
    num_tokens: Vector
    share: Vector
    preference: Vector
    weights: Vector
    average: Vector
    curves: Vector
    point_tokens: Vector
    point_losses: Vector
    num_points: int
    updates_per_point: int
    updates_in_point: int
    num_updates: int


def ado(
    warmup: int = 1000,
    refit_every: int = 1000,
    ignore: int = 500,
    credit: float = 0.5,
    newest_share: float = 0.1,
    newest_preference: float = 0.1,
    minimum: float = 0.01,
    variant: str = "paper",
) -> UpdateRule:
    """Return ADO.

    Args:
        warmup: updates before the first fit; the weights are the prior until then.
        refit_every: updates between fits.
        ignore: first updates that are left out of the curves.
        credit: exponent of h.
        newest_share: share of the newest batch in h.
        newest_preference: share of the newest rho in pi.
        minimum: smallest entry of rho; lowered to 1 / D where it would not fit.
        variant: "paper" or "official".

    >>> rule = ado()
    >>> rule.weights(rule.init(["a", "b"])).tolist()
    [0.5, 0.5]
    """
    settings = dict(locals())
    start, every = whole(warmup, "warmup", low=FEWEST_POINTS), whole(refit_every, "refit_every", low=1)
    skipped = whole(ignore, "ignore")
    official = choice(variant, "variant", ("paper", "official")) == "official"
    credit, minimum = number(credit, "credit", low=0), number(minimum, "minimum", low=0, high=1)
    newest_share = number(newest_share, "newest_share", low=0, high=1)
    newest_preference = number(newest_preference, "newest_preference", low=0, high=1)

    def init(domains: Domains | Sequence[str]) -> ADOState:
        prior = as_domains(domains).prior
        size, points = prior.size, np.zeros((NUM_POINTS, prior.size))
        zeros, curves = np.zeros(size), np.zeros((size, 3))
        return ADOState(prior, zeros, prior, prior, prior, prior, curves, points, points, 0, 1, 0, 0)

    def update(state: ADOState, signals: Signals) -> tuple[ADOState, Vector]:
        tokens = field(signals, "num_tokens", state.prior.size)
        losses = field(signals, "loss", tokens.size)
        if not np.any(tokens > 0):
            return state, state.weights
        count = state.num_updates + 1
        share = (1 - newest_share) * state.share + newest_share * tokens / tokens.sum()
        new = state._replace(num_tokens=state.num_tokens + tokens, share=share, num_updates=count)
        if count > skipped:
            new = _recorded(new, tokens, losses)
        if count >= start and (count - start) % every == 0:
            new = new._replace(curves=_fitted(new, official))
        if np.any(new.curves > 0):
            new = _preferring(new, credit, newest_preference, min(minimum, 1.0 / tokens.size), official)
        return new._replace(average=mean_into(state.average, new.weights, count)), new.weights

    return UpdateRule(
        name="ado",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.weights,
        result=lambda state: normalized(state.average),
        applies="sampling",
        # The first fit with the 8 points that a curve takes.
        first_move=lambda num_domains: start + every * max(0, -((start - skipped - FEWEST_POINTS) // every)),
    )


def _recorded(state: ADOState, tokens: Vector, losses: Vector) -> ADOState:
    """Add one update to the open point of the curves; merge pairs of points when all are filled."""
    point_tokens, point_losses = state.point_tokens.copy(), state.point_losses.copy()
    filled, per_point, inside = state.num_points, state.updates_per_point, state.updates_in_point
    if filled == NUM_POINTS:
        half = NUM_POINTS // 2
        for points in (point_tokens, point_losses):
            points[:half] = points[0::2] + points[1::2]
            points[half:] = 0.0
        filled, per_point = half, 2 * per_point
    point_tokens[filled] += tokens
    point_losses[filled] += losses
    inside += 1
    if inside == per_point:
        filled, inside = filled + 1, 0
    return state._replace(
        point_tokens=point_tokens,
        point_losses=point_losses,
        num_points=filled,
        updates_per_point=per_point,
        updates_in_point=inside,
    )


def _fitted(state: ADOState, official: bool) -> Vector:
    """Return (D, 3) curves; a domain with too few points of positive loss keeps the one it had."""
    curves, seen, points = state.curves.copy(), state.num_tokens, state.point_tokens
    if official:
        seen, points = np.full(seen.size, seen.sum()), np.broadcast_to(points.sum(axis=1)[:, None], points.shape)
    for d in range(curves.shape[0]):
        used = (state.point_tokens[:, d] > 0) & (state.point_losses[:, d] > 0)
        if used.sum() >= FEWEST_POINTS:
            # A point's mean loss belongs to the middle of the tokens that it covers.
            middle = seen[d] - points[:, d].sum() + np.cumsum(points[:, d]) - 0.5 * points[:, d]
            curves[d] = fit_power_law(middle[used], state.point_losses[used, d] / state.point_tokens[used, d])
    return curves


def _preferring(state: ADOState, credit: float, newest: float, minimum: float, official: bool) -> ADOState:
    _, scale, rate = state.curves.T
    seen = np.maximum(np.full(rate.size, state.num_tokens.sum()) if official else state.num_tokens, 1.0)
    known = scale > 0
    slope = np.where(known, (np.maximum(rate, 0.05) if official else rate) * scale * seen ** (-rate - 1.0), 0.0)
    slope = np.where(known, slope, np.mean(slope[known]))
    score = state.prior * (state.share * (1 - state.share) if official else state.share) ** credit * slope
    if not score.sum() > 0:
        return state
    if official:
        rho = normalized(np.maximum(normalized(score), minimum))
    else:
        rho = project(normalized(score), np.full(score.size, minimum), np.ones(score.size))
    weights = normalized(newest * rho + (1 - newest) * state.preference)
    return state._replace(preference=mean_into(state.preference, rho, state.num_updates + 1), weights=weights)
