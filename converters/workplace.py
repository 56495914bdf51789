"""The folders of a conversion: what is there already, one process at a time, and what is tidied up.

What was asked is kept beside the stage files and beside the shards; another request for the same folder is refused
with the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from converters.extending import EXTENSION, input_row, known_inputs
from converters.inspecting import read_index
from converters.job import PACK, QUARANTINE, STAGE, TOKENIZER, Job
from converters.locations import Location, children, load_manifest, remove_tree, write_whole
from converters.locks import Lock, lock
from converters.plan import CHOOSING, around_finished, difference, is_mended, piece_keys
from converters.verifying import require_shards
from mixer.errors import InputError
from mixer.manifest import FILE_NAME, Manifest, domain_folder
from mixer.mds import index_bytes
from mixer.side_columns import FOLDER as COLUMNS

__all__ = ["begin", "clean_up", "clear", "finished", "has_leftovers", "locked"]

log = logging.getLogger(__name__)


def clear(job: Job) -> bool:
    """Remove what an earlier conversion left in ``out`` and in the stage folder, and nothing else; say if any.

    Of an extension: only what it left while it was unfinished, so that the shards are as they were before it.
    """
    if job.base is not None:
        return _clear_extension(job, job.base)
    if (job.out / FILE_NAME).exists():
        names = [domain_folder(name) for name in load_manifest(job.out).names]
    else:
        names = children(job.out / PACK / "shards")
    staged = (job.stage / "plan.json").exists()
    if not names and not has_leftovers(job) and not staged:
        return False
    with locked(job):
        for name in (FILE_NAME, QUARANTINE, *_input_lists(job.out)):
            (job.out / name).unlink(missing_ok=True)
        for name in (*names, TOKENIZER, COLUMNS, f"{PACK}/shards"):
            remove_tree(job.out / name)
        if staged:
            for name in ["units", *(name for name in children(job.stage) if name.startswith(f"{EXTENSION}."))]:
                remove_tree(job.stage / name)
            (job.stage / "tokenizer.json").unlink(missing_ok=True)
        for file in (job.stage / "plan.json", job.out / PACK / "request.json"):
            file.unlink(missing_ok=True)
    return True


def _clear_extension(job: Job, base: Manifest) -> bool:
    staged = (job.stage / "plan.json").exists()
    if not staged and not has_leftovers(job):
        return False
    with locked(job):
        for file in (job.out / PACK / "request.json", job.out / job.quarantine()):
            file.unlink(missing_ok=True)
        if staged:
            (job.stage / "plan.json").unlink(missing_ok=True)
            remove_tree(job.stage / "units")
        before = {split.path: split for domain in base.domains.values() for split in domain.splits.values()}
        records = job.out / PACK / "shards"
        for path in [f"{name}/{split}" for name in children(records) for split in children(records / name)]:
            if path in before:
                _remove_added(job.out / path, before[path].num_shards)
            else:
                remove_tree(job.out / path)
        for name in set(children(records)) - {path.partition("/")[0] for path in before}:
            remove_tree(job.out / name)
        remove_tree(records)
    return True


def _remove_added(folder: Location, num_shards: int) -> None:
    """Leave the first shards of a folder, and an index of them alone."""
    entries = read_index(folder)[:num_shards]
    write_whole(folder / "index.json", index_bytes(entries))
    listed = {data["basename"] for entry in entries for data in (entry["zip_data"], entry["raw_data"]) if data}
    for name in children(folder):
        if name.startswith("shard.") and name not in listed:
            (folder / name).unlink()


def _input_lists(out: Location) -> list[str]:
    return [name for name in children(out) if name.startswith("inputs.") and name.endswith(".jsonl")]


def finished(job: Job, is_ours: bool = False) -> Manifest | None:
    """Return the manifest if this very conversion is done.

    Raises:
        InputError: if the folder holds another conversion, or something else.
        DataError: if shards of a finished one are missing or cut.
    """
    if job.out.is_file():
        raise InputError(f"{job.out} is a file; --out is a folder for the shards.")
    names = children(job.out)
    if FILE_NAME in names:
        manifest = load_manifest(job.out)
        before, now = dict(manifest.converter.get("request", {})), job.request()
        if job.base is not None:
            for facts, name in itertools.product((before, now), ("source", *CHOOSING)):
                facts.pop(name, None)
        if before.get("source") != now.get("source"):
            _name_inputs(job, manifest, before, now)
        _refuse_difference(before, now, job.out, "--out", is_extended=job.base is not None, is_finished=True)
        require_shards(job.out, manifest)
        return manifest if job.base is None or not job.plan.units else None
    if names and not is_ours and not {STAGE, PACK} & {*names}:
        raise InputError(f"{job.out} is neither empty nor a conversion that can go on; choose another --out.")
    return None


def _name_inputs(job: Job, manifest: Manifest, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Put the rows of the input files in place of their sums, which differ."""
    try:
        known = known_inputs(job.out, manifest)
    except InputError:
        return
    rows = {row["name"]: input_row(row) for row in job.plan.inputs}
    extensions = len(manifest.converter.get("extensions", []))
    if extensions or known.keys() != rows.keys():  # else it may be their order
        known, rows = dict(sorted(known.items())), dict(sorted(rows.items()))
    for facts, inputs, number in ((before, known, extensions), (now, rows, 0)):
        facts.update(inputs=list(inputs.values()), extensions=number)
        facts.pop("source", None)


