"""Find a mixture offline, from a table of small runs: fit losses as a function of the weights, then minimise the fit.

    runs   = read_runs("mixtures.csv", "losses.csv")
    law    = fit_log_linear(runs.mixtures, runs.losses)
    weights = descend(law, objective="worst", lower=0.002, upper=caps)

The log-linear law  L_m(w) = exp(c_m) + exp(t_m . w)  is convex in w, so its best mixture is found exactly, with floors
and caps: Ye et al. 2024, arXiv:2403.16952 (data mixing laws), used for this in Olmix. Any other regression can be
searched as RegMix does, by drawing mixtures around a prior and averaging the best: Liu et al. 2024, arXiv:2407.01492;
they fit boosted trees (``boosted_trees.fit_trees``); kernel regression on the square roots of the weights is quicker.

Everything is numpy; nothing draws random numbers but ``search``, from the generator that it is given.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mixer.errors import InputError
from mixer.projection import project

__all__ = [
    "KernelLaw",
    "LogLinearLaw",
    "Runs",
    "checked_runs",
    "cross_validated",
    "descend",
    "fit_kernel",
    "fit_log_linear",
    "read_runs",
    "search",
    "spearman",
]

Matrix = NDArray[np.float64]
Law = Callable[[Matrix], Matrix]


class Runs(NamedTuple):
    """Runs of one model size: (N, D) mixtures that sum to 1, (N, M) losses, and the names of both columns."""

    mixtures: Matrix
    losses: Matrix
    domains: tuple[str, ...]
    metrics: tuple[str, ...]


class LogLinearLaw(NamedTuple):
    """c (M,) and t (D, M) of L_m(w) = exp(c_m) + exp(t_m . w)."""

    log_floor: Matrix
    tilt: Matrix

    def __call__(self, mixtures: Matrix) -> Matrix:
        """Return the predicted losses (N, M) of mixtures (N, D)."""
        return np.exp(self.log_floor) + np.exp(np.asarray(mixtures) @ self.tilt)


class KernelLaw(NamedTuple):
    """Kernel ridge regression on square roots of weights: training points (N, D), coefficients and means (N, M),
    (M,)."""

    points: Matrix
    coefficients: Matrix
    mean: Matrix
    width: float

    def __call__(self, mixtures: Matrix) -> Matrix:
        """Return the predicted losses (N, M) of mixtures (N, D)."""
        return self.mean + _kernel(np.sqrt(np.asarray(mixtures)), self.points, self.width) @ self.coefficients


def read_runs(mixtures: str | os.PathLike[str], losses: str | os.PathLike[str]) -> Runs:
    """Return the runs of two CSV files with a first column that numbers the runs, in the same order in both.

    Mixtures are normalised: printed weights rarely sum to 1.

    Raises: InputError: if the runs differ, or an entry is not a finite number, naming the run.
    """
    domains, numbers, weights = _read_table(mixtures)
    metrics, others, values = _read_table(losses)
    if len(numbers) != len(others):
        raise InputError(f"{mixtures} has {len(numbers)} runs, {losses} {len(others)}; they must agree.")
    if numbers != others:
        place = next(n for n, (one, other) in enumerate(zip(numbers, others)) if one != other)
        raise InputError(
            f"run {place + 1} of {mixtures} is {numbers[place]!r}, of {losses} {others[place]!r}; they must agree."
        )
    if np.any(weights < 0) or np.any(weights.sum(axis=1) <= 0):
        raise InputError(f"{mixtures} has a run whose weights are negative or all 0.")
    untried = [name for name, used in zip(domains, weights.any(axis=0)) if not used]
    if untried:
        raise InputError(
            f"no run of {mixtures} has anything of {untried}: nothing is known of them. Leave their columns out."
        )
    return Runs(weights / weights.sum(axis=1, keepdims=True), values, domains, metrics)


def fit_log_linear(mixtures: ArrayLike, losses: ArrayLike) -> LogLinearLaw:
    """Return the log-linear law by least squares, one column of losses after the other.

    Each fit starts from three guesses of the floor and takes Levenberg-Marquardt steps; 512 runs of 17 domains and 13
    losses take a fraction of a second.

    Args:
        mixtures: (N, D), rows sum to 1.
        losses: (N, M) or (N,), positive.

    Raises: InputError: with fewer runs than the D + 1 numbers to fit, or values that are not positive and finite.

    >>> mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    >>> truth = LogLinearLaw(np.log([2.0]), np.array([[0.5], [-1.0], [0.2]]))
    >>> law = fit_log_linear(mixtures, truth(mixtures))
    >>> bool(np.allclose(law(mixtures), truth(mixtures)))
    True
    """
    w, y = checked_runs(mixtures, losses)
    if w.shape[0] < w.shape[1] + 1:
        raise InputError(
            f"a log-linear law of {w.shape[1]} domains needs {w.shape[1] + 1} runs or more; got {w.shape[0]}."
        )
    if np.any(y <= 0):
        raise InputError("a log-linear law needs positive losses.")
    columns = np.stack([_fit_column(w, column) for column in y.T], axis=1)
    return LogLinearLaw(columns[0], columns[1:])


def fit_kernel(mixtures: ArrayLike, losses: ArrayLike, width: float = 3.0, ridge: float = 1e-2) -> KernelLaw:
    """Return kernel ridge regression with a Gaussian kernel on the square roots of the weights.

    Square roots spread out small weights, where a little more of a domain changes most.

    Args:
        mixtures: (N, D), rows sum to 1.
        losses: (N, M) or (N,).
        width: of the kernel; two mixtures without common domains are sqrt(2) apart.
        ridge: added to the diagonal.
    """
    w, y = checked_runs(mixtures, losses)
    points, mean = np.sqrt(w), y.mean(axis=0)
    gram = _kernel(points, points, width) + ridge * np.eye(len(points))
    return KernelLaw(points, np.linalg.solve(gram, y - mean), mean, width)


def descend(
    law: LogLinearLaw,
    objective: Literal["average", "worst"] = "average",
    lower: ArrayLike = 0.0,
    upper: ArrayLike = 1.0,
    prior: ArrayLike | None = None,
    pull: float = 0.0,
    importance: ArrayLike | None = None,
    tolerance: float = 1e-7,
) -> Matrix:
    """Return the mixture (D,) that minimises a log-linear law within bounds; a convex problem.

    Args:
        objective: the mean loss, or the "worst" excess of a loss over the least that any mixture within the bounds
            gives it, smoothed at 0.002 nats.
        lower, upper: numbers or (D,); e.g. caps of max_epochs * tokens / budget.
        prior, pull: adds pull * KL(w || prior); the prior is uniform by default. 0.05 to 0.1 in Olmix.
        importance: (M,) weights of the losses in "average"; equal by default.
        tolerance: nats; it ends when 20 steps in a row gain less each.

    >>> law = LogLinearLaw(np.log([1.0, 1.0]), np.array([[-1.0, 0.0], [0.0, -1.0]]))
    >>> descend(law).round(6).tolist(), descend(law, upper=[0.3, 1.0]).round(6).tolist()
    ([0.5, 0.5], [0.3, 0.7])
    """
    num_domains, num_losses = law.tilt.shape
    base = np.full(num_domains, 1.0 / num_domains) if prior is None else np.asarray(prior, dtype=np.float64)
    share = np.ones(num_losses) if importance is None else np.asarray(importance, dtype=np.float64)
    share, least = share / share.sum(), _least(law, lower, upper)

    def value(w: Matrix) -> tuple[float, Matrix]:
        tilted = np.exp(w @ law.tilt)
        excess = np.exp(law.log_floor) + tilted - least
        if objective == "average":
            total, by_loss = float(share @ excess), share
        else:
            top = excess.max()
            soft = np.exp((excess - top) / _SMOOTHING)
            total, by_loss = float(top + _SMOOTHING * np.log(soft.sum())), soft / soft.sum()
        ratio = np.log(np.maximum(w, 1e-300) / np.maximum(base, 1e-300))
        return total + pull * float(w @ ratio), law.tilt @ (tilted * by_loss) + pull * (ratio + 1.0)

    # Weights of 1e-12 can still grow; of 0 they could not.
    start = project(np.maximum(base, 1e-12), lower, upper)
    return _mirror_descent(value, start, lower, upper, tolerance)


def search(
    law: Law,
    prior: ArrayLike,
    rng: np.random.Generator,
    num_samples: int = 100_000,
    num_best: int = 128,
    concentration: tuple[float, float] = (1.0, 20.0),
    lower: ArrayLike = 0.0,
    upper: ArrayLike = 1.0,
    objective: Callable[[Matrix], Matrix] = lambda losses: losses.mean(axis=1),
) -> Matrix:
    """Return the mean of the best of many mixtures drawn around a prior: RegMix's search, for any law.

    Args:
        law: (N, D) -> (N, M).
        prior: (D,) weights that the draws are centred on.
        concentration: each draw is Dirichlet(strength * prior) with the strength log-uniform in this range
            (RegMix trains on strengths of 0.1 to 5; with more domains than that, such draws are mostly single domains).
        lower, upper: draws are projected into these bounds.
        objective: (N, M) losses -> (N,) numbers to minimise.

    >>> law = LogLinearLaw(np.log([1.0]), np.array([[-1.0], [0.0]]))
    >>> bool(search(law, [0.5, 0.5], np.random.default_rng(0), num_samples=2000, num_best=8)[0] > 0.95)
    True
    """
    base = np.asarray(prior, dtype=np.float64)
    weakest, strongest = concentration
    strength = np.exp(rng.uniform(np.log(weakest), np.log(strongest), (num_samples, 1)))
    # Dirichlet draws as normalised gamma draws, which takes one strength per row.
    draws = np.maximum(rng.standard_gamma(np.maximum(strength * base, 1e-3)), 1e-300)
    draws /= draws.sum(axis=1, keepdims=True)
    for row in np.flatnonzero(np.any((draws < lower) | (draws > upper), axis=1)):
        draws[row] = project(draws[row], lower, upper)
    best = np.argsort(objective(law(draws)), kind="stable")[:num_best]
    return project(draws[best].mean(axis=0), lower, upper)


def cross_validated(fit: Callable[[Matrix, Matrix], Law], runs: Runs, num_parts: int = 5) -> float:
    """Return the mean rank correlation of predicted and real losses on runs that were left out of the fit.

    Every ``num_parts``-th run is left out in turn; NaN where the parts have fewer than 3 runs, or the others do not
    suffice for a fit.

    >>> truth = LogLinearLaw(np.log([2.0]), np.array([[0.5], [-1.0], [0.2]]))
    >>> mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    >>> round(cross_validated(fit_log_linear, Runs(mixtures, truth(mixtures), ("a", "b", "c"), ("loss",))), 6)
    1.0
    """
    part = np.arange(len(runs.mixtures)) % num_parts
    if len(part) < 3 * num_parts:
        return float("nan")
    correlations = []
    for left_out in range(num_parts):
        train, test = part != left_out, part == left_out
        try:
            predicted = fit(runs.mixtures[train], runs.losses[train])(runs.mixtures[test])
        except InputError:  # the rest are too few, or have nothing of some domain
            return float("nan")
        correlations += [spearman(a, b) for a, b in zip(predicted.T, runs.losses[test].T)]
    return float(np.mean(correlations))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return the rank correlation of two vectors (N,); equal values share their mean rank.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    return float(np.corrcoef(_ranks(np.asarray(a)), _ranks(np.asarray(b)))[0, 1])


_SMOOTHING = 0.002


def _read_table(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], list[str], Matrix]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise InputError(f"cannot read the runs {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a table of runs, a header and a row of numbers per run: {error}.") from error
    names = header[1:]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"the header of {path} has the columns {twice} more than once; give each a name of its own.")
    return tuple(names), [row[0] for row in rows], np.array([_numbers(path, row, names) for row in rows])


def _numbers(path: str | os.PathLike[str], row: Sequence[str], names: Sequence[str]) -> list[float]:
    where = f"{path} is not a table of runs, a header and a row of numbers per run: the run {row[0]!r} has"
    if len(row) != len(names) + 1:
        raise InputError(f"{where} {len(row) - 1} entries, the header {len(names)} after the first column.")
    numbers = []
    for name, text in zip(names, row[1:]):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(np.nan)
        if not np.isfinite(numbers[-1]):
            raise InputError(f"{where} {text!r} for {name!r}. Leave the run out of both tables.")
    return numbers


def checked_runs(mixtures: ArrayLike, losses: ArrayLike) -> tuple[Matrix, Matrix]:
    """Return mixtures (N, D) and losses (N, M) to fit.

    Raises: InputError: if they do not fit together, are no mixtures, or none has anything of some domain.
    """
    w, y = np.asarray(mixtures, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    y = y[:, None] if y.ndim == 1 else y
    if w.ndim != 2 or y.ndim != 2 or len(w) != len(y) or not (np.isfinite(w).all() and np.isfinite(y).all()):
        raise InputError(f"mixtures and losses must be finite, (N, D) and (N, M); got {w.shape} and {y.shape}.")
    if np.any(w < 0) or np.any(np.abs(w.sum(axis=1) - 1) > 1e-6):
        raise InputError("every mixture must be >= 0 and sum to 1; divide each row by its sum.")
    if not w.any(axis=0).all():
        # Its tilt would be 0, which is often the best of all, and the proposal nothing but it.
        untried = np.flatnonzero(~w.any(axis=0)).tolist()
        raise InputError(f"no mixture has anything of the domains in columns {untried}; leave them out.")
    return w, y


def _fit_column(w: Matrix, y: Matrix) -> Matrix:
    fits = [_levenberg_marquardt(w, y, np.log(share * y.min())) for share in (0.3, 0.7, 0.95)]
    return min(fits, key=lambda fit: fit[1])[0]


def _levenberg_marquardt(w: Matrix, y: Matrix, log_floor: float) -> tuple[Matrix, float]:
    tilt = np.linalg.lstsq(w, np.log(np.maximum(y - np.exp(log_floor), 1e-3)), rcond=None)[0]
    x, damping = np.concatenate([[log_floor], tilt]), 1e-3

    def residual(x: Matrix) -> Matrix:
        return y - np.exp(x[0]) - np.exp(np.minimum(w @ x[1:], 50.0))

    error = float(np.sum(residual(x) ** 2))
    for _ in range(300):
        jacobian = np.column_stack([np.full(len(y), np.exp(x[0])), np.exp(np.minimum(w @ x[1:], 50.0))[:, None] * w])
        normal = jacobian.T @ jacobian
        damped = normal + damping * np.diag(np.diag(normal) + 1e-12)
        moved = x + np.linalg.lstsq(damped, jacobian.T @ residual(x), rcond=None)[0]
        new_error = float(np.sum(residual(moved) ** 2))
        settled = abs(error - new_error) <= 1e-13 * error
        if new_error < error:
            x, error, damping = moved, new_error, 0.3 * damping
        else:
            damping *= 5.0
        if settled or damping > 1e12:
            break
    return x, error


def _kernel(a: Matrix, b: Matrix, width: float) -> Matrix:
    squared = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1) - 2 * a @ b.T
    return np.exp(-np.maximum(squared, 0.0) / (2 * width**2))


def _least(law: LogLinearLaw, lower: ArrayLike, upper: ArrayLike) -> Matrix:
    """Return the least loss (M,) that a mixture within the bounds gives each metric: fill up the best domains."""
    num_domains, num_losses = law.tilt.shape
    low = np.broadcast_to(np.asarray(lower, dtype=np.float64), num_domains)
    high = np.broadcast_to(np.minimum(np.asarray(upper, dtype=np.float64), 1.0), num_domains)
    least = np.empty(num_losses)
    for metric in range(num_losses):
        w, left = low.copy(), 1.0 - low.sum()
        for domain in np.argsort(law.tilt[:, metric], kind="stable"):
            taken = min(high[domain] - low[domain], left)
            w[domain] += taken
            left -= taken
        least[metric] = law(w[None])[0, metric]
    return least


def _mirror_descent(
    value: Callable[[Matrix], tuple[float, Matrix]], start: Matrix, lower: ArrayLike, upper: ArrayLike, tolerance: float
) -> Matrix:
    """Exponentiated gradient steps, projected, whose length doubles while they help and shrinks until they do."""
    w = start
    current, gradient = value(w)
    step, waiting = 1.0, 0
    for _ in range(20_000):
        # A floor in the step keeps domains that are at almost 0 able to come back.
        moved = np.maximum(w, 1e-12) * np.exp(np.clip(-step * (gradient - gradient @ w), -50.0, 50.0))
        moved = project(moved, lower, upper)
        new_value, new_gradient = value(moved)
        if new_value < current:
            waiting = waiting + 1 if current - new_value < tolerance else 0
            w, current, gradient, step = moved, new_value, new_gradient, 1.5 * step
        else:
            step *= 0.5
        if waiting >= 20 or step < 1e-12:
            break
    return w


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
