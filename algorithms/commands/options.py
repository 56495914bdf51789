"""Options and tables that the training commands share."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixer.errors import InputError

if TYPE_CHECKING:
    from algorithms.training import TrainSettings

__all__ = ["parse_settings", "training_options", "training_settings"]


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
        "--weight-decay",
        default=1e-5,
        show_default=True,
        type=click.FloatRange(0),
        help="Decoupled from the learning rate's peak, per step.",
    ),
    click.option(
        "--patience",
        type=click.IntRange(1),
        metavar="N",
        help="Stop when the worst domain's held-out loss has not improved N times, evaluated every 50 steps, and keep "
        "the best model.",
    ),
    click.option(
        "--objective",
        help="Watch this average for --patience, and report it: uniform, proportional, or a file of weights.  "
        "[default: the worst domain]",
    ),
    click.option(
        "--on-nonfinite",
        default="fail",
        show_default=True,
        type=click.Choice(["fail", "skip"]),
        help="What a NaN or infinite loss does: end the run, or leave its domain out of the step, counted.",
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
    """Return ``{"eta": 0.1}`` for ``("eta=0.1",)``.

    Numbers, lists and dicts are written as in Python, booleans also in lower case; ``key=@file.json`` reads a file; the
    rest is text.

    Raises: InputError: on what is no pair, or a file that is not there or not JSON.

    >>> parse_settings(["eta=0.1", "clip=token", "targets={'law': 2.1}"])
    {'eta': 0.1, 'clip': 'token', 'targets': {'law': 2.1}}
    """
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--set takes key=value; got {pair!r}.")
        settings[key] = _from_file(value[1:], key) if value.startswith("@") else _literal(value)
    return settings


def training_settings(options: dict[str, Any], shards: Path) -> TrainSettings:
    """Take the options of ``training_options`` out of a command's, and return what they say."""
    from algorithms.training import TrainSettings

    objective = _objective(options.pop("objective"), shards)
    taken = {name: options.pop(name) for name in ("model", "steps", "seed", "weight_decay", "patience", "on_nonfinite")}
    return TrainSettings(
        global_batch_size=options.pop("batch_size"), learning_rate=options.pop("lr"), objective=objective, **taken
    )


def _objective(source: str | None, shards: Path) -> dict[str, float] | None:
    from algorithms.objective import objective_weights
    from mixer.folders import load_manifest

    if source is None:
        return None
    manifest = load_manifest(shards)
    return objective_weights(source, {name: manifest.split(name, "train").num_tokens for name in manifest.names})


def _literal(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _from_file(path: str, key: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--set {key}=@{path} cannot be read as JSON: {error}.") from error
