"""Pack what is staged into shards, then commit: an index for every split, and the manifest last of all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mixer
from converters.domains import domain_rule, mapped
from converters.extending import fixed_splits, known_inputs, merged, save_inputs
from converters.inspecting import manifest_digest, read_index
from converters.job import PACK, QUARANTINE, SCRATCH, TOKENIZER, Job, Progress
from converters.locations import Location, UrlPath, read_range, size_of, write_file, write_whole
from converters.locks import Lock
from converters.packing import PackTask, check_accounting, pack_shard, pack_tasks, read_record
from converters.readers import Piece
from converters.shuffling import Shuffled
from converters.splits import DomainPlan, SplitPlan, copies_across_splits, plan_splits, require_samples
from converters.stage import GIVEN, unit_folder
from converters.streams import keep_first_copies
from converters.tokenizers import id_dtype
from converters.tokenizing import Staged
from mixer.errors import DataError, InputError
from mixer.manifest import FILE_NAME, Domain, Manifest, Split, TokenizerInfo, domain_folder
from mixer.mds import index_bytes

__all__ = ["pack"]


def pack(job: Job, staged: Staged, locks: Sequence[Lock]) -> Manifest:
    """Write the shards that are not there yet, then, if the folder is still ours, the index files and the manifest."""
    with _scratch(job) as scratch:
        return _packed(job, staged, locks, scratch)


@contextlib.contextmanager
def _scratch(job: Job) -> Iterator[Path]:
    """Yield a new folder of this machine for orders and layouts; the workers read them there, or where they are put."""
    if isinstance(job.out, UrlPath):
        with tempfile.TemporaryDirectory(prefix="mixer-") as temporary:
            yield Path(temporary)
        return
    folder = job.out / PACK / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder


def _packed(job: Job, staged: Staged, locks: Sequence[Lock], scratch: Path) -> Manifest:
    keep, staged = _deduplicated(job, staged, scratch)
    plans = _plan_splits(job, keep, scratch)
    _check_counts(job, staged, plans)
    warnings = [
        *job.plan.warnings, *_about_trained(job, staged.tokenizer), *_require_documents(job, plans),
        *require_samples(plans, job.pack_options), *_about_mapping(job, staged, plans),
    ]  # fmt: skip
    splits = [split for plan in plans for split in plan.splits if split.num_samples]
    if not splits:
        raise InputError(f"no domain fills a sample of {job.pack_options.seq_len:,} tokens. Lower --seq-len.")
    tasks = {(split.domain, split.split): list(_pack_tasks(job, split, staged.tokenizer)) for split in splits}
    if isinstance(job.out, UrlPath):
        tasks = {key: _readable_anywhere(job, several, scratch) for key, several in tasks.items()}
    _write_shards(job, [task for several in tasks.values() for task in several])
    for each in locks:
        each.check()
    written = {(split.domain, split.split): _commit_split(job, split, tasks) for split in splits}
    return _commit(job, staged, plans, written, warnings)


def _check_counts(job: Job, staged: Staged, plans: Sequence[DomainPlan]) -> None:
    kept, left_out = sum(plan.documents for plan in plans), staged.left_out()
    if not plans:
        why = ": " * bool(left_out) + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise InputError(f"no text in {staged.documents_read:,} records of {len(job.plan.inputs):,} files{why}.")
    if staged.documents_read != kept + sum(left_out.values()):
        raise DataError(f"{staged.documents_read:,} records read, but {kept:,} kept and {left_out} left out.")


def _about_trained(job: Job, tokenizer: TokenizerInfo) -> list[str]:
    wanted = job.stage_options.train_tokenizer
    if wanted is None or tokenizer.vocab_size >= wanted:
        return []
    return [
        f"the text gave a tokenizer of {tokenizer.vocab_size:,} ids, not {wanted:,}: nothing more can be merged in it."
    ]


def _about_mapping(job: Job, staged: Staged, plans: Sequence[DomainPlan]) -> list[str]:
    """Return a warning if the mapping of domains names some that no record and no file has.

    None for an extension: it has the mapping of before, which may be about the inputs of before.
    """
    unused = job.stage_options.domain_map.keys() - staged.used - {"*"}
    if not unused or job.base is not None:
        return []
    domain_of = domain_rule(job.stage_options.domain)
    unused -= {domain_of(piece, {}) for unit in job.plan.units for piece in unit.pieces}  # of files without records
    if not unused:
        return []
    return [
        f"--domain-map names {_some(sorted(unused))}, which no record has as its domain; after it there are"
        f" {_some([plan.domain for plan in plans])}. Is a name misspelt?"
    ]


def _some(names: Sequence[str], most: int = 12) -> str:
    """Return names for a message, and how many are left out."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def _require_documents(job: Job, plans: Sequence[DomainPlan]) -> list[str]:
    """Return a warning for every domain that has files but no document, if that is allowed, else raise the first.

    Only rules that go by the path tell the domain of a file without records; a domain that is mapped away is none.
    """
    have = {plan.domain for plan in plans} | (job.base.domains.keys() if job.base else set())
    missing: dict[str, Piece] = {}
    domain_of = domain_rule(job.stage_options.domain)
    for piece in (piece for unit in job.plan.units for piece in unit.pieces):
        name = domain_of(piece, {})
        name = mapped(name, job.stage_options.domain_map) if name else None
        if name is not None and name not in have:
            missing.setdefault(name, piece)
    problems = [
        f"domain {name!r} has no document: its first file is {piece.path} of {piece.size_bytes:,} bytes. Add text,"
        " leave its files out with --exclude, or go on without the domain with --allow-empty."
        for name, piece in sorted(missing.items())
    ]
    if problems and not job.pack_options.allow_empty:
        more = f" ({len(problems) - 1} more domains like this.)" if len(problems) > 1 else ""
        raise InputError(problems[0] + more)
    return problems


