"""One small language model trained on a mixture or under a rule, in a plain loop; finished runs are kept.

    runs = Runs(shards, Setting(steps=400, batch_size=64), folder)
    baseline = runs.get(Run(seed=0, mixture=(0.25, 0.25, 0.25, 0.25)))
    proxy = runs.get(Run(seed=1, rule="doremi", settings={"eta": 0.1}, reference=baseline.key))
    main = runs.get(Run(seed=0, mixture=proxy.weights))

A run is a function of what ``Run`` and ``Setting`` say and of the shards. Under a key made of these its result lies in
the folder, with the model where another run may need it as reference.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms.domain_gradients import measure_gradients
from algorithms.domain_losses import DomainLosses
from algorithms.evaluation import heldout_samples
from algorithms.heldout import HeldOutWindows
from algorithms.losses import labels_of, loss_mask, token_losses
from algorithms.references import FrozenModel, as_reference, bigram_distances, count_bigrams
from algorithms.references.base import Reference
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import UpdateRule, as_domains
from algorithms.signals import Signals
from mixer import MixtureLoader

__all__ = ["Missing", "Result", "Run", "Runs", "Setting"]

Vector = NDArray[np.float64]
WINDOWS = 16  # held-out samples per domain that rules look at
GRADIENT_RULES = frozenset({"gradients", "gradient_variance"})


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison have in common."""

    steps: int
    batch_size: int
    width: int = 64
    layers: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.06


@dataclass(frozen=True)
class Run:
    """One training: samples drawn by ``mixture`` (by uniform weights if None), under a rule or without one.

    ``reference`` is the key of the run whose model is the reference, or "bigram". ``every`` counts steps between
    updates. ``steps`` is less than the setting's for the small runs of a regression. ``start`` is the key of the run
    whose model training continues from, at 0.3 of the learning rate.
    """

    seed: int
    mixture: tuple[float, ...] | None = None
    rule: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    every: int = 1
    steps: int | None = None
    start: str | None = None


@dataclass(frozen=True)
class Result:
    """Mean losses per domain in nats per token: on the ``test`` samples, and on the ``windows`` that methods may see
    (all of them, where rules look at 16 per domain).

    ``weights`` are those that the rule ends with as its result, ``drawn`` the realised shares of the samples, ``swing``
    the mean change of a weight per update; ``seconds`` is CPU time.
    """

    key: str
    test: tuple[float, ...]
    windows: tuple[float, ...]
    weights: tuple[float, ...]
    drawn: tuple[float, ...]
    swing: float
    seconds: float


class Missing(Exception):
    """A run is not there, and none shall be made."""


