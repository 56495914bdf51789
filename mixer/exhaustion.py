"""What happens when a domain has been read ``max_epochs`` times and is owed more.

A policy is told which domains are used up and returns the weights to go on with, or raises. The mixer itself keeps
every domain within its limit, whatever a policy returns.

    repeat   go on for ever; with ``max_epochs`` the limit is the user's word, so reaching it is an error that names it
    drop     the domain leaves the mixture, the others share its weight
    stop     the run ends before the first batch that cannot be filled
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.errors import ExhaustedError

__all__ = ["EXHAUSTION", "Exhausted", "RunEnded"]

Vector = NDArray[np.float64]


class Exhausted(NamedTuple):
    """What a policy may know.

    Attributes:
        names: of all D domains.
        weights: (D,), those of this batch.
        used_up: (D,) bool, domains with weight that have nothing left after this batch, or even for it.
        owed: (D,) bool, those of them from which this batch needs more than is left.
        max_epochs: (D,), the limits.
        step: index of the batch.
    """

    names: tuple[str, ...]
    weights: Vector
    used_up: NDArray[np.bool_]
    owed: NDArray[np.bool_]
    max_epochs: Vector
    step: int

    def describe(self) -> str:
        """Return ``'book' after 2 epochs, 'wiki' after 4 epochs``."""
        return ", ".join(f"{self.names[i]!r} after {self.max_epochs[i]:g} epochs" for i in np.flatnonzero(self.used_up))


class RunEnded(Exception):
    """Raised by a policy: no further batch; the message says why."""


def repeat(event: Exhausted) -> Vector:
    """Refuse when more epochs than allowed would be needed."""
    if not event.owed.any():
        return event.weights
    raise ExhaustedError(
        f"used up before batch {event.step:,}: {event.describe()}. To go on, let it leave the mixture"
        " (on_exhausted='drop'), end the run there (on_exhausted='stop'), or allow more epochs (max_epochs; `mixer"
        " weigh --method unimax` keeps weights within them)."
    )


def drop(event: Exhausted) -> Vector:
    """Give the weight of the used-up domains to the others, in proportion."""
    weights = np.where(event.used_up, 0.0, event.weights)
    if not weights.any():
        raise RunEnded(f"every domain with a positive weight is used up: {event.describe()}")
    return weights


def stop(event: Exhausted) -> Vector:
    """End the run when the batch cannot be filled as the weights ask."""
    if not event.owed.any():
        return event.weights
    raise RunEnded(f"used up: {event.describe()}")


# A new row enters the shared property tests: never past max_epochs, ends, resumes.
EXHAUSTION: dict[str, Callable[[Exhausted], Vector]] = {"repeat": repeat, "drop": drop, "stop": stop}