# --- shards --------------------------------------------------------------------------------------------------------


def _unit_numbers(job: Job) -> list[int]:
    return [unit.number for unit in job.plan.units]


def _deduplicated(job: Job, staged: Staged, scratch: Path) -> tuple[str | None, Staged]:
    """Return the folder that says which documents stay (None: all), and what is left out with the copies counted."""
    if not job.pack_options.dedupe:
        return None, staged
    folder = scratch / "keep"
    skipped = {name: Counter(reasons) for name, reasons in staged.skipped.items()}
    for name, count in keep_first_copies(str(job.stage), _unit_numbers(job), folder).items():
        skipped.setdefault(name.removesuffix(GIVEN), Counter())["duplicate"] += count
    return str(folder), staged._replace(skipped=skipped)


def _plan_splits(job: Job, keep: str | None, scratch: Path) -> list[DomainPlan]:
    units, fixed = _unit_numbers(job), fixed_splits(job.base)
    return plan_splits(str(job.stage), units, job.pack_options, scratch=scratch, keep=keep, fixed=fixed)


def _pack_tasks(job: Job, split: SplitPlan, tokenizer: TokenizerInfo) -> Iterator[PackTask]:
    below = Path(domain_folder(split.domain)) / split.split
    return pack_tasks(
        split,
        folder=job.out / below,
        records=job.out / PACK / "shards" / below,
        dtype=id_dtype(tokenizer.vocab_size).name,
        eos_id=tokenizer.eos_id,
        options=job.pack_options,
        first_number=_before(job, split, "num_shards"),
        first_id=_before(job, split, "num_samples"),
    )


def _readable_anywhere(job: Job, tasks: Sequence[PackTask], scratch: Path) -> list[PackTask]:
    """Put the orders and layouts of these tasks beside the shards, and return tasks that read them there."""
    put = functools.cache(functools.partial(_put, job.out / PACK / SCRATCH, scratch))
    moved = []
    for task in tasks:
        stream, layout = task.stream, task.layout
        if isinstance(stream, Shuffled):
            stream = stream._replace(order=put(stream.order))
        elif stream.keep is not None:
            stream = stream._replace(keep=put(stream.keep))
        if layout is not None:
            layout = put(layout)
        moved.append(task._replace(stream=stream, layout=layout))
    return moved


def _put(there: Location, scratch: Path, path: str) -> str:
    """Copy what begins with a path below ``scratch`` (a file, a folder, a layout's files); return its new place."""
    for file in sorted(scratch.glob(f"{Path(path).relative_to(scratch)}*")):
        for each in sorted(file.iterdir()) if file.is_dir() else [file]:
            write_file(there / each.relative_to(scratch), each)
    return str(there / Path(path).relative_to(scratch))


def _before(job: Job, split: SplitPlan, counted: str) -> int:
    """Return how many shards or samples of an extended split are there already."""
    domain = None if job.base is None else job.base.domains.get(split.domain)
    return getattr(domain.splits[split.split], counted) if domain and split.split in domain.splits else 0


def _write_shards(job: Job, tasks: Sequence[PackTask]) -> None:
    total, done, tokens = sum(task.num_samples for task in tasks), 0, 0
    job.progress(Progress("pack", 0, total, "samples"))
    for record in job.run(pack_shard, tasks):
        done += record["samples"]
        tokens += record["tokens"]
        job.progress(Progress("pack", done, total, "samples", tokens=tokens))


