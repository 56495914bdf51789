"""Times between events of a Composer run: "20ba", "5000sp", "1000000tok"."""

from __future__ import annotations

from composer.core import State, Time, TimeUnit

from mixer.errors import InputError

__all__ = ["interval", "is_due"]


def interval(every: str | int) -> Time:
    """Return the time between two events; a number counts batches.

    Raises: InputError: unless it is at least one batch, sample or token.

    >>> str(interval(20)), str(interval("1000tok"))
    ('20ba', '1000tok')
    """
    try:
        time = Time.from_input(every, TimeUnit.BATCH)
    except (TypeError, ValueError) as error:
        raise InputError(
            f'every={every!r} is not a time: expected "20ba" (batches), "5000sp" (samples) or "1000000tok" (tokens).'
        ) from error
    if time.unit not in (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN) or time.value < 1:
        raise InputError(f'every={every!r} has to be at least one batch ("ba"), sample ("sp") or token ("tok").')
    return time


def is_due(every: Time, state: State) -> bool:
    """Return whether the step that has just ended went past a multiple of ``every``."""
    now, before = (moment.get(every.unit).value for moment in (state.timestamp, state.previous_timestamp))  # type: ignore[union-attr]
    return now // every.value > before // every.value
