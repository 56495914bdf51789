"""How often an update finds no sample of a domain, so that it goes by an old score, or by none.

A loader that carries its rounding gives a domain of weight w its n w samples of every n, to within one; a domain owed
less than one sample per update is absent from the others. Drawn independently it is absent with chance (1 - w)^n: 22
domains alike miss one another in two of three batches of 64, and in 6 % of those of 128.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algorithms.loader_facts import sampling_weights
from algorithms.ranks import rank, world_size
from algorithms.rules.base import UpdateRule

__all__ = ["absence_warning", "absent_shares", "samples_per_step", "warn_of_absences"]

log = logging.getLogger(__name__)

Vector = NDArray[np.float64]
TOLERATED = 0.01  # share of updates in which some domain is absent


def absent_shares(weights: Vector, num_samples: float, *, independent: bool = False) -> Vector:
    """Return the share (D,) of updates, of ``num_samples`` samples each, in which each domain is absent.

    >>> absent_shares(np.array([0.9, 0.1]), 4).round(3).tolist()
    [0.0, 0.6]
    >>> absent_shares(np.array([0.9, 0.1]), 4, independent=True).round(3).tolist()
    [0.0, 0.656]
    """
    shares = np.asarray(weights, dtype=np.float64)
    return (1.0 - shares) ** num_samples if independent else np.maximum(1.0 - shares * num_samples, 0.0)


def absence_warning(names: Sequence[str], weights: Vector, num_samples: float, *, independent: bool = False) -> str:
    """Return one sentence where more than 1 % of updates lack some domain, else "". Domains of weight 0 do not count.

    >>> absence_warning(["a", "b"], np.array([0.5, 0.5]), 2)
    ''
    """
    drawn = np.flatnonzero(weights)
    absent = absent_shares(weights[drawn], num_samples, independent=independent)
    # Carried samples that one domain gets, another does not: absences exclude each other as far as they can.
    lacking = 1.0 - float(np.prod(1.0 - absent)) if independent else min(float(absent.sum()), 1.0)
    if lacking <= TOLERATED:
        return ""
    rarest = int(np.argmax(absent))
    least = float(weights[drawn[rarest]])
    needed = int(np.ceil((np.log(len(drawn) / TOLERATED) if independent else 1.0) / least - 1e-9))
    return (
        f"about {lacking:.0%} of the updates, of {num_samples:g} samples each, will lack some domain, most often "
        f"{names[drawn[rarest]]!r} (weight {least:.3g}, absent from {absent[rarest]:.0%}), which then counts by "
        f"its last score: take {needed:,} samples or more per update, by a larger batch or a longer interval (every=, "
        "--every)."
    )


def warn_of_absences(rule: UpdateRule, loader: Any, num_samples: float | None = None) -> None:
    """Log one warning, on rank 0, where more than 1 % of the updates of ``rule`` will lack a domain of ``loader``.

    Rules that sample, and those on held-out losses, do not depend on which domains a batch happens to hold: no warning.

    Args:
        loader: a ``MixtureLoader``; of one that does not say what it draws by, nothing is known.
        num_samples: samples between two updates, over all ranks; by default those of one batch.
    """
    samples, shares = num_samples or samples_per_step(loader), _shares_of_samples(loader)
    if rank() != 0 or samples is None or shares is None or rule.applies != "loss" or "heldout" in rule.needs:
        return
    independent = getattr(getattr(loader, "mixer", None), "independent", True)
    warning = absence_warning(tuple(loader.domains), shares, samples, independent=independent)
    if warning:
        log.warning("%s", warning)


def samples_per_step(loader: Any) -> int | None:
    """Return how many samples a batch of all ranks holds; None where the loader does not say."""
    batch_size = getattr(loader, "global_batch_size", None)
    return batch_size or (getattr(loader, "batch_size", None) or 0) * world_size() or None


def _shares_of_samples(loader: Any) -> Vector | None:
    """Return the shares (D,) of the samples that a loader draws; weights may be of tokens."""
    weights, means = sampling_weights(loader), getattr(getattr(loader, "mixer", None), "mean_tokens", None)
    if weights is None or means is None:
        return weights
    return weights / means / np.sum(weights / means)
