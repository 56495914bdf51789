"""When to stop, and what to read off a trajectory of weights: pure functions over arrays.

``extrapolate`` ends a proxy run early, ``standard_error`` and ``round_verdict`` end the rounds of iterated DoReMi when
what still changes is noise, ``worst_domain_stop`` ends the training of a robust model before it fits everything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from algorithms.rules.settings import number
from algorithms.rules.steps import Vector, normalized
from mixer.errors import InputError

__all__ = ["RoundVerdict", "drift", "extrapolate", "round_verdict", "standard_error", "worst_domain_stop"]


def extrapolate(trajectory: Vector, total_steps: float, tail: float = 1 / 3) -> Vector:
    """Return the average weights of a run of ``total_steps``, from its first T steps.

    The steps that were not run are taken to have the mean weights of the last share ``tail`` of those that were:
    (T * mean + (total - T) * tail mean) / total. Without this an early stop is biased to whatever the start favoured;
    most movement is in the first quarter of a run (arXiv:2305.10429, appendix B).

    Args:
        trajectory: (T, D) weights per step, evenly spaced.
        total_steps: at least T, in units of the trajectory's rows.

    >>> extrapolate(np.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]), total_steps=6).round(6).tolist()
    [0.583333, 0.416667]
    """
    rows = _rows(trajectory)
    total = number(total_steps, "total_steps", low=rows.shape[0])
    done = rows.shape[0]
    last = rows[-max(1, round(number(tail, "tail", low=0, high=1) * done)) :]
    return normalized((done * rows.mean(axis=0) + (total - done) * last.mean(axis=0)) / total)


def drift(trajectory: Vector) -> float:
    """Return the largest change of any weight from the middle third of a (T, D) trajectory to its last third.

    ``extrapolate`` is to be trusted as far as this is small.

    >>> round(drift(np.array([[1.0, 0.0], [0.5, 0.5], [0.6, 0.4]])), 6)
    0.1
    """
    rows = _rows(trajectory)
    third = rows.shape[0] // 3
    if third == 0:
        raise InputError(f"the drift of a trajectory needs at least 3 rows; got {rows.shape[0]}.")
    return float(np.max(np.abs(rows[-third:].mean(axis=0) - rows[-2 * third : -third].mean(axis=0))))


def standard_error(
    trajectory: Vector, rng: np.random.Generator, block: int | None = None, num_resamples: int = 200
) -> Vector:
    """Return the standard error of the mean weights, (D,), by the circular block bootstrap.

    Consecutive weights are strongly correlated, so whole blocks of steps are resampled.

    Args:
        trajectory: (T, D) weights per step.
        rng: makes the result reproducible; nothing else here is random.
        block: steps per block; by default about T^(2/3), and never less than 1.

    >>> constant = np.full((100, 2), 0.5)
    >>> standard_error(constant, np.random.default_rng(0)).tolist()
    [0.0, 0.0]
    """
    rows = _rows(trajectory)
    size = rows.shape[0]
    length = int(number(round(size ** (2 / 3)) if block is None else block, "block", low=1, high=size))
    centred = rows - rows.mean(axis=0)
    padded = np.concatenate([centred, centred[:length]])
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(padded, axis=0)])
    block_means = (sums[length : length + size] - sums[:size]) / length
    starts = rng.integers(0, size, (num_resamples, -(-size // length)))
    return np.std(block_means[starts].mean(axis=1), axis=0, ddof=1)


class RoundVerdict(NamedTuple):
    """Whether to stop, the largest change, the noise level it was compared with, and why."""

    stop: bool
    largest_change: float
    noise: float
    reason: str


def round_verdict(
    before: Vector, after: Vector, errors: Vector, tolerance: float = 1e-3, num_errors: float = 2.0
) -> RoundVerdict:
    """Return whether iterated rounds have converged.

    They have when no weight moved by ``tolerance`` (the paper's criterion; a user's three rounds ended 24 times above
    it), or when every change is within ``num_errors`` of its standard error.

    Args:
        before, after: (D,) weights of two rounds.
        errors: (D,) standard errors of the difference: the root of the sum of both rounds' squares.

    >>> round_verdict(np.array([0.5, 0.5]), np.array([0.51, 0.49]), errors=np.array([0.02, 0.02])).reason
    'every change is within 2 standard errors'
    """
    change = np.abs(np.asarray(after) - np.asarray(before))
    largest, noise = float(change.max()), float(num_errors * errors[int(np.argmax(change))])
    if largest < tolerance:
        return RoundVerdict(True, largest, noise, f"no weight changed by {tolerance:g}")
    if np.all(change <= num_errors * np.asarray(errors)):
        return RoundVerdict(True, largest, noise, f"every change is within {num_errors:g} standard errors")
    return RoundVerdict(False, largest, noise, f"a weight changed by {largest:.3g}, its noise is {noise:.3g}")


def worst_domain_stop(
    heldout: Vector, reference: Vector | None = None, patience: int = 5, min_change: float = 0.0
) -> tuple[bool, int]:
    """Return whether the worst domain has stopped improving, and the evaluation at which it was best.

    Group DRO helps only while the training loss is not 0: stop, and keep the checkpoint of the best evaluation
    (arXiv:1911.08731, section 3.2: worst-group accuracy 6.7 -> 86.0 on Waterbirds with early stopping).

    Args:
        heldout: (T, D) mean held-out losses of T evaluations.
        reference: (D,) subtracted from them; without it the domain of highest entropy is always the worst.
        patience: evaluations without a new best before stopping.
        min_change: nats by which a new best must be better.

    >>> worst_domain_stop(np.array([[3.0, 2.0], [2.5, 2.2], [2.4, 2.6], [2.2, 2.8]]), patience=2)
    (True, 1)
    """
    losses = _rows(heldout)
    worst = np.max(losses - (0.0 if reference is None else np.asarray(reference)), axis=1)
    best = 0
    for step in range(1, worst.size):
        if worst[step] < worst[best] - min_change:
            best = step
    return worst.size - 1 - best >= patience, best


def _rows(values: Vector) -> Vector:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape or not np.all(np.isfinite(rows)):
        raise InputError(f"expected finite rows of shape (T, D) with T, D >= 1; got shape {rows.shape}.")
    return rows
