"""Options and tables that the training commands share."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import click

from mixer.errors import InputError

__all__ = ["parse_count", "parse_settings", "training_options"]


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ``TrainSettings`` to a command, with its defaults."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.option(
        "--model",
        default="nano",
        show_default=True,
        help="nano, micro, mini, small; or a Hugging Face model folder or config.json.",
    ),
    click.option("--steps", default=400, show_default=True, type=click.IntRange(1), help="Optimiser steps."),
    click.option(
        "--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Samples per step, over all ranks."
    ),
    click.option(
        "--lr", default=2e-3, show_default=True, type=float, help="Peak learning rate; warm-up, then cosine to a tenth."
    ),
    click.option("--seed", default=17, show_default=True, type=int, help="For weights, sample order and dropout."),
    click.option(
        "--heldout-samples",
        default=256,
        show_default=True,
        type=click.IntRange(1),
        help="Validation samples per domain at the end.",
    ),
)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return ``{"eta": 0.1}`` for ``("eta=0.1",)``: numbers, booleans and lists as in Python, the rest as text.

    >>> parse_settings(["eta=0.1", "clip=token"])
    {'eta': 0.1, 'clip': 'token'}
    """
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--set takes key=value; got {pair!r}.")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings


def parse_count(text: str) -> int:
    """Return a whole number written plainly or with K, M, B or T (powers of 1000).

    >>> parse_count("50M"), parse_count("1.5B"), parse_count("1000")
    (50000000, 1500000000, 1000)
    """
    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"expected a positive count such as 50M or 1.5B; got {text!r}.")
    return round(value)
