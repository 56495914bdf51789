"""``WorstDomainEarlyStopping``: end a run when its worst domain no longer gets better.

    Trainer(..., callbacks=[WorstDomainEarlyStopping("shards", every="50ba", patience=3, restore_best=True)])

A large model can drive every training loss so low that reweighting has nothing left to act on; what then decides is
when to stop. Sagawa, Koh, Hashimoto, Liang 2020, arXiv:1911.08731, stop early and select by the worst group's held-out
result; their worst-group accuracy on Waterbirds rises from 6.7 to 86 per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.checks import check_parallelism
from algorithms.forward import evaluate_windows
from algorithms.heldout import HeldOutWindows
from algorithms.intervals import interval, is_due
from algorithms.references.frozen import language_model
from algorithms.sharding import gathered, is_flattened, local_part, part_of
from mixer.errors import InputError

__all__ = ["WorstDomainEarlyStopping"]


class WorstDomainEarlyStopping(Callback):
    """Evaluate held-out windows at intervals; stop when the worst domain has not improved ``patience`` times in a row.

    Args:
        heldout: windows, or the folder of shards whose validation split to take them from.
        targets: nats per token by domain to subtract, so that the worst domain is the one farthest above its target.
        objective: weights by domain, to watch the weighted average of the losses in place of the worst.
        every: time between evaluations, in batches ("50ba"), samples ("sp") or tokens ("tok").
        patience: evaluations without an improvement before the run ends.
        min_delta: an improvement is more than this, in nats.
        restore_best: end with the model of the best evaluation, whether or not the run was cut short; the last step is
            evaluated too. A copy of its parameters is held in main memory, by each rank of what it holds itself, and
            the whole of it in checkpoints. Not under FSDP1, which flattens parameters together.

    Logged at Composer's own loss step: ``worst_domain/loss`` and ``worst_domain/best``; with an objective
    ``objective/loss`` and ``objective/best``.
    """

    def __init__(
        self,
        heldout: HeldOutWindows | str | Path,
        *,
        targets: Mapping[str, float] | None = None,
        objective: Mapping[str, float] | None = None,
        every: str | int = "50ba",
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = False,
    ) -> None:
        if patience < 1 or not min_delta >= 0:
            raise InputError(f"patience must be >= 1 and min_delta >= 0; got {patience} and {min_delta}.")
        self.heldout = heldout if isinstance(heldout, HeldOutWindows) else HeldOutWindows(heldout)
        self.targets = self._by_domain(targets, "target loss") if targets else np.zeros(len(self.heldout.domains))
        self.objective = self._by_domain(objective, "weight in the objective") if objective else None
        self.every, self.patience, self.min_delta = interval(every), patience, min_delta
        self.restore_best = restore_best
        self._model: nn.Module | None = None
        self._best_model: dict[str, Tensor] = {}  # this rank's parts
        self._loaded: dict[str, Tensor] = {}  # whole, until training starts
        self.best, self.best_step, self.num_worse = math.inf, -1, 0

    def _by_domain(self, values: Mapping[str, float], what: str) -> NDArray[np.float64]:
        missing = sorted(set(self.heldout.domains) - set(values))
        if missing:
            raise InputError(f"no {what} for the domains {missing}.")
        return np.array([values[name] for name in self.heldout.domains], dtype=np.float64)

    def fit_start(self, state: State, logger: Logger) -> None:
        check_parallelism(state)
        if self.restore_best and is_flattened(state.model):
            raise InputError(
                "restore_best cannot keep the parameters of FSDP1, which are flattened together. Use FSDP2 or DDP; or "
                "leave it out, and load the checkpoint of best_step."
            )
        self._model = language_model(state.model)
        if self._loaded:
            self._best_model, self._loaded = _parts(self._loaded, self._model), {}
        if self.num_worse >= self.patience:
            state.stop_training()  # continued from a checkpoint of the step that had ended the run

    def batch_end(self, state: State, logger: Logger) -> None:
        is_last = state.max_duration is not None and state.timestamp >= state.max_duration
        if not is_due(self.every, state) and not (self.restore_best and is_last):
            return
        losses, tokens = evaluate_windows(state, self.heldout)
        step, watched = state.timestamp.batch.value - 1, self._watched(losses / tokens - self.targets)
        if watched < self.best - self.min_delta:
            self.best, self.best_step, self.num_worse = watched, step, 0
            if self.restore_best:
                self._best_model = _copy(language_model(state.model))
        else:
            self.num_worse += 1
        prefix = "worst_domain" if self.objective is None else "objective"
        logger.log_metrics({f"{prefix}/loss": watched, f"{prefix}/best": self.best}, step=step)
        if self.num_worse >= self.patience:
            state.stop_training()

    def _watched(self, losses: NDArray[np.float64]) -> float:
        return float(losses.max() if self.objective is None else np.average(losses, weights=self.objective))

    def fit_end(self, state: State, logger: Logger) -> None:
        self.restore(state.model)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the parameters of the best evaluation into ``model``, where they are kept; ``fit`` does so at its end."""
        if self._best_model:
            for name, value in language_model(model).state_dict().items():
                local_part(value).copy_(self._best_model[name])

    @property
    def reason(self) -> str:
        """Why the run was ended; "" where it was not."""
        if self.num_worse < self.patience:
            return ""
        what = "the worst domain's held-out loss" if self.objective is None else "the objective's held-out loss"
        return f"{what} has not improved since step {self.best_step} ({self.best:.3f})"

    def state_dict(self) -> dict[str, Any]:
        state = {"best": self.best, "best_step": self.best_step, "num_worse": self.num_worse}
        # As pairs: of a dict, a sharded checkpoint would look for every entry when it is loaded.
        return {**state, "model": list(self._whole_model().items())} if self.restore_best else state

    def _whole_model(self) -> dict[str, Tensor]:
        """Return the best model on every rank that writes checkpoints; all ranks have to ask."""
        if self._model is None or not self._best_model:
            return self._loaded
        like, whole = self._model.state_dict(), {}
        for name, part in self._best_model.items():
            value = gathered(part, like[name])
            if dist.get_global_rank() == 0:
                whole[name] = value
        return whole

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.num_worse = state["best"], state["best_step"], state["num_worse"]
        self._loaded, self._best_model = dict(state.get("model", {})) if self.restore_best else {}, {}
        if self.restore_best and self.best_step >= 0 and not self._loaded:
            raise InputError(
                f"restore_best: the checkpoint was saved without it and has no model of step {self.best_step}, the "
                "best so far. Leave it out, or start anew with load_ignore_keys=['state/callbacks/*']."
            )


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: local_part(value).detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def _parts(whole: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: part_of(whole[name], value) for name, value in model.state_dict().items()}
