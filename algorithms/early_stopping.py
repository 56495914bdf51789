"""``WorstDomainEarlyStopping``: end a run when its worst domain no longer gets better.

    Trainer(..., callbacks=[WorstDomainEarlyStopping("shards", every="50ba", patience=3)])

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
from composer.core import Callback, State
from composer.loggers import Logger

from algorithms.forward import evaluate_windows
from algorithms.heldout import HeldOutWindows
from algorithms.intervals import interval, is_due
from mixer.errors import InputError

__all__ = ["WorstDomainEarlyStopping"]


class WorstDomainEarlyStopping(Callback):
    """Evaluate held-out windows at intervals; stop when the worst domain has not improved ``patience`` times in a row.

    Args:
        heldout: windows, or the folder of shards whose validation split to take them from.
        targets: nats per token by domain to subtract, so that the worst domain is the one farthest above its target.
        every: time between evaluations, in batches ("50ba"), samples ("sp") or tokens ("tok").
        patience: evaluations without an improvement before the run ends.
        min_delta: an improvement is more than this, in nats.

    Logged at Composer's own loss step: ``worst_domain/loss`` and ``worst_domain/best``.
    """

    def __init__(
        self,
        heldout: HeldOutWindows | str | Path,
        *,
        targets: Mapping[str, float] | None = None,
        every: str | int = "50ba",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if patience < 1 or not min_delta >= 0:
            raise InputError(f"patience must be >= 1 and min_delta >= 0; got {patience} and {min_delta}.")
        self.heldout = heldout if isinstance(heldout, HeldOutWindows) else HeldOutWindows(heldout)
        missing = sorted(set(self.heldout.domains) - set(targets)) if targets else []
        if missing:
            raise InputError(f"no target loss for the domains {missing}.")
        self.targets = np.array([targets[name] if targets else 0.0 for name in self.heldout.domains])
        self.every, self.patience, self.min_delta = interval(every), patience, min_delta
        self.best, self.best_step, self.num_worse = math.inf, -1, 0

    def batch_end(self, state: State, logger: Logger) -> None:
        if not is_due(self.every, state):
            return
        losses, tokens = evaluate_windows(state, self.heldout)
        step, worst = state.timestamp.batch.value - 1, float((losses / tokens - self.targets).max())
        if worst < self.best - self.min_delta:
            self.best, self.best_step, self.num_worse = worst, step, 0
        else:
            self.num_worse += 1
        logger.log_metrics({"worst_domain/loss": worst, "worst_domain/best": self.best}, step=step)
        if self.num_worse >= self.patience:
            state.stop_training()

    @property
    def reason(self) -> str:
        """Why the run was ended; "" where it was not."""
        if self.num_worse < self.patience:
            return ""
        return f"the worst domain's held-out loss has not improved since step {self.best_step} ({self.best:.3f})"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.num_worse = state["best"], state["best_step"], state["num_worse"]
