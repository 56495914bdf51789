"""Stage every unit that is not there yet, and add up what was read and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from converters.job import Job, Progress
from converters.locations import local_file, read_many, write_file
from converters.memory import return_memory
from converters.stage import INTENDED, StageTask, stage_unit, unit_folder
from converters.tokenizers import check_gigatoken, describe, load_encoder, require_gigatoken
from mixer.errors import DataError
from mixer.manifest import TokenizerInfo

__all__ = ["Staged", "tokenize"]


class Staged(NamedTuple):
    """What became of all records.

    Args:
        skipped: by domain (empty where none could be told), how many were left out, by reason.
        bad_records: place and reason of some of them.
        used: names of the mapping of domains that records have.
    """

    tokenizer: TokenizerInfo
    documents_read: int
    skipped: Mapping[str, Counter[str]]
    bad_records: list[dict[str, Any]]
    used: set[str]

    def left_out(self) -> dict[str, int]:
        """Return how many records were left out, by reason."""
        return dict(sorted(sum(self.skipped.values(), Counter()).items()))


_NAMED_BAD_RECORDS = 100  # of all units


def tokenize(job: Job) -> Staged:
    """Stage every unit that is not there yet."""
    tokenizer, file = _tokenizer(job)
    done = documents = tokens = 0
    tasks = []
    for unit, summary in zip(job.plan.units, _summaries(job)):
        if summary is None:
            tasks.append(StageTask(unit, str(job.stage), job.stage_options, tokenizer, file, job.backend))
        else:
            done += unit.size_bytes
    if tasks:
        _check_encoder(job, tokenizer, file)
    job.progress(Progress("tokenize", done, job.plan.size_bytes, "bytes"))
    for summary in job.run(stage_unit, tasks):
        done += summary["size_bytes"]
        documents += sum(sums["documents"] for sums in summary["domains"].values())
        tokens += sum(sums["tokens"] for sums in summary["domains"].values())
        job.progress(Progress("tokenize", done, job.plan.size_bytes, "bytes", documents, tokens))
    return _added_up(job, tokenizer)


def _tokenizer(job: Job) -> tuple[TokenizerInfo, str | None]:
    """Return the tokenizer, trained now if that is asked, and the file that the workers read."""
    if job.tokenizer is None:
        from converters.training import trained_tokenizer

        job.progress(Progress("train-tokenizer", 0, 1, "tokenizers"))
        file = trained_tokenizer(job.plan.units, job.stage_options, job.stage)
        job.progress(Progress("train-tokenizer", 1, 1, "tokenizers"))
        return describe(local_file(str(file))), str(file)
    if job.tokenizer.file is None:
        return job.tokenizer, None
    # A copy, so that every worker on every machine reads the file that was fingerprinted.
    copy = job.stage / f"tokenizer{Path(job.tokenizer.file).suffix}"
    write_file(copy, Path(job.tokenizer.file))
    return job.tokenizer, str(copy)


def _check_encoder(job: Job, tokenizer: TokenizerInfo, file: str | None) -> None:
    """Load the tokenizer; compare a fast backend with the exact one on documents of this corpus, before its use."""
    file, special_tokens = file and local_file(file), job.stage_options.special_tokens
    if file is not None and tokenizer.kind == "hf" and job.backend == "gigatoken":
        require_gigatoken()
        texts = _some_documents(job)  # before the tables of the encoders take memory, too
        return_memory()
        check_gigatoken(file, special_tokens, tokenizer.eos_id, texts)
        return_memory()
    else:
        load_encoder(tokenizer.kind, file, job.backend, special_tokens, tokenizer.eos_id)


def _some_documents(job: Job) -> list[str]:
    from converters.training import sample_documents

    some = job.plan.units[:: max(1, len(job.plan.units) // 4)]
    return [*sample_documents(some, job.stage_options, 1 << 20), "a<|endoftext|>b </s>", "e\u0301 \u212b"]


def _summaries(job: Job) -> Iterator[dict[str, Any] | None]:
    """Yield what is known of every unit, None for those that are not finished."""
    files = [unit_folder(job.stage, unit.number) / "unit.json" for unit in job.plan.units]
    return (None if data is None else orjson.loads(data) for data in read_many(files))


def _added_up(job: Job, tokenizer: TokenizerInfo) -> Staged:
    """Add up the units' summaries. Raises: DataError: if more records are bad than is allowed."""
    skipped: dict[str, Counter[str]] = {}
    bad_records: list[dict[str, Any]] = []
    used: set[str] = set()
    read = 0
    for unit, summary in zip(job.plan.units, _summaries(job)):
        if summary is None:
            raise DataError(f"unit {unit.number} has gone from {job.stage}. Run the same command again.")
        read += summary["read"]
        for name, reasons in summary["skipped"].items():
            skipped.setdefault(name, Counter()).update(reasons)
        bad_records += summary["bad_records"][: _NAMED_BAD_RECORDS - len(bad_records)]
        used.update(summary.get("used", job.stage_options.domain_map))  # a stage of before does not say
    staged = Staged(tokenizer, read, skipped, bad_records, used)
    bad = sum(count for reason, count in staged.left_out().items() if reason not in INTENDED)
    allowed = 0 if job.stage_options.on_bad_record == "fail" else job.stage_options.max_bad
    if bad > allowed * read:
        first = bad_records[0]
        raise DataError(
            f"{bad:,} of {read:,} records are bad, more than the allowed share of {allowed:g}; the"
            f" first is {first['place']}: {first['detail']}. Repair them, or raise --max-bad."
        )
    return staged
