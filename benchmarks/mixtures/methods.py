"""The rows of the comparison: how each method is set up, and which model is its outcome.

Rules have the settings of their papers, that is their defaults, on every corpus; none is tuned. Only what is counted in
steps or has to be given follows from the comparison: DoGE's learning rate, PiKE's batch size, ADO's warm-up and
intervals (an eighth of the run), targets (the held-out losses of the uniform run), the distances of domains (of their
bigrams) and UniMax's budget. Rules on the
training loss are updated every step, those on held-out losses or gradients every 20, Aioli every 4. All of them start
from uniform weights.

A row's outcome is either the model that trained under the rule, or, for methods that search weights for another run, a
second model trained on the mixture found. All models are of the same size and read the same number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from algorithms.mixture_regression import descend, fit_log_linear
from algorithms.rules import UPDATE_RULES
from benchmarks.mixtures.runs import Result, Run, Runs
from mixer.static_weights import proportional, temperature, uniform, unimax

__all__ = ["BASELINES", "LATER", "LONGER", "METHODS", "Method", "Outcome", "baselines", "outcome"]

COSTLY = frozenset({"heldout", "gradients", "gradient_variance"})


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        rule: row of ``UPDATE_RULES``.
        settings: of the rule; a function of ``Context`` where they follow from the comparison.
        reference: the baseline whose model is the reference, or "bigram".
        searches: train a second model on the mixture found.
        every: steps between updates; None for 1, or 20 where an update costs evaluations.
    """

    rule: str
    settings: Mapping[str, Any] | Callable[[Context], Mapping[str, Any]] = MappingProxyType({})
    reference: str | None = None
    searches: bool = False
    every: int | None = None


class Context(NamedTuple):
    """What settings may follow from."""

    steps: int
    batch_size: int
    learning_rate: float
    targets: Mapping[str, float]
    distances: Callable[[], Mapping[str, Mapping[str, float]]]


class Outcome(NamedTuple):
    """The result of a row for one seed: the model's; the weights found, or the shares drawn (for rules on the loss,
    their mean weights); CPU seconds of all its runs."""

    result: Result
    weights: tuple[float, ...]
    seconds: float


def _ado(context: Context) -> dict[str, int]:
    eighth = max(8, context.steps // 8)
    return {"warmup": eighth, "refit_every": eighth, "ignore": eighth // 2}


LONGER = "uniform, three times the steps"  # what a search costs, spent on plain training
BASELINES = ("uniform", "proportional", "temperature", "UniMax", LONGER)

METHODS: dict[str, Method] = {
    "DoReMi recommended, reference uniform": Method("doremi", {"variant": "recommended"}, "uniform", True),
    "DoReMi paper, reference uniform": Method("doremi", {}, "uniform", True),
    "DoReMi recommended, reference proportional": Method("doremi", {"variant": "recommended"}, "proportional", True),
    "DoReMi paper, reference proportional": Method("doremi", {}, "proportional", True),
    "hardest": Method("hardest", searches=True),
    "Group DRO": Method("group_dro"),
    "on-demand": Method("on_demand"),
    "Sheared LLaMA": Method("sheared_llama", lambda c: {"targets": dict(c.targets)}, "uniform"),
    "ODM": Method("odm"),
    "ADO": Method("ado", _ado),
    "Skill-It": Method("skill_it"),
    "Aioli": Method("aioli", every=4),
    "DoGE": Method("doge", lambda c: {"eta": c.learning_rate}, searches=True),
    "PiKE": Method("pike", lambda c: {"batch_size": c.batch_size}),
}

# Measured after the others.
MORE: dict[str, Method] = {
    "MERO": Method("mero", {}, "uniform"),
    "DRO-LM": Method("dro_lm", {}, "bigram"),
    "agnostic": Method("agnostic"),
    "divergence ball": Method("divergence_ball", every=20),
    "topic CVaR": Method("topic_cvar"),
    "Wasserstein ball": Method("wasserstein", lambda c: {"distances": c.distances()}),
    "validation feedback, progress": Method("validation_feedback", {"mode": "progress"}),
    "validation feedback, level": Method("validation_feedback"),
    "just train twice": Method("jtt", searches=True),
    "lookahead": Method("lookahead"),
    "easiest": Method("easiest", {}, "uniform", True),
    "mixture regression": Method("regression", searches=True),
}
METHODS |= MORE
LATER = (*MORE, LONGER)


def baselines(runs: Runs, seed: int) -> dict[str, Run]:
    """Return the runs on fixed mixtures: UniMax with one epoch at most, since more would not bind here."""
    steps = runs.setting.steps
    budget = steps * runs.setting.batch_size
    rows = {
        "uniform": uniform(len(runs.domains)),
        "proportional": proportional(runs.sizes),
        "temperature": temperature(runs.sizes, 2.0),
        "UniMax": unimax(runs.sizes, budget, 1.0, names=runs.domains),
    }
    fixed = {name: Run(seed, tuple(row.tolist())) for name, row in rows.items()}
    return {**fixed, LONGER: replace(fixed["uniform"], steps=3 * steps)}


def outcome(name: str, runs: Runs, seed: int) -> Outcome:
    """Return the outcome of a baseline or method for one seed, training what is missing."""
    fixed = baselines(runs, seed)
    if name in fixed:
        result = runs.get(fixed[name])
        return Outcome(result, result.drawn, result.seconds)
    method = METHODS[name]
    found = _regression(runs, seed) if method.rule == "regression" else _under_rule(method, runs, seed, fixed)
    if not method.searches:
        return found
    main = runs.get(Run(seed, found.weights))
    return Outcome(main, found.weights, found.seconds + main.seconds)


def _under_rule(method: Method, runs: Runs, seed: int, fixed: Mapping[str, Run]) -> Outcome:
    setting, settings = runs.setting, method.settings
    if callable(settings):
        targets = runs.targets(fixed["uniform"])
        context = Context(setting.steps, setting.batch_size, setting.learning_rate, targets, runs.distances)
        settings = settings(context)
    rule = UPDATE_RULES[method.rule](**settings)
    reference, seconds = method.reference, 0.0
    if reference is not None and reference in fixed:
        trained = runs.get(fixed[reference])
        reference, seconds = trained.key, trained.seconds
    result = runs.get(
        Run(
            # A proxy that started as its own reference would have no excess loss anywhere.
            seed=seed + 1 if method.searches else seed,
            rule=method.rule,
            settings=dict(settings),
            reference=reference if "reference" in rule.needs else None,
            every=method.every or (20 if rule.needs & COSTLY else 1),
        )
    )
    draws = rule.applies == "sampling" and not method.searches
    return Outcome(result, result.drawn if draws else result.weights, seconds + result.seconds)


def _regression(runs: Runs, seed: int) -> Outcome:
    """Find the mixture of least average loss by a law fitted on small runs: 3 (D + 1), a quarter as long."""
    count = len(runs.domains)
    mixtures = np.random.default_rng((seed, 3)).dirichlet(np.ones(count), 3 * (count + 1))
    small = [Run(seed, tuple(row.tolist()), steps=runs.setting.steps // 4) for row in mixtures]
    results = [runs.get(run) for run in small]
    law = fit_log_linear(mixtures, np.array([result.windows for result in results]))
    weights = descend(law, "average", lower=0.01)
    return Outcome(results[0], tuple(weights.tolist()), sum(result.seconds for result in results))
