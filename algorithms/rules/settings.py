"""Checks of the settings that rules are made with: each returns what it was given, or says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algorithms.rules.base import Domains
from mixer.errors import InputError

__all__ = ["by_name", "choice", "flag", "mapping", "names_in", "number", "whole"]

Vector = NDArray[np.float64]


def by_name(
    values: Mapping[str, float] | float,
    domains: Domains,
    what: str,
    default: float | None = None,
    low: float = -np.inf,
) -> Vector:
    """Return one number per domain, (D,) and >= ``low``, from a number for all or a mapping by name.

    Raises: InputError: if a name is unknown, or one is missing and there is no default.
    """
    if not isinstance(values, Mapping):
        return np.full(len(domains.names), number(values, what, low))
    unknown = sorted(set(values) - set(domains.names))
    missing = sorted(set(domains.names) - set(values)) if default is None else []
    if unknown or missing:
        problem = f"names unknown domains {unknown}" if unknown else f"has no value for {missing}"
        raise InputError(f"{what} {problem}; the domains are {list(domains.names)}.")
    return np.array([number(values.get(name, default), f"{what}[{name!r}]", low) for name in domains.names])


def number(value: Any, what: str, low: float = -np.inf, high: float = np.inf) -> float:
    """Return ``value`` as a float in [low, high].

    Raises: InputError: if it is not a finite number there.

    >>> number(1, "eta", low=0)
    1.0
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not np.isfinite(float(value)):
        raise InputError(f"{what} must be a finite number; got {value!r}.")
    if not low <= value <= high:
        allowed = f"be >= {low:g}" if high == np.inf else f"lie in [{low:g}, {high:g}]"
        raise InputError(f"{what} must {allowed}; got {value:g}.")
    return float(value)


def whole(value: Any, what: str, low: int = 0) -> int:
    """Return ``value`` as an int of at least ``low``.

    Raises: InputError: if it is not a whole number there.

    >>> whole(3.0, "window", low=1)
    3
    """
    if number(value, what) != int(value) or value < low:
        raise InputError(f"{what} must be a whole number >= {low}; got {value!r}.")
    return int(value)


def flag(value: Any, what: str) -> bool:
    """Return ``value`` if it is True or False: the text "no" would count as true.

    Raises: InputError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{what} must be True or False; got {value!r}.")
    return value


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """Return ``value`` if it maps names of domains to something.

    Raises: InputError: if it does not.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be given by name, as in {{'code': ...}}; got {value!r}.")
    return value


def names_in(value: Any, what: str) -> tuple[str, ...]:
    """Return ``value`` as a tuple of names.

    Raises: InputError: if it is not a list of them: of a single text, every letter would be one.

    >>> names_in(["code", "law"], "targets")
    ('code', 'law')
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{what} must be a list of names, as in ['code', 'law']; got {value!r}.")
    return tuple(value)


def choice(value: str, what: str, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``.

    Raises: InputError: listing the options.
    """
    if value not in options:
        raise InputError(f"{what} must be one of {', '.join(map(repr, options))}; got {value!r}.")
    return value
