"""Weights that do not move: the baselines that every proposal has to beat, and published mixtures.

    erm            size-proportional: uniform over the union of all samples, plain training
    uniform        every domain the same
    temperature    size^(1/tau)
    unimax         uniform, no domain beyond max_epochs (Chung et al. 2023, arXiv:2304.09151, Algorithm 1)
    preset         a published table, by domain name (see ``presets.py``)
    given          weights by domain name

All but the last two are computed by ``mixer.static_weights`` from ``Domains.num_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.presets import published_weights
from algorithms.rules.settings import by_name, flag, mapping, number
from algorithms.rules.steps import Vector, normalized
from algorithms.signals import Signals
from mixer import static_weights
from mixer.errors import InputError

__all__ = ["FixedState", "erm", "given", "preset", "temperature", "uniform", "unimax"]


class FixedState(NamedTuple):
    """(D,) weights."""

    weights: Vector


def erm() -> UpdateRule:
    """Return size-proportional weights.

    >>> rule = erm()
    >>> rule.weights(rule.init(as_domains(["a", "b"], num_tokens=[300, 100]))).tolist()
    [0.75, 0.25]
    """
    return _rule("erm", {}, lambda domains: static_weights.proportional(domains.num_tokens))


def uniform() -> UpdateRule:
    """Return the same weight for every domain.

    >>> rule = uniform()
    >>> rule.weights(rule.init(["a", "b"])).tolist()
    [0.5, 0.5]
    """
    return _rule("uniform", {}, lambda domains: static_weights.uniform(len(domains.names)))


def temperature(tau: float = 2.0) -> UpdateRule:
    """Return weights proportional to size^(1/tau): 1 is size-proportional, large is uniform.

    Args:
        tau: the temperature. In use: 1.43 (mBERT), 2 (XLM), 3.33 (XLM-R, mT5), by arXiv:2304.09151, Table 1.

    >>> rule = temperature(tau=2)
    >>> rule.weights(rule.init(as_domains(["a", "b"], num_tokens=[900, 100]))).round(12).tolist()
    [0.75, 0.25]
    """
    settings = {"tau": number(tau, "tau", low=1e-9)}
    return _rule("temperature", settings, lambda domains: static_weights.temperature(domains.num_tokens, tau))


def unimax(budget: float, max_epochs: float = 4.0) -> UpdateRule:
    """Return weights as uniform as possible with no domain read more than ``max_epochs`` times.

    Args:
        budget: tokens of the whole run.
        max_epochs: largest number of passes over a domain.

    >>> rule = unimax(budget=100)
    >>> rule.weights(rule.init(as_domains(["big", "small"], num_tokens=[1000, 5]))).round(12).tolist()
    [0.8, 0.2]
    """
    settings = {"budget": number(budget, "budget", low=1e-9), "max_epochs": number(max_epochs, "max_epochs", low=1e-9)}
    return _rule(
        "unimax",
        settings,
        lambda domains: static_weights.unimax(domains.num_tokens, budget, max_epochs, names=domains.names),
    )


def preset(name: str, names: Mapping[str, str] | None = None, partial: bool = False) -> UpdateRule:
    """Return a published mixture.

    Args:
        name: a table of ``presets.PRESETS``, such as "pile-doremi-280m".
        names: your domain name -> the table's, where they differ by more than case and punctuation.
        partial: allow domains of the table that you do not have; the rest is normalised.

    Raises: InputError: at ``init``, if a domain is not in the table, or one of the table's is missing without
    ``partial``.

    >>> rule = preset("llama-3.1")
    >>> rule.weights(rule.init(["code", "general", "math", "multilingual"])).tolist()
    [0.17, 0.5, 0.25, 0.08]
    """
    table = published_weights(name)
    mapping({} if names is None else names, "names")
    settings = {"name": name, "names": names, "partial": flag(partial, "partial")}
    known = {_plain(key): key for key in table}

    def weights(domains: Domains) -> Vector:
        keys = {own: known.get(_plain((names or {}).get(own, own))) for own in domains.names}
        unknown = [own for own, key in keys.items() if key is None]
        missing = sorted(set(table) - {key for key in keys.values() if key is not None})
        if unknown or (missing and not partial):
            problem = f"has no domains {unknown}" if unknown else f"also has {missing}"
            raise InputError(
                f"the preset {name!r} {problem}; it has {sorted(table)}. Map your names with names={{yours: theirs}}, "
                "or set partial for a part of its domains."
            )
        return normalized(np.array([table[str(keys[own])] for own in domains.names]))

    return _rule("preset", settings, weights)


def given(weights: Mapping[str, float]) -> UpdateRule:
    """Return weights by name, normalised.

    Args:
        weights: a number for every domain, such as {'code': 1, 'web': 3}, or @FILE to read them from JSON.

    >>> rule = given({"a": 3, "b": 1})
    >>> rule.weights(rule.init(["a", "b"])).tolist()
    [0.75, 0.25]
    """
    mapping(weights, "weights")
    return _rule("given", {"weights": dict(weights)}, lambda domains: normalized(by_name(weights, domains, "weights")))


def _rule(name: str, settings: Mapping[str, Any], weights: Callable[[Domains], Vector]) -> UpdateRule:
    def init(domains: Domains | Sequence[str]) -> FixedState:
        return FixedState(weights(as_domains(domains)))

    def update(state: FixedState, signals: Signals) -> tuple[FixedState, Vector]:
        return state, state.weights

    return UpdateRule(name, settings, init, update, _weights, _weights, frozenset(), "sampling")


def _weights(state: FixedState) -> Vector:
    return state.weights


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