class Runs:
    """All runs on one folder of shards; with ``finished`` only those that are there already."""

    def __init__(self, shards: Path, setting: Setting, folder: Path, *, finished: bool = False) -> None:
        self.shards, self.setting, self.folder, self.finished = shards, setting, folder, finished
        loader = MixtureLoader(shards, mixture="uniform", global_batch_size=1)
        self.domains, self.manifest = loader.domains, loader.manifest
        self.sizes = np.array([loader.num_samples[name] for name in loader.domains], dtype=np.float64)
        held_out = {name: heldout_samples(shards, name, max_samples=1 << 20) for name in self.domains}
        self.seen = {name: _spread(rows[0::2], 256) for name, rows in held_out.items()}
        self.windows = {name: _spread(rows, WINDOWS) for name, rows in self.seen.items()}
        self.test = {name: _spread(rows[1::2], 256) for name, rows in held_out.items()}

    def get(self, run: Run) -> Result:
        """Return the result of a run, made now if it is not there yet.

        Raises: Missing: if it is not there, and ``finished`` was asked for.
        """
        path = self.folder / f"{self.key(run)}.json"
        if not path.exists():
            if self.finished:
                raise Missing(path.name)
            result, model = self._train(run)
            if run.rule is None and (run.steps is None or run.start is not None):
                torch.save(model.state_dict(), path.with_suffix(".pt"))
            _write(path, json.dumps({"run": asdict(run), "setting": asdict(self.setting), **asdict(result)}))
        saved = json.loads(path.read_text())
        return Result(**{name: _hashable(saved[name]) for name in Result.__dataclass_fields__})

    def key(self, run: Run) -> str:
        shards = {name: self.manifest.split(name, "train").fingerprint for name in self.domains}
        # Later fields only where they are in use, so that runs from before them are found.
        asked = {name: value for name, value in asdict(run).items() if name != "start" or value is not None}
        content = json.dumps([asked, asdict(self.setting), shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _train(self, run: Run) -> tuple[Result, nn.Module]:
        start = time.process_time()
        loop = _Loop(self, run)
        for step in range(run.steps or self.setting.steps):
            loop.step(step)
        test, windows = mean_losses(loop.model, self.test), mean_losses(loop.model, self.seen)
        path = np.array(loop.path)
        swing = float(np.abs(np.diff(path, axis=0)).mean()) if len(path) > 1 else 0.0
        drawn = tuple(row["share"] for row in loop.loader.stats()["domains"].values())
        weights = tuple(loop.rule.result(loop.state).tolist())
        seconds = time.process_time() - start
        return Result(self.key(run), test, windows, weights, drawn, swing, seconds), loop.model

    def model(self, seed: int) -> nn.Module:
        """Return a new Llama of the setting's size, with weights drawn from the seed."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.manifest.tokenizer.vocab_size,
                hidden_size=self.setting.width,
                intermediate_size=3 * self.setting.width,
                num_hidden_layers=self.setting.layers,
                num_attention_heads=self.setting.width // 16,
                max_position_embeddings=self.manifest.seq_len,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )

    def targets(self, run: Run) -> dict[str, float]:
        """Return the losses by domain of a finished run's model on the windows that rules look at."""
        return dict(zip(self.domains, mean_losses(self.load(self.get(run).key), self.windows)))

    def distances(self) -> dict[str, dict[str, float]]:
        """Return how far the domains' bigrams are apart."""
        return bigram_distances(count_bigrams(self.shards, self.folder / "bigrams"))

    def reference(self, source: str | None) -> Reference | None:
        """Return the model of another run as reference, or the bigram tables."""
        if source is None:
            return None
        if source == "bigram":
            return as_reference(count_bigrams(self.shards, self.folder / "bigrams"))
        return FrozenModel(self.load(source))

    def load(self, key: str) -> nn.Module:
        """Return the model of a finished run on a fixed mixture."""
        model = self.model(0)
        model.load_state_dict(torch.load(self.folder / f"{key}.pt", weights_only=True))
        return model


class _Loop:
    """The training loop of docs/training.md, with everything that any rule asks for."""

    def __init__(self, runs: Runs, run: Run) -> None:
        setting, count = runs.setting, len(runs.domains)
        self.run, self.rule = run, _rule_of(run, runs.domains)
        mixture = run.mixture or (1 / count,) * count
        self.model = runs.model(run.seed) if run.start is None else runs.load(run.start)
        self.loader = MixtureLoader(
            runs.shards,
            mixture=dict(zip(runs.domains, mixture)),
            global_batch_size=setting.batch_size,
            seed=run.seed,
        )
        self.batches = iter(self.loader)
        self.reference = runs.reference(run.reference)
        self.losses = DomainLosses(
            self.loader,
            reference=self.reference,
            normalization=self.rule.normalization,
            histogram="histogram" in self.rule.needs,
        )
        self.state = self.rule.init(as_domains(runs.domains, (runs.sizes * runs.manifest.seq_len).tolist()))
        self.samples_by_rule = self.rule.applies == "sampling" and run.rule is not None
        self.windows = HeldOutWindows(runs.windows, batch_size=64)
        self.pending: Signals | None = None
        self.path = [self.rule.weights(self.state)]
        rate = setting.learning_rate * (1.0 if run.start is None else 0.3)
        self.at_first: Vector | None = None
        if "heldout_reference" in self.rule.needs:
            self.at_first = self._windows()[0]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        steps = run.steps or setting.steps
        warmup = max(1, round(setting.warmup * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warmup, 0.1 ** (max(step - warmup, 0) / steps))
        )

    def step(self, step: int) -> None:
        batch = next(self.batches)
        weights = None if self.run.rule is None or self.samples_by_rule else self.rule.weights(self.state)
        self.losses(self.model(input_ids=batch["input_ids"]).logits, batch, weights).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        signals = self.losses.signals()._replace(behaviour=np.array(list(self.loader.weights.values())))
        if self.run.rule is not None:
            self._update(step, batch, signals)

    def _update(self, step: int, batch: Mapping[str, torch.Tensor], signals: Signals) -> None:
        self.pending = signals if self.pending is None else self.pending + signals
        if (step + 1) % self.run.every:
            return
        signals, self.pending = self.pending, None
        if "heldout" in self.rule.needs:
            losses, tokens = self._windows()
            signals = signals._replace(heldout_loss=losses, heldout_tokens=tokens, heldout_reference_loss=self.at_first)
        if self.rule.needs & GRADIENT_RULES:
            signals = self._with_gradients(batch, signals)
        self.state, weights = self.rule.update(self.state, signals)
        self.path.append(weights)
        if self.samples_by_rule:
            self.loader.set_weights(weights)

    @torch.no_grad()
    def _windows(self) -> tuple[Vector, Vector]:
        return self.windows.evaluate(self._losses_of, 0, 1)

    def _losses_of(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return token_losses(self.model(input_ids=batch["input_ids"]).logits, batch["input_ids"])

    def _with_gradients(self, batch: Mapping[str, torch.Tensor], signals: Signals) -> Signals:
        batch = {**batch, "labels": labels_of(batch)}
        mask = loss_mask(batch["labels"])
        ids = batch["domain_ids"]
        num_tokens = torch.bincount(ids, minlength=len(self.loader.domains)) * mask.shape[1]
        sums = measure_gradients(
            lambda part: (self._losses_of(part), loss_mask(part["labels"])),
            batch,
            num_tokens,
            list(self.model.parameters()),
            rows_at_once=len(ids),
            variance="gradient_variance" in self.rule.needs,
        )
        return signals._replace(
            gradient_products=sums.products, gradient_counts=sums.counts, gradient_variance=sums.variance
        )


@torch.no_grad()
def mean_losses(model: nn.Module, samples: Mapping[str, NDArray[np.int64]]) -> tuple[float, ...]:
    """Return the mean loss over each domain's samples, nats per token."""
    means = []
    for rows in samples.values():
        total, count = 0.0, 0
        for part in torch.from_numpy(rows).split(64):
            loss = token_losses(model(input_ids=part).logits, part)
            total, count = total + float(loss.double().sum()), count + loss.numel()
        means.append(total / count)
    return tuple(means)


def _spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return ``count`` rows, or as many as there are, evenly spread: neighbours are of one document."""
    count = min(count, len(rows))
    return rows[np.arange(count) * len(rows) // count]


def _rule_of(run: Run, domains: tuple[str, ...]) -> UpdateRule:
    if run.rule is not None:
        return UPDATE_RULES[run.rule](**run.settings)
    return UPDATE_RULES["given"](weights=dict(zip(domains, run.mixture or (1.0,) * len(domains))))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
