"""Find a mixture: train a reference, train a proxy under an update rule, freeze its weights; repeat for more rounds.

Iterated DoReMi (Xie et al. 2023, arXiv 2305.10429, section 2): round r trains its reference on the weights of round
r - 1, until no weight moves by ``tolerance`` (or by more than its noise), or the rounds are used up. Methods without a
reference train only a proxy, in one round.

    out/round-1/reference/    a run folder (algorithms.training_run), with model/ in Hugging Face format
    out/round-1/scores/       the reference's losses, or bigram tables, where those were asked for
    out/round-1/proxy/        a run folder with trajectory.npz
    out/round-1/mixture.json
    out/mixture.json          of the last round
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import TimeUnit
from rich.console import Console

from algorithms.domain_reweighting import COSTLY, DomainReweighting
from algorithms.heldout import HeldOutWindows
from algorithms.intervals import interval
from algorithms.models import check_model, samples_per_forward
from algorithms.references import FrozenModel, as_reference, count_bigrams, score
from algorithms.references.base import Reference
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.bounds import bounded
from algorithms.rules.diagnostics import hindsight
from algorithms.rules.fixed import given
from algorithms.rules.stopping import RoundVerdict, drift, extrapolate, round_verdict, standard_error
from algorithms.runs import begin_run, finish_run
from algorithms.same_tokenizer import check_tokenizer
from algorithms.training import TrainSettings, without_defaults
from algorithms.training_run import fingerprints, train_on
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.setup import resolve_curriculum

__all__ = ["SearchSettings", "find_mixture", "make_rule"]

_WORDS = ("train", "cached", "bigram", "none")  # references that are no path


@dataclass(frozen=True)
class SearchSettings:
    """How a mixture is searched for.

    Attributes:
        method: a row of ``UPDATE_RULES``.
        rule: the rule's own settings, e.g. ``{"eta": 0.1}``.
        proxy, reference_steps: how proxy and reference are trained; the reference takes ``reference_steps`` steps.
        rounds, tolerance: at most so many rounds; stop when no weight moved by ``tolerance`` or beyond its noise.
        reference: where a rule that compares gets its losses from. "train": a model trained first, run online;
            "cached": the same, its losses computed once; "bigram": tables counted from the shards; "none": nowhere; or
            the path of a model, of what ``mixer score`` wrote, or of a file of target losses.
        reference_mixture: what the first round's reference is trained on: "proportional" (to size; the paper's choice
            for The Pile), "uniform" (its choice for GLaM), or the path of a mixture file. A reference that hardly saw a
            domain is no yardstick for it: excess losses there come out low, and the domain is starved.
        apply, every: what the weights act on ("loss" or "sampling") and how often they are updated; None for the
            rule's own choice.
        heldout_windows: validation samples per domain that rules on held-out losses evaluate at every update.
        floor, ceiling: least and largest weight of every domain.
        max_epochs, budget_tokens: cap the weights so that a run of ``budget_tokens`` sees no domain more than
            ``max_epochs`` times; no cap where either is None.
        extrapolate_to: steps that the averaged weights should stand for, beyond those the proxy was trained.
        heldout_samples: per domain, for the held-out losses of reference and proxy.
        prior: what samples are drawn by while weights act on the loss, and what a rule that samples starts from where
            it has no start of its own: "uniform", "proportional", or the path of a mixture file.
        min_tokens: see ``DomainReweighting``.
    """

    method: str = "doremi"
    rule: Mapping[str, Any] = field(default_factory=dict)
    proxy: TrainSettings = field(default_factory=TrainSettings)
    reference_steps: int | None = None
    rounds: int = 1
    tolerance: float = 1e-3
    reference: str = "train"
    reference_mixture: str = "proportional"
    apply: str | None = None
    every: str | None = None
    heldout_windows: int = 16
    floor: float = 0.0
    ceiling: float = 1.0
    max_epochs: float | None = None
    budget_tokens: int | None = None
    extrapolate_to: int | None = None
    heldout_samples: int = 256
    prior: str = "uniform"
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance must be a finite number >= 0; got {self.tolerance}.")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings; later ones only where they are in use, so that searches from before them go on."""
        settings = without_defaults(asdict(self), {"prior": "uniform", "min_tokens": 0, "ceiling": 1.0})
        return {**settings, "proxy": self.proxy.to_dict()}


