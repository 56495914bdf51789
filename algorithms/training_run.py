"""One training run in its folder: train a model on a mixture, evaluate every domain, keep the result.

    out/run.json       what was asked              out/trajectory.npz     losses (and weights) over the steps
    out/model/         Hugging Face format         out/result.json        held-out losses, realised shares, epochs

``mixer train`` is this; a search (``algorithms.rounds``) does it for its references and proxies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from algorithms.domain_reweighting import DomainReweighting
from algorithms.early_stopping import WorstDomainEarlyStopping
from algorithms.evaluation import HeldOut, heldout_losses
from algorithms.evaluation import heldout_samples as _heldout_samples
from algorithms.models import build_model, check_model
from algorithms.objective import weighted_average
from algorithms.ranks import rank, wait_for_all
from algorithms.runs import begin_run, finish_run
from algorithms.same_tokenizer import check_tokenizer
from algorithms.training import TrainSettings, train
from mixer.dataloader import MixtureLoader
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fingerprints", "train_on"]


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
    curriculum: str | None = None,
    **loader_options: Any,
) -> dict[str, Any]:
    """Train one model on ``mixture`` and return its result: held-out losses, realised shares, epochs.

    ``algorithm`` defaults to counting the per-domain losses without changing anything. ``curriculum`` is the path of a
    mixture file with stages, of which ``mixture`` is the first. Already finished: only the result is read.
    Interrupted: goes on from the last checkpoint.
    """
    manifest = Manifest.load(shards)
    for name in manifest.names:
        # Missing or damaged held-out samples should be known before hours of training, not after.
        _heldout_samples(shards, name, max_samples=heldout_samples)
    check_model(settings.model)
    check_tokenizer(settings.model, shards, manifest)
    algorithm = algorithm or DomainReweighting(on_nonfinite=settings.on_nonfinite)
    stopping = _early_stopping(shards, settings)
    asked = _asked(manifest, mixture, settings, algorithm, loader_options) | {"heldout_samples": heldout_samples}
    if curriculum is not None:
        asked["curriculum"] = json.loads(Path(curriculum).read_text(encoding="utf-8"))
    result = begin_run(folder, asked)
    if result is not None:
        console.print(f"{label}: finished before, kept ({folder})", style="dim", markup=False)
        return result
    loader = MixtureLoader(
        shards,
        mixture=mixture if curriculum is None else curriculum,
        global_batch_size=settings.global_batch_size,
        seed=settings.seed,
        force="forced" in mixture.provenance,
        **loader_options,
    )
    if algorithm.rule is None and curriculum is None and settings.patience is None:
        _check_lasts(loader, settings.steps)
    model = build_model(
        settings.model, vocab_size=manifest.tokenizer.vocab_size, seq_len=manifest.seq_len, seed=settings.seed
    )
    watched: dict[str, Any] = {"label": label, "console": console}
    train(model, loader, settings, folder, algorithms=[algorithm], callbacks=stopping, save_every=save_every, **watched)
    ended = _end(model, loader, settings, stopping, **watched)
    if rank() == 0:
        _keep(folder, model, algorithm, manifest, Path(shards))
    wait_for_all()
    heldout = heldout_losses(model, shards, max_samples=heldout_samples)
    chosen = {"best_step": stopping[0].best_step, "best": stopping[0].best} if stopping else {}
    outcome = _outcome(loader, heldout, mixture, model, ended) | _left_out(algorithm, settings, **watched)
    result = finish_run(folder, outcome | _objective(settings, heldout) | chosen)
    if rank() == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _check_lasts(loader: MixtureLoader, steps: int) -> None:
    """Refuse a run that fixed weights would end with an error at ``max_epochs``, before hours of training."""
    if loader.mixer.on_exhausted != "repeat" or loader.variable_length:
        return
    batch_tokens = loader.mixer.batch_size * loader.manifest.seq_len
    plan = loader.plan(steps * batch_tokens)
    lasts = int(plan.budget // batch_tokens)
    if lasts < steps - 1:  # the last batch may just be filled: the mixer counts in whole samples
        raise InputError(
            f"{plan.names[int(plan.capped.argmax())]!r} would be used up after about {lasts:,} of {steps:,} steps. Let"
            " it leave the mixture (--on-exhausted drop), end the run there (--on-exhausted stop), allow more epochs"
            " (--max-epochs), or take weights that keep within them (`mixer weigh --method unimax`)."
        )


def _end(
    model: PreTrainedModel,
    loader: MixtureLoader,
    settings: TrainSettings,
    stopping: Sequence[WorstDomainEarlyStopping],
    label: str,
    console: Console,
) -> str:
    """Put the best model back where one is kept; say, and return, why the run ended early, "" where it did not."""
    for callback in stopping:
        callback.restore(model)  # fit() does so at its end, which a loader that ends first does not reach
    ended = loader.ended or "".join(callback.reason for callback in stopping)
    if ended:
        console.print(f"{label}: ended after {loader.step} of {settings.steps} steps: {ended}", markup=False)
    for callback in stopping:
        console.print(f"{label}: kept the model of step {callback.best_step} ({callback.best:.3f})", markup=False)
    return ended


def _left_out(algorithm: DomainReweighting, settings: TrainSettings, label: str, console: Console) -> dict[str, Any]:
    """Say, and return, what was skipped because it was not finite; nothing where that would have ended the run."""
    if settings.on_nonfinite == "fail":
        return {}
    losses, steps = algorithm.num_nonfinite, algorithm.num_skipped_steps
    if any(losses.values()):
        shown = ", ".join(f"{name} in {count:,}" for name, count in losses.items() if count)
        text = f"{label}: not finite and left out, in steps of {settings.steps:,}: the loss of {shown}"
        console.print(f"{text}; the gradients of all in {steps:,}", style="yellow", markup=False, highlight=False)
    return {"num_nonfinite": losses, "num_skipped_steps": steps}


def _keep(folder: Path, model: PreTrainedModel, algorithm: DomainReweighting, manifest: Manifest, shards: Path) -> None:
    """Write the history, the mixture found, and the model with its tokenizer into ``folder``."""
    algorithm.save_trajectory(folder / "trajectory.npz")
    if algorithm.rule is not None:
        algorithm.mixture().save(folder / "mixture.json")
    model.save_pretrained(folder / "model")
    _save_tokenizer(shards, manifest, folder / "model")


def _early_stopping(shards: str | os.PathLike[str], settings: TrainSettings) -> list[WorstDomainEarlyStopping]:
    if settings.patience is None:
        return []
    objective, patience = settings.objective, settings.patience
    return [
        WorstDomainEarlyStopping(Path(shards), objective=objective, every="50ba", patience=patience, restore_best=True)
    ]


def _objective(settings: TrainSettings, heldout: dict[str, HeldOut]) -> dict[str, Any]:
    if settings.objective is None:
        return {}
    return {"objective": weighted_average({name: row.loss for name, row in heldout.items()}, settings.objective)}


def _asked(
    manifest: Manifest,
    mixture: Mixture,
    settings: TrainSettings,
    algorithm: DomainReweighting,
    loader_options: dict[str, Any],
) -> dict[str, Any]:
    """Everything that decides what comes out, for ``run.json``."""
    asked = {"command": "train", "mixture": dict(mixture.weights), "shards": fingerprints(manifest)}
    if "forced" in mixture.provenance:
        asked["forced"] = list(mixture.provenance["forced"])
    if algorithm.rule is not None:
        rule = {"rule": algorithm.rule.name, "rule_settings": dict(algorithm.rule.settings)}
        asked |= {**rule, "apply": algorithm.target, "every": str(algorithm.every)}
    return {**asked, **settings.to_dict(), **loader_options}


def _outcome(
    loader: MixtureLoader,
    heldout: dict[str, HeldOut],
    mixture: Mixture,
    model: PreTrainedModel,
    ended: str,
) -> dict[str, Any]:
    losses = [value.loss for value in heldout.values()]
    delivered = loader.stats()
    realised = {name: row["target_share"] for name, row in delivered["domains"].items()}
    return {
        "heldout": {name: value._asdict() for name, value in heldout.items()},
        "average": float(np.mean(losses)),
        "worst": float(max(losses)),
        "weights": dict(mixture.weights) if len(loader.curriculum) == 1 else realised,
        "num_samples": dict(loader.num_samples),
        "sizes": {name: loader.manifest.split(name, "train").num_tokens for name in loader.domains},
        "loader": delivered,
        "ended": ended,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": delivered["tokens"],
    }


def _save_tokenizer(shards: Path, manifest: Manifest, folder: Path) -> None:
    """Put the tokenizer beside the model, so that the folder loads with Hugging Face's Auto classes."""
    import transformers

    if manifest.tokenizer.kind == "bytes" or not manifest.tokenizer.file:
        return
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(shards / manifest.tokenizer.file))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(manifest.tokenizer.eos_id)
    tokenizer.save_pretrained(folder)


def fingerprints(manifest: Manifest) -> dict[str, str]:
    """Return the fingerprint of every domain's train split."""
    return {name: manifest.split(name, "train").fingerprint for name in manifest.names}
