"""Fit L(n) = e + b * n^-a to losses over tokens seen: for ADO's rates of learning, and for target losses.

The loss is Huber on the logarithm (delta 1e-3, as in Hoffmann et al. 2022, arXiv:2203.15556), over e >= 0, b > 0 and
0 < a <= 0.8. A grid over (a, e) with the best b for each is refined by damped Gauss-Newton steps; deterministic, numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from algorithms.rules.steps import Vector
from mixer.errors import InputError

__all__ = ["PowerLaw", "fit_power_law"]

DELTA = 1e-3
RATES = np.concatenate([[0.01, 0.02, 0.035], np.linspace(0.05, 0.8, 26)])
FLOORS = np.concatenate([[0.0], np.linspace(0.02, 0.98, 33), [0.99, 0.995]])


class PowerLaw(NamedTuple):
    """e (nats, lowest attainable), b (nats), a (rate)."""

    floor: float
    scale: float
    rate: float

    def loss(self, num_tokens: float | Vector) -> float | Vector:
        """Return L at ``num_tokens`` > 0, nats per token."""
        return self.floor + self.scale * np.asarray(num_tokens, dtype=np.float64) ** -self.rate

    def slope(self, num_tokens: float | Vector) -> float | Vector:
        """Return -dL/dn at ``num_tokens`` > 0, nats per token and token seen; >= 0."""
        tokens = np.asarray(num_tokens, dtype=np.float64)
        return self.rate * self.scale * tokens ** (-self.rate - 1.0)


def fit_power_law(num_tokens: Vector, losses: Vector) -> PowerLaw:
    """Return the power law through (num_tokens, losses), both (N,) and positive, N >= 4.

    Raises: InputError: on fewer points, or values that are not positive and finite.

    >>> tokens = np.geomspace(1e3, 1e7, 30)
    >>> law = fit_power_law(tokens, 2.0 + 50 * tokens**-0.3)
    >>> round(law.floor, 3), round(law.scale, 1), round(law.rate, 3)
    (2.0, 50.0, 0.3)
    """
    tokens, losses = np.asarray(num_tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if tokens.shape != losses.shape or tokens.ndim != 1 or tokens.size < 4:
        raise InputError(f"a power law needs at least 4 points; got shapes {tokens.shape} and {losses.shape}.")
    if not (np.all(np.isfinite(tokens) & np.isfinite(losses)) and np.all(tokens > 0) and np.all(losses > 0)):
        raise InputError("a power law needs positive finite token counts and losses.")
    # Tokens relative to their geometric mean keep the scale and the rate from being strongly correlated.
    centre = float(np.exp(np.mean(np.log(tokens))))
    x, y = np.log(tokens / centre), np.log(losses)
    floor, scale, rate = _refined(x, y, _best_on_grid(x, y))
    return PowerLaw(floor, float(scale * centre**rate), rate)


def _best_on_grid(x: Vector, y: Vector) -> tuple[float, float, float]:
    floors = FLOORS * np.exp(y.min())
    above = np.log(np.exp(y) - floors[:, None])  # (F, N)
    log_scale = np.median(above[:, None, :] + RATES[:, None] * x, axis=2)  # (F, R)
    predicted = np.log(floors[:, None, None] + np.exp(log_scale[:, :, None] - RATES[:, None] * x))
    value = _huber(y - predicted).sum(axis=2)
    f, r = np.unravel_index(np.argmin(value), value.shape)
    return float(floors[f]), float(np.exp(log_scale[f, r])), float(RATES[r])


def _refined(x: Vector, y: Vector, start: tuple[float, float, float]) -> tuple[float, float, float]:
    parameters = np.array([start[0], np.log(start[1]), start[2]])
    value, damping = _huber(_residual(x, y, parameters)).sum(), 1e-3
    for _ in range(100):
        floor, log_scale, rate = parameters
        decay = np.exp(log_scale - rate * x)
        predicted = floor + decay
        jacobian = np.stack([1 / predicted, decay / predicted, -x * decay / predicted], axis=1)
        residual = _residual(x, y, parameters)
        weight = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))
        normal = jacobian.T @ (weight[:, None] * jacobian)
        step = np.linalg.lstsq(
            normal + damping * np.diag(np.diag(normal) + 1e-12), jacobian.T @ (weight * residual), rcond=None
        )[0]
        moved = np.clip(parameters + step, [0.0, -50.0, 1e-3], [np.exp(y.min()), 50.0, 0.8])
        new_value = _huber(_residual(x, y, moved)).sum()
        if new_value < value:
            parameters, value, damping = moved, new_value, damping * 0.3
        else:
            damping *= 10.0
        if damping > 1e12:
            break
    return float(parameters[0]), float(np.exp(parameters[1])), float(parameters[2])


def _residual(x: Vector, y: Vector, parameters: Vector) -> Vector:
    return y - np.log(parameters[0] + np.exp(parameters[1] - parameters[2] * x))


def _huber(residual: Vector) -> Vector:
    size = np.abs(residual)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
