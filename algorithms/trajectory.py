"""The history of a run, a row per update, in bounded memory.

A run of a million updates would write a checkpoint of gigabytes. When more than ``max_rows`` rows are held, neighbours
are merged in pairs: their losses add up, the later weights stay. Rows are always evenly spaced, and each is the exact
mean over the updates it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["Rows", "Trajectory"]

MAX_ROWS = 1000


class Rows(NamedTuple):
    """A run's history over n rows and D domains. Means are NaN where a domain did not occur.

    Attributes:
        steps: (n,) int64, the step after which the row's weights were in force (the first step is 0).
        weights: (n, D), used from then on.
        loss: (n, D), mean token loss in nats since the row before.
        excess: (n, D), mean of loss − reference loss; NaN without a reference.
        clipped_excess: (n, D), mean of max(loss − reference loss, 0); NaN without a reference.
        num_tokens: (n, D).
        heldout_loss: (n, D), mean held-out loss at the update; NaN where none is evaluated.
    """

    steps: NDArray[np.int64]
    weights: NDArray[np.float64]
    loss: NDArray[np.float64]
    excess: NDArray[np.float64]
    clipped_excess: NDArray[np.float64]
    num_tokens: NDArray[np.float64]
    heldout_loss: NDArray[np.float64]


class Trajectory:
    """Append-only rows for ``num_domains`` domains, at most ``max_rows`` (an even number) of them."""

    def __init__(self, num_domains: int, max_rows: int = MAX_ROWS) -> None:
        self.max_rows = max_rows
        self._stride = 1  # updates per row
        self._filled = 0  # updates in the last row
        self._steps: list[int] = []
        # One row: weights, tokens, loss, reference loss, clipped excess, held-out tokens, held-out loss.
        self._rows: list[NDArray[np.float64]] = []
        self._shape = (7, num_domains)

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, step: int, weights: NDArray[np.float64], signals: Signals) -> None:
        """Add the outcome of the update after ``step``."""
        optional = (signals.reference_loss, signals.clipped_excess, signals.heldout_tokens, signals.heldout_loss)
        nothing = np.full(self._shape[1], np.nan)
        given = [nothing if value is None else value for value in optional]
        row = np.stack([weights, signals.num_tokens, signals.loss, *given]).astype(np.float64)
        if self._rows and self._filled < self._stride:
            self._rows[-1] = _merge(self._rows[-1], row)
            self._steps[-1] = step
            self._filled += 1
            return
        if len(self._rows) >= self.max_rows:
            self._rows = [_merge(a, b) for a, b in zip(self._rows[::2], self._rows[1::2])]
            self._steps = self._steps[1::2]
            self._stride *= 2
        self._rows.append(row)
        self._steps.append(step)
        self._filled = 1

    def rows(self) -> Rows:
        """Return the history as arrays."""
        table = np.array(self._rows).reshape(len(self._rows), *self._shape)
        weights, tokens, loss, reference, clipped, heldout_tokens, heldout = table.transpose(1, 0, 2)
        mean_loss, excess, clipped_excess = (_means(total, tokens) for total in (loss, loss - reference, clipped))
        steps = np.array(self._steps, dtype=np.int64)
        return Rows(steps, weights, mean_loss, excess, clipped_excess, tokens, _means(heldout, heldout_tokens))

    def save(self, path: str | Path, domains: tuple[str, ...]) -> Path:
        """Write the rows and the names of the domains as a compressed ``.npz``, and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.tmp.npz")
        np.savez_compressed(partial, domains=np.array(domains), **self.rows()._asdict())
        return partial.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """Return builtins and tensors; at most ``max_rows`` rows."""
        table = np.array(self._rows).reshape(len(self._rows), *self._shape)
        rows = torch.from_numpy(table)
        return {"steps": list(self._steps), "stride": self._stride, "filled": self._filled, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        table = np.array(state["rows"], dtype=np.float64)
        if table.shape[1:] != self._shape:
            raise InputError(
                f"the saved history has rows of shape {table.shape[1:]}, expected {self._shape}: "
                "it was made for other domains."
            )
        self._steps, self._stride, self._filled = list(state["steps"]), int(state["stride"]), int(state["filled"])
        self._rows = list(table)


def _merge(earlier: NDArray[np.float64], later: NDArray[np.float64]) -> NDArray[np.float64]:
    total = earlier + later
    total[0] = later[0]
    return total


def _means(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
