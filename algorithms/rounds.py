"""Find a mixture: train a reference, train a proxy under an update rule, freeze its weights; repeat for more rounds.

Iterated DoReMi (Xie et al. 2023, arXiv 2305.10429, section 2): round r trains its reference on the weights of round
r − 1, until no weight moves by ``tolerance`` or the rounds are used up. Methods without a reference train only a proxy.

    out/round-1/reference/    a run folder (algorithms.runs), with model/ in Hugging Face format
    out/round-1/proxy/        a run folder with trajectory.npz
    out/round-1/mixture.json
    out/mixture.json          of the last round
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from algorithms.domain_reweighting import DomainReweighting
from algorithms.evaluation import heldout_losses
from algorithms.models import build_model
from algorithms.references import FrozenModel
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import UpdateRule, as_domains
from algorithms.runs import begin_run, finish_run
from algorithms.training import TrainSettings, train
from mixer.dataloader import MixtureLoader, resolve_mixture
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.projection import project

__all__ = ["SearchSettings", "find_mixture", "make_rule", "train_on"]


@dataclass(frozen=True)
class SearchSettings:
    """How a mixture is searched for.

    Attributes:
        method: a row of ``UPDATE_RULES``.
        rule: the rule's own settings, e.g. ``{"eta": 0.1}``.
        proxy, reference_steps: how proxy and reference are trained; the reference takes ``reference_steps`` steps.
        rounds, tolerance: at most so many rounds; stop when no weight moved by ``tolerance``.
        reference: folder of a ready model, instead of training one.
        reference_mixture: what the first round's reference is trained on: "proportional" (to size; the paper's choice
            for The Pile), "uniform" (its choice for GLaM), or the path of a mixture file. A reference that hardly saw a
            domain is no yardstick for it: excess losses there come out low, and the domain is starved.
        max_epochs, budget_tokens: cap each final weight so that a run of ``budget_tokens`` sees no domain more than
            ``max_epochs`` times; no cap where either is None.
        heldout_samples: per domain, for the held-out losses of reference and proxy.
    """

    method: str = "doremi"
    rule: Mapping[str, Any] = field(default_factory=dict)
    proxy: TrainSettings = field(default_factory=TrainSettings)
    reference_steps: int | None = None
    rounds: int = 1
    tolerance: float = 1e-3
    reference: str | None = None
    reference_mixture: str = "proportional"
    max_epochs: float | None = None
    budget_tokens: int | None = None
    heldout_samples: int = 256


def make_rule(method: str, settings: Mapping[str, Any]) -> UpdateRule:
    """Return the rule of a row of ``UPDATE_RULES``.

    Raises: InputError: no such row, or settings it does not take.
    """
    if method not in UPDATE_RULES:
        raise InputError(f"no method {method!r}; there are {', '.join(sorted(UPDATE_RULES))}.")
    try:
        return UPDATE_RULES[method](**settings)
    except TypeError as error:
        raise InputError(f"method {method!r} cannot be made with {dict(settings)}: {error}.") from error


def find_mixture(
    shards: str | os.PathLike[str], settings: SearchSettings, out: str | os.PathLike[str], console: Console
) -> Mixture:
    """Return the mixture found, after writing everything about it into ``out``; finished parts are not done again."""
    manifest, rule = Manifest.load(shards), make_rule(settings.method, settings.rule)
    if begin_run(out, {"command": "optimize", "shards": _fingerprints(manifest), **asdict(settings)}) is not None:
        return Mixture.load(Path(out) / "mixture.json")
    weights, changes = dict(resolve_mixture(settings.reference_mixture, manifest).weights), []
    for number in range(1, settings.rounds + 1):
        folder = Path(out) / f"round-{number}"
        mixture = _one_round(shards, manifest, rule, settings, weights, folder, console)
        changes.append(max(abs(mixture.weights[name] - weights[name]) for name in manifest.names))
        weights = dict(mixture.weights)
        mixture.save(Path(out) / "mixture.json")
        if changes[-1] < settings.tolerance:
            break
    finish_run(out, {"rounds": len(changes), "largest_change": changes, "weights": dict(mixture.weights)})
    return mixture


def _one_round(
    shards: str | os.PathLike[str],
    manifest: Manifest,
    rule: UpdateRule,
    settings: SearchSettings,
    weights: Mapping[str, float],
    folder: Path,
    console: Console,
) -> Mixture:
    reference = None
    if "reference" in rule.needs:
        if settings.reference is None:
            steps = settings.reference_steps or settings.proxy.steps
            reference_settings = TrainSettings(**{**settings.proxy.to_dict(), "steps": steps})
            train_on(
                shards,
                Mixture(weights),
                reference_settings,
                folder / "reference",
                label=f"{folder.name} reference",
                console=console,
                heldout_samples=settings.heldout_samples,
            )
        reference = FrozenModel(settings.reference or folder / "reference" / "model")
    names = manifest.names
    domains = as_domains(names, [manifest.split(name, "train").num_tokens for name in names])
    algorithm = DomainReweighting(rule, reference=reference, domains=domains)
    sampling = rule.weights(rule.init(domains)) if rule.applies == "sampling" else np.full(len(names), 1 / len(names))
    # A proxy that started as its own reference would have no excess loss anywhere, and learn nothing from it.
    proxy_settings = TrainSettings(**{**settings.proxy.to_dict(), "seed": settings.proxy.seed + 1})
    train_on(
        shards,
        Mixture(dict(zip(names, sampling.tolist()))),
        proxy_settings,
        folder / "proxy",
        algorithm=algorithm,
        label=f"{folder.name} proxy",
        console=console,
        heldout_samples=settings.heldout_samples,
    )
    mixture = Mixture.load(folder / "proxy" / "mixture.json")
    capped = project(np.array([mixture.weights[name] for name in names]), upper=_ceilings(manifest, settings))
    facts = {
        **mixture.provenance,
        "proxy": settings.proxy.to_dict(),
        "round": folder.name,
        "reference_weights": dict(weights) if reference is not None else None,
        "reference": reference.fingerprint if reference is not None else None,
        "tokenizer": manifest.tokenizer.fingerprint,
        "seq_len": manifest.seq_len,
        "shards": _fingerprints(manifest),
        "max_epochs": settings.max_epochs,
        "budget_tokens": settings.budget_tokens,
    }
    final = Mixture(dict(zip(names, capped.tolist())), facts)
    final.save(folder / "mixture.json")
    return final


def train_on(
    shards: str | os.PathLike[str],
    mixture: Mixture,
    settings: TrainSettings,
    folder: Path,
    *,
    algorithm: DomainReweighting | None = None,
    label: str,
    console: Console,
    heldout_samples: int = 256,
    save_every: int = 50,
    **loader_options: Any,
) -> dict[str, Any]:
    """Train one model on ``mixture`` and return its result: held-out losses, realised shares, epochs.

    ``algorithm`` defaults to counting the per-domain losses without changing anything. Already finished: only the
    result is read. Interrupted: goes on from the last checkpoint.
    """
    manifest = Manifest.load(shards)
    asked = {
        "command": "train",
        "mixture": dict(mixture.weights),
        "shards": _fingerprints(manifest),
        **settings.to_dict(),
        **loader_options,
    }
    if algorithm is not None and algorithm.rule is not None:
        asked |= {"rule": algorithm.rule.name, "rule_settings": dict(algorithm.rule.settings)}
    result = begin_run(folder, asked)
    if result is not None:
        console.print(f"[dim]{label}: finished before, kept ({folder})[/dim]")
        return result
    loader = MixtureLoader(
        shards, mixture=mixture, global_batch_size=settings.global_batch_size, seed=settings.seed, **loader_options
    )
    model = build_model(
        settings.model, vocab_size=manifest.tokenizer.vocab_size, seq_len=manifest.seq_len, seed=settings.seed
    )
    algorithm = algorithm or DomainReweighting()
    train(model, loader, settings, folder, algorithms=[algorithm], label=label, save_every=save_every, console=console)
    algorithm.save_trajectory(folder / "trajectory.npz")
    if algorithm.rule is not None:
        algorithm.mixture().save(folder / "mixture.json")
    heldout = heldout_losses(model, shards, max_samples=heldout_samples)
    model.save_pretrained(folder / "model")
    return finish_run(
        folder,
        {
            "heldout": {name: value._asdict() for name, value in heldout.items()},
            "average": float(np.mean([value.loss for value in heldout.values()])),
            "worst": float(max(value.loss for value in heldout.values())),
            "weights": dict(mixture.weights),
            "num_samples": dict(loader.num_samples),
            "loader": loader.stats(),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_tokens": settings.steps * settings.global_batch_size * manifest.seq_len,
        },
    )


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    return {name: manifest.split(name, "train").fingerprint for name in manifest.names}


def _ceilings(manifest: Manifest, settings: SearchSettings) -> Any:
    if settings.max_epochs is None or settings.budget_tokens is None:
        return 1.0
    sizes = np.array([manifest.split(name, "train").num_tokens for name in manifest.names], dtype=np.float64)
    return np.minimum(1.0, settings.max_epochs * sizes / settings.budget_tokens)
