"""What one call of ``convert`` is: what is asked, where things lie, and who does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from converters.locations import Location
from converters.options import PackOptions, StageOptions
from converters.plan import Plan, inputs_fingerprint
from mixer.manifest import Manifest, TokenizerInfo

__all__ = ["PACK", "QUARANTINE", "SCRATCH", "STAGE", "TOKENIZER", "Job", "Progress"]

# Names below ``out``. What starts with a dot is there only while a conversion is unfinished.
STAGE, PACK, TOKENIZER, QUARANTINE = ".stage", ".pack", "tokenizer", "quarantine.jsonl"
SCRATCH = "scratch"  # in PACK


class Progress(NamedTuple):
    """How far a conversion is: ``phase`` is ``train-tokenizer``, ``tokenize`` or ``pack``; counts are so far."""

    phase: str
    done: int
    total: int
    unit: str
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Job:
    """One conversion.

    Args:
        tokenizer: None if it is to be trained.
        run: an engine with its workers: (function, tasks) -> results.
        base: the manifest that is extended, if any.
    """

    out: Location
    stage: Location
    plan: Plan
    stage_options: StageOptions
    pack_options: PackOptions
    tokenizer: TokenizerInfo | None
    backend: str
    run: Callable[..., Iterator[Any]]
    progress: Callable[[Progress], None]
    base: Manifest | None

    def request(self) -> dict[str, Any]:
        """Return what decides the bytes of the shards: no unit size, no times, no paths of this machine."""
        facts = {key: value for key, value in self.plan.facts.items() if key != "unit_bytes"}
        inputs = [{"name": row["name"], "bytes": row["bytes"], "hash": row["hash"]} for row in self.plan.inputs]
        size = sum(row["bytes"] for row in inputs)
        source = {"files": len(inputs), "bytes": size, "fingerprint": inputs_fingerprint(inputs)}
        return {**facts, **self.pack_options.facts(), "source": source}

    def extensions(self) -> list[dict[str, Any]]:
        """Return the facts of the extensions that were made before."""
        return list(self.base.converter.get("extensions", [])) if self.base else []

    def quarantine(self) -> str:
        """Return the name of the file for quarantined records."""
        return QUARANTINE if self.base is None else f"quarantine.{len(self.extensions()) + 1}.jsonl"