def make_rule(settings: SearchSettings) -> UpdateRule:
    """Return the rule, within its floor and caps.

    Raises: InputError: no such row, settings it does not take, or a combination that makes no sense.
    """
    if settings.method not in UPDATE_RULES:
        raise InputError(f"no method {settings.method!r}; there are {', '.join(sorted(UPDATE_RULES))}.")
    _check_names(settings.method, settings.rule)
    rule = UPDATE_RULES[settings.method](**settings.rule)
    if settings.rounds > 1 and ("reference" not in rule.needs or settings.reference not in ("train", "cached")):
        raise InputError(
            f"{settings.rounds} rounds of {settings.method!r} with reference {settings.reference!r} would all be the "
            "same: a round differs from the last by the reference it trains. Use one round, or a method that has one."
        )
    return _within_bounds(rule, settings)


def _check_names(method: str, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(UPDATE_RULES[method]).parameters
    unknown = sorted(set(settings) - set(parameters))
    missing = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if unknown:
        raise InputError(
            f"the method {method!r} has no setting {unknown[0]!r}; it has {', '.join(parameters) or 'none'}."
        )
    for name in missing:
        if name not in settings:
            raise InputError(f"the method {method!r} needs --set {name}=...; `mixer methods {method}` says what it is.")


def _within_bounds(rule: UpdateRule, settings: SearchSettings) -> UpdateRule:
    if (settings.floor, settings.ceiling, settings.max_epochs) == (0.0, 1.0, None):
        return rule
    caps = {"max_epochs": settings.max_epochs, "budget": settings.budget_tokens, "apply": settings.apply}
    return bounded(rule, floor=settings.floor, ceiling=settings.ceiling, **caps)  # type: ignore[arg-type]


def find_mixture(
    shards: str | os.PathLike[str], settings: SearchSettings, out: str | os.PathLike[str], console: Console
) -> Mixture:
    """Return the mixture found, after writing everything about it into ``out``; finished parts are not done again."""
    search = _Search(shards, Manifest.load(shards), make_rule(settings), settings, console)
    search.check()
    asked = {"command": "optimize", "shards": fingerprints(search.manifest), **settings.to_dict()}
    if begin_run(out, asked) is not None:
        return Mixture.load(Path(out) / "mixture.json")
    if len(search.names) <= settings.proxy.global_batch_size < 2 * len(search.names):
        console.print(
            f"[yellow]note:[/yellow] a batch of {settings.proxy.global_batch_size} samples holds less than two of each "
            f"of {len(search.names)} domains; their losses per step will be noisy. "
            f"--batch-size {4 * len(search.names)} is safer."
        )
    weights = _fixed_weights(settings.reference_mixture, search.manifest)
    verdicts: list[RoundVerdict] = []
    before_errors = np.zeros(len(search.names))  # the first round starts from weights that were given
    for number in range(1, settings.rounds + 1):
        mixture, errors = search.round(weights, Path(out) / f"round-{number}")
        before, after = (np.array([values[name] for name in search.names]) for values in (weights, mixture.weights))
        verdicts.append(round_verdict(before, after, np.hypot(before_errors, errors), settings.tolerance))
        before_errors = errors
        weights = dict(mixture.weights)
        if settings.rounds > 1:
            console.print(_told(number, verdicts[-1]), markup=False, highlight=False)
        if verdicts[-1].stop:
            break
    mixture.save(Path(out) / "mixture.json")
    changes = [verdict.largest_change for verdict in verdicts]
    noise = [verdict.noise for verdict in verdicts]
    with np.load(Path(out) / f"round-{len(changes)}" / "proxy" / "trajectory.npz", allow_pickle=False) as history:
        agreed = hindsight(history["weights"], history["heldout_loss"])
    outcome = {"rounds": len(changes), "largest_change": changes, "noise": noise, "stopped": verdicts[-1].reason}
    finish_run(out, {**outcome, "hindsight": agreed, "weights": dict(mixture.weights)})
    return mixture


def _told(number: int, verdict: RoundVerdict) -> str:
    why = f"; stopping: {verdict.reason}" if verdict.stop else ""
    moved = f"largest change of a weight {verdict.largest_change:.4f}"
    return f"round-{number}: {moved} (two standard errors: {verdict.noise:.4f}){why}"


def _fixed_weights(source: str, manifest: Manifest) -> dict[str, float]:
    stages = resolve_curriculum(source, manifest)
    if len(stages) > 1:
        raise InputError(f"{source} has {len(stages)} stages; a search takes one mixture.")
    return dict(stages[0].mixture.weights)


@dataclass(frozen=True)
class _Search:
    """What all rounds of a search share."""

    shards: str | os.PathLike[str]
    manifest: Manifest
    rule: UpdateRule
    settings: SearchSettings
    console: Console

    @property
    def names(self) -> tuple[str, ...]:
        return self.manifest.names

    @property
    def domains(self) -> Domains:
        prior = _fixed_weights(self.settings.prior, self.manifest)
        sizes = [self.manifest.split(name, "train").num_tokens for name in self.names]
        return as_domains(self.names, sizes, [prior[name] for name in self.names])

    def check(self) -> None:
        """Refuse, before anything is trained, what would fail only afterwards.

        Raises: InputError: for a single domain, an interval without an update, floors that do not fit, a reference
            that is nowhere.
        """
        settings = self.settings
        if len(self.names) < 2:
            raise InputError(
                f"{self.shards} has one domain, {self.names[0]!r}, whose weight can only be 1. Convert with a --domain "
                "rule that tells domains apart (file, field:..., path:...), or train on it by `mixer train`."
            )
        _fixed_weights(settings.reference_mixture, self.manifest)
        self._check_updates()
        if settings.floor * len(self.names) > 1:
            raise InputError(f"a floor of {settings.floor} for {len(self.names)} domains is more than 1 in all.")
        if settings.ceiling * len(self.names) < 1:
            raise InputError(f"a ceiling of {settings.ceiling} for {len(self.names)} domains is less than 1 in all.")
        self.rule.weights(self.rule.init(self.domains))
        check_model(settings.proxy.model)
        check_tokenizer(settings.proxy.model, self.shards, self.manifest)
        self._check_reference()
        if settings.extrapolate_to is not None:
            self._check_extrapolation(settings.extrapolate_to)

    def _check_updates(self) -> None:
        settings, method = self.settings, self.settings.method
        every = interval(settings.every or ("20ba" if self.rule.needs & COSTLY else "1ba"))
        steps, samples = settings.proxy.steps, settings.proxy.steps * settings.proxy.global_batch_size
        length = {TimeUnit.BATCH: steps, TimeUnit.SAMPLE: samples, TimeUnit.TOKEN: samples * self.manifest.seq_len}
        updates, needed = length[every.unit] // every.value, self.rule.first_move(len(self.names))  # type: ignore[index]
        if updates == 0:
            raise InputError(
                f"no update would happen in {steps} steps with one every {every}: take more steps, or a shorter "
                "--every."
            )
        if updates < needed:
            raise InputError(
                f"{method!r} moves its weights at update {needed} for the first time, and {steps} steps with one every "
                f"{every} have {updates}: take more steps, a shorter --every, or other settings (`mixer methods "
                f"{method}`)."
            )

    def _check_reference(self) -> None:
        needs, reference, method = self.rule.needs, self.settings.reference, self.settings.method
        if "reference" in needs and reference == "none":
            raise InputError(
                f"the method {method!r} compares with a reference: --reference none leaves it nothing. Take "
                "train, cached, bigram or a path; or a method that needs none (`mixer methods`)."
            )
        used = "reference" in needs or ("heldout_reference" in needs and reference not in _WORDS)
        if not used and reference not in ("train", "none"):
            raise InputError(
                f"the method {method!r} compares with no such reference: --reference {reference} would be ignored."
            )
        if used and reference not in _WORDS:
            as_reference(reference)
            check_tokenizer(reference, self.shards, self.manifest)
        trains = "reference" in needs and reference in ("train", "cached")
        if not trains and self.settings.reference_steps:
            raise InputError(
                f"no reference is trained for {method!r} with --reference {reference}: leave out --reference-steps."
            )

    def _check_extrapolation(self, total: int) -> None:
        if not self.rule.averages:
            raise InputError(
                f"--extrapolate-to is for methods whose result is the average of their weights; that of "
                f"{self.settings.method!r} is not."
            )
        if total < self.settings.proxy.steps:
            raise InputError(
                f"--extrapolate-to {total} is less than the {self.settings.proxy.steps} steps that the proxy trains."
            )

    def round(self, weights: Mapping[str, float], folder: Path) -> tuple[Mixture, Any]:
        """Return the mixture of one round whose reference trains on ``weights``, and its standard errors (D,)."""
        reference = self._reference(weights, folder)
        self._train_proxy(reference, folder)
        with np.load(folder / "proxy" / "trajectory.npz", allow_pickle=False) as saved:
            history, steps = saved["weights"], int(saved["steps"].max(initial=-1)) + 1
        if not steps:
            raise InputError(
                "the proxy was stopped before its first update: take a larger --patience, or a shorter --every."
            )
        errors = standard_error(history, np.random.default_rng(self.settings.proxy.seed))
        found = Mixture.load(folder / "proxy" / "mixture.json")
        values, facts = self._extrapolated(dict(found.weights), history, steps, folder.name)
        mixture = Mixture(values, {**found.provenance, **self._facts(weights, folder.name), **facts})
        mixture.save(folder / "mixture.json")
        return mixture, errors

    def _reference(self, weights: Mapping[str, float], folder: Path) -> Reference | None:
        """Return what the rule compares with, if it does."""
        source = self.settings.reference
        if "reference" not in self.rule.needs:
            # Losses of a reference on held-out windows are optional: without them it is the model's own first ones.
            wanted = "heldout_reference" in self.rule.needs and source not in _WORDS
            return as_reference(source) if wanted else None
        if source == "bigram":
            self.console.print(f"[dim]{folder.name}: counting bigrams[/dim]")
            return as_reference(count_bigrams(self.shards, folder / "scores"))
        if source not in ("train", "cached"):
            return as_reference(source)
        steps = self.settings.reference_steps or self.settings.proxy.steps
        settings = replace(self.settings.proxy, steps=steps, patience=None)
        self._train(Mixture(weights), settings, folder / "reference")
        model = FrozenModel(folder / "reference" / "model")
        if source == "train":
            return model
        self.console.print(f"[dim]{folder.name}: computing the reference's losses of every sample[/dim]")
        fits = min(32, samples_per_forward(self.manifest.tokenizer.vocab_size, self.manifest.seq_len))
        return as_reference(score(self.shards, model, folder / "scores", batch_size=fits))

    def _train_proxy(self, reference: Reference | None, folder: Path) -> None:
        rule, settings = self.rule, self.settings
        needs_heldout = any(need.startswith("heldout") for need in rule.needs)
        windows = HeldOutWindows(self.shards, samples_per_domain=settings.heldout_windows) if needs_heldout else None
        algorithm = DomainReweighting(
            rule,
            reference=reference,
            apply=settings.apply,  # type: ignore[arg-type]
            every=settings.every,
            heldout=windows,
            domains=self.domains,
            min_tokens=settings.min_tokens,
            on_nonfinite=settings.proxy.on_nonfinite,
        )
        domains = self.domains
        sampling = rule.weights(rule.init(domains)) if algorithm.target == "sampling" else domains.prior
        # A proxy that started as its own reference would have no excess loss anywhere, and learn nothing from it.
        proxy = replace(settings.proxy, seed=settings.proxy.seed + 1)
        self._train(Mixture(dict(zip(self.names, sampling.tolist()))), proxy, folder / "proxy", algorithm)

    def _train(
        self, mixture: Mixture, settings: TrainSettings, folder: Path, algorithm: DomainReweighting | None = None
    ) -> None:
        label = f"{folder.parent.name} {folder.name}"
        samples = self.settings.heldout_samples
        train_on(
            self.shards,
            mixture,
            settings,
            folder,
            algorithm=algorithm,
            label=label,
            console=self.console,
            heldout_samples=samples,
        )

    def _extrapolated(
        self, found: dict[str, float], history: Any, steps: int, round_name: str
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the weights of a longer run where that was asked, else those found; and the facts about it.

        Args:
            history: weights (n, D) over the run, evenly spaced.
            steps: that the proxy was trained, fewer than asked where it was stopped early.
        """
        settings, total = self.settings, self.settings.extrapolate_to
        if total is None:
            return found, {"extrapolated_to": None}
        longer = extrapolate(history, len(history) * max(total / steps, 1.0))
        # What was in force may exceed the caps of the result.
        rule = _within_bounds(given(dict(zip(self.names, longer.tolist()))), settings)
        moved = drift(history) if len(history) >= 3 else None
        self.console.print(
            f"{round_name}: weights of {steps} steps extrapolated to {total}; from the middle third to the last they "
            f"still moved by {'an unknown amount' if moved is None else f'{moved:.4f}'}",
            markup=False,
            highlight=False,
        )
        values = dict(zip(self.names, rule.result(rule.init(self.domains)).tolist()))
        return values, {"extrapolated_to": total, "extrapolated_from": steps, "drift": moved}

    def _facts(self, weights: Mapping[str, float], round_name: str) -> dict[str, Any]:
        """Return what there is to know of this search beside what the proxy's mixture says itself."""
        settings, compares = self.settings, "reference" in self.rule.needs
        return {
            "proxy": settings.proxy.to_dict(),
            "round": round_name,
            "reference_kind": settings.reference if compares else None,
            "reference_weights": dict(weights) if compares else None,
            "tokenizer": self.manifest.tokenizer.fingerprint,
            "seq_len": self.manifest.seq_len,
            "shards": fingerprints(self.manifest),
        }
