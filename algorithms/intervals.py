"""Times between events of a Composer run: "20ba", "5000sp", "1Mtok"."""

from __future__ import annotations

import re
from typing import Any

from composer.core import State, Time, TimeUnit

from algorithms.presence import samples_per_step
from mixer.errors import InputError
from mixer.units import parse_count

__all__ = ["interval", "is_due", "samples_between"]


def interval(every: str | int) -> Time:
    """Return the time between two events; a number counts batches.

    Raises: InputError: unless it is at least one batch, sample or token.

    >>> str(interval(20)), str(interval("1000tok")), str(interval("1.5Mtok"))
    ('20ba', '1000tok', '1500000tok')
    """
    wrong = f'every={every!r} is not a time: expected "20ba" (batches), "5000sp" (samples) or "1Mtok" (tokens).'
    match = re.fullmatch(r"\s*(.+?)\s*(ba|sp|tok|)\s*", str(every))
    try:
        count = parse_count(match[1] if match else "")
    except InputError as error:
        raise InputError(wrong) from error
    if count < 1:
        raise InputError(f'every={every!r} has to be at least one batch ("ba"), sample ("sp") or token ("tok").')
    return Time(count, TimeUnit(match[2] or "ba") if match else TimeUnit.BATCH)


def is_due(every: Time, state: State) -> bool:
    """Return whether the step that has just ended went past a multiple of ``every``."""
    now, before = (moment.get(every.unit).value for moment in (state.timestamp, state.previous_timestamp))  # type: ignore[union-attr]
    return now // every.value > before // every.value


def samples_between(every: Time, loader: Any) -> float | None:
    """Return how many samples of ``loader``, over all ranks, add up in the time ``every``; None where unknown."""
    batch_size = samples_per_step(loader)
    if batch_size is None:
        return None
    if every.unit == TimeUnit.BATCH:
        return float(every.value * batch_size)
    if every.unit == TimeUnit.SAMPLE:
        return float(max(every.value, batch_size))
    manifest = getattr(loader, "manifest", None)
    return float(batch_size) if manifest is None else max(every.value / manifest.seq_len, float(batch_size))
