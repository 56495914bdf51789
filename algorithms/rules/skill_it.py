"""Skill-It: sample the domains from which the currently worst domains can be learnt, along a graph of what helps what.

    w_0 ~ exp(eta * sum_j A_dj)            w_t ~ exp(eta * sum_j A_dj * (sum of v_j over the last ``window`` updates))

v is the held-out loss. Chen, Roberts, Bhatia, Wang, Zhang, Sala, Re 2023, arXiv:2307.14430, Algorithm 1. A_dj says how
much training on d helps j; it is estimated beforehand by training on single domains or pairs.

What differs in the code (``variant="official"``): off-diagonal edges of weight 1 are halved after loading, and
the window holds fewer losses until it is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.on_demand import heldout
from algorithms.rules.settings import choice, mapping, number, whole
from algorithms.rules.steps import Vector, filled, mean_into, normalized, weights_of
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["SkillItState", "skill_it"]


class SkillItState(NamedTuple):
    """The graph (D, D); the last held-out losses (window, D), newest first; (D,) vectors: 1 where ever seen, the
    weights in force, their mean; and t."""

    graph: Vector
    history: Vector
    seen: Vector
    weights: Vector
    average: Vector
    num_updates: int


def skill_it(
    graph: Mapping[str, Mapping[str, float]] | None = None, eta: float = 0.2, window: int = 3, variant: str = "paper"
) -> UpdateRule:
    """Return Skill-It.

    Args:
        graph: how much training on a domain (outer name) helps another (inner name); missing pairs 0, a missing
            diagonal entry 1. None is the identity: each domain helps itself only.
        eta: 0.1 to 0.8 in the papers' runs.
        window: updates whose losses are summed.
        variant: "paper" or "official".

    >>> rule = skill_it({"a": {"b": 1.0}}, eta=np.log(3))
    >>> rule.weights(rule.init(["a", "b"])).round(12).tolist()  # a helps both, b itself
    [0.75, 0.25]
    """
    settings = dict(locals())
    eta = number(eta, "eta", low=0)
    num_kept = whole(window, "window", low=1)
    for name, row in mapping({} if graph is None else graph, "graph").items():
        mapping(row, f"graph[{name!r}]")
    official = choice(variant, "variant", ("paper", "official")) == "official"

    def init(domains: Domains | Sequence[str]) -> SkillItState:
        names = as_domains(domains).names
        edges = _edges(graph or {}, names)
        if official:
            edges[(edges == 1.0) & ~np.eye(len(names), dtype=bool)] = 0.5
        weights = weights_of(eta * edges.sum(axis=1))
        size = len(names)
        return SkillItState(edges, np.zeros((num_kept, size)), np.zeros(size), weights, weights, 0)

    def update(state: SkillItState, signals: Signals) -> tuple[SkillItState, Vector]:
        fresh, present = heldout(signals, state.seen.size)
        if not present.any():
            return state, state.weights
        loss, seen = np.where(present, fresh, state.history[0]), np.where(present, 1.0, state.seen)
        count = state.num_updates + 1
        # First losses fill the whole window, so that the weights are not flatter before it is full.
        rows = state.history[:-1] if official else np.where(state.seen > 0, state.history[:-1], loss)
        history = np.concatenate([loss[None], rows])
        weights = weights_of(eta * state.graph @ filled(history.sum(axis=0), seen))
        average = mean_into(state.average, weights, count)
        return SkillItState(state.graph, history, seen, weights, average, count), weights

    return UpdateRule(
        name="skill_it",
        settings=settings,
        init=init,
        update=update,
        weights=lambda state: state.weights,
        result=lambda state: normalized(state.average),
        needs=frozenset({"heldout"}),
        applies="sampling",
    )


def _edges(graph: Mapping[str, Mapping[str, float]], names: tuple[str, ...]) -> Vector:
    unknown = sorted((set(graph) | {inner for row in graph.values() for inner in row}) - set(names))
    if unknown:
        raise InputError(f"the graph names unknown domains {unknown}; the domains are {list(names)}.")
    edges, place = np.eye(len(names)), {name: index for index, name in enumerate(names)}
    for a, row in graph.items():
        for b, weight in row.items():
            edges[place[a], place[b]] = number(weight, f"graph[{a!r}][{b!r}]")
    return edges
