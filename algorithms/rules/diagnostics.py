"""Was the method right about what helps what? Compare what it assumes with what a run's held-out losses did.

Every online method moves weights by w ~ w exp(eta * column sums of A), with a guess A[i, d] of how much training on d
lowers the loss of i: DoReMi's is diagonal with the excess losses, DoGE's is of gradient products, Aioli measures it
(Chen et al. 2024, arXiv:2411.05735, section 3). The run itself tells: drop of i per interval = sum_d A[i, d] w[d].
"""

from __future__ import annotations

import numpy as np

from algorithms.rules.settings import number
from algorithms.rules.steps import Vector
from mixer.errors import InputError

__all__ = ["agreement", "hindsight", "transfer_from_history"]


def transfer_from_history(weights: Vector, losses: Vector, ridge: float = 1e-6) -> Vector:
    """Return the A (M, D) by which mixtures explain the drops of the losses best, in nats per interval.

    The weights must have varied: along directions in which they did not, A is pulled to the same value for all domains.

    Args:
        weights: (T, D), the mixture trained on in each interval.
        losses: (T + 1, M), held-out losses before, between and after them.
        ridge: pull of A to its row's mean.

    Raises: InputError: on shapes that do not fit, or fewer than 2 intervals.

    >>> truth = np.array([[0.3, 0.1], [0.0, 0.2]])
    >>> mixtures = np.array([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    >>> losses = 5 - np.concatenate([np.zeros((1, 2)), np.cumsum(mixtures @ truth.T, axis=0)])
    >>> transfer_from_history(mixtures, losses).round(4).tolist()
    [[0.3, 0.1], [0.0, 0.2]]
    """
    w, v = np.asarray(weights, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if w.ndim != 2 or v.ndim != 2 or len(v) != len(w) + 1 or len(w) < 2:
        raise InputError(f"expected (T, D) weights and (T + 1, M) losses with T >= 2; got {w.shape} and {v.shape}.")
    drops = v[:-1] - v[1:]
    size = w.shape[1]
    spread = np.eye(size) - 1.0 / size
    return np.linalg.solve(w.T @ w + number(ridge, "ridge", low=1e-300) * spread, w.T @ drops).T


def agreement(assumed: Vector, measured: Vector) -> float:
    """Return the cosine, in [-1, 1], between the moves of the weights that two matrices A ask for.

    Only differences between domains move weights, so column sums are compared after taking off their mean; 0 where one
    of them asks for no move.

    >>> round(agreement(np.diag([2.0, 1.0]), np.array([[0.3, 0.1], [0.0, 0.1]])), 6)
    1.0
    """
    one, other = (np.sum(matrix, axis=0) - np.mean(np.sum(matrix, axis=0)) for matrix in (assumed, measured))
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms > 0 else 0.0


def hindsight(weights: Vector, losses: Vector) -> float | None:
    """Return how well a run moved its weights by what its own held-out losses say afterwards: a cosine in [-1, 1].

    The move is log w_last - log w_first; what it should have been are the column sums of ``transfer_from_history``. A
    rough answer from a short run: losses are noisy, and drops shrink as training goes on whatever the mixture.

    Args:
        weights: (T, D), in force after each update.
        losses: (T, M), held-out at the updates.
    Returns: None where that cannot be told: losses that were not evaluated, or fewer than D + 1 intervals.

    >>> mixtures = np.array([[0.5, 0.5], [0.6, 0.4], [0.8, 0.2], [0.9, 0.1], [0.9, 0.1]])
    >>> losses = 5 - np.cumsum(np.concatenate([[[0.0]], mixtures[:-1] @ [[0.3], [0.1]]]), axis=0)
    >>> round(hindsight(mixtures, losses), 6)
    1.0
    """
    w, v = np.asarray(weights, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(w) < w.shape[1] + 2 or not np.isfinite(v).all():
        return None
    moved = np.log(np.maximum(w[-1], 1e-12)) - np.log(np.maximum(w[0], 1e-12))
    return agreement(moved[None], transfer_from_history(w[:-1], v))
