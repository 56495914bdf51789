"""The whole conversion: plan -> stage -> pack -> commit.

    from converters import convert
    convert(["corpus/"], "shards", tokenizer="tokenizer.json", seq_len=2048, workers=4)

``index.json`` files are written when all shards are there, the manifest last of all: a folder without one is not
finished, and the same command continues it. What was asked is kept beside the stage files; another request for the
same folder is refused with the difference.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from converters import workplace
from converters.committing import pack
from converters.domains import load_mapping
from converters.engines import check_engine, kept_running, run_tasks, start_workers
from converters.extending import known_inputs, stage_of_extension
from converters.job import STAGE, Job, Progress
from converters.locations import Location, load_manifest, local_file, output_location
from converters.options import DEFAULT_EXCLUDE, PackOptions, StageOptions, size_in_bytes
from converters.packing import require_room
from converters.plan import make_plan
from converters.tokenizers import BACKENDS, describe, id_dtype, require_gigatoken
from converters.tokenizing import tokenize
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest, TokenizerInfo

__all__ = ["Progress", "convert"]


def convert(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    train_tokenizer: int | None = None,
    seq_len: int,
    eos: str | None = None,
    special_tokens: str = "text",
    tokens_from: str | os.PathLike[str] | None = None,
    retokenize: bool = False,
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
    tail: str | None = None,
    doc_starts: bool = False,
    sample_ids: bool = False,
    shuffle_seed: int | None = None,
    dedupe: bool = False,
    on_bad_record: str = "fail",
    max_bad: float = 0.01,
    max_record: str | int = "8MiB",
    workers: int = 1,
    engine: str = "local",
    backend: str = "hf",
    compression: str | None = "zstd:3",
    hashes: Sequence[str] = ("xxh64",),
    shard_size: str | int = "64MiB",
    unit_size: str | int | None = None,
    seed: int = 0,
    fingerprint: str = "ends",
    stage: str | os.PathLike[str] | None = None,
    keep_stage: bool = False,
    fresh: bool = False,
    extend: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Convert text to one set of MDS shards per domain and return the manifest.

    The bytes written depend on the inputs and the options below up to ``shard_size``, not on ``workers``, ``engine``,
    ``unit_size``, or how often the conversion was interrupted. A finished conversion is returned as it is, if all its
    shards are there with their sizes.

    Args:
        inputs: files, folders, globs, URLs (``s3://``, ``gs://``, ``https://``); ``name=path`` gives all documents of a
            path to one domain; ``@list.txt`` stands for the inputs listed in that file. What lies in ``out`` or
            ``stage`` is none.
        out: folder for the shards, of this machine or ``s3://bucket/folder``; new, empty, or an unfinished conversion
            by the same options.
        tokenizer: a ``tokenizer.json``, a folder that holds one, a SentencePiece ``.model``, ``tiktoken:cl100k_base``,
            ``tiktoken:o200k_base`` or ``bytes``. Either this or ``train_tokenizer``.
        train_tokenizer: vocabulary size of a byte-level BPE trained on a sample of the corpus.
        seq_len: tokens per sample.
        eos: the end-of-text token, where the tokenizer's own is not found.
        special_tokens: what a special token that is spelled out in a text is: ``text``, or with ``parse`` its id.
        tokens_from: the tokenizer that made the ids in MDS shards that are given as input, where no manifest says it.
        retokenize: decode such ids and encode the text anew; otherwise ``tokenizer`` must be the one that made them.
        domain: ``folder``, ``file``, ``field:<dotted.path>`` or ``path:<regex>``; see ``converters.domains``.
        domain_map: a mapping or JSON file that renames, merges and (null) drops domains; ``"*"`` is all others.
        text_field: dotted path of a record's text; several joined (``title,body``); or ``{title}: {body}``.
        format: one of ``converters.readers.FORMATS``, or ``auto``: by file name.
        include, exclude: globs on the path below the input and on the file name.
        held_out: share of each domain for the validation split; 0 for none.
        min_held_out: documents that a validation split should have at least, see ``splits.choose_held_out``.
        allow_empty: accept domains without a document, or without a training or validation sample; recorded in the
            manifest.
        packing: ``concat`` (documents joined and cut every ``seq_len``), ``best_fit`` (no document is cut that fits;
            the rest of a sample is padding, ids of end of text) or ``none`` (a document is a sample of its own length,
            one longer than ``seq_len`` several).
        tail: with ``concat``: ``drop`` the end of a domain that fills no sample (default), or ``pad`` it.
        doc_starts: also write the column ``doc_starts``: where documents, and padding, start in each sample.
        sample_ids: also write the column ``sample_id``: the sample's number in its domain and split, uint64.
        shuffle_seed: put the documents of each domain in a random order before packing; None for that of the input.
        dedupe: keep only the first of equal texts in a domain; the others are counted as ``duplicate``.
        on_bad_record: ``fail``, ``skip`` (counted by reason, places named in the manifest) or ``quarantine`` (also
            kept, with place, reason and raw bytes, in ``quarantine.jsonl``).
        max_bad: unless ``fail``, the share of records that may be bad.
        max_record: bytes that a record or its text may have; a longer one is bad (``oversized``). A worker takes up to
            nine bytes of memory for each.
        workers: processes; with Ray, tasks at a time.
        engine: ``local``, ``ray`` or ``ray:<address>``; see ``converters.engines``.
        backend: ``hf``, or ``gigatoken`` for a ``tokenizer.json``: many times faster; compared with ``hf`` on documents
            of the corpus first, and refused if any id differs.
        compression: ``zstd:LEVEL`` or None.
        hashes: names of the hashes in the index, sorted.
        shard_size, unit_size: bytes per shard before compression, and per unit of work.
        seed: of the sample for ``train_tokenizer``.
        fingerprint: how changed inputs are noticed: by size, time and ``ends`` (the first and last MiB), or with
            ``full`` by every byte, which reads them once more; times then do not matter.
        stage: folder or URL for the tokenised documents, kept for packing again; default: inside ``out``, removed at
            the end. Extensions have folders of their own in it.
        keep_stage: keep it inside ``out``.
        extend: add the inputs that are new to the finished shards in ``out``, in new shards; all options but those
            that choose files must be as before. Copies (``dedupe``, and ``copies_across_splits`` in the manifest) are
            looked for among the new documents only.
        fresh: start over, deleting what an earlier conversion left in ``out`` and ``stage``; with ``extend``, only
            what an unfinished extension left.
        progress: called with ``Progress`` as work gets done.
    Raises:
        InputError: for wrong options or inputs, or if ``out`` holds something else.
        DataError: for damaged input, a full disk, a dead worker, or a finished shard that is missing. What is finished
            is kept.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError(
            "give either a tokenizer (--tokenizer: a tokenizer.json, 'bytes', …) or the vocabulary of one to train on"
            " the corpus (--train-tokenizer 32768)."
        )
    if eos is not None and {tokenizer, tokens_from} <= {None, "bytes"}:
        raise InputError(
            f"the end of text {eos!r} is none of a tokenizer that is trained, or of 'bytes'. Leave it out."
        )
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is not one of {list(BACKENDS)}.")
    if backend == "gigatoken":
        require_gigatoken()
    check_engine(engine, workers)
    stage_options = StageOptions(
        format=format, include=tuple(include), exclude=tuple(exclude), domain=domain, text_field=text_field,
        on_bad_record=on_bad_record, max_bad=max_bad, seed=seed, train_tokenizer=train_tokenizer,
        special_tokens=special_tokens, retokenize=retokenize, fingerprint=fingerprint,
        tokens_from=None if tokens_from is None else describe(tokens_from, eos),
        domain_map={} if domain_map is None else load_mapping(domain_map),
        max_record_bytes=size_in_bytes(max_record, "max_record"),
        unit_bytes=None if unit_size is None else size_in_bytes(unit_size, "unit_size"),
    )  # fmt: skip
    pack_options = PackOptions(
        seq_len=seq_len, held_out=held_out, min_held_out=min_held_out, allow_empty=allow_empty,
        shard_bytes=size_in_bytes(shard_size, "shard_size"), compression=compression, hashes=tuple(sorted(set(hashes))),
        packing=packing, tail=tail or "drop", doc_starts=doc_starts, sample_ids=sample_ids,
        shuffle_seed=shuffle_seed, dedupe=dedupe,
    )  # fmt: skip
    if tail is not None and packing != "concat":
        raise InputError(
            f"--tail {tail} would be ignored: with --packing {packing} no end of a domain is left over. Leave it out,"
            " or take --packing concat."
        )
    where = output_location(out)
    base = load_manifest(where) if extend else None
    given = _given_tokenizer(tokenizer, eos, where, base)
    vocab_size = given.vocab_size if given is not None else train_tokenizer or 0
    require_room(id_dtype(vocab_size).name, pack_options, stage_options.max_record_bytes)
    asked = given if tokenizer is not None else None
    known = None if base is None else known_inputs(where, base)
    stages = output_location(stage) if stage else where / STAGE
    plan = make_plan(inputs, stage_options, _identity(asked, train_tokenizer), known, [str(where), str(stages)])
    staged = stages if base is None else stage_of_extension(stages, base, is_new=bool(plan.units))
    run = functools.partial(run_tasks, engine, workers=workers)
    job = Job(
        where, staged, plan, stage_options, pack_options, given, backend, run, progress or (lambda _: None), base,
    )  # fmt: skip
    cleared = fresh and workplace.clear(job)
    manifest = workplace.finished(job, is_ours=cleared)
    if manifest is None or workplace.has_leftovers(job):
        with _naming_full_disk(job.out), workplace.locked(job) as locks, kept_running(engine, workers):
            manifest = workplace.finished(job)  # another process may have finished it just now
            if manifest is None:
                job = workplace.begin(job)
                start_workers(workers, len(job.plan.units))
                manifest = pack(job, tokenize(job), locks)
            workplace.clean_up(job, locks, keep_stage or stage is not None)
    return manifest


def _given_tokenizer(
    tokenizer: str | os.PathLike[str] | None, eos: str | None, out: Location, base: Manifest | None
) -> TokenizerInfo | None:
    """Return the tokenizer that is there: the one named, or the one that was trained for the shards to extend."""
    if tokenizer is not None:
        return describe(local_file(os.fspath(tokenizer)), eos)
    if base is None or base.tokenizer.file is None:
        return None
    return describe(local_file(str(out / base.tokenizer.file)))


def _identity(tokenizer: TokenizerInfo | None, train_tokenizer: int | None) -> dict[str, Any]:
    """Return what another run must have in common: of a tokenizer that is trained, its size."""
    if tokenizer is None:
        return {"trained": train_tokenizer}
    names = ("kind", "fingerprint", "vocab_size", "eos_id")
    return {name: getattr(tokenizer, name) for name in names}


@contextlib.contextmanager
def _naming_full_disk(out: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"no space left while converting into {out} ({error}). Finished work is kept: free some space and run the"
            " same command again."
        ) from error
