"""Group DRO: minimise the loss of the worst mixture of domains, by exponentiated gradient ascent on the mixture.

    q_0    = 1/D
    s_t[d] = mean token loss of d + C / sqrt(N_d)
    q_t    = q_{t-1} * exp(eta * s_t) / sum(...)                                  eta = 0.01, C = 0

The model minimises sum_d q_t[d] * (mean token loss of d). Sagawa, Koh, Hashimoto, Liang 2020, arXiv:1911.08731,
Algorithm 1 (one domain per step there; the mini-batch form here is the one of their code) and section 3.3 (C).

A domain whose entropy is high takes the weight whether or not anything can be learnt there: subtract a reference
(``doremi``) or a target (``validation_feedback``) where domains differ in entropy. Stop early or regularise, because a
model that reaches a loss of 0 everywhere is optimal for every q.

What differs in the official code (``variant="official"``): absent domains score 0, which drains rare ones; the
adjustment is dropped for all domains unless it is positive for all. (It is also added in place, so that the losses that
code reports contain it.) Here an absent domain keeps its last score, and the sign is free per domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import by_name, choice, flag, number
from algorithms.rules.steps import (
    Vector,
    exponentiated,
    hold,
    mean_into,
    mean_of,
    moving_average,
    normalized,
    weights_of,
)
from algorithms.signals import Signals

__all__ = ["GroupDROState", "group_dro"]


class GroupDROState(NamedTuple):
    """(D,) vectors: log q_t, the last mean losses, 1 where ever seen, their moving average, what is added to them, the
    mean of q_1..q_t; and t."""

    log_weights: Vector
    loss: Vector
    seen: Vector
    loss_average: Vector
    adjustment: Vector
    average: Vector
    num_updates: int


def group_dro(
    eta: float = 0.01,
    adjustment: Mapping[str, float] | float = 0.0,
    sizes: Mapping[str, float] | None = None,
    automatic: bool = False,
    smoothing: float = 0.1,
    variant: str = "paper",
) -> UpdateRule:
    """Return the Group DRO rule.

    Args:
        eta: step size of the ascent.
        adjustment: C, for all domains or by name; C / sqrt(N_d) is added to the loss of d to allow for the larger
            gap between training and held-out loss of small domains. Choose C so that C / sqrt(smallest N) is about
            that gap.
        sizes: N_d by name; by default the tokens per domain that ``init`` is told.
        automatic: measure the gap instead: held-out loss minus the moving average of the training loss, whenever
            held-out losses come with the signals. Replaces ``adjustment`` from the first held-out losses on.
        smoothing: share of the newest loss in that moving average (gamma in the official code).
        variant: "paper" or "official".

    >>> rule = group_dro(eta=1.0)
    >>> state, weights = rule.update(rule.init(["a", "b"]), Signals(np.ones(2), np.array([np.log(3), 0.0])))
    >>> weights.round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    eta, smoothing = number(eta, "eta", low=0), number(smoothing, "smoothing", low=0, high=1)
    automatic = flag(automatic, "automatic")
    official = choice(variant, "variant", ("paper", "official")) == "official"

    def init(domains: Domains | Sequence[str]) -> GroupDROState:
        known = as_domains(domains)
        counts = known.num_tokens if sizes is None else by_name(sizes, known, "sizes", low=1)
        added = by_name(adjustment, known, "adjustment", default=0.0) / np.sqrt(np.maximum(counts, 1.0))
        uniform, zeros = np.full(added.size, 1.0 / added.size), np.zeros(added.size)
        if official and not np.all(added > 0):
            added = zeros
        return GroupDROState(np.log(uniform), zeros, zeros, zeros, added, uniform, 0)

    def update(state: GroupDROState, signals: Signals) -> tuple[GroupDROState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, weights_of(state.log_weights)
        loss, seen = hold(fresh, present, state.loss, state.seen)
        loss_average = moving_average(state.loss_average, state.seen, fresh, present, smoothing)
        added = _gap(state.adjustment, loss_average, seen, signals) if automatic else state.adjustment
        score = (fresh if official else loss) + added
        log_weights = exponentiated(state.log_weights, eta * score)
        weights, count = weights_of(log_weights), state.num_updates + 1
        average = mean_into(state.average, weights, count)
        return GroupDROState(log_weights, loss, seen, loss_average, added, average, count), weights

    return UpdateRule(
        name="group_dro",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.log_weights),
        result=lambda state: normalized(state.average),
        needs=frozenset({"heldout"}) if automatic else frozenset(),
    )


def _gap(adjustment: Vector, loss_average: Vector, seen: Vector, signals: Signals) -> Vector:
    if signals.heldout_loss is None:
        return adjustment
    heldout, measured = mean_of(signals, "heldout_loss", "heldout_tokens", seen.size)
    return np.where(measured & (seen > 0), heldout - loss_average, adjustment)