@contextlib.contextmanager
def locked(job: Job) -> Iterator[list[Lock]]:
    """Let one process at a time work on a folder."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(lock(folder)) for folder in (job.stage, job.out / PACK)]


def has_leftovers(job: Job) -> bool:
    """Return whether a run was killed between the manifest and the cleaning up."""
    return (job.out / PACK).exists()


def begin(job: Job) -> Job:
    """Write down what is asked, or compare it with what was asked before; clear what a killed run half wrote.

    A request that led to no unit, or no shard, gives way to another one, and a file that no finished unit is of to a
    mended one. Returns the job with the units that are finished under the numbers that they have.
    """
    _remove_half_written(job)
    job = _with_units_of_before(job)
    request = job.request()
    if job.base is not None:
        request["extends"] = hashlib.sha256(job.base.to_json().encode()).hexdigest()
    if not _has_shards(job, request):
        remove_tree(job.out / PACK / "shards")
        (job.out / PACK / "request.json").unlink(missing_ok=True)
    file = job.out / PACK / "request.json"
    before = _load(file)
    if before is None:
        write_whole(file, orjson.dumps(request))
    else:
        _refuse_difference(before, request, job.out, "--out", is_extended=job.base is not None)
    return job


def _with_units_of_before(job: Job) -> Job:
    """Write the plan down; return the job with the units that are finished under the numbers that they have."""
    file = job.stage / "plan.json"
    finished = {name for name in children(job.stage / "units") if name.isdigit()}
    before, facts = _load(file), _staged_facts(job)
    units = {} if before is None else before.pop("units", {})
    lines = [] if before is None else difference(before, facts)
    if lines and not finished:
        (job.stage / "tokenizer.json").unlink(missing_ok=True)
        before, lines = None, []
    plan = around_finished(job.plan, {int(name): units.get(name, [""]) for name in finished})
    if before is not None and lines:
        if plan is None or job.tokenizer is None or not is_mended(before, facts):
            option = "--out" if job.stage == job.out / STAGE else "--stage"
            _refuse_difference(before, facts, job.stage, option, is_extended=job.base is not None)
        log.warning("%s. None of this is in a finished unit: all %s stay.", _listed(lines), f"{len(finished):,}")
    if plan is None:
        raise InputError(
            f"{job.stage} holds units of inputs that were named otherwise (NAME=PATH), or cut by another version."
            " Name them as before, choose another folder, or start over with --fresh."
        )
    keys = {f"{unit.number:06d}": piece_keys(unit) for unit in plan.units}
    if before is None or lines or keys != units:
        write_whole(file, orjson.dumps({**facts, "units": keys}))
    return dataclasses.replace(job, plan=plan)


def _staged_facts(job: Job) -> dict[str, Any]:
    """Return what decides the contents of the stage, as JSON gives it back."""
    facts: dict[str, Any] = {**job.plan.facts, "inputs": job.plan.inputs}
    if job.tokenizer is not None:  # it may be one that was trained for the shards to extend
        facts["tokenizer"] = {**facts["tokenizer"], "fingerprint": job.tokenizer.fingerprint}
    return orjson.loads(orjson.dumps(facts))


def _has_shards(job: Job, request: Mapping[str, Any]) -> bool:
    """Return whether a request has led to shards that are not finished."""
    if job.base is None:
        return bool({*children(job.out)} - {STAGE, PACK})
    before = _load(job.out / PACK / "request.json") or {}
    return before.get("extends") == request["extends"] and bool(children(job.out / PACK / "shards"))


def _remove_half_written(job: Job) -> None:
    """Remove what a process left that died while it wrote."""
    if isinstance(job.stage, Path):
        _remove_partial(job.stage, "*.tmp", "units/*.tmp")
    if isinstance(job.out, Path):
        _remove_partial(job.out, ".*.tmp", "*/.*.tmp", "*/*/.*.tmp")


def _remove_partial(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def clean_up(job: Job, locks: list[Lock], keep_stage: bool) -> None:
    """Remove what only an unfinished conversion needs, and the list of inputs that an extension replaced."""
    _remove_half_written(job)  # by workers that died in this very run
    named = load_manifest(job.out).converter.get("inputs")
    for name in _input_lists(job.out):
        if name != named:
            (job.out / name).unlink()
    for each in locks:
        each.end()
    if not keep_stage:
        remove_tree(job.stage)
        if not children(job.out / STAGE):  # in which an extension has its own
            remove_tree(job.out / STAGE)
    remove_tree(job.out / PACK)  # last: while it is there, something may be left to tidy up


def _load(file: Location) -> dict[str, Any] | None:
    try:
        return orjson.loads(file.read_bytes())
    except FileNotFoundError:
        return None


def _refuse_difference(
    before: dict[str, Any],
    now: dict[str, Any],
    folder: Location,
    option: str,
    is_extended: bool,
    is_finished: bool = False,
) -> None:
    lines = difference(before, orjson.loads(orjson.dumps(now)))
    if not lines:
        return
    only_new = all(
        line.startswith("extensions: ") or (line.startswith("inputs: ") and line.endswith(" is new")) for line in lines
    )
    extend = " add what is new with --extend," if only_new and is_finished else ""
    if not is_extended:
        advice = f"Repeat those,{extend} choose another {option}, or start over with --fresh."
    elif is_finished:
        advice = f"An extension has the options of before: repeat those, or choose another {option}."
    else:
        advice = "Repeat those, or start the extension over with --extend --fresh, which leaves finished shards alone."
    raise InputError(f"{folder} holds a conversion with other inputs or options: {_listed(lines)}. {advice}")


def _listed(lines: Sequence[str]) -> str:
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
