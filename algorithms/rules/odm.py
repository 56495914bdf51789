"""Online data mixing: a bandit that samples the domains from which most is left to learn, by their training loss.

    R[d] <- a * R[d] + (1 - a) * loss[d] / pi[d]                         for domains in the batch; pi: sampled by
    eps_t = min(1/D, sqrt(ln D / (D t)))
    pi_t  = (1 - D eps_t) * softmax(eps_{t-1} * R) + eps_t               a = 0.9

Albalak, Pan, Raffel, Wang 2023, arXiv:2312.02406, Algorithm 1 (EXP3 with a moving average).

What differs in the official code (``variant="official"``): the class that its README names rewards with exp(loss), does
not divide by pi, and takes pi proportional to R instead of its softmax. In both a domain that was not drawn yet has a
reward of 0 and is avoided; here it has the mean reward of the others until it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import choice, number
from algorithms.rules.steps import Vector, field, filled, mean_into, mean_of, means, normalized, weights_of
from algorithms.signals import Signals

__all__ = ["ODMState", "odm"]


class ODMState(NamedTuple):
    """(D,) vectors: the rewards R, 1 where ever seen, the weights in force, their mean; the last eps in an array of
    shape (); and t."""

    reward: Vector
    seen: Vector
    weights: Vector
    average: Vector
    exploration: Vector
    num_updates: int


def odm(smoothing: float = 0.9, variant: str = "paper") -> UpdateRule:
    """Return online data mixing.

    Args:
        smoothing: a, the share of the old reward that is kept.
        variant: "paper" or "official".

    The weights that the samples were drawn by are read from Signals.behaviour where that is gathered, so that a loader
    that reads ahead is credited rightly; otherwise they are the rule's own last weights.

    >>> rule = odm(smoothing=0.0)
    >>> state = rule.init(["a", "b"])
    >>> for _ in range(2):  # eps_1 is 1/2: the first weights are uniform
    ...     state, weights = rule.update(state, Signals(np.ones(2), np.array([3.0, 1.0])))
    >>> eps = np.sqrt(np.log(2) / 4)
    >>> bool(np.isclose(weights[0], (1 - 2 * eps) / (1 + np.exp(-0.5 * 4)) + eps))
    True
    """
    settings = dict(locals())
    smoothing = number(smoothing, "smoothing", low=0, high=1)
    choice(variant, "variant", ("paper", "official"))

    def init(domains: Domains | Sequence[str]) -> ODMState:
        size = len(as_domains(domains).names)
        start = uniform(size)
        return ODMState(np.zeros(size), np.zeros(size), start, start, np.array(1.0 / size), 0)

    def update(state: ODMState, signals: Signals) -> tuple[ODMState, Vector]:
        size = state.reward.size
        loss, present = mean_of(signals, "loss", "num_tokens", size)
        if not present.any():
            return state, state.weights
        count = state.num_updates + 1
        exploration = min(1.0 / size, np.sqrt(np.log(size) / (size * count)))
        if variant == "official":
            gain = np.exp(np.minimum(loss, 700.0))  # beyond that a float64 ends
        else:
            drawn_by = state.weights if signals.behaviour is None else normalized(field(signals, "behaviour", size))
            gain = means(loss, drawn_by)
        reward = np.where(present, smoothing * state.reward + (1 - smoothing) * gain, state.reward)
        seen = np.where(present, 1.0, state.seen)
        if variant == "official":
            chosen = normalized(reward)
        else:
            chosen = weights_of(float(state.exploration) * filled(reward, seen))
        weights = normalized((1 - size * exploration) * chosen + exploration)
        average = mean_into(state.average, weights, count)
        return ODMState(reward, seen, weights, average, np.array(exploration), count), weights

    return UpdateRule(
        name="odm",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.weights,
        result=lambda state: normalized(state.average),
        needs=frozenset({"behaviour"}),
        applies="sampling",
        first_move=lambda num_domains: int(num_domains * np.log(num_domains)) + 1,  # until then all is exploration
    )
