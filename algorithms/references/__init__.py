"""References: what gives the losses that a DRO method compares with. One file per kind.

as_reference(model)               a frozen model, run on every batch
as_reference("path/to/model")     the same, from a Hugging Face folder or a Composer checkpoint
as_reference("scores")            what ``mixer score`` wrote: losses computed once, or bigram tables
as_reference("targets.json")      one target loss per domain; also as a dict
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from algorithms.references.base import Reference
from algorithms.references.bigram import BigramLosses, bigram_distances, count_bigrams
from algorithms.references.cached import CachedLosses, LossesInBatch, score
from algorithms.references.frozen import FrozenModel
from algorithms.references.targets import BestSoFar, TargetLosses
from algorithms.runs import read_settings
from mixer.errors import InputError

__all__ = [
    "BestSoFar",
    "BigramLosses",
    "CachedLosses",
    "FrozenModel",
    "LossesInBatch",
    "Reference",
    "TargetLosses",
    "as_reference",
    "bigram_distances",
    "count_bigrams",
    "score",
]


def as_reference(source: Any) -> Reference:
    """Return a ``Reference`` from a model, a path, target losses by domain, or a reference.

    Raises: InputError: if ``source`` is none of these.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, Mapping):
        return TargetLosses(source)
    if isinstance(source, nn.Module):
        return FrozenModel(source)
    if isinstance(source, str | Path):
        return _from_path(Path(source))
    raise InputError(f"a reference is a model, a path, losses by domain, or a Reference; got {type(source).__name__}.")


def _from_path(path: Path) -> Reference:
    if path.suffix == ".json":
        return TargetLosses.load(path)
    if not (path / "run.json").is_file() or (path / "config.json").is_file():
        return FrozenModel(path)
    kind = read_settings(path).get("kind")
    if kind not in ("token", "sample", "bigram"):
        raise InputError(
            f"{path} is a run, but not one of `mixer score`. Give the run's model/ folder to use its model."
        )
    return BigramLosses(path) if kind == "bigram" else CachedLosses(path)
