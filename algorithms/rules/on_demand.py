"""On-demand sampling: train on samples drawn by the adversary's weights, and measure the losses that move it apart.

    every interval: v[d] = mean loss of d over held-out windows;  q ~ q * exp(eta * v);  train on domains drawn by q

The learner's samples carry no importance weights, so its gradient does not have the factor D of variance that Group DRO
pays for drawing domains uniformly and weighting them; the adversary sees every domain at each update, for the price of
D small evaluations. Haghtalab, Jordan, Zhao 2022, arXiv:2210.12529, Algorithms 1 and 2; the interval form is the one of
their deep-learning code (eta 0.2 to 1, 500 to 1,000 held-out samples, every 2,500 to 5,000 training samples).

What differs in the official code: it weights examples by q[d] * N / N[d], which is drawing domains by q. The paper's
listing updates the learner with the wrong player's gradient (a typo).
"""

from __future__ import annotations

from algorithms.rules.ascent import ascent_rule
from algorithms.rules.base import UpdateRule
from algorithms.rules.settings import number
from algorithms.rules.steps import Present, Vector, mean_of
from algorithms.signals import Signals

__all__ = ["heldout", "on_demand"]


def heldout(signals: Signals, num_domains: int) -> tuple[Vector, Present]:
    """Return the mean held-out loss per domain, (D,) nats per token, and which domains were measured."""
    return mean_of(signals, "heldout_loss", "heldout_tokens", num_domains)


def on_demand(eta: float = 0.2, smoothing: float = 0.0) -> UpdateRule:
    """Return on-demand sampling.

    Args:
        eta: step size per update. The noise it adds per update is about eta times the standard error of the held-out
            losses: keep that below 0.1.
        smoothing: c, the share of the uniform mixture mixed in at every update.

    >>> import numpy as np
    >>> rule = on_demand(eta=1.0)
    >>> signals = Signals(np.ones(2), np.ones(2), heldout_loss=np.array([np.log(3), 0.0]), heldout_tokens=np.ones(2))
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    return ascent_rule(
        name="on_demand",
        settings=settings,
        score=heldout,
        eta=number(eta, "eta", low=0),
        smoothing=number(smoothing, "smoothing", low=0, high=1),
        needs=frozenset({"heldout"}),
        applies="sampling",
    )