# --- commit --------------------------------------------------------------------------------------------------------


def _commit_split(job: Job, split: SplitPlan, tasks: Mapping[tuple[str, str], Sequence[PackTask]]) -> Split:
    records = [read_record(task) for task in tasks[split.domain, split.split]]
    check_accounting(split, records)
    entries = [record["entry"] for record in records]
    below = f"{domain_folder(split.domain)}/{split.split}"
    before = _before(job, split, "num_shards")
    old = read_index(job.out / below)[:before] if before else []
    index = index_bytes([*old, *entries])
    write_whole(job.out / below / "index.json", index)
    return Split(
        path=below,
        num_samples=split.num_samples,
        num_tokens=split.num_tokens,
        num_documents=split.num_documents,
        num_shards=len(entries),
        size_bytes=sum((entry["zip_data"] or entry["raw_data"])["bytes"] for entry in entries),
        fingerprint="sha256:" + hashlib.sha256(index).hexdigest(),
    )


def _commit(
    job: Job,
    staged: Staged,
    plans: Sequence[DomainPlan],
    written: Mapping[tuple[str, str], Split],
    warnings: list[str],
) -> Manifest:
    tokenizer = _copy_tokenizer(job, staged.tokenizer)
    names = {name for name, _ in written}
    before = dict(job.base.domains) if job.base else {}
    added = {plan.domain: _domain(plan, staged, written) for plan in plans if plan.domain in names | before.keys()}
    domains = {**before, **{name: merged(before.get(name), domain) for name, domain in added.items()}}
    known = [] if job.base is None else known_inputs(job.out, job.base).values()
    facts: dict[str, Any] = {
        "name": "domain-mixer",
        "version": mixer.__version__,
        "request": job.request(),
        "documents_read": staged.documents_read,
        "skipped": staged.left_out(),
        **_publish_quarantine(job, staged),
        "bad_records": staged.bad_records[:100],
        "warnings": warnings,
        "copies_across_splits": copies_across_splits(plans),
        "inputs": save_inputs(job.out, [*known, *job.plan.inputs]),
    }
    if job.base is not None:
        facts = {**job.base.converter, "inputs": facts["inputs"], "extensions": [*job.extensions(), facts]}
    dtype = id_dtype(tokenizer.vocab_size).name
    seq_len, varies = job.pack_options.seq_len, job.pack_options.packing == "none"
    manifest = Manifest(
        dict(sorted(domains.items())), seq_len, dtype, tokenizer, converter=facts, variable_length=varies
    )
    manifest = dataclasses.replace(manifest, converter={**facts, "digest": manifest_digest(manifest)})
    write_whole(job.out / FILE_NAME, manifest.to_json().encode("utf-8"))
    return manifest


def _domain(plan: DomainPlan, staged: Staged, written: Mapping[tuple[str, str], Split]) -> Domain:
    return Domain(
        splits={split.split: written[plan.domain, split.split] for split in plan.splits if split.num_samples},
        text_bytes=plan.text_bytes,
        held_out=plan.held_out.facts(),
        skipped=dict(sorted(staged.skipped.get(plan.domain, {}).items())),
        dropped_tokens={split.split: split.dropped_tokens for split in plan.splits},
        tokens_in={split.split: split.tokens_in for split in plan.splits},
        padding_tokens={split.split: split.padding_tokens for split in plan.splits},
    )


_COPY_BYTES = 8 << 20


def _publish_quarantine(job: Job, staged: Staged) -> dict[str, Any]:
    """Gather the quarantined records of all units, in input order, into one file; say where."""
    if job.stage_options.on_bad_record != "quarantine" or not staged.bad_records:
        return {}
    name = job.quarantine()
    with tempfile.NamedTemporaryFile(prefix="mixer-") as file:
        for unit in job.plan.units:
            source = unit_folder(job.stage, unit.number) / QUARANTINE
            for start in range(0, size_of(source), _COPY_BYTES):
                file.write(read_range(source, start, start + _COPY_BYTES))
        file.flush()
        write_file(job.out / name, Path(file.name))
    return {"quarantine": name}


def _copy_tokenizer(job: Job, tokenizer: TokenizerInfo) -> TokenizerInfo:
    if tokenizer.file is None:
        return tokenizer
    name = f"{TOKENIZER}/tokenizer{Path(tokenizer.file).suffix}"
    write_file(job.out / name, Path(tokenizer.file))
    return dataclasses.replace(tokenizer, file=name)
