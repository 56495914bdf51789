"""Rules that answer the current losses with the worst mixture of a set, instead of stepping towards it.

    L_t[d] = (1 - s) * L_{t-1}[d] + s * (mean loss of d - baseline of d)      w_t = argmax { q . L_t : q in the set }

``divergence_ball``: a KL, chi-square or CVaR ball around the prior. Applied by resampling at intervals this is iterated
best response, with chi-square and rho = 0.05 in Zhou, Levy, Li, Ghazvininejad, Neubig 2021, arXiv:2109.04020 (their
code forgets the losses at the end of each epoch; update once per interval with ``smoothing=1`` for that).
``topic_cvar``: the loss of the worst mixture that holds at least a share alpha of the topics, Oren, Sagawa, Hashimoto,
Liang 2019, arXiv:1909.02060; ``dro_lm`` is the same on losses minus a baseline model's (a bigram model per domain), so
that domains are compared by what can still be learnt.
``wasserstein``: a transport ball over domains with a ground distance; the linear programme is ours, after the set that
Sinha, Namkoong, Duchi 2018, arXiv:1710.10571 use over inputs.

What differs in the codes: group_DRO's CVaR indexes out of range at alpha = 1 and splits ties by order; the multilingual
code's ratio floor is applied inside the bisection, as here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from algorithms.rules.balls import chi2_ball, cvar_ball, kl_ball, wasserstein_ball
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import by_name, choice, mapping, number, whole
from algorithms.rules.steps import Vector, field, filled, mean_into, mean_of, means, moving_average, normalized
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["BestResponseState", "divergence_ball", "dro_lm", "topic_cvar", "wasserstein", "worst_case_subset"]


class BestResponseState(NamedTuple):
    """(D,) vectors: what the ball is centred on, what is subtracted from losses, their moving average, 1 where ever
    seen, the weights in force, the mean of w_1..w_t; (D, D) distances, 0 where there are none; and t."""

    prior: Vector
    baseline: Vector
    loss: Vector
    seen: Vector
    weights: Vector
    average: Vector
    distances: Vector
    num_updates: int


def divergence_ball(
    ball: str = "chi2",
    radius: float = 0.05,
    smoothing: float = 0.1,
    min_ratio: float = 0.2,
    warmup: int = 1,
    baseline: Mapping[str, float] | str = "none",
) -> UpdateRule:
    """Return iterated best response over a ball around the prior.

    Args:
        ball: "chi2", "kl" or "cvar".
        radius: of the ball; for "cvar" it is alpha, the share of the prior that the worst mixture must cover.
        smoothing: s, share of the newest loss in the moving average; 1 forgets earlier updates.
        min_ratio: the smallest weight relative to the prior (for "cvar": share of the prior mixed in).
        warmup: updates before the first answer; the weights stay at the prior.
        baseline: "none", "reference" (subtract the reference's loss, not clipped) or nats per token by name.

    >>> rule = divergence_ball(radius=0.08, min_ratio=0, warmup=0)
    >>> state, weights = rule.update(rule.init(["a", "b"]), Signals(np.ones(2), np.array([3.0, 1.0])))
    >>> weights.round(9).tolist()
    [0.7, 0.3]
    """
    settings = dict(locals())
    choice(ball, "ball", ("chi2", "kl", "cvar"))
    radius = number(radius, "radius", low=1e-9 if ball == "cvar" else 0, high=1 if ball == "cvar" else np.inf)
    min_ratio, warmup = number(min_ratio, "min_ratio", low=0, high=1), whole(warmup, "warmup")

    def solve(state: BestResponseState, losses: Vector) -> Vector:
        if ball == "cvar":
            return (1 - min_ratio) * cvar_ball(losses, state.prior, radius) + min_ratio * state.prior
        return (kl_ball if ball == "kl" else chi2_ball)(losses, state.prior, radius, min_ratio)

    return _rule("divergence_ball", settings, solve, smoothing, warmup, baseline, "sampling")


def topic_cvar(alpha: float = 0.2, smoothing: float = 0.1, prior_share: float = 0.0) -> UpdateRule:
    """Return the loss rule of topic CVaR: weights prior / alpha on the worst topics until they fill a share alpha.

    Args:
        alpha: smallest share of the topics that the worst mixture may consist of.
        smoothing: share of the newest loss in the moving average.
        prior_share: m, mixed in as m * prior.

    >>> rule = topic_cvar(alpha=0.5)
    >>> rule.update(rule.init(["a", "b", "c", "d"]), Signals(np.ones(4), np.array([1.0, 4.0, 3.0, 2.0])))[1].tolist()
    [0.0, 0.5, 0.5, 0.0]
    """
    return _cvar("topic_cvar", dict(locals()), "none")


def dro_lm(alpha: float = 0.2, smoothing: float = 0.1, prior_share: float = 0.0) -> UpdateRule:
    """Return topic CVaR on loss minus reference loss, for a bigram model per domain as the reference.

    The difference is not clipped: a trained model is far below its bigram baseline, and every clipped score would be 0.

    Args:
        alpha, smoothing, prior_share: as for ``topic_cvar``.

    >>> rule = dro_lm(alpha=0.5)
    >>> signals = Signals(np.ones(2), np.array([4.0, 3.0]), reference_loss=np.array([6.0, 4.0]))
    >>> rule.update(rule.init(["noise", "text"]), signals)[1].tolist()  # noise is 2 nats below its baseline, text 1
    [0.0, 1.0]
    """
    return _cvar("dro_lm", dict(locals()), "reference")


def wasserstein(
    distances: Mapping[str, Mapping[str, float]],
    radius: float = 0.1,
    smoothing: float = 0.1,
    baseline: Mapping[str, float] | str = "none",
) -> UpdateRule:
    """Return best response within a transport distance of the prior.

    Args:
        distances: cost of moving weight from one domain to another, by name and name; missing pairs take the value of
            the reverse pair. Units are yours: the radius is in the same. `mixer score --bigram --distances` writes
            those of bigrams, between 0 and 0.83.
        radius: largest total cost.
        smoothing: share of the newest loss in the moving average; 1 forgets earlier updates.
        baseline: "none", "reference" (subtract the reference's loss, not clipped) or nats per token by name.

    Raises: InputError: at ``init``, if a pair is missing both ways, or a distance is negative.

    >>> rule = wasserstein({"a": {"b": 2.0}}, radius=0.4)
    >>> rule.update(rule.init(["a", "b"]), Signals(np.ones(2), np.array([3.0, 1.0])))[1].round(12).tolist()
    [0.7, 0.3]
    """
    settings = dict(locals())
    radius = number(radius, "radius", low=0)
    for name, row in mapping(distances, "distances").items():
        mapping(row, f"distances[{name!r}]")

    def solve(state: BestResponseState, losses: Vector) -> Vector:
        return wasserstein_ball(losses, state.prior, state.distances, radius)

    return _rule("wasserstein", settings, solve, smoothing, 0, baseline, "loss", distances)


def worst_case_subset(losses: Vector, keep: float, baseline: Vector | None = None) -> Vector:
    """Return the sorted indices of the ceil(keep * N) samples with the highest loss above their baseline.

    For DRO that back-propagates only the worst part of a larger forward batch (Oren et al. 2019): with keep = 1/2 and
    equal backward batches this costs 4/3 of the FLOPs of weighting by domain if all activations are kept, and 5/3 if
    the losses are computed beforehand, as ``WorstSubset`` does. Ties go to the earlier sample.

    Args:
        losses: (N,) mean loss per sample, nats per token.
        keep: share to keep, in (0, 1].
        baseline: (N,) the baseline's losses, or None.

    >>> worst_case_subset(np.array([1.0, 5.0, 3.0, 2.0]), keep=0.5).tolist()
    [1, 2]
    """
    keep = number(keep, "keep", low=1e-12, high=1)
    score = np.asarray(losses, dtype=np.float64)
    if baseline is not None:
        if np.shape(baseline) != score.shape:
            raise InputError(
                f"a baseline of shape {np.shape(baseline)} does not fit losses of shape {score.shape}: give one loss of"
                " the baseline for each sample."
            )
        score = score - np.asarray(baseline, dtype=np.float64)
    if score.ndim != 1 or not np.all(np.isfinite(score)):
        raise InputError(f"per-sample losses must be finite and of shape (N,); got shape {score.shape}.")
    count = int(np.ceil(keep * score.size - 1e-9))
    return np.sort(np.argsort(-score, kind="stable")[:count])


def _cvar(name: str, settings: dict[str, Any], baseline: str) -> UpdateRule:
    alpha = number(settings["alpha"], "alpha", low=1e-9, high=1)
    share = number(settings["prior_share"], "prior_share", low=0, high=1)

    def solve(state: BestResponseState, losses: Vector) -> Vector:
        return share * state.prior + (1 - share) * cvar_ball(losses, state.prior, alpha)

    return _rule(name, settings, solve, settings["smoothing"], 0, baseline, "loss")


def _rule(
    name: str,
    settings: Mapping[str, Any],
    solve: Callable[[BestResponseState, Vector], Vector],
    smoothing: float,
    warmup: int,
    baseline: Mapping[str, float] | str,
    applies: Literal["loss", "sampling"],
    distances: Mapping[str, Mapping[str, float]] | None = None,
) -> UpdateRule:
    smoothing = number(smoothing, "smoothing", low=0, high=1)
    if isinstance(baseline, str):
        choice(baseline, "baseline", ("none", "reference"))

    def init(domains: Domains | Sequence[str]) -> BestResponseState:
        known = as_domains(domains)
        zeros = np.zeros(len(known.names))
        fixed = zeros if isinstance(baseline, str) else by_name(baseline, known, "baseline")
        matrix = np.zeros((zeros.size, zeros.size)) if distances is None else _matrix(distances, known.names)
        return BestResponseState(known.prior, fixed, zeros, zeros, known.prior, known.prior, matrix, 0)

    def update(state: BestResponseState, signals: Signals) -> tuple[BestResponseState, Vector]:
        fresh, present = mean_of(signals, "loss", "num_tokens", state.loss.size)
        if not present.any():
            return state, state.weights
        if baseline == "reference":
            fresh = fresh - means(field(signals, "reference_loss", fresh.size), signals.num_tokens)
        loss = moving_average(state.loss, state.seen, fresh - state.baseline, present, smoothing)
        seen = np.where(present, 1.0, state.seen)
        count = state.num_updates + 1
        weights = state.prior if count <= warmup else normalized(solve(state, filled(loss, seen)))
        average = mean_into(state.average, weights, count)
        new = state._replace(loss=loss, seen=seen, weights=weights, average=average, num_updates=count)
        return new, weights

    return UpdateRule(
        name=name,
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.weights,
        result=lambda state: normalized(state.average),
        needs=frozenset({"reference"}) if baseline == "reference" else frozenset(),
        applies=applies,
        first_move=lambda num_domains: warmup + 1,
    )


def _matrix(distances: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> Vector:
    def entry(a: str, b: str) -> float:
        if a == b:
            return 0.0
        value = distances.get(a, {}).get(b, distances.get(b, {}).get(a))
        if value is None:
            raise InputError(f"distances have no entry for the domains {a!r} and {b!r}; give every pair once.")
        return number(value, f"distances[{a!r}][{b!r}]", low=0)

    return np.array([[entry(a, b) for b in names] for a in names])
