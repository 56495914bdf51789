"""Floors, ceilings and epoch caps for any rule, by the one projection of ``mixer.projection``.

The rule itself is left alone: its own state moves freely and what it returns is projected, so that a weight held at its
cap comes off it as soon as the rule asks for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.settings import by_name, choice, number
from algorithms.rules.steps import Vector
from algorithms.signals import Signals
from mixer.errors import InputError
from mixer.projection import project

__all__ = ["BoundedState", "bounded"]


class BoundedState(NamedTuple):
    """The rule's state; (D,) floors, ceilings, tokens that may still be read in all (infinite without a cap), and
    tokens read so far."""

    rule: Any
    floor: Vector
    ceiling: Vector
    allowance: Vector
    consumed: Vector


def bounded(
    rule: UpdateRule,
    floor: Mapping[str, float] | float = 0.0,
    ceiling: Mapping[str, float] | float = 1.0,
    max_epochs: float | None = None,
    budget: float | None = None,
    apply: str | None = None,
) -> UpdateRule:
    """Return ``rule`` with its weights and its result kept within bounds.

    Args:
        floor, ceiling: least and largest weight, for all domains or by name (missing names: 0 and 1).
        max_epochs: largest number of passes over a domain in a run of ``budget`` tokens. It caps the result; and, for a
            rule that samples, the weights in force, at what is left of each domain over what is left of the budget.
        budget: tokens of the run; needed with ``max_epochs``.
        apply: what the weights will act on, "loss" or "sampling", where that is not the rule's default.

    Raises: InputError: at ``init``, if no mixture lies within the bounds.

    >>> from algorithms.rules.group_dro import group_dro
    >>> rule = bounded(group_dro(eta=1.0), floor=0.1, ceiling=0.6)
    >>> rule.update(rule.init(["a", "b", "c"]), Signals(np.ones(3), np.array([50.0, 0.0, 0.0])))[1].round(6).tolist()
    [0.6, 0.2, 0.2]
    """
    if (max_epochs is None) != (budget is None):
        raise InputError(f"max_epochs ({max_epochs}) and budget ({budget}) must be given together.")
    epochs = np.inf if max_epochs is None else number(max_epochs, "max_epochs", low=1e-9)
    tokens = np.inf if budget is None else number(budget, "budget", low=1e-9)
    applies = rule.applies if apply is None else choice(apply, "apply", ("loss", "sampling"))

    def capped(
        state: BoundedState, weights: Vector, left: Vector, of: float, names: Sequence[str] | None = None
    ) -> Vector:
        if max_epochs is None:
            caps = state.ceiling
        else:
            can_give = np.maximum(left, 0.0) / of
            caps = np.minimum(state.ceiling, can_give)
            if names is None and caps.sum() < 1.0:
                # What was drawn strays from the weights by whole samples, so that bounds that just fitted at the start
                # may come to leave no mixture. Then the ceilings give way: texts cannot.
                caps = project(np.maximum(caps, 1e-300), 0.0, can_give)
        # A weight of exactly 0 could not take up what capped domains leave.
        return project(np.maximum(weights, 1e-300), np.minimum(state.floor, caps), caps, names=names)

    def in_force(state: BoundedState) -> Vector:
        left, of = state.allowance, tokens
        if applies == "sampling" and tokens > state.consumed.sum():
            left, of = left - state.consumed, tokens - state.consumed.sum()
        elif applies == "loss":
            left = np.full(left.shape, np.inf)
        return capped(state, rule.weights(state.rule), left, of)

    def init(domains: Domains | Sequence[str]) -> BoundedState:
        known = as_domains(domains)
        low, high = by_name(floor, known, "floor", default=0.0), by_name(ceiling, known, "ceiling", default=1.0)
        allowance = np.full(low.size, np.inf) if max_epochs is None else epochs * known.num_tokens
        state = BoundedState(rule.init(known), low, high, allowance, np.zeros(low.size))
        capped(state, known.prior, state.allowance, tokens, known.names)
        return state

    def update(state: BoundedState, signals: Signals) -> tuple[BoundedState, Vector]:
        inner, _ = rule.update(state.rule, signals)
        new = state._replace(rule=inner, consumed=state.consumed + signals.num_tokens)
        return new, in_force(new)

    bounds = {"floor": floor, "ceiling": ceiling, "max_epochs": max_epochs, "budget": budget}
    return rule._replace(
        settings={**rule.settings, "bounds": bounds},
        init=init,
        update=update,
        weights=in_force,
        result=lambda state: capped(state, rule.result(state.rule), state.allowance, tokens),
    )
