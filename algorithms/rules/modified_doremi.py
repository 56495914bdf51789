"""DoReMi for a model that continues from a pretrained one, which is also the reference; with a target per new domain.

    score of an old domain = max(mean loss - mean loss of the pretrained model, 0)      forgetting
    score of a new domain  = max(mean loss - target, 0)                                 what is left to learn
    then as in DoReMi.

Without the targets the method is degenerate, in two ways that this rule refuses. At the first step the model is the
reference and every score is 0; and on a new domain the model only gets better than the reference, so that its score is
clipped to 0 for ever and the domain is starved. So every domain in ``new`` must have a target, and scores that all
stay below ``tolerance`` for ``patience`` updates raise an error. Targets: a small specialist's loss, a scaling curve,
or a bigram model's as a loose one.

DoReMi: arXiv:2305.10429. The continual form is a proposal without a paper; no official code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import AscentState, ascend, begin, uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.doremi import smoothing_for
from algorithms.rules.settings import by_name, flag, mapping, names_in, number, whole
from algorithms.rules.steps import Vector, field, mean_of, means, normalized, weights_of
from algorithms.signals import Signals
from mixer.errors import DataError, InputError

__all__ = ["ModifiedDoReMiState", "modified_doremi"]


class ModifiedDoReMiState(NamedTuple):
    """The ascent; (D,) targets and 1 for new domains; and how many updates in a row had no score above the
    tolerance."""

    ascent: AscentState
    target: Vector
    is_new: Vector
    num_idle: int


def modified_doremi(
    targets: Mapping[str, float],
    new: Sequence[str] = (),
    eta: float = 1.0,
    smoothing: float | None = None,
    clip: bool = True,
    patience: int = 100,
    tolerance: float = 1e-6,
) -> UpdateRule:
    """Return modified DoReMi.

    Args:
        targets: nats per token by name for the new domains. Domains without one are old: their target is the
            reference's loss in the signals.
        new: names that must have a target; a check, since a forgotten target starves the domain.
        eta, smoothing: as in ``doremi``.
        clip: whether a mean excess below 0 counts as 0.
        patience, tolerance: raise after this many updates in a row without a score above ``tolerance`` nats.

    Raises: InputError: if a new domain has no target. DataError: in ``update``, when the scores stay 0.

    >>> rule = modified_doremi({"new": 1.0}, smoothing=0)
    >>> signals = Signals(np.ones(2), np.array([1 + np.log(3), 2.0]), reference_loss=np.array([9.0, 2.0]))
    >>> rule.update(rule.init(["new", "old"]), signals)[1].round(12).tolist()
    [0.75, 0.25]
    """
    settings = dict(locals())
    eta = number(eta, "eta", low=0)
    share = smoothing_for(eta, smoothing)
    clip, patience = flag(clip, "clip"), whole(patience, "patience", low=1)
    tolerance = number(tolerance, "tolerance", low=0)
    without = sorted(set(names_in(new, "new")) - set(mapping(targets, "targets")))
    if without:
        raise InputError(
            f"the new domains {without} have no target: with the pretrained model as their reference their excess loss "
            "is never positive and they would be starved. Give a target loss for each, in nats per token."
        )

    def init(domains: Domains | Sequence[str]) -> ModifiedDoReMiState:
        known = as_domains(domains)
        is_new = np.array([float(name in targets) for name in known.names])
        return ModifiedDoReMiState(
            begin(uniform(is_new.size)), by_name(targets, known, "targets", default=0.0, low=0), is_new, 0
        )

    def update(state: ModifiedDoReMiState, signals: Signals) -> tuple[ModifiedDoReMiState, Vector]:
        loss, present = mean_of(signals, "loss", "num_tokens", state.target.size)
        reference = means(field(signals, "reference_loss", loss.size), signals.num_tokens)
        excess = loss - np.where(state.is_new > 0, state.target, reference)
        score = np.where(present, np.maximum(excess, 0.0) if clip else excess, 0.0)
        num_idle = state.num_idle + 1 if present.any() and np.max(np.abs(score)) <= tolerance else 0
        _check_alive(num_idle, patience, tolerance)
        ascent = ascend(state.ascent, score, present, eta, share)
        return state._replace(ascent=ascent, num_idle=num_idle), weights_of(ascent.log_weights)

    return UpdateRule(
        name="modified_doremi",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: weights_of(state.ascent.log_weights),
        result=lambda state: normalized(state.ascent.average),
        needs=frozenset({"reference"}),
    )


def _check_alive(num_idle: int, patience: int, tolerance: float) -> None:
    if num_idle >= patience:
        raise DataError(
            f"no domain had an excess loss above {tolerance:g} nats in {num_idle} updates: the model never rose above "
            "its reference or targets, so the weights cannot move. Lower the targets or change the reference."
        )
