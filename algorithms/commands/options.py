"""Options and tables that the training commands share."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import click

from mixer.errors import InputError

__all__ = ["parse_settings", "training_options"]


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
    click.option(
        "--seed",
        default=17,
        show_default=True,
        type=click.IntRange(0, 2**32 - 2),
        help="For weights, sample order and dropout.",
    ),
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
