"""DoReMi: minimise the worst excess loss over a reference model, and keep the adversary's average as the mixture.

    a_0 = u = 1/D
    s_t[d] = sum over tokens j of d in the batch of max(loss_j - reference_j, 0)  /  number of tokens of d in the batch
    a_t    = (1 - c) * softmax(log a_{t-1} + eta * s_t) + c * u
    result = (a_1 + ... + a_T) / T                        eta = 1, c = 1e-3

The proxy minimises sum_d a_t[d] * (mean token loss of d) on uniformly sampled domains; the main model then samples by
the result. Xie, Pham, Dong, Du, Liu, Lu, Liang, Le, Ma, Yu 2023, arXiv:2305.10429, Algorithm 1.

What differs in the official code (``variant="official"``): float32; a domain that was never seen scores ln V while it
is absent, so that one missing from the first batch takes 0.999 of the weight; the average includes a_0; a_0 is the
sampling prior; the proxy loss is one mean over all tokens (weight of d proportional to a[d] times its tokens), and
ranks other than 0 multiply by a_{t-1}.

``variant="recommended"`` is the paper's form with eta = 0.1 and c = 1e-4. With eta = 1 every domain's weight swings
through values near 1; with eta = 0.1 the average comes out similar with a sixth of the movement per step (measured on
small language models, tests/algorithms/test_rules_language_model.py). The pull to uniform depends on c / eta only: so c
is eta / 1000 unless it is given. (In the official code it stays at 1e-3, and an eta of 0.1 pulls ten times harder.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from algorithms.rules.ascent import AscentState, ascent_rule, begin, uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import choice, number, whole
from algorithms.rules.steps import Present, Vector, field, mean_of, means, normalized, weights_of
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["doremi", "easiest", "excess", "hardest", "smoothing_for"]

ETA = {"paper": 1.0, "official": 1.0, "recommended": 0.1}  # by variant
SMOOTHING = 1e-3  # at eta = 1


def doremi(
    eta: float | None = None,
    smoothing: float | None = None,
    clip: str = "token",
    variant: str = "paper",
    vocab_size: int | None = None,
    confidence: float = 1.0,
) -> UpdateRule:
    """Return the DoReMi rule.

    Args:
        eta: step size; by default 1, and 0.1 for the recommended variant.
        smoothing: c above; by default eta / 1000, so that the pull to uniform does not depend on eta; always 1e-3 for
            the official variant.
        clip: where excess below 0 counts as 0: per "token" (paper), after the "domain" mean (a domain on which proxy
            and reference merely disagree then scores nothing), "confident" (the same after ``confidence`` standard
            errors of the mean over sequences were taken off it, so that noise has to be exceeded), or "none".
        variant: "paper", "official" or "recommended".
        vocab_size: V of ln V; the official variant needs it, the others do not use it.
        confidence: standard errors for clip="confident"; a domain with one sequence has none and counts as absent.

    Raises: InputError: on a setting out of range.

    >>> rule = doremi(clip="none", smoothing=0)
    >>> signals = Signals(np.array([10.0, 10.0]), np.array([30.0, 20.0]), reference_loss=np.array([20.0, 20.0]))
    >>> state, weights = rule.update(rule.init(["code", "web"]), signals)
    >>> weights.round(3).tolist()  # e / (e + 1)
    [0.731, 0.269]
    """
    choice(variant, "variant", tuple(ETA))
    choice(clip, "clip", ("token", "domain", "confident", "none"))
    eta = number(ETA[variant] if eta is None else eta, "eta", low=0)
    smoothing = smoothing_for(1.0 if variant == "official" else eta, smoothing)
    settings = {"eta": eta, "smoothing": smoothing, "clip": clip, "variant": variant, "vocab_size": vocab_size}
    confidence = number(confidence, "confidence", low=0)
    vocab_size = None if vocab_size is None else whole(vocab_size, "vocab_size", low=2)
    if clip == "confident":
        settings["confidence"] = confidence
    if variant == "official":
        return _official(settings, eta, smoothing, clip, _first_score(vocab_size))

    def score(signals: Signals, num_domains: int) -> tuple[Vector, Present]:
        return surely(signals, num_domains, confidence) if clip == "confident" else excess(signals, num_domains, clip)

    return ascent_rule("doremi", settings, score, eta, smoothing, frozenset({"reference"}))


def hardest(eta: float = 1.0, smoothing: float | None = None) -> UpdateRule:
    """Return DoReMi's ablation that scores by the proxy's loss alone: s[d] = mean loss of d.

    It goes to the domain of highest entropy, from which nothing can be learnt: worst and average log-perplexity 2.66
    and 2.62 against the baseline's 2.39 and 2.32 (arXiv:2305.10429, Table 7). For comparison, not for use.

    Args:
        eta, smoothing: as for ``doremi``.

    >>> rule = hardest(smoothing=0)
    >>> rule.update(rule.init(["a", "b"]), Signals(np.ones(2), np.array([np.log(3), 0.0])))[1].round(12).tolist()
    [0.75, 0.25]
    """
    eta = number(eta, "eta", low=0)
    smoothing = smoothing_for(eta, smoothing)
    settings = {"eta": eta, "smoothing": smoothing}
    return ascent_rule("hardest", settings, lambda s, d: mean_of(s, "loss", "num_tokens", d), eta, smoothing)


def easiest(eta: float = 1.0, smoothing: float | None = None) -> UpdateRule:
    """Return DoReMi's ablation that scores by the reference alone: s[d] = -(mean reference loss of d).

    It goes to the domain of lowest entropy: worst and average log-perplexity 4.27 and 4.18 (arXiv:2305.10429, Table 7).
    The paper's shift that keeps the scores positive changes no weight. For comparison, not for use.

    Args:
        eta, smoothing: as for ``doremi``.

    >>> rule = easiest(smoothing=0)
    >>> signals = Signals(np.ones(2), np.zeros(2), reference_loss=np.array([np.log(3), 0.0]))
    >>> rule.update(rule.init(["a", "b"]), signals)[1].round(12).tolist()
    [0.25, 0.75]
    """
    eta = number(eta, "eta", low=0)
    smoothing = smoothing_for(eta, smoothing)
    settings = {"eta": eta, "smoothing": smoothing}

    def score(signals: Signals, num_domains: int) -> tuple[Vector, Present]:
        reference, present = mean_of(signals, "reference_loss", "num_tokens", num_domains)
        return -reference, present

    return ascent_rule("easiest", settings, score, eta, smoothing, frozenset({"reference"}))


def smoothing_for(eta: float, smoothing: float | None = None) -> float:
    """Return c: the one given, or the paper's in proportion to eta, at most 1.

    >>> smoothing_for(eta=0.5)
    0.0005
    """
    given = min(1.0, SMOOTHING * eta) if smoothing is None else smoothing
    return number(given, "smoothing", low=0, high=1)


def excess(signals: Signals, num_domains: int, clip: str) -> tuple[Vector, Present]:
    """Return the mean excess loss per domain, in nats per token, clipped at 0 per "token", per "domain" or not."""
    if clip == "token":
        return mean_of(signals, "clipped_excess", "num_tokens", num_domains)
    loss, present = mean_of(signals, "loss", "num_tokens", num_domains)
    difference = loss - means(field(signals, "reference_loss", num_domains), signals.num_tokens)
    return (np.maximum(difference, 0.0) if clip == "domain" else difference), present


def surely(signals: Signals, num_domains: int, confidence: float) -> tuple[Vector, Present]:
    """Return max(m - confidence * se, 0) with m the mean excess loss of each domain and se its standard error.

    The error is that of a mean over sequences, whose own excess varies from one to the next; it takes two to know.

    >>> sums = Signals(np.array([8.0]), np.array([12.0]), np.array([2.0]), reference_loss=np.array([4.0]),
    ...     excess_squared=np.array([0.5**2 + 1.5**2]))
    >>> surely(sums, 1, confidence=1.0)[0].tolist()  # mean 1; sequences 0.5 and 1.5: standard error 0.5
    [0.5]
    """
    mean, present = excess(signals, num_domains, "none")
    count = field(signals, "num_sequences", num_domains)
    square = means(field(signals, "excess_squared", num_domains), count)
    spread = np.maximum(square - mean**2, 0.0) * means(count, count - 1)
    known = present & (count > 1)
    return np.where(known, np.maximum(mean - confidence * np.sqrt(means(spread, count)), 0.0), 0.0), known


def _first_score(vocab_size: int | None) -> float:
    if vocab_size is None:
        raise InputError(
            'doremi(variant="official") needs vocab_size, the number of tokens the tokenizer knows, for its first '
            "scores ln V."
        )
    return float(np.float32(np.log(vocab_size)))


def _official(settings: dict, eta: float, smoothing: float, clip: str, first_score: float) -> UpdateRule:
    def init(domains: Domains | Sequence[str]) -> AscentState:
        prior = as_domains(domains).prior.astype(np.float32).astype(np.float64)
        state = begin(prior, uniform(prior.size))
        return state._replace(score=np.full(prior.size, first_score))

    def update(state: AscentState, signals: Signals) -> tuple[AscentState, Vector]:
        score, present = excess(signals, state.score.size, clip)
        new = _official_step(state, score, present, eta, smoothing) if present.any() else state
        return new, weights_of(new.log_weights)

    return UpdateRule(
        name="doremi",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.log_weights),
        result=lambda state: normalized(state.average),
        needs=frozenset({"reference"}),
        normalization="tokens",
    )


def _official_step(state: AscentState, score: Vector, present: Present, eta: float, smoothing: float) -> AscentState:
    # The official trainer keeps float32 buffers, and counts a_0 as the first term of the average.
    held = np.where(present, score, state.score).astype(np.float32)
    moved = np.log(np.exp(state.log_weights).astype(np.float32)) + np.float32(eta) * held
    moved = np.exp(moved - moved.max())
    weights = np.float32(1 - smoothing) * (moved / moved.sum()) + np.float32(smoothing / held.size)
    count = state.num_updates + 2
    average = (state.average.astype(np.float32) * np.float32(count - 1) + weights) / np.float32(count)
    return AscentState(
        log_weights=np.log(weights.astype(np.float64)),
        prior=state.prior,
        score=held.astype(np.float64),
        seen=np.where(present, 1.0, state.seen),
        average=average.astype(np.float64),
        num_updates=count - 1,
    )
