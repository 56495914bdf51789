"""Train one causal LM with Composer on a ``MixtureLoader``: the loop that reference, proxy and main runs share.

A run saves a checkpoint every ``save_every`` steps and when it is interrupted (Ctrl-C finishes the step first), and
continues from the newest one. Model, optimiser, schedule, loader, update rule and random generators are all in it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from composer import Algorithm, Callback, Event, Logger, State, Trainer
from composer.algorithms import GradientClipping
from composer.models import HuggingFaceModel
from composer.optim import CosineAnnealingWithWarmupScheduler, DecoupledAdamW
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from algorithms.domain_losses import OnNonfinite
from algorithms.models import samples_per_forward
from algorithms.ranks import all_reduce, world_size
from mixer.dataloader import MixtureLoader
from mixer.errors import ExhaustedError, InputError
from mixer.progress import LoggedProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TrainSettings", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """How one model is trained. Everything that changes the outcome is here, so it can be written down and compared.

    Attributes:
        model: a row of ``MODEL_SIZES``, or a path (see ``build_model``).
        steps: optimiser steps.
        global_batch_size: samples per step over all ranks.
        learning_rate: peak; linear warm-up over ``warmup`` of the run, then cosine to a tenth.
        weight_decay: decoupled from the learning rate's peak, per step.
        seed: model weights, sample order and dropout.
        patience: end the run when the worst domain's held-out loss, evaluated every 50 steps, has not improved so many
            times in a row; None for the full length. Either way the model is then that of the best evaluation.
        objective: weights by domain, whose weighted average ``patience`` watches in place of the worst domain, and
            which the result reports; None for the worst, and nothing more.
        on_nonfinite: "fail" or "skip", see ``DomainReweighting``.
    """

    model: str = "nano"
    steps: int = 400
    global_batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: float = 0.06
    weight_decay: float = 1e-5
    seed: int = 17
    patience: int | None = None
    objective: Mapping[str, float] | None = None
    on_nonfinite: OnNonfinite = "fail"

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be a finite number >= 0; got {self.weight_decay}.")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings; later ones only where they are in use, so that runs from before them go on."""
        return without_defaults(asdict(self), {"patience": None, "objective": None, "on_nonfinite": "fail"})


