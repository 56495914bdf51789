"""The folders of a conversion: what is there already, one process at a time, and what is tidied up.

What was asked is kept beside the stage files and beside the shards; another request for the same folder is refused
with the difference.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from converters.job import PACK, QUARANTINE, STAGE, TOKENIZER, Job
from converters.plan import difference
from mixer.errors import InputError
from mixer.manifest import FILE_NAME, Manifest, domain_folder

__all__ = ["begin", "clean_up", "clear", "finished", "has_leftovers", "locked"]


def clear(job: Job) -> None:
    """Remove what an earlier conversion left in ``out`` and in the stage folder, and nothing else."""
    if (job.out / FILE_NAME).exists():
        names = {domain_folder(name) for name in Manifest.load(job.out).domains}
    elif has_leftovers(job):
        names = {path.name for path in (job.out / PACK / "shards").glob("*")}
    else:
        names = set()
    staged = (job.stage / "plan.json").exists()
    if not names and not has_leftovers(job) and not staged:
        return
    with locked(job):
        for path in (job.out / FILE_NAME, job.out / QUARANTINE, *job.out.glob("inputs.*.jsonl")):
            path.unlink(missing_ok=True)
        for name in (*sorted(names), TOKENIZER, f"{PACK}/shards"):
            shutil.rmtree(job.out / name, ignore_errors=True)
        if staged:
            shutil.rmtree(job.stage / "units", ignore_errors=True)
            (job.stage / "tokenizer.json").unlink(missing_ok=True)
        for file in (job.stage / "plan.json", job.out / PACK / "request.json"):
            file.unlink(missing_ok=True)


def finished(job: Job) -> Manifest | None:
    """Return the manifest if this very conversion is done; refuse a folder that holds another one."""
    if not job.out.exists():
        return None
    if not job.out.is_dir():
        raise InputError(f"{job.out} is a file; --out is a folder for the shards.")
    if (job.out / FILE_NAME).exists():
        manifest = Manifest.load(job.out)
        before, now = dict(manifest.converter.get("request", {})), job.request()
        if job.base is not None:
            before.pop("source", None)
            now.pop("source")
        _refuse_difference(before, now, job.out)
        return manifest if job.base is None or not job.plan.units else None
    if any(job.out.iterdir()) and not any((job.out / name).exists() for name in (STAGE, PACK)):
        raise InputError(f"{job.out} is neither empty nor a conversion that can go on; choose another --out.")
    return None


@contextlib.contextmanager
def locked(job: Job) -> Iterator[None]:
    """Let one process at a time work on a folder; the lock goes with the process, however it ends."""
    with contextlib.ExitStack() as stack:
        for folder in (job.stage, job.out / PACK):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / "lock", "w"))
            except OSError as error:
                raise InputError(f"cannot write into {folder}: {error.strerror}.") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another conversion works in {folder}; wait for it to end.") from error
        yield


def has_leftovers(job: Job) -> bool:
    """Return whether a run was killed between the manifest and the cleaning up."""
    return (job.out / PACK).exists()


def begin(job: Job) -> None:
    """Write down what is asked, or compare it with what was asked before; clear what a killed run half wrote."""
    for partial in (*job.stage.glob("units/*.tmp"), *job.out.glob(".*.tmp"), *job.out.glob("*/*/.*.tmp")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    staged = {**job.plan.facts, "inputs": job.plan.inputs}
    _same_or_new(job.stage / "plan.json", staged, job.stage)
    extends = {} if job.base is None else {"extends": hashlib.sha256(job.base.to_json().encode()).hexdigest()}
    _same_or_new(job.out / PACK / "request.json", {**job.request(), **extends}, job.out)


def clean_up(job: Job, keep_stage: bool) -> None:
    """Remove what only an unfinished conversion needs, and the list of inputs that an extension replaced."""
    named = Manifest.load(job.out).converter.get("inputs")
    for path in job.out.glob("inputs.*.jsonl"):
        if path.name != named:
            path.unlink()
    shutil.rmtree(job.out / PACK, ignore_errors=True)
    if not keep_stage:
        shutil.rmtree(job.stage, ignore_errors=True)


def _same_or_new(file: Path, facts: dict[str, Any], folder: Path) -> None:
    try:
        before = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        partial.write_bytes(orjson.dumps(facts))
        os.replace(partial, file)
    else:
        _refuse_difference(before, facts, folder)


def _refuse_difference(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    lines = difference(before, orjson.loads(orjson.dumps(now)))
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise InputError(
            f"{folder} holds a conversion with other inputs or options: {'; '.join(lines[:8])}{more}. Repeat those,"
            " choose another --out, or start over with --fresh."
        )
