"""Every row of the catalogue and its variants in one training run: all get the same signals, and none acts."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from algorithms import DomainReweighting
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.signals import Signals
from mixer.errors import InputError
from tests.algorithms.rule_cases import VARIANTS, make
from tests.algorithms.test_domain_reweighting import heldout_windows
from tests.algorithms.tiny import DOMAINS, Loader, llama, wrap
from tests.algorithms.training_helpers import fit

Run = list[dict[str, np.ndarray]]  # by step: the weights of every rule

# Products of gradients are float32 sums; everything else is float64 sums of float32 losses.
IN_FLOAT32 = ("lookahead", "doge", "pike", "doge:official", "pike:tilt")


def fitting_rules(names: Sequence[str]) -> dict[str, UpdateRule]:
    """Every rule that can be made for ``names``: a few variants and the preset are for domains of their own."""
    rules = {}
    for name in (*UPDATE_RULES, *VARIANTS):
        try:
            rule = make(name, sorted(names))
            rule.init(sized(names))
            rules[name] = rule
        except InputError:
            continue
    return rules


def sized(names: Sequence[str]) -> Domains:
    """The domains with sizes of their own, whatever their order."""
    return as_domains(names, num_tokens=[1000.0 * (1 + len(name)) for name in names])


def together(names: Sequence[str], seen: list[dict[str, np.ndarray]]) -> UpdateRule:
    """One rule that updates all of them, appends their weights to ``seen``, and has uniform weights itself."""
    rules = fitting_rules(names)
    Together = namedtuple("Together", [f"rule_{number}" for number in range(len(rules))])  # type: ignore[misc]
    uniform = np.full(len(names), 1 / len(names))

    def update(state: Any, signals: Signals) -> tuple[Any, np.ndarray]:
        results = [rule.update(old, signals) for rule, old in zip(rules.values(), state)]
        seen.append({name: weights for name, (_, weights) in zip(rules, results)})
        return Together(*(new for new, _ in results)), uniform

    return UpdateRule(
        name="together",
        settings={},
        init=lambda domains: Together(*(rule.init(sized(names)) for rule in rules.values())),
        update=update,
        weights=lambda state: uniform,
        result=lambda state: uniform,
        needs=frozenset().union(*(rule.needs for rule in rules.values())),
    )


def weights_of_every_rule(
    steps: int = 4, micro: int | None = None, loader: Any = None, names: Sequence[str] = DOMAINS, **options: Any
) -> list[dict[str, np.ndarray]]:
    """Train a model in float64 for a few steps, and return the weights of every rule after each.

    In float64 losses come out the same to the last bit of their float32, however the batch is split.
    """
    seen: list[dict[str, np.ndarray]] = []
    windows = heldout_windows() if names == DOMAINS else renamed_windows(names)
    algorithm = DomainReweighting(together(names, seen), heldout=windows, every=1, reference=llama(seed=1).double())
    model = wrap(llama().double())
    fit(algorithm, model=model, loader=Loader() if loader is None else loader, micro=micro, steps=steps, **options)
    return seen


def renamed_windows(names: Sequence[str]) -> Any:
    """The windows of ``heldout_windows``, in the order of ``names``."""
    windows = heldout_windows()
    order = torch.tensor([DOMAINS.index(name) for name in names])
    windows.domains = tuple(names)
    windows.domain_ids = torch.argsort(order)[windows.domain_ids]
    return windows


def largest_difference(one: Run, other: Run, exact: bool = True) -> dict[str, float]:
    """Return, by rule, how far two runs are apart; of the rules that compare exactly, or of the others."""
    names = [name for name in one[0] if (name not in IN_FLOAT32) == exact]
    steps = list(zip(one, other, strict=True))
    return {name: max(float(np.max(np.abs(a[name] - b[name]))) for a, b in steps) for name in names}


def assert_equal_runs(one: Run, other: Run, exact: float = 1e-12, in_float32: float = 1e-6) -> None:
    """Compare the weights of every rule after every step."""
    for limit, is_exact in ((exact, True), (in_float32, False)):
        worst = max(largest_difference(one, other, is_exact).items(), key=lambda item: item[1])
        assert worst[1] <= limit, worst
