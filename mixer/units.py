"""Numbers as people write them: 50M tokens, 1.5T tokens, 20GB."""

from __future__ import annotations

import re

from mixer.errors import InputError

__all__ = ["parse_bytes", "parse_count", "short"]

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}


def parse_count(text: str | float, what: str = "a count") -> int:
    """Return ``50M`` as 50,000,000; K, M, B (or G), T, or 5e7.

    >>> parse_count("50M"), parse_count("1.5b"), parse_count("2e3"), parse_count(7)
    (50000000, 1500000000, 2000, 7)
    """
    return _parse(str(text), _COUNTS, r"", what, "50M, 1.5B or 50000000")


def parse_bytes(text: str | float, what: str = "a size") -> int:
    """Return ``20GB`` (or GiB, or g) as 20 · 2**30; as mosaicml-streaming reads sizes.

    >>> parse_bytes("1kb"), parse_bytes("2 GiB"), parse_bytes(5)
    (1024, 2147483648, 5)
    """
    return _parse(str(text), _BYTES, r"(?:i?b)?", what, "20GB or 500MB")


def short(count: float) -> str:
    """Return a count with three digits and a unit.

    >>> short(123456), short(1.5e12), short(12)
    ('123K', '1.5T', '12')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _parse(text: str, units: dict[str, int], suffix: str, what: str, example: str) -> int:
    # A comma stands between thousands: "1,5" might be meant as 1.5, and is no number here.
    number = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9_.]+)(?:e\+?[0-9]+)?"
    match = re.fullmatch(rf"\s*({number})\s*([a-z]?){suffix}\s*", text.lower())
    try:
        if match is None or match[2] not in units:
            raise ValueError(text)
        value = float(match[1].replace(",", "").replace("_", "")) * units[match[2]]
        if units[match[2]] == 1 and value != round(value):
            raise ValueError(text)
        return round(value)
    except ValueError:
        raise InputError(f"{text!r} is not {what}; write for example {example}.") from None
