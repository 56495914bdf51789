"""How the shared tests make each row of ``UPDATE_RULES``, and random signals that carry every optional field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from algorithms.rules import UPDATE_RULES, UpdateRule, as_domains
from algorithms.rules.base import Domains
from algorithms.signals import Signals, loss_histogram

NAMES = ("code", "law", "math", "news", "web")

# Settings that a rule cannot do without, by domain name or not. Everything else is at its default.
REQUIRED: dict[str, Any] = {
    "unimax": lambda names: {"budget": 500.0, "max_epochs": 4.0},
    "preset": lambda names: {
        "name": "llama-3.1",
        "names": dict(zip(names, ["code", "general", "math", "multilingual"])),
    },
    "given": lambda names: {"weights": {name: 1.0 + i % 3 for i, name in enumerate(sorted(names))}},
    "wasserstein": lambda names: {
        "distances": {a: {b: 1.0 + (hash_of(a) + hash_of(b)) % 3 for b in names if a < b} for a in names}
    },
    "sheared_llama": lambda names: {"targets": dict.fromkeys(names, 2.0)},
    "modified_doremi": lambda names: {"targets": {max(names): 1.5}},
}
# Settings that make a rule do its work within the few updates of a test.
QUICK: dict[str, dict[str, Any]] = {
    "ado": {"warmup": 10, "refit_every": 5, "ignore": 0},
    "aioli": {"sweeps": 1, "period": 8},
}


# Other settings that change what a rule computes, as "name:what is different".
VARIANTS: dict[str, dict[str, Any]] = {
    "doremi:official": {"variant": "official", "vocab_size": 1000},
    "doremi:recommended": {"variant": "recommended"},
    "doremi:domain clip": {"clip": "domain"},
    "doremi:confident": {"clip": "confident", "confidence": 2.0},
    "doremi:no clip": {"clip": "none"},
    "group_dro:official": {"variant": "official", "adjustment": 2.0},
    "group_dro:automatic": {"automatic": True},
    "agnostic:box": {"eta": 0.2, "lower": 0.05, "upper": 0.5},
    "mero:best": {"risk": "best"},
    "mero:given": {"risk": {"code": 1.0, "law": 2.0, "math": 0.5, "news": 1.5, "web": 2.5}},
    "divergence_ball:kl": {"ball": "kl", "radius": 0.2, "min_ratio": 0.0},
    "divergence_ball:cvar": {"ball": "cvar", "radius": 0.5, "smoothing": 1.0},
    "divergence_ball:baseline": {"baseline": "reference"},
    "validation_feedback:best": {"targets": "best"},
    "validation_feedback:reference": {"targets": "reference", "clip": True, "adjustment": 3.0},
    "validation_feedback:stage": {"targets": {"web": 1.5}, "others": "reference"},
    "validation_feedback:progress": {"mode": "progress"},
    "modified_doremi:no clip": {"clip": False, "targets": {"web": 1.5}},
    "odm:official": {"variant": "official"},
    "skill_it:graph": {"graph": {"code": {"math": 0.5}, "web": {"news": 1.0}}, "variant": "official"},
    "aioli:memory": {"sweeps": 1, "period": 8, "memory": 0.1},
    "ado:official": {"warmup": 10, "refit_every": 5, "ignore": 0, "variant": "official"},
    "doge:official": {"variant": "official", "targets": ["law", "web"]},
    "pike:tilt": {"tilt": 2.0},
    "jtt:none": {"baseline": "none"},
}


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def make(name: str, names: Sequence[str] = NAMES) -> UpdateRule:
    if name in VARIANTS:
        return UPDATE_RULES[name.partition(":")[0]](**VARIANTS[name])
    settings = dict(QUICK.get(name, {}))
    if name in REQUIRED:
        settings.update(REQUIRED[name](tuple(names)))
    return UPDATE_RULES[name](**settings)


def names_for(name: str) -> tuple[str, ...]:
    """The preset has four domains, every other rule is tried with five."""
    return NAMES[:4] if name == "preset" else NAMES


def domains_for(name: str, names: Sequence[str] | None = None) -> Domains:
    names = names_for(name) if names is None else names
    sizes = [100.0 * (1 + hash_of(item) % 7) for item in names]
    return as_domains(names, num_tokens=sizes)


def random_signals(seed: int, num_domains: int, absent: Sequence[int] = (), scale: float = 4.0) -> Signals:
    """Sums that are multiples of 1/64 and far below 2^53: their additions are exact in any order."""
    rng = np.random.default_rng(seed)
    present = np.ones(num_domains)
    present[list(absent)] = 0.0

    def exact(values: np.ndarray) -> np.ndarray:
        return np.round(values * 64) / 64

    tokens = rng.integers(50, 500, num_domains) * present
    mean = rng.uniform(0.1, scale, num_domains)
    gradients = exact(rng.normal(size=(num_domains, 8))) * present[:, None]
    sequences = rng.integers(2, 9, num_domains) * present
    ids = np.repeat(np.arange(num_domains), sequences.astype(int))
    return Signals(
        num_tokens=tokens,
        loss=exact(tokens * mean),
        num_sequences=sequences,
        loss_squared=exact(sequences * mean**2),
        reference_loss=exact(tokens * rng.uniform(0.1, scale, num_domains)),
        clipped_excess=exact(tokens * rng.uniform(0.1, 1.0, num_domains)),
        heldout_loss=exact(64 * present * mean),
        heldout_tokens=64 * present,
        heldout_reference_loss=exact(64 * present * rng.uniform(0.1, scale, num_domains)),
        behaviour=exact(rng.uniform(0.1, 1.0, num_domains)),
        gradient_products=gradients @ gradients.T,
        gradient_counts=np.outer(present, present),
        gradient_variance=exact(rng.uniform(0.0, 1.0, num_domains)) * present,
        histogram=loss_histogram(rng.uniform(0.0, scale, ids.size), ids, num_domains),
        excess_squared=exact(sequences * rng.uniform(0.0, scale, num_domains)),
    )


def equal_signals(num_domains: int, absent: Sequence[int] = ()) -> Signals:
    """Every present domain has the same losses and the same gradients."""
    present = np.ones(num_domains)
    present[list(absent)] = 0.0
    ids = np.repeat(np.arange(num_domains), 4 * present.astype(int))
    return Signals(
        num_tokens=64 * present,
        loss=128 * present,
        num_sequences=4 * present,
        loss_squared=16 * present,
        reference_loss=96 * present,
        clipped_excess=32 * present,
        heldout_loss=128 * present,
        heldout_tokens=64 * present,
        heldout_reference_loss=96 * present,
        behaviour=np.ones(num_domains),
        gradient_products=np.outer(present, present),
        gradient_counts=np.outer(present, present),
        gradient_variance=present,
        histogram=loss_histogram(np.full(ids.size, 2.0), ids, num_domains),
        excess_squared=present,
    )


def permuted(signals: Signals, order: Sequence[int]) -> Signals:
    """The same signals with the domains in another order."""
    index = list(order)
    square = ("gradient_products", "gradient_counts")
    fields = signals._asdict().items()
    return Signals(**{k: v if v is None else v[np.ix_(index, index)] if k in square else v[index] for k, v in fields})