def without_defaults(settings: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` without those of ``defaults`` that have their default."""
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


def train(
    model: PreTrainedModel,
    loader: MixtureLoader,
    settings: TrainSettings,
    folder: Path,
    *,
    algorithms: Sequence[Algorithm] = (),
    callbacks: Sequence[Callback] = (),
    label: str = "training",
    save_every: int = 50,
    console: Console | None = None,
) -> None:
    """Train ``model`` in place for ``settings.steps`` steps; continue from ``folder/checkpoints`` where there are any.

    It ends earlier where the loader does (``on_exhausted="stop"``); ``loader.ended`` then says why.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the running step is finished and a checkpoint is written.
        DataError: from a loss that is not finite or a shard that is damaged.
    """
    _quiet()
    if "GROUP_RANK" in os.environ:  # torchrun's name for what Composer looks for when it loads a checkpoint
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    stopper = _StopAfterStep()
    trainer = _make_trainer(
        HuggingFaceModel(model, use_logits=True, shift_labels=True),
        loader,
        settings,
        algorithms=[*algorithms, GradientClipping(clipping_type="norm", clipping_threshold=1.0)],
        callbacks=[*callbacks, _ProgressBar(label, settings.steps, loader, console), stopper],
        **_checkpoints(folder, settings.steps, save_every, stopper),
    )
    try:
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
        else:
            # Stopped after its last step: nothing to train, but the algorithms still have to take up their state.
            trainer.engine.run_event(Event.FIT_START)
    except ExhaustedError:
        # Composer asks for another epoch after the loader has ended, which the loader refuses.
        if loader.mixer.on_exhausted != "stop":
            raise
    finally:
        trainer.close()
    if stopper.agreed or (stopper.requested and world_size() == 1):
        raise KeyboardInterrupt


def _make_trainer(model: HuggingFaceModel, loader: MixtureLoader, settings: TrainSettings, **options: Any) -> Trainer:
    gpu = torch.cuda.is_available()
    fits = samples_per_forward(model.model.config.vocab_size, loader.manifest.seq_len)  # type: ignore[union-attr, arg-type]
    return Trainer(
        model=model,
        train_dataloader=loader,
        max_duration=f"{settings.steps}ba",
        optimizers=DecoupledAdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        ),
        schedulers=CosineAnnealingWithWarmupScheduler(
            t_warmup=f"{round(settings.warmup * settings.steps)}ba", alpha_f=0.1
        ),
        device="gpu" if gpu else "cpu",
        precision="amp_bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32",
        device_train_microbatch_size="auto" if gpu else min(loader.batch_size or 1, fits),
        progress_bar=False,
        log_to_console=False,
        auto_log_hparams=False,
        seed=settings.seed,
        **options,
    )


def _checkpoints(folder: Path, steps: int, save_every: int, stopper: _StopAfterStep) -> dict[str, Any]:
    """Return Trainer's options for one checkpoint at a time, and to continue from the one that is there."""
    latest = folder / "checkpoints" / "latest-rank{rank}.pt"

    def save_now(state: State, event: Event) -> bool:
        done = state.timestamp.batch.value
        return event == Event.BATCH_CHECKPOINT and (stopper.agreed or done % save_every == 0 or done == steps)

    return {
        "save_folder": str(latest.parent),
        "save_latest_filename": latest.name,
        "save_overwrite": True,
        "save_interval": save_now,
        "save_num_checkpoints_to_keep": 1,
        "load_path": str(latest) if Path(str(latest).format(rank=0)).exists() else None,
    }


class _StopAfterStep(Callback):
    """Let Ctrl-C and SIGTERM (a preempted job) finish the step; the checkpoint saver sees ``agreed``; the run ends.

    Made before the Trainer, which sets handlers of its own: those found here are put back at the end. The signal
    reaches ranks at different steps, so that they have to agree on one.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = False
        self._is_main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def fit_start(self, state: State, logger: Logger) -> None:
        for number in self._previous if self._is_main else ():
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True
        print("\nfinishing this step, then stopping; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.agreed = bool(all_reduce(torch.tensor(int(self.requested))).item())

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.agreed:
            raise KeyboardInterrupt

    def close(self, state: State, logger: Logger) -> None:
        for number, handler in self._previous.items() if self._is_main else ():
            signal.signal(number, handler)


class _ProgressBar(Callback):
    """Steps, rate and loss on standard error, for as long as the run lasts."""

    def __init__(self, label: str, steps: int, loader: MixtureLoader, console: Console | None) -> None:
        self._label, self._steps = label, steps
        self._loader = loader
        self._bar = LoggedProgress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task = self._bar.add_task(label, total=steps, rate="", loss="", start=False)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._first, self._start = self._loader.stats()["tokens"], time.perf_counter()
        self._bar.start()
        self._bar.start_task(self._task)
        self._bar.update(self._task, completed=state.timestamp.batch.value)

    def after_loss(self, state: State, logger: Logger) -> None:
        # The model's own mean loss: from BEFORE_BACKWARD on it is the reweighted one.
        self._loss = state.loss.detach().float().mean() if isinstance(state.loss, torch.Tensor) else None

    def batch_end(self, state: State, logger: Logger) -> None:
        rate = (self._loader.stats()["tokens"] - self._first) / max(time.perf_counter() - self._start, 1e-9)
        loss = "" if self._loss is None else f"loss {self._loss.item():.3f}"
        done = state.timestamp.batch.value
        self._bar.update(self._task, completed=done, rate=f"{rate / 1000:,.1f} k tokens/s", loss=loss)

    def close(self, state: State, logger: Logger) -> None:
        self._bar.stop()


def _quiet() -> None:
    """Silence what says nothing about this run: missing tokenizers, future warnings of libraries."""
    for name in ("composer", "transformers", "streaming"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="composer")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.filterwarnings("ignore", category=FutureWarning)
