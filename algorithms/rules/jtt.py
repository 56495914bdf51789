"""Just train twice: train once, find the sequences that went badly, and train again with those drawn more often.

    E      = sequences of the first run whose score is in its top share rho          score: loss, or loss - median of
    domain E_d    = share of domain d's sequences that are in E
    w_d    ~ N_d * (1 + (lambda - 1) * E_d)                                          N_d: tokens of d

Liu, Haghgoo, Chen, Raghunathan, Koh, Sagawa, Liang, Finn 2021, arXiv:2107.09044. There E is the misclassified examples
after T epochs of plain training (T, lambda: Waterbirds 60, 100; CelebA 1, 50; MultiNLI 2, 4; CivilComments 2, 6) and
examples, not domains, are drawn lambda times as often: ``algorithms.just_train_twice.upsample`` writes shards for
that. A language model has no error bit: the top share of the losses takes its place, which is our adaptation. A raw
loss is high where entropy is high; subtract a reference (gather the histogram of loss - reference) or the domain's
median.

As a rule this is one run in two halves: the weights in force stay at the prior while the histograms add up, and
``result`` is the mixture to train again with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import choice, number
from algorithms.rules.steps import Vector, field, means, normalized
from algorithms.signals import HISTOGRAM_EDGES, Signals
from mixer.errors import InputError

__all__ = ["JTTState", "error_set", "jtt"]

CENTRES = 0.5 * (HISTOGRAM_EDGES[:-1] + HISTOGRAM_EDGES[1:])


class JTTState(NamedTuple):
    """(D,) prior and sizes; (D, 512) sequences by loss."""

    prior: Vector
    sizes: Vector
    histogram: Vector


def jtt(upweight: float = 5.0, share: float = 0.2, baseline: str = "median") -> UpdateRule:
    """Return just train twice at the level of domains.

    Args:
        upweight: lambda, how often a bad sequence counts.
        share: rho, share of all sequences that count as bad.
        baseline: "median" subtracts each domain's median loss, "none" nothing.

    >>> from algorithms.signals import loss_histogram
    >>> losses, domain_ids = np.array([1.0, 1.0, 1.0, 9.0]), np.array([0, 0, 1, 1])
    >>> rule = jtt(upweight=3, share=0.25, baseline="none")
    >>> signals = Signals(np.ones(2), np.ones(2), histogram=loss_histogram(losses, domain_ids, 2))
    >>> state, _ = rule.update(rule.init(["a", "b"]), signals)
    >>> rule.result(state).round(12).tolist()  # half of b is bad: 1 + 2 / 2
    [0.333333333333, 0.666666666667]
    """
    settings = dict(locals())
    upweight, share = number(upweight, "upweight", low=1), number(share, "share", low=0, high=1)
    choice(baseline, "baseline", ("median", "none"))

    def init(domains: Domains | Sequence[str]) -> JTTState:
        known = as_domains(domains)
        return JTTState(known.prior, known.num_tokens, np.zeros((len(known.names), CENTRES.size)))

    def update(state: JTTState, signals: Signals) -> tuple[JTTState, Vector]:
        counts = field(signals, "histogram", state.prior.size)
        return state._replace(histogram=state.histogram + counts), state.prior

    def result(state: JTTState) -> Vector:
        if not state.histogram.any():
            return state.prior
        return normalized(state.sizes * (1 + (upweight - 1) * _bad_shares(state.histogram, share, baseline)))

    return UpdateRule(
        name="jtt",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.prior,
        result=result,
        needs=frozenset({"histogram"}),
        applies="sampling",
        averages=False,
    )


def error_set(
    losses: Vector, domain_ids: NDArray[np.integer], share: float = 0.2, baseline: str = "median"
) -> NDArray[np.int64]:
    """Return the sorted indices of the samples in the top ``share`` of the losses, to be drawn more often.

    Args:
        losses: (N,) mean loss per sample of the first run, nats per token, minus a reference's where there is one.
        domain_ids: (N,).
        baseline: "median" subtracts each domain's median loss, "none" nothing.

    >>> error_set(np.array([1.0, 1.0, 5.0, 5.5]), np.array([0, 0, 1, 1]), share=0.25).tolist()
    [3]
    """
    share = number(share, "share", low=0, high=1)
    score, ids = np.array(losses, dtype=np.float64), np.asarray(domain_ids)
    if score.ndim != 1 or score.shape != ids.shape or not np.all(np.isfinite(score)):
        raise InputError(f"losses {score.shape} and domain ids {ids.shape} must be finite and both of shape (N,).")
    if choice(baseline, "baseline", ("median", "none")) == "median":
        for domain in np.unique(ids):
            score[ids == domain] -= np.median(score[ids == domain])
    count = int(np.floor(share * score.size + 1e-9))
    return np.sort(np.argsort(-score, kind="stable")[:count]).astype(np.int64)


def _bad_shares(histogram: Vector, share: float, baseline: str) -> Vector:
    """Return per domain the share of sequences in the overall top ``share``; a bin at the edge counts in part."""
    scores = np.broadcast_to(CENTRES, histogram.shape)
    if baseline == "median":
        scores = scores - np.array([_median(row) for row in histogram])[:, None]
    order = np.argsort(-scores, axis=None, kind="stable")
    flat, values = histogram.reshape(-1)[order], scores.reshape(-1)[order]
    total = share * flat.sum()
    edge = values[min(int(np.searchsorted(np.cumsum(flat), total)), flat.size - 1)]
    above, at = scores > edge + 1e-9, np.abs(scores - edge) <= 1e-9
    left = np.clip((total - histogram[above].sum()) / max(histogram[at].sum(), 1e-300), 0.0, 1.0)
    bad = np.where(above, histogram, 0.0).sum(axis=1) + left * np.where(at, histogram, 0.0).sum(axis=1)
    return means(bad, histogram.sum(axis=1))


def _median(counts: Vector) -> float:
    return float(CENTRES[np.searchsorted(np.cumsum(counts), 0.5 * counts.sum())]) if counts.any() else 0.0
