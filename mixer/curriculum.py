"""Weights that change along a run: a mixture file with stages, or several files one after another.

    {"schema": 1, "stages": [
        {"from_tokens": 0, "mixture": "broad.json"},
        {"from_tokens": "900B", "ramp_tokens": "50B", "weights": {"code": 0.4, "web": 0.6}}
    ]}

A stage begins at a batch (``from_step``) or after a number of tokens (``from_tokens``), with weights of its own or
those of another mixture file beside it. With ``ramp_steps`` or ``ramp_tokens`` the weights move there in a straight
line beforehand.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixer.errors import InputError
from mixer.mixture import Mixture, check_schema
from mixer.units import parse_count

__all__ = ["CurriculumStage", "load_curriculum"]

_KEYS = {"from_step", "from_tokens", "ramp_steps", "ramp_tokens", "weights", "mixture"}


class CurriculumStage(NamedTuple):
    """One stage: ``start`` and ``ramp`` are in tokens or in steps (batches)."""

    mixture: Mixture
    start: int
    ramp: int
    in_tokens: bool


def load_curriculum(path: str | os.PathLike[str]) -> list[CurriculumStage]:
    """Read a mixture file: one stage for a plain one, in order of their starts for one with stages.

    Raises: InputError: if it cannot be read, a stage is unclear, the first does not begin at 0, or two begin together.
    """
    source = Path(path)
    try:
        raw = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [CurriculumStage(Mixture.load(source), 0, 0, False)]  # says what is wrong with it
    if not isinstance(raw, dict) or "stages" not in raw:
        return [CurriculumStage(Mixture.load(source), 0, 0, False)]
    check_schema(source, raw)
    if not isinstance(raw["stages"], list) or not raw["stages"]:
        raise InputError(f"{source} has no stages: expected a list of {{'from_tokens': …, 'weights': …}}.")
    stages = [_stage(source, number, entry) for number, entry in enumerate(raw["stages"])]
    if len({stage.in_tokens for stage in stages if stage.start}) > 1:
        raise InputError(f"{source} mixes from_step and from_tokens; give all stages in one unit.")
    stages.sort(key=lambda stage: stage.start)
    starts = [stage.start for stage in stages]
    if starts[0] != 0 or len(set(starts)) < len(starts):
        raise InputError(f"{source}: stages begin at {starts}; the first must begin at 0, and no two together.")
    for before, stage in itertools.pairwise(stages):
        if stage.start - stage.ramp < before.start:
            raise InputError(f"{source}: the ramp of {stage.ramp:,} to {stage.start:,} begins before {before.start:,}.")
    return stages


def _stage(source: Path, number: int, entry: Any) -> CurriculumStage:
    where = f"{source}, stage {number}"
    if not isinstance(entry, Mapping) or not set(entry) <= _KEYS:
        raise InputError(f"{where}: expected an object with keys among {sorted(_KEYS)}; got {entry!r:.120}.")
    if ("from_step" in entry) + ("from_tokens" in entry) != 1 or ("weights" in entry) + ("mixture" in entry) != 1:
        raise InputError(f"{where} needs one of from_step and from_tokens, and one of weights and mixture.")
    in_tokens = "from_tokens" in entry
    unit = ("from_tokens", "ramp_tokens", "ramp_steps") if in_tokens else ("from_step", "ramp_steps", "ramp_tokens")
    if unit[2] in entry:
        raise InputError(f"{where} begins by {unit[0]} and so takes {unit[1]}, not {unit[2]}.")
    start = parse_count(entry[unit[0]], f"a start of {where}")
    ramp = parse_count(entry.get(unit[1], 0), f"a ramp of {where}")
    mixture = Mixture(entry["weights"]) if "weights" in entry else Mixture.load(source.parent / entry["mixture"])
    return CurriculumStage(mixture, start, ramp, in_tokens)
