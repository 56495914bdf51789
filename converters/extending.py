"""Add the text of new inputs to finished shards: new shards behind the old ones, which are not touched.

Each conversion leaves the names and hashes of its inputs beside the manifest, so the whole corpus may be given again
and only what is new is converted. Documents are held out by the threshold of before; where a domain was split by
samples, its new documents are all for training. A stream's tail that filled no sample stays dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from converters.locations import Location, write_whole
from converters.splits import HeldOut
from mixer.errors import InputError
from mixer.manifest import Domain, Manifest, Split

__all__ = ["fixed_splits", "input_row", "known_inputs", "merged", "save_inputs", "stage_of_extension"]

EXTENSION = "extension"  # name of stage folders, before their number


def save_inputs(out: Location, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows (name, bytes, hash) of all inputs to a file named by its content; return that name."""
    data = b"".join(orjson.dumps(input_row(row), option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    name = f"inputs.{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    write_whole(out / name, data)
    return name


def input_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of an input file."""
    return {key: row[key] for key in ("name", "bytes", "hash")}


def known_inputs(out: Location, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return the rows of all inputs that finished shards were made from, by name."""
    name = manifest.converter.get("inputs")
    if name is None:
        raise InputError(f"cannot extend {out}: it records no inputs. Extend the shards that it was made from.")
    try:
        rows = [orjson.loads(line) for line in (out / str(name)).read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot extend {out}: its list of inputs {name} is missing or damaged ({error}).") from error
    return {row["name"]: row for row in rows}


def stage_of_extension(stages: Location, base: Manifest, is_new: bool) -> Location:
    """Return the stage folder of a new extension, or of what finished the shards that are there.

    Each has its own below the first one's, so that a stage that is kept holds all that the shards are made of.
    """
    number = len(base.converter.get("extensions", [])) + is_new
    return stages / f"{EXTENSION}.{number}" if number else stages


def fixed_splits(base: Manifest | None) -> dict[str, HeldOut]:
    """Return how the domains that are extended were split."""
    return {} if base is None else {name: HeldOut.from_facts(domain.held_out) for name, domain in base.domains.items()}


def merged(before: Domain | None, added: Domain) -> Domain:
    """Return a domain's facts after an extension. Splits of ``added`` have the paths and fingerprints of the whole."""
    if before is None:
        return added
    splits = {key: _merged_split(before.splits.get(key), split) for key, split in added.splits.items()}
    return Domain(
        splits={**before.splits, **splits},
        text_bytes=before.text_bytes + added.text_bytes,
        held_out=before.held_out,
        **{
            name: _sums(getattr(before, name), getattr(added, name))
            for name in ("skipped", "dropped_tokens", "tokens_in", "padding_tokens")
        },
    )


def _merged_split(before: Split | None, added: Split) -> Split:
    if before is None:
        return added
    counted = ("num_samples", "num_tokens", "num_documents", "num_shards", "size_bytes")
    return dataclasses.replace(added, **{name: getattr(before, name) + getattr(added, name) for name in counted})


def _sums(one: Mapping[str, int], two: Mapping[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + two.get(key, 0) for key in sorted({*one, *two})}
