"""The whole conversion: plan -> stage -> pack -> commit.

    from converters import convert
    convert(["corpus/"], "shards", tokenizer="tokenizer.json", seq_len=2048, workers=4)

``index.json`` files are written when all shards are there, the manifest last of all: a folder without one is not
finished, and the same command continues it. What was asked is kept beside the stage files; another request for the
same folder is refused with the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

import mixer
from converters.domains import domain_rule, load_mapping, mapped
from converters.engines import kept_running, run_tasks
from converters.extending import fixed_splits, known_inputs, merged, save_inputs
from converters.inspecting import read_index
from converters.options import DEFAULT_EXCLUDE, PackOptions, StageOptions, size_in_bytes
from converters.packing import check_accounting, pack_shard, pack_tasks, shard_path
from converters.plan import Plan, difference, inputs_fingerprint, make_plan
from converters.readers import Piece
from converters.splits import DomainPlan, SplitPlan, copies_across_splits, plan_splits, require_samples
from converters.stage import INTENDED, StageTask, read_unit, stage_unit, unit_folder
from converters.streams import keep_first_copies
from converters.tokenizers import BACKENDS, describe, id_dtype, load_encoder
from mixer.errors import DataError, InputError
from mixer.manifest import FILE_NAME, Domain, Manifest, Split, TokenizerInfo, domain_folder
from mixer.mds import write_index

__all__ = ["Progress", "convert"]

_STAGE, _PACK, _TOKENIZER, _QUARANTINE = ".stage", ".pack", "tokenizer", "quarantine.jsonl"


class Progress(NamedTuple):
    """How far a conversion is: ``phase`` is ``train-tokenizer``, ``tokenize`` or ``pack``; counts are so far."""

    phase: str
    done: int
    total: int
    unit: str
    documents: int = 0
    tokens: int = 0


def convert(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    train_tokenizer: int | None = None,
    seq_len: int,
    eos: str | None = None,
    domain: str = "folder",
    domain_map: str | os.PathLike[str] | Mapping[str, str | None] | None = None,
    text_field: str = "text",
    format: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    held_out: float = 0.01,
    min_held_out: int = 8,
    allow_empty: bool = False,
    packing: str = "concat",
    tail: str = "drop",
    doc_starts: bool = False,
    dedupe: bool = False,
    on_bad_record: str = "fail",
    max_bad: float = 0.01,
    workers: int = 1,
    engine: str = "local",
    backend: str = "hf",
    compression: str | None = "zstd:3",
    hashes: Sequence[str] = ("xxh64",),
    shard_size: str | int = "64MiB",
    unit_size: str | int | None = None,
    seed: int = 0,
    stage: str | os.PathLike[str] | None = None,
    keep_stage: bool = False,
    fresh: bool = False,
    extend: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Convert text to one set of MDS shards per domain and return the manifest.

    The bytes written depend on the inputs and the options below up to ``shard_size``, not on ``workers``, ``engine``,
    ``unit_size``, or how often the conversion was interrupted. A finished conversion is returned as it is.

    Args:
        inputs: files, folders, globs, URLs for fsspec; ``name=path`` gives all documents of a path to one domain;
            ``@list.txt`` stands for the inputs listed in that file.
        out: folder for the shards; new, empty, or an unfinished conversion by the same options.
        tokenizer: a ``tokenizer.json``, a folder that holds one, a SentencePiece ``.model``, ``tiktoken:cl100k_base``,
            ``tiktoken:o200k_base`` or ``bytes``. Either this or ``train_tokenizer``.
        train_tokenizer: vocabulary size of a byte-level BPE trained on a sample of the corpus.
        seq_len: tokens per sample.
        eos: the end-of-text token, where the tokenizer's own is not found.
        domain: ``folder``, ``file``, ``field:<dotted.path>`` or ``path:<regex>``; see ``converters.domains``.
        domain_map: a mapping or JSON file that renames, merges and (null) drops domains; ``"*"`` is all others.
        text_field: dotted path of a record's text; several joined (``title,body``); or ``{title}: {body}``.
        format: one of ``converters.readers.FORMATS``, or ``auto``: by file name.
        include, exclude: globs on the path below the input and on the file name.
        held_out: share of each domain for the validation split; 0 for none.
        min_held_out: documents that a validation split should have at least, see ``splits.choose_held_out``.
        allow_empty: accept domains without a document, or without a training or validation sample; recorded in the
            manifest.
        packing: ``concat`` (documents joined and cut every ``seq_len``) or ``best_fit`` (no document is cut that fits;
            the rest of a sample is padding, ids of end of text).
        tail: ``drop`` the end of a domain that fills no sample, or ``pad`` it (with ``concat``).
        doc_starts: also write the column ``doc_starts``: where documents, and padding, start in each sample.
        dedupe: keep only the first of equal texts in a domain; the others are counted as ``duplicate``.
        on_bad_record: ``fail``, ``skip`` (counted by reason, places named in the manifest) or ``quarantine`` (also
            kept, with place, reason and raw bytes, in ``quarantine.jsonl``).
        max_bad: unless ``fail``, the share of records that may be bad.
        workers: processes; with Ray, tasks at a time.
        engine: ``local``, ``ray`` or ``ray:<address>``; see ``converters.engines``.
        backend: ``hf``, or ``gigatoken`` for a ``tokenizer.json``: many times faster; compared with ``hf`` on documents
            of the corpus first, and refused if any id differs.
        compression: ``zstd:LEVEL`` or None.
        hashes: names of the hashes in the index, sorted.
        shard_size, unit_size: bytes per shard before compression, and per unit of work.
        seed: of the sample for ``train_tokenizer``.
        stage: folder for the tokenised documents, kept for packing again; default: inside ``out``, removed at the end.
        keep_stage: keep it inside ``out``.
        extend: add the inputs that are new to the finished shards in ``out``, in new shards; all else must be as
            before. Copies (``dedupe``) are looked for among the new documents only.
        fresh: start over, deleting what an earlier conversion left in ``out``.
        progress: called with ``Progress`` as work gets done.
    Raises:
        InputError: for wrong options or inputs, or if ``out`` holds something else.
        DataError: for damaged input, a full disk or a dead worker. What is finished is kept.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError("give one of tokenizer (a tokenizer.json or 'bytes') and train_tokenizer (a vocabulary size).")
    stage_options = StageOptions(
        format=format, include=tuple(include), exclude=tuple(exclude), domain=domain, text_field=text_field,
        on_bad_record=on_bad_record, max_bad=max_bad, seed=seed, train_tokenizer=train_tokenizer,
        domain_map={} if domain_map is None else load_mapping(domain_map),
        unit_bytes=None if unit_size is None else size_in_bytes(unit_size, "unit_size"),
    )  # fmt: skip
    pack_options = PackOptions(
        seq_len=seq_len, held_out=held_out, min_held_out=min_held_out, allow_empty=allow_empty,
        shard_bytes=size_in_bytes(shard_size, "shard_size"), compression=compression, hashes=tuple(sorted(set(hashes))),
        packing=packing, tail=tail, doc_starts=doc_starts, dedupe=dedupe,
    )  # fmt: skip
    given = None if tokenizer is None else describe(tokenizer, eos)
    base = Manifest.load(out) if extend else None
    known = None if base is None else known_inputs(Path(out), base)
    identity = {"trained": train_tokenizer} if given is None else _identity(given)
    plan = make_plan(inputs, stage_options, identity, known)
    job = _Job(
        Path(out), Path(stage) if stage else Path(out) / _STAGE, plan, stage_options, pack_options, given,
        functools.partial(run_tasks, engine, workers=workers), progress or (lambda _: None), backend, base,
    )  # fmt: skip
    if fresh:
        job.clear()
    manifest = job.finished()
    if manifest is None or job.has_leftovers():
        with _naming_full_disk(job.out), job.locked(), kept_running(engine, workers):
            manifest = job.finished()  # another process may have finished it just now
            if manifest is None:
                job.begin()
                job.tokenize()
                manifest = job.pack()
            job.clean_up(keep_stage or stage is not None)
    return manifest


@contextlib.contextmanager
def _naming_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no space left while converting into {out} ({error}). Finished work is kept: free some space and run the"
            " same command again."
        ) from error


def _identity(tokenizer: TokenizerInfo) -> dict[str, Any]:
    return {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }


class _Job:
    """The state of one call of ``convert``: where things lie and what is done."""

    def __init__(
        self, out: Path, stage: Path, plan: Plan, stage_options: StageOptions, pack_options: PackOptions,
        tokenizer: TokenizerInfo | None, run: Callable[..., Iterator[Any]], progress: Callable[[Progress], None],
        backend: str, base: Manifest | None,
    ) -> None:  # fmt: skip
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is not one of {list(BACKENDS)}.")
        self.backend = backend
        self.out, self.stage, self.plan = out, stage, plan
        self.options, self.pack_options, self.tokenizer = stage_options, pack_options, tokenizer
        self.run, self.progress, self.base = run, progress, base
        if base is not None and tokenizer is None and base.tokenizer.file is not None:
            self.tokenizer = describe(out / base.tokenizer.file)  # the one that was trained before
        self.skipped: dict[str, Counter[str]] = {}
        self.bad_records: list[dict[str, Any]] = []
        self.documents_read = 0

    # --- what is there already ---

    def clear(self) -> None:
        """Remove what an earlier conversion left in ``out`` and in the stage folder, and nothing else."""
        if (self.out / FILE_NAME).exists():
            names = {domain_folder(name) for name in Manifest.load(self.out).domains}
        elif self.has_leftovers():
            names = {path.name for path in (self.out / _PACK / "shards").glob("*")}
        else:
            names = set()
        staged = (self.stage / "plan.json").exists()
        if not names and not self.has_leftovers() and not staged:
            return
        with self.locked():
            for path in (self.out / FILE_NAME, self.out / _QUARANTINE, *self.out.glob("inputs.*.jsonl")):
                path.unlink(missing_ok=True)
            for name in (*sorted(names), _TOKENIZER, f"{_PACK}/shards"):
                shutil.rmtree(self.out / name, ignore_errors=True)
            if staged:
                shutil.rmtree(self.stage / "units", ignore_errors=True)
                (self.stage / "tokenizer.json").unlink(missing_ok=True)
            for file in (self.stage / "plan.json", self.out / _PACK / "request.json"):
                file.unlink(missing_ok=True)

    def finished(self) -> Manifest | None:
        """Return the manifest if this very conversion is done; refuse a folder that holds another one."""
        if not self.out.exists():
            return None
        if not self.out.is_dir():
            raise InputError(f"{self.out} is a file; --out is a folder for the shards.")
        if (self.out / FILE_NAME).exists():
            manifest = Manifest.load(self.out)
            before, now = dict(manifest.converter.get("request", {})), self._request()
            if self.base is not None:
                before.pop("source", None)
                now.pop("source")
            self._refuse_difference(before, now, self.out)
            return manifest if self.base is None or not self.plan.units else None
        if any(self.out.iterdir()) and not any((self.out / name).exists() for name in (_STAGE, _PACK)):
            raise InputError(f"{self.out} is neither empty nor a conversion that can go on; choose another --out.")
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time work on a folder; the lock goes with the process, however it ends."""
        with contextlib.ExitStack() as stack:
            for folder in (self.stage, self.out / _PACK):
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

    def has_leftovers(self) -> bool:
        """Return whether a run was killed between the manifest and the cleaning up."""
        return (self.out / _PACK).exists()

    def begin(self) -> None:
        """Write down what is asked, or compare it with what was asked before; clear what a killed run half wrote."""
        for partial in (*self.stage.glob("units/*.tmp"), *self.out.glob(".*.tmp"), *self.out.glob("*/*/.*.tmp")):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        staged = {**self.plan.facts, "inputs": self.plan.inputs}
        self._same_or_new(self.stage / "plan.json", staged, self.stage)
        extends = {} if self.base is None else {"extends": hashlib.sha256(self.base.to_json().encode()).hexdigest()}
        self._same_or_new(self.out / _PACK / "request.json", {**self._request(), **extends}, self.out)

    def _same_or_new(self, file: Path, facts: dict[str, Any], folder: Path) -> None:
        try:
            before = orjson.loads(file.read_bytes())
        except FileNotFoundError:
            _write_json(file, facts)
        else:
            self._refuse_difference(before, facts, folder)

    def _refuse_difference(self, before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
        lines = difference(before, orjson.loads(orjson.dumps(now)))
        if lines:
            more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
            raise InputError(
                f"{folder} holds a conversion with other inputs or options: {'; '.join(lines[:8])}{more}. Repeat those,"
                " choose another --out, or start over with --fresh."
            )

    def _request(self) -> dict[str, Any]:
        """Return what decides the bytes of the shards: no unit size, no times, no paths of this machine."""
        facts = {key: value for key, value in self.plan.facts.items() if key != "unit_bytes"}
        inputs = [{"name": row["name"], "bytes": row["bytes"], "hash": row["hash"]} for row in self.plan.inputs]
        size = sum(row["bytes"] for row in inputs)
        source = {"files": len(inputs), "bytes": size, "fingerprint": inputs_fingerprint(inputs)}
        return {**facts, **self.pack_options.facts(), "source": source}

    # --- stage ---

    def tokenize(self) -> None:
        """Stage every unit that is not there yet."""
        tokenizer, file = self._tokenizer()
        if self.backend == "gigatoken":
            self._check_backend(tokenizer, file)
        done = documents = tokens = 0
        tasks = []
        for unit in self.plan.units:
            if read_unit(unit_folder(self.stage, unit.number)) is None:
                tasks.append(StageTask(unit, str(self.stage), self.options, tokenizer, file, self.backend))
            else:
                done += unit.size_bytes
        self.progress(Progress("tokenize", done, self.plan.size_bytes, "bytes"))
        for summary in self.run(stage_unit, tasks):
            done += summary["size_bytes"]
            documents += sum(sums["documents"] for sums in summary["domains"].values())
            tokens += sum(sums["tokens"] for sums in summary["domains"].values())
            self.progress(Progress("tokenize", done, self.plan.size_bytes, "bytes", documents, tokens))
        self._count_bad_records()

    def _tokenizer(self) -> tuple[TokenizerInfo, str | None]:
        if self.tokenizer is None:
            from converters.training import trained_tokenizer

            self.progress(Progress("train-tokenizer", 0, 1, "tokenizers"))
            file = trained_tokenizer(self.plan.units, self.options, self.stage)
            self.progress(Progress("train-tokenizer", 1, 1, "tokenizers"))
            self.tokenizer = describe(file)
            return self.tokenizer, str(file)
        if self.tokenizer.file is None:
            return self.tokenizer, None
        # A copy, so that every worker on every machine reads the file that was fingerprinted.
        copy = self.stage / f"tokenizer{Path(self.tokenizer.file).suffix}"
        _copy(self.tokenizer.file, copy)
        return self.tokenizer, str(copy)

    def _check_backend(self, tokenizer: TokenizerInfo, file: str | None) -> None:
        """Compare the fast backend with the exact one on documents of this very corpus, before it is used."""
        from converters.tokenizers import GigatokenEncoder
        from converters.training import sample_documents

        encoder = load_encoder(tokenizer.kind, file, self.backend)
        assert isinstance(encoder, GigatokenEncoder)
        some = self.plan.units[:: max(1, len(self.plan.units) // 4)]
        encoder.check([*sample_documents(some, self.options, 1 << 20), "a<|endoftext|>b </s>", "e\u0301 \u212b"])

    def _count_bad_records(self) -> None:
        for unit in self.plan.units:
            summary = read_unit(unit_folder(self.stage, unit.number)) or {}
            self.documents_read += summary["read"]
            for name, reasons in summary["skipped"].items():
                self.skipped.setdefault(name, Counter()).update(reasons)
            self.bad_records += summary["bad_records"]
        bad = sum(count for reason, count in self._left_out().items() if reason not in INTENDED)
        allowed = 0 if self.options.on_bad_record == "fail" else self.options.max_bad
        if bad > allowed * self.documents_read:
            first = self.bad_records[0]
            raise DataError(
                f"{bad:,} of {self.documents_read:,} records are bad, more than the allowed share of {allowed:g}; the"
                f" first is {first['place']}: {first['detail']}. Repair them, or raise --max-bad."
            )

    def _left_out(self) -> dict[str, int]:
        return dict(sorted(sum(self.skipped.values(), Counter()).items()))

    # --- pack and commit ---

    def pack(self) -> Manifest:
        """Write the shards that are not there yet, then the index files and the manifest."""
        assert self.tokenizer is not None
        dtype = id_dtype(self.tokenizer.vocab_size).name
        plans = self._plan_splits()
        if not plans:
            raise InputError(f"no text in {self.documents_read:,} records of {len(self.plan.inputs):,} files.")
        kept = sum(plan.documents for plan in plans)
        if self.documents_read != kept + sum(self._left_out().values()):
            raise DataError(f"{self.documents_read:,} records read, but {kept:,} kept and {self._left_out()} left out.")
        warnings = [*self._require_documents(plans), *require_samples(plans, self.pack_options)]
        splits = [split for plan in plans for split in plan.splits if split.num_samples]
        if not splits:
            raise InputError(f"no domain fills a sample of {self.pack_options.seq_len:,} tokens. Lower --seq-len.")
        tasks = [task for split in splits for task in self._pack_tasks(split, dtype)]
        total = sum(task.num_samples for task in tasks)
        done = 0
        self.progress(Progress("pack", 0, total, "samples"))
        for entry in self.run(pack_shard, tasks):
            done += entry["samples"]
            self.progress(Progress("pack", done, total, "samples", tokens=done * self.pack_options.seq_len))
        written = {(split.domain, split.split): self._commit_split(split, dtype) for split in splits}
        return self._commit(plans, written, dtype, warnings)

    def _require_documents(self, plans: Sequence[DomainPlan]) -> list[str]:
        """Return a warning for every domain that has files but no document, if that is allowed, else raise the first.

        Only rules that go by the path tell the domain of a file without records; a domain that is mapped away is none.
        """
        have = {plan.domain for plan in plans} | (self.base.domains.keys() if self.base else set())
        missing: dict[str, Piece] = {}
        domain_of = domain_rule(self.options.domain)
        for piece in (piece for unit in self.plan.units for piece in unit.pieces):
            name = domain_of(piece, {})
            name = mapped(name, self.options.domain_map) if name else None
            if name is not None and name not in have:
                missing.setdefault(name, piece)
        problems = [
            f"domain {name!r} has no document: its first file is {piece.path} of {piece.size_bytes:,} bytes. Add text,"
            " leave its files out with --exclude, or go on without the domain with --allow-empty."
            for name, piece in sorted(missing.items())
        ]
        if problems and not self.pack_options.allow_empty:
            more = f" ({len(problems) - 1} more domains like this.)" if len(problems) > 1 else ""
            raise InputError(problems[0] + more)
        return problems

    def _plan_splits(self) -> list[DomainPlan]:
        stage, units = str(self.stage), [unit.number for unit in self.plan.units]
        scratch = self.out / _PACK / "layouts"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        keep = None
        if self.pack_options.dedupe:
            keep = self.out / _PACK / "keep"
            for name, count in keep_first_copies(stage, units, keep).items():
                self.skipped.setdefault(name, Counter())["duplicate"] += count
        fixed = fixed_splits(self.base)
        return plan_splits(
            stage, units, self.pack_options, scratch=scratch, keep=str(keep) if keep else None, fixed=fixed
        )

    def _pack_tasks(self, split: SplitPlan, dtype: str) -> Iterator[Any]:
        assert self.tokenizer is not None
        below = Path(domain_folder(split.domain)) / split.split
        return pack_tasks(
            split,
            folder=self.out / below,
            records=self.out / _PACK / "shards" / below,
            dtype=dtype,
            eos_id=self.tokenizer.eos_id,
            options=self.pack_options,
            first_number=self._shards_before(split),
        )

    def _shards_before(self, split: SplitPlan) -> int:
        """Return how many shards of an extended split are there already."""
        domain = None if self.base is None else self.base.domains.get(split.domain)
        return domain.splits[split.split].num_shards if domain and split.split in domain.splits else 0

    def _commit_split(self, split: SplitPlan, dtype: str) -> Split:
        tasks = list(self._pack_tasks(split, dtype))
        entries = [orjson.loads(Path(task.record).read_bytes()) for task in tasks]
        check_accounting(split, entries, self.pack_options.seq_len)
        below = f"{domain_folder(split.domain)}/{split.split}"
        before = self._shards_before(split)
        old = read_index(self.out / below)[:before] if before else []
        index = write_index(self.out / below, [*old, *entries])
        return Split(
            path=below,
            num_samples=split.num_samples,
            num_tokens=split.num_samples * self.pack_options.seq_len,
            num_documents=split.num_documents,
            num_shards=len(entries),
            size_bytes=sum(shard_path(index.parent, entry).stat().st_size for entry in entries),
            fingerprint=_sha256(index),
        )

    def _commit(
        self, plans: Sequence[DomainPlan], written: dict[tuple[str, str], Split], dtype: str, warnings: list[str]
    ) -> Manifest:
        tokenizer = self._copy_tokenizer()
        names = {name for name, _ in written}
        before = dict(self.base.domains) if self.base else {}
        added = {plan.domain: self._domain(plan, written) for plan in plans if plan.domain in names | before.keys()}
        domains = {**before, **{name: merged(before.get(name), domain) for name, domain in added.items()}}
        known = [] if self.base is None else known_inputs(self.out, self.base).values()
        facts: dict[str, Any] = {
            "name": "domain-mixer",
            "version": mixer.__version__,
            "request": self._request(),
            "documents_read": self.documents_read,
            "skipped": self._left_out(),
            **self._publish_quarantine(),
            "bad_records": self.bad_records[:100],
            "warnings": warnings,
            "copies_across_splits": copies_across_splits(plans),
            "inputs": save_inputs(self.out, [*known, *self.plan.inputs]),
        }
        if self.base is not None:
            facts = {**self.base.converter, "inputs": facts["inputs"], "extensions": [*self._extensions(), facts]}
        manifest = Manifest(dict(sorted(domains.items())), self.pack_options.seq_len, dtype, tokenizer, converter=facts)
        manifest.save(self.out)
        return manifest

    def _extensions(self) -> list[dict[str, Any]]:
        return list(self.base.converter.get("extensions", [])) if self.base else []

    def _publish_quarantine(self) -> dict[str, Any]:
        """Gather the quarantined records of all units, in input order, into one file; say where."""
        if self.options.on_bad_record != "quarantine" or not self.bad_records:
            return {}
        name = _QUARANTINE if self.base is None else f"quarantine.{len(self._extensions()) + 1}.jsonl"
        partial = self.out / f".{_QUARANTINE}.{os.getpid()}.tmp"
        with open(partial, "wb") as file:
            for unit in self.plan.units:
                file.write((unit_folder(self.stage, unit.number) / _QUARANTINE).read_bytes())
        os.replace(partial, self.out / name)
        return {"quarantine": name}

    def _domain(self, plan: DomainPlan, written: dict[tuple[str, str], Split]) -> Domain:
        return Domain(
            splits={split.split: written[plan.domain, split.split] for split in plan.splits if split.num_samples},
            text_bytes=plan.text_bytes,
            held_out=plan.held_out.facts(),
            skipped=dict(sorted(self.skipped.get(plan.domain, {}).items())),
            dropped_tokens={split.split: split.dropped_tokens for split in plan.splits},
            tokens_in={split.split: split.tokens_in for split in plan.splits},
            padding_tokens={split.split: split.padding_tokens for split in plan.splits},
        )

    def _copy_tokenizer(self) -> TokenizerInfo:
        assert self.tokenizer is not None
        if self.tokenizer.file is None:
            return self.tokenizer
        name = f"{_TOKENIZER}/tokenizer{Path(self.tokenizer.file).suffix}"
        (self.out / _TOKENIZER).mkdir(exist_ok=True)
        _copy(self.tokenizer.file, self.out / name)
        return dataclasses.replace(self.tokenizer, file=name)

    def clean_up(self, keep_stage: bool) -> None:
        """Remove what only an unfinished conversion needs, and the list of inputs that an extension replaced."""
        named = Manifest.load(self.out).converter.get("inputs")
        for path in self.out.glob("inputs.*.jsonl"):
            if path.name != named:
                path.unlink()
        shutil.rmtree(self.out / _PACK, ignore_errors=True)
        if not keep_stage:
            shutil.rmtree(self.stage, ignore_errors=True)


def _sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _copy(source: str, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(orjson.dumps(value))
    os.replace(partial, path)
