"""Sampling weights from held-out losses at intervals of ordinary training.

``validation_feedback`` has three readings of the same signal v[d], the mean held-out loss of d:

    level      w ~ p * exp(v / tau)                                              the worst mixture under a KL penalty
    target     w ~ w * exp(eta * (v - target + C / sqrt(N)))                     ascent on the excess over a target
    progress   w ~ p * exp(eta * R),  R <- (1 - s) R + s (v before - v now)      follow what is being learnt

each followed by (1 - c) w + c p, p the prior. "target" is the stage mix for continual training: targets are the start
model's losses for old domains (above it: forgetting) and a real goal for new ones; no second model is resident:

    validation_feedback(targets={"new": 2.1}, others="reference")

Targets: by name; "reference", Signals.heldout_reference_loss: what a reference, or without one the model before its
first step, loses on the windows; or "best", the domain's lowest held-out loss so far, which only guards against getting
worse.

``sheared_llama`` is "target" with eta = 1, c = 1e-4 towards uniform and the excess clipped at 0: Xia, Gao, Zeng, Chen
2023, arXiv:2310.06694, Algorithm 1. Their code (``clip=False``) does not clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from algorithms.rules.ascent import AscentState, ascend, begin, uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.on_demand import heldout
from algorithms.rules.settings import by_name, choice, flag, mapping, number
from algorithms.rules.steps import (
    Present,
    Vector,
    exponentiated,
    filled,
    hold,
    mean_into,
    mean_of,
    mix_in,
    moving_average,
    normalized,
    weights_of,
)
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["FeedbackState", "sheared_llama", "validation_feedback"]


class FeedbackState(NamedTuple):
    """The ascent, and (D,) vectors: the targets (or lowest losses so far), what is added to the excess, the last
    held-out losses, their moving-average progress and 1 where it is known; 1 for targets that were given by name."""

    ascent: AscentState
    target: Vector
    added: Vector
    loss: Vector
    progress: Vector
    moved: Vector
    named: Vector


def validation_feedback(
    mode: str | None = None,
    eta: float = 1.0,
    targets: Mapping[str, float] | str | None = None,
    others: str | None = None,
    smoothing: float = 1e-3,
    tau: float = 1.0,
    newest: float = 0.5,
    adjustment: float = 0.0,
    clip: bool = False,
) -> UpdateRule:
    """Return validation feedback.

    Args:
        mode: "level", "target" or "progress"; by default "target" where targets are given, else "level".
        eta: step size of "target"; sharpness of "progress", per nat of progress between updates.
        targets: of "target": nats per token by name, "reference" or "best".
        others: "reference" or "best" for domains that ``targets`` does not name; None refuses to leave one out, because
            a forgotten target starves its domain.
        smoothing: c, the share of the prior in the weights.
        tau: temperature of "level", nats.
        newest: s, share of the newest difference in the moving average of "progress".
        adjustment: C of "target", N being the tokens per domain that ``init`` is told.
        clip: whether an excess below 0 counts as 0 in "target".

    >>> rule = validation_feedback(targets={"old": 1.0, "new": 2.0}, smoothing=0)
    >>> signals = Signals(
    ...     np.ones(2), np.ones(2), heldout_loss=np.array([2 + np.log(3), 1.0]), heldout_tokens=np.ones(2)
    ... )
    >>> rule.update(rule.init(["new", "old"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    mode = ("level" if targets is None else "target") if mode is None else mode
    reading = choice(mode, "mode", ("level", "target", "progress"))
    if (reading == "target") != (targets is not None):
        raise InputError(f'mode "target" and targets belong together; got mode {reading!r} and targets {targets!r}.')
    eta, tau = number(eta, "eta", low=0), number(tau, "tau", low=1e-9)
    smoothing, newest = number(smoothing, "smoothing", low=0, high=1), number(newest, "newest", low=0, high=1)
    clip, unnamed = flag(clip, "clip"), _for_unnamed(targets, others)

    def init(domains: Domains | Sequence[str]) -> FeedbackState:
        known = as_domains(domains)
        zeros = np.zeros(len(known.names))
        fixed, named = _given(targets, known, default=None if others is None else 0.0)
        added = number(adjustment, "adjustment") / np.sqrt(np.maximum(known.num_tokens, 1.0))
        return FeedbackState(begin(known.prior, known.prior), fixed, added, zeros, zeros, zeros, named)

    def update(state: FeedbackState, signals: Signals) -> tuple[FeedbackState, Vector]:
        fresh, present = heldout(signals, state.loss.size)
        if not present.any():
            return state, weights_of(state.ascent.log_weights)
        if targets is not None:
            new = _towards_targets(state, fresh, present, signals, unnamed, clip, eta, smoothing)
        else:
            new = _tilt(state, fresh, present, reading, 1 / tau if reading == "level" else eta, smoothing, newest)
        return new, weights_of(new.ascent.log_weights)

    needs = {"heldout", "heldout_reference"} if unnamed == "reference" else {"heldout"}
    return _rule("validation_feedback", settings, init, update, frozenset(needs), result="average")


def sheared_llama(
    targets: Mapping[str, float], eta: float = 1.0, smoothing: float = 1e-4, clip: bool = True
) -> UpdateRule:
    """Return the dynamic batch loading of Sheared LLaMA.

    Args:
        targets: nats per token by name, from a scaling law fitted to larger models of the same family.
        eta: step size per evaluation (every 50 to 400 batches).
        smoothing: c, towards uniform.
        clip: whether domains below their target score 0 (paper) or less (code).

    >>> rule = sheared_llama({"a": 1.0, "b": 2.0}, smoothing=0)
    >>> signals = Signals(
    ...     np.ones(2), np.ones(2), heldout_loss=np.array([1 + np.log(3), 1.5]), heldout_tokens=np.ones(2)
    ... )
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    eta, smoothing = number(eta, "eta", low=0), number(smoothing, "smoothing", low=0, high=1)
    clip, targets = flag(clip, "clip"), mapping(targets, "targets")

    def init(domains: Domains | Sequence[str]) -> FeedbackState:
        known = as_domains(domains)
        zeros = np.zeros(len(known.names))
        ascent = begin(known.prior, uniform(zeros.size))
        fixed, named = _given(targets, known)
        return FeedbackState(ascent, fixed, zeros, zeros, zeros, zeros, named)

    def update(state: FeedbackState, signals: Signals) -> tuple[FeedbackState, Vector]:
        fresh, present = heldout(signals, state.loss.size)
        new = _towards_targets(state, fresh, present, signals, None, clip, eta, smoothing)
        return new, weights_of(new.ascent.log_weights)

    return _rule("sheared_llama", settings, init, update, frozenset({"heldout"}), result="last")


def _rule(
    name: str,
    settings: dict[str, Any],
    init: Callable[[Domains | Sequence[str]], FeedbackState],
    update: Callable[[FeedbackState, Signals], tuple[FeedbackState, Vector]],
    needs: frozenset[str],
    result: Literal["average", "last"],
) -> UpdateRule:
    def frozen(state: FeedbackState) -> Vector:
        return normalized(state.ascent.average) if result == "average" else weights_of(state.ascent.log_weights)

    return UpdateRule(
        name=name,
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.ascent.log_weights),
        result=frozen,
        needs=needs,
        applies="sampling",
        averages=result == "average",
    )


def _for_unnamed(targets: Any, others: str | None) -> str | None:
    """Return where domains that ``targets`` does not name get theirs: "reference", "best" or nowhere."""
    if others is not None:
        choice(others, "others", ("reference", "best"))
        if not isinstance(targets, Mapping):
            raise InputError(f"others={others!r} is for domains that targets do not name; got targets {targets!r}.")
        return others
    if isinstance(targets, str):
        return choice(targets, "targets", ("reference", "best"))
    if targets is not None:
        mapping(targets, "targets")
    return None


def _given(
    targets: Mapping[str, float] | str | None, known: Domains, default: float | None = None
) -> tuple[Vector, Vector]:
    """Return the targets given by name, and 1 for the domains that have one."""
    if not isinstance(targets, Mapping):
        return np.zeros(len(known.names)), np.zeros(len(known.names))
    missing = sorted(set(known.names) - set(targets))
    if missing and default is None:
        raise InputError(
            f"targets has no value for {missing}; the domains are {list(known.names)}. Give one for each, in nats per "
            'token; validation_feedback(others="reference") takes the model\'s own first held-out losses for the rest.'
        )
    named = np.array([float(name in targets) for name in known.names])
    return by_name(targets, known, "targets", default, low=0), named


def _towards_targets(
    state: FeedbackState,
    fresh: Vector,
    present: Present,
    signals: Signals,
    unnamed: str | None,
    clip: bool,
    eta: float,
    smoothing: float,
) -> FeedbackState:
    target, open_ = state.target, present & (state.named == 0)
    if unnamed == "best":
        lowest = np.where(state.ascent.seen > 0, np.minimum(target, fresh), fresh)
        target = np.where(open_, lowest, target)
    elif unnamed == "reference":
        reference, _ = mean_of(signals, "heldout_reference_loss", "heldout_tokens", fresh.size)
        target = np.where(open_, reference, target)
    excess = fresh - target + state.added
    score = np.maximum(excess, 0.0) if clip else excess
    ascent = ascend(state.ascent, score, present, eta, smoothing)
    return state._replace(ascent=ascent, target=target, loss=np.where(present, fresh, state.loss))


def _tilt(
    state: FeedbackState, fresh: Vector, present: Present, mode: str, sharpness: float, smoothing: float, newest: float
) -> FeedbackState:
    old, loss_before = state.ascent, state.loss
    loss, seen = hold(fresh, present, loss_before, old.seen)
    again = present & (old.seen > 0)
    progress = moving_average(state.progress, state.moved, loss_before - fresh, again, newest)
    moved = np.where(again, 1.0, state.moved)
    score = loss if mode == "level" else filled(progress, moved)
    with np.errstate(divide="ignore"):
        log_weights = exponentiated(np.log(old.prior), sharpness * score)
    log_weights = mix_in(log_weights, smoothing, old.prior)
    count = old.num_updates + 1
    average = mean_into(old.average, weights_of(log_weights), count)
    ascent = AscentState(log_weights, old.prior, score, seen, average, count)
    stored = np.where(present, fresh, loss_before)
    return state._replace(ascent=ascent, loss=stored, progress=progress, moved=moved)
