"""Rules that compare the gradients of domains: DoGE and PiKE. Both read inner products of mean-loss gradients, (D, D).

``doge``: raise the weight of domains whose gradient points where the target domains' losses fall.

    W[d] = < grad_d , sum over targets j of grad_j >             w ~ w * exp(eta * W / mu)       result: mean of w

Fan, Pagliardini, Jaggi 2023, arXiv:2310.15393, Algorithm 1, where eta is the learning rate and the proxy itself steps
on sum_d w[d] grad_d. In the code (``variant="official"``, after the re-implementation in HazyResearch/aioli) every
gradient is clipped to norm 1, the targets' gradients are averaged, W is divided by the mean norm of the domains'
gradients and clipped to [0, 5], and a domain that is absent scores 0.

``pike``: raise the weight of domains with large gradients and lower that of noisy ones, to the rate of the average
loss.

    w ~ w * exp(z1 * |grad_d|^2 - z2 * var_d / (2 b))

var_d is the per-sequence gradient variance, b the batch size; with ``tilt`` > 0 both are multiplied by y_d^2 with
y_d ~ exp(tilt * loss_d), which favours the domains that lag. Li, Deng, Zhong, Razaviyayn, Mirrokni 2025,
arXiv:2502.06244, Algorithms 1 and 2. No official code was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from algorithms.rules.ascent import AscentState, ascend, begin, uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.lookahead import gram_of
from algorithms.rules.settings import choice, names_in, number
from algorithms.rules.steps import Present, Vector, field, hold, mean_of, means, normalized, weights_of
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["GradientState", "doge", "pike"]


class GradientState(NamedTuple):
    """The ascent; the (D, D) inner products; (D,) vectors: 1 for target domains, the last variances and losses."""

    ascent: AscentState
    products: Vector
    is_target: Vector
    variance: Vector
    loss: Vector


def doge(
    eta: float = 5e-4,
    mu: float = 0.01,
    targets: Sequence[str] = (),
    smoothing: float = 0.0,
    variant: str = "paper",
) -> UpdateRule:
    """Return DoGE.

    Args:
        eta: the proxy's learning rate.
        mu: strength of the pull to the last weights; smaller moves faster.
        targets: domains whose losses shall fall; all by default. They stay part of the mixture.
        smoothing: c, the share of the uniform mixture.
        variant: "paper" or "official".

    >>> rule = doge(eta=np.log(3), mu=1.0)
    >>> signals = Signals(
    ...     np.ones(2), np.ones(2), gradient_products=np.diag([1.0, 0.0]), gradient_counts=np.ones((2, 2))
    ... )
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    choice(variant, "variant", ("paper", "official"))
    targets = names_in(targets, "targets")
    step = number(eta, "eta", low=0) / number(mu, "mu", low=1e-12)
    smoothing = number(smoothing, "smoothing", low=0, high=1)

    def score(state: GradientState, present: Present) -> tuple[Vector, Present]:
        if variant == "official":
            return _clipped_alignment(state, present), np.ones_like(present)
        return state.products @ state.is_target, present

    return _rule("doge", settings, score, step, smoothing, targets, frozenset({"gradients"}), "loss")


def _clipped_alignment(state: GradientState, present: Present) -> Vector:
    products = np.where(np.outer(present, present), state.products, 0.0)
    share = state.is_target / state.is_target.sum()
    norms, target_norm = np.sqrt(np.maximum(np.diag(products), 0.0)), np.sqrt(max(share @ products @ share, 0.0))
    kept, kept_of_target = np.minimum(1.0, 1.0 / (norms + 1e-6)), min(1.0, 1.0 / (target_norm + 1e-6))
    alignment = kept * kept_of_target * (products @ share)
    return np.clip(alignment / (np.mean(kept * norms) + 1e-6), 0.0, 5.0)


def pike(
    zeta1: float = 0.01, zeta2: float = 0.01, batch_size: int = 512, tilt: float = 0.0, smoothing: float = 0.0
) -> UpdateRule:
    """Return PiKE.

    Args:
        zeta1, zeta2: z1 and z2, in units of inverse squared gradient norms; theirs are tuned per model.
        batch_size: b, sequences per batch.
        tilt: 0 for the average loss; 1 to 5 (3 was best in the paper) for balance between domains.
        smoothing: c, the share of the uniform mixture.

    >>> rule = pike(zeta1=np.log(3))
    >>> signals = Signals(
    ...     np.ones(2), np.ones(2), gradient_products=np.diag([1.0, 0.0]), gradient_counts=np.ones((2, 2)),
    ...     gradient_variance=np.zeros(2),
    ... )
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    zeta1, zeta2 = number(zeta1, "zeta1", low=0), number(zeta2, "zeta2", low=0)
    size = number(batch_size, "batch_size", low=1)
    tilt, smoothing = number(tilt, "tilt", low=0), number(smoothing, "smoothing", low=0, high=1)

    def score(state: GradientState, present: Present) -> tuple[Vector, Present]:
        gain = zeta1 * np.diag(state.products) - zeta2 * state.variance / (2 * size)
        return gain * (state.loss.size * weights_of(tilt * state.loss)) ** 2, present

    needs = frozenset({"gradients", "gradient_variance"})
    return _rule("pike", settings, score, 1.0, smoothing, (), needs, "sampling")


def _rule(
    name: str,
    settings: dict[str, Any],
    score: Callable[[GradientState, Present], tuple[Vector, Present]],
    step: float,
    smoothing: float,
    targets: Sequence[str],
    needs: frozenset[str],
    applies: Literal["loss", "sampling"],
) -> UpdateRule:
    def init(domains: Domains | Sequence[str]) -> GradientState:
        names = as_domains(domains).names
        unknown = sorted(set(targets) - set(names))
        if unknown:
            raise InputError(f"targets name unknown domains {unknown}; the domains are {list(names)}.")
        size = len(names)
        is_target = np.array([float(not targets or item in targets) for item in names])
        return GradientState(begin(uniform(size)), np.zeros((size, size)), is_target, np.zeros(size), np.zeros(size))

    def update(state: GradientState, signals: Signals) -> tuple[GradientState, Vector]:
        size = state.loss.size
        measured = np.diag(field(signals, "gradient_counts", size))
        present = measured > 0
        if not present.any():
            return state, weights_of(state.ascent.log_weights)
        fresh, _ = mean_of(signals, "loss", "num_tokens", size)
        loss, _ = hold(fresh, signals.num_tokens > 0, state.loss, state.ascent.seen)
        variance = state.variance
        if "gradient_variance" in needs:
            variance = np.where(present, means(field(signals, "gradient_variance", size), measured), variance)
        new = GradientState(state.ascent, gram_of(signals, state.products), state.is_target, variance, loss)
        ascent = ascend(state.ascent, *score(new, present), step, smoothing)
        return new._replace(ascent=ascent), weights_of(ascent.log_weights)

    return UpdateRule(
        name=name,
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.ascent.log_weights),
        result=lambda state: normalized(state.ascent.average),
        needs=needs,
        applies=applies,
    )
