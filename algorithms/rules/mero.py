"""Minimax excess risk: minimise the worst difference between a domain's loss and the lowest loss it allows.

    s_t[d] = mean loss of d - r[d]            q_t ~ q_{t-1} * exp(eta / sqrt(t) * s_t)          result: mean of q_1..q_t

A domain of high entropy has a high r and no longer takes all weight, as it does in Group DRO: the theory behind
subtracting a reference. Agarwal and Zhang 2022, arXiv:2202.05436; Zhang and Tu 2023, arXiv:2306.00026, who estimate the
r[d] by one side run of stochastic descent per domain and use anytime steps of order 1 / sqrt(t), as here.

r comes from ``risk``: "reference" takes Signals.reference_loss, from whatever plays the specialists' part; "best" takes
the lowest moving average of the domain's own loss so far, an upper bound on r that needs no second model and is blind
at the start (all scores are then 0 and nothing moves); or give nats per token by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import AscentState, begin, uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import by_name, choice, number
from algorithms.rules.steps import (
    Present,
    Vector,
    exponentiated,
    field,
    hold,
    mean_into,
    mean_of,
    means,
    moving_average,
    normalized,
    weights_of,
)
from algorithms.signals import Signals

__all__ = ["MEROState", "mero"]


class MEROState(NamedTuple):
    """The ascent on q, and (D,) vectors: the lowest losses known, and the moving average of the loss."""

    ascent: AscentState
    risk: Vector
    loss: Vector


def mero(eta: float = 1.0, risk: Mapping[str, float] | str = "reference", smoothing: float = 0.1) -> UpdateRule:
    """Return minimax excess risk optimisation.

    Args:
        eta: step size at t = 1; it falls as 1 / sqrt(t).
        risk: "reference", "best", or the lowest attainable loss by name, in nats per token.
        smoothing: share of the newest loss in the moving average that "best" takes the minimum of.

    >>> rule = mero(risk={"noise": 4.0, "text": 1.0})
    >>> weights = rule.update(rule.init(["noise", "text"]), Signals(np.ones(2), np.array([4.0, 1 + np.log(3)])))[1]
    >>> weights.round(12).tolist()
    [0.25, 0.75]
    """
    settings = dict(locals())
    eta, smoothing = number(eta, "eta", low=0), number(smoothing, "smoothing", low=0, high=1)
    if isinstance(risk, str):
        choice(risk, "risk", ("reference", "best"))

    def init(domains: Domains | Sequence[str]) -> MEROState:
        known = as_domains(domains)
        zeros = np.zeros(len(known.names))
        lowest = zeros if isinstance(risk, str) else by_name(risk, known, "risk", low=0)
        return MEROState(begin(uniform(zeros.size)), lowest, zeros)

    def update(state: MEROState, signals: Signals) -> tuple[MEROState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, weights_of(state.ascent.log_weights)
        seen = state.ascent.seen
        loss = moving_average(state.loss, seen, fresh, present, smoothing)
        lowest = state.risk
        if risk == "best":
            lowest = np.where(present, np.where(seen > 0, np.minimum(lowest, loss), loss), lowest)
        elif risk == "reference":
            lowest = np.where(present, means(field(signals, "reference_loss", fresh.size), signals.num_tokens), lowest)
        ascent = _step(state.ascent, fresh - lowest, present, eta)
        return MEROState(ascent, lowest, loss), weights_of(ascent.log_weights)

    return UpdateRule(
        name="mero",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.ascent.log_weights),
        result=lambda state: normalized(state.ascent.average),
        needs=frozenset({"reference"}) if risk == "reference" else frozenset(),
    )


def _step(state: AscentState, score: Vector, present: Present, eta: float) -> AscentState:
    count = state.num_updates + 1
    held, seen = hold(score, present, state.score, state.seen)
    log_weights = exponentiated(state.log_weights, eta / np.sqrt(count) * held)
    average = mean_into(state.average, weights_of(log_weights), count)
    return AscentState(log_weights, state.prior, held, seen, average, count)
