"""The commands ``mixer convert``, ``inspect``, ``verify``, ``add-column``, ``stats`` and ``train-tokenizer``.

Heavy imports are inside the functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from converters.conversion import Progress
    from mixer.manifest import Manifest

__all__ = ["add_column", "convert", "inspect", "stats", "train_tokenizer", "verify"]

# No command here does linear algebra, for which numpy would start a thread per core as it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
atexit.register(gc.freeze)  # nor has its last work to be looked through for garbage, which takes a tenth of a short run


def _workers(asked: int | None) -> int:
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, help="Folder for the shards, or s3://bucket/folder.")
@click.option("--seq-len", type=int, required=True, help="Tokens per sample.")
@click.option("--tokenizer", help="tokenizer.json, folder, .model, tiktoken:NAME, or 'bytes'.")
@click.option("--train-tokenizer", type=int, metavar="VOCAB", help="Train a byte-level BPE of this size on the corpus.")
@click.option("--eos", metavar="TOKEN", help="End-of-text token, where the tokenizer's own is not found.")
@click.option(
    "--special-tokens", type=click.Choice(["text", "parse"]), default="text", show_default=True,
    help="What '<|endoftext|>' in a text is: text, or its id.",
)  # fmt: skip
@click.option("--tokens-from", metavar="TOKENIZER", help="What made the ids in MDS input, if no manifest says.")
@click.option("--retokenize", is_flag=True, help="Decode the ids in MDS input, and encode the text anew.")
@click.option(
    "--domain", default="folder", show_default=True, metavar="RULE",
    help="folder, file, field:<dotted.path> or path:<regex>.",
)  # fmt: skip
@click.option("--domain-map", metavar="JSON", help='File like {"old": "new", "unwanted": null}; "*" is all others.')
@click.option("--text-field", default="text", show_default=True, help="A field; 'title,body'; or '{title}: {body}'.")
@click.option(
    "--format", default="auto", show_default=True,
    help="auto (by name), jsonl, parquet, arrow, csv, tsv, warc, mds, text (one per file), text-lines, text-blocks.",
)  # fmt: skip
@click.option("--include", multiple=True, metavar="GLOB", help="Only files whose path or name matches (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Not these; default: hidden files and __pycache__.")
@click.option("--held-out", default=0.01, show_default=True, help="Share of each domain for validation; 0 for none.")
@click.option("--min-held-out", default=8, show_default=True, help="Documents a validation split should have at least.")
@click.option("--allow-empty", is_flag=True, help="Accept domains without a document or a sample.")
@click.option(
    "--packing", type=click.Choice(["concat", "best_fit", "none"]), default="concat", show_default=True,
    help="Join and cut documents; cut none that fits; or one sample per document.",
)  # fmt: skip
@click.option("--tail", type=click.Choice(["drop", "pad"]), help="End of a domain, with concat; default: drop.")
@click.option("--doc-starts", is_flag=True, help="Also write where documents start in each sample.")
@click.option("--sample-ids", is_flag=True, help="Also write each sample's number in its domain and split.")
@click.option("--shuffle-seed", type=int, help="Shuffle the documents of each domain before packing.")
@click.option("--dedupe", is_flag=True, help="Keep only the first of equal texts in a domain.")
@click.option("--on-bad-record", type=click.Choice(["fail", "skip", "quarantine"]), default="fail", show_default=True)
@click.option("--max-bad", default=0.01, show_default=True, help="Share of records that may be bad.")
@click.option("--max-record", default="8MiB", show_default=True, help="A longer record or text is a bad record.")
@click.option("--workers", type=int, help="Processes; default: one per core.")
@click.option(
    "--backend", type=click.Choice(["hf", "gigatoken"]), default="hf", show_default=True,
    help="What encodes by a tokenizer.json; gigatoken is faster and checked first.",
)  # fmt: skip
@click.option("--engine", default="local", show_default=True, help="local, ray, or ray:ADDRESS of a running cluster.")
@click.option("--compression", default="zstd:3", show_default=True, help="zstd:LEVEL, or none.")
@click.option("--hashes", default="xxh64", show_default=True, help="Hashes in the index, comma-separated.")
@click.option("--shard-size", default="64MiB", show_default=True, help="Before compression.")
@click.option("--unit-size", help="Input bytes that a process takes at a time; default by corpus size.")
@click.option("--seed", default=0, show_default=True, help="Of the sample that a tokenizer is trained on.")
@click.option(
    "--fingerprint", type=click.Choice(["ends", "full"]), default="ends", show_default=True,
    help="Notice changed inputs by size, time and both ends, or by every byte.",
)  # fmt: skip
@click.option("--stage", help="Folder or URL for the tokenised documents, kept for packing again.")
@click.option("--keep-stage", is_flag=True, help="Keep the tokenised documents inside --out.")
@click.option("--extend", is_flag=True, help="Add what is new in the inputs to finished shards, in new shards.")
@click.option(
    "--fresh", is_flag=True,
    help="Start over: delete what an earlier conversion left in --out and --stage; with --extend, only what an"
    " unfinished extension left.",
)  # fmt: skip
def convert(inputs: tuple[str, ...], workers: int | None, **options: Any) -> None:
    """Convert text corpora to one set of MDS shards per domain.

    INPUTS are files, folders, globs and URLs (fsspec): JSON lines, Parquet, Arrow, CSV, TSV, WET and MDS by their
    names (also .gz, .zst, .bz2, .xz), any other file as one document. NAME=PATH gives everything in a path to one
    domain; @FILE reads inputs from a list. An interrupted conversion is continued by the same command; the bytes
    written do not depend on --workers.

    \b
    Examples:
      mixer convert corpus/ --out shards --tokenizer tokenizer.json --seq-len 2048
      mixer convert corpus/ --out shards --train-tokenizer 8192 --seq-len 512 --workers 8
      mixer convert pile/*.jsonl.zst --out shards --tokenizer gpt-neox/ --seq-len 2048 --domain field:meta.pile_set_name
      mixer convert corpus/ --out shards --tokenizer tokenizer.json --seq-len 2048 --extend    # files were added
      mixer convert python=/usr/lib/python3 web=crawl.parquet --out shards --tokenizer bytes --seq-len 1024 \\
            --include '*.py' --include '*.parquet' --on-bad-record skip
    """
    from converters.conversion import convert as run

    options["compression"] = None if options["compression"].lower() == "none" else options["compression"]
    options["hashes"] = tuple(sorted(name for name in options["hashes"].split(",") if name))
    if not options["exclude"]:
        del options["exclude"]
    with _ending_when_told(), _progress_bar() as progress:
        manifest = run(inputs, options.pop("out"), workers=_workers(workers), progress=progress, **options)
    _print_table(manifest)
    _print_bad_records(manifest)


@click.command()
@click.argument("shards")
@click.option("--sample", default=0, show_default=True, help="Show this many decoded samples per domain.")
@click.option("--split", default="train", show_default=True, help="Split to show samples of.")
@click.option("--domain", "only", multiple=True, help="Only this domain (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead.")
def inspect(shards: str, sample: int, split: str, only: tuple[str, ...], as_json: bool) -> None:
    """Show what a folder of shards holds: domains, samples, tokens, shares, bytes; and samples as text.

    \b
    Examples:
      mixer inspect shards
      mixer inspect shards --sample 2 --domain wiki
      mixer inspect shards --sample 1 --split validation
      mixer inspect shards --json | jq .domains
    """
    from converters.inspecting import require_split
    from converters.locations import load_manifest, location
    from mixer.errors import InputError

    manifest = load_manifest(location(shards))
    if unknown := sorted(set(only) - set(manifest.names)):
        raise InputError(f"no domain {unknown} in {shards}; it has {list(manifest.names)}.")
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    if sample:
        require_split(manifest, split)
    _print_table(manifest, only)
    _print_columns_beside(shards)
    _print_bad_records(manifest)
    if sample:
        _print_samples(shards, manifest, only or manifest.names, split, sample)


@click.command()
@click.argument("shards")
@click.option("--deep", is_flag=True, help="Read every shard: hashes, headers, token ids.")
@click.option("--workers", type=int, help="Processes; default: one per core.")
def verify(shards: str, deep: bool, workers: int | None) -> int:
    """Check shards against their manifest; every finding names the file and the repair. Exit code 1 if there are any.

    \b
    Examples:
      mixer verify shards             # digests of indexes, sizes of shards, accounting: seconds
      mixer verify shards --deep      # every byte
    """
    from rich.console import Console

    from converters.verifying import verify as run
    from mixer.progress import LoggedProgress

    console = Console(stderr=True)
    with LoggedProgress(console=console, transient=console.is_terminal) as bar:

        def update(done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task("verify")
            bar.update(task, completed=done, total=total)

        findings = run(shards, deep=deep, workers=_workers(workers), progress=update)
    for finding in findings:
        click.echo(f"{finding.path}: {finding.what.removesuffix('.')}. To repair: {finding.repair}.")
    depth = "every byte was read" if deep else "structure and sizes; --deep reads every byte"
    count = "1 finding" if len(findings) == 1 else f"{len(findings) or 'No'} findings"
    click.echo(f"{count} ({depth}).")
    return 1 if findings else 0


@click.command("add-column")
@click.argument("shards")
@click.argument("name")
@click.option("--from", "sources", multiple=True, required=True, metavar="SOURCE", help="Where values come from.")
@click.option("--split", default="train", show_default=True, help="Split that the values belong to.")
@click.option("--dtype", default="float32", show_default=True, help="Of the values in tables.")
@click.option("--fill", type=float, help="Value of samples that have none; without it they are an error.")
@click.option("--replace", is_flag=True, help="Overwrite a column of that name.")
def add_column(shards: str, name: str, sources: tuple[str, ...], **options: Any) -> None:
    """Put one value per sample beside finished shards, which stay as they are.

    SOURCE is a table (Parquet, Arrow, JSON lines, CSV, TSV) with the columns domain, sample_id and NAME; DOMAIN=TABLE
    without a domain; DOMAIN=ARRAY.npy with one row per sample; or a folder that `mixer score` wrote. sample_id is a
    sample's number in its domain and split. The loader delivers the column by columns=["NAME"].

    \b
    Examples:
      mixer add-column shards quality --from quality.parquet
      mixer add-column shards quality --from web=web.npy --from code=code.npy
      mixer add-column shards reference_loss --from scores      # after: mixer score shards --model m --out scores
    """
    from converters.columns import add_column as run
    from mixer.side_columns import SideColumn

    folder = run(shards, name, sources, **options)
    count = sum(size for files in SideColumn(folder).files.values() for _, size, _ in files)
    click.echo(f"Wrote {count:,} values to {folder}.")


@click.command()
@click.argument("shards")
@click.option("--split", default="train", show_default=True)
@click.option("--max-tokens", default="20M", show_default=True, help="Of each domain, from its first shards.")
@click.option("--plot", metavar="PNG", help="Also draw lengths and entropies.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def stats(shards: str, split: str, max_tokens: str, plot: str | None, as_json: bool) -> None:
    """Show what the text of each domain is like: document lengths, bytes per token, duplicates, entropies.

    H1 is the entropy of single tokens, H2 of a token given the one before, in bits per token. In shards packed by
    best_fit, the pieces of a document that is longer than a sample count as documents.

    \b
    Examples:
      mixer stats shards
      mixer stats shards --split validation --plot stats.png
      mixer stats shards --json | jq '.[] | {domain, h2}'
    """
    import json

    from converters.options import size_in_bytes
    from converters.statistics import domain_statistics, plot_statistics
    from mixer.pictures import check_picture
    from mixer.units import short

    if plot:
        check_picture(plot)
    rows = domain_statistics(shards, split=split, max_tokens=size_in_bytes(max_tokens, "max_tokens"))
    if plot:
        plot_statistics(rows, plot)
    if as_json:
        facts = [{key: value for key, value in row._asdict().items() if key != "lengths"} for row in rows]
        for row in facts:
            row["quantiles"] = row["quantiles"] if row["documents"] else None
        click.echo(json.dumps(facts, indent=2))
        return
    columns = ("domain", "tokens", "docs", "p10", "p50", "p90", "B/tok", "copies", "H1", "H2")
    cells = [
        (
            row.domain, short(row.tokens), f"{row.documents:,}",
            *(short(length) if row.documents else "" for length in row.quantiles),
            f"{row.bytes_per_token:.2f}", f"{row.duplicates:.1%}", f"{row.h1:.1f}", f"{row.h2:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    _print_columns(f"{split} split", columns, cells)
    if plot:
        click.echo(f"Wrote {plot}")


@click.command("train-tokenizer")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--vocab-size", type=int, required=True, help="Ids, the end of text included.")
@click.option("--out", required=True, help="File to write, tokenizer.json.")
@click.option("--sample-size", default="64MiB", show_default=True, help="Text to train on, spread over the domains.")
@click.option("--domain", default="folder", show_default=True, metavar="RULE", help="As for convert.")
@click.option("--text-field", default="text", show_default=True, help="As for convert.")
@click.option("--format", default="auto", show_default=True, help="As for convert.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only files whose path or name matches (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Not these; default: hidden files and __pycache__.")
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
def train_tokenizer(inputs: tuple[str, ...], out: str, vocab_size: int, sample_size: str, **options: Any) -> None:
    """Train a byte-level BPE on a seeded sample of the corpus; the same file in every run.

    \b
    Examples:
      mixer train-tokenizer corpus/ --vocab-size 32768 --out tokenizer.json
      mixer train-tokenizer pile/*.jsonl.zst --vocab-size 50000 --domain field:meta.pile_set_name --out tokenizer.json
    """
    from converters.training import train_tokenizer as run

    if not options["exclude"]:
        del options["exclude"]
    path = run(inputs, out, vocab_size=vocab_size, sample_size=sample_size, **options)
    click.echo(f"Wrote {path}.")


@contextmanager
def _ending_when_told() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end a run as Ctrl-C does: workers stop, and one line says what to do."""
    import signal

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- printing ------------------------------------------------------------------------------------------------------


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a callback that draws one bar per phase, with rates; say so if it was never called."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from mixer.progress import LoggedProgress

    columns = (
        TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rates]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks: dict[str, tuple[TaskID, float, int]] = {}
    with LoggedProgress(*columns, console=Console(stderr=True)) as bar:

        def update(event: Progress) -> None:
            if event.phase not in tasks:
                task = bar.add_task(event.phase, total=event.total, completed=event.done, rates="")
                tasks[event.phase] = (task, time.monotonic(), event.done)
            task, start, first = tasks[event.phase]
            bar.update(task, completed=event.done, rates=_rates(event, time.monotonic() - start, event.done - first))

        yield update
    if not tasks:
        click.echo("Nothing to do: all of this was converted before.", err=True)


def _rates(event: Progress, seconds: float, done: int) -> str:
    if seconds <= 0 or not event.tokens:
        return ""
    tokens = f"{event.tokens / seconds / 1e6:.2f} Mtok/s"
    return f"{done / seconds / 1e6:.1f} MB/s, {tokens}" if event.unit == "bytes" else tokens


def _print_table(manifest: Manifest, only: tuple[str, ...] = ()) -> None:
    from converters.inspecting import domain_rows
    from mixer.units import short

    title = f"{manifest.seq_len} tokens per sample, {manifest.dtype}, {manifest.tokenizer.vocab_size:,} token ids"
    columns = ("domain", "docs", "train", "valid", "tokens", "share", "size", "held out")
    rows = [row for row in domain_rows(manifest) if not only or row.domain in only]
    cells = [
        (
            row.domain, f"{row.documents:,}", f"{row.train_samples:,}", f"{row.validation_samples:,}",
            short(row.train_tokens), f"{row.share:.2%}", f"{short(row.size_bytes)}B", row.held_out,
        )
        for row in rows
    ]  # fmt: skip
    total = (
        "total", *(f"{sum(values):,}" for values in zip(*(row[1:4] for row in rows))),
        short(sum(row.train_tokens for row in rows)), f"{sum(row.share for row in rows):.2%}",
        f"{short(sum(row.size_bytes for row in rows))}B", "",
    )  # fmt: skip
    _print_columns(title, columns, cells, total)


def _print_columns_beside(shards: str) -> None:
    from mixer.side_columns import find_columns

    names: dict[str, list[str]] = {}
    for name, split, _ in find_columns(shards):
        names.setdefault(name, []).append(split)
    if names:
        click.echo("Beside the samples: " + ", ".join(f"{name} ({', '.join(names[name])})" for name in names) + ".")


_NAME_WIDTH = 12


def _print_columns(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None
) -> None:
    """Print a table whose first column folds down to ``_NAME_WIDTH``; no number is cut.

    In a narrow terminal the last columns are left out and named below; what is piped elsewhere is as wide as need be.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mixer.names import plain

    console = Console()
    every = [columns, *rows, *([total] if total else [])]
    edges, between = 2, 2
    number_widths = [between + max(map(len, cells)) for cells in list(zip(*every))[1:]]
    ends = list(accumulate(number_widths, initial=edges))
    width = console.width
    if not console.is_terminal and "COLUMNS" not in os.environ:
        width = max(width, _NAME_WIDTH + ends[-1])
    kept = max(2, sum(_NAME_WIDTH + end <= width for end in ends))
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(columns[0], overflow="fold", min_width=min(_NAME_WIDTH, max(len(cells[0]) for cells in every)))
    for name in columns[1:kept]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(plain(row[0]), *row[1:kept])
    if total:
        table.add_section()
        table.add_row(*total[:kept])
    if kept < len(columns):
        table.caption = f"no room for {', '.join(columns[kept:])}: widen the terminal, or use --json"
    console.print(table, width=width)


def _print_bad_records(manifest: Manifest) -> None:
    """Print what was left out, and copies across splits, of the conversion and its extensions, the latest first."""
    from mixer.names import printable

    parts = [*reversed(manifest.converter.get("extensions", [])), manifest.converter]
    skipped = sum((Counter(part.get("skipped", {})) for part in parts), Counter())
    if skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        read = sum(part["documents_read"] for part in parts)
        kept = [part["quarantine"] for part in parts if part.get("quarantine")]
        where = f" (kept in {' and '.join(sorted(kept))})" if kept else ""
        click.echo(f"Left out {skipped.total():,} of {read:,} records: {counts}{where}.", err=True)
    for record in [record for part in parts for record in part.get("bad_records", [])][:10]:
        click.echo(printable(f"  {record['place']}: {record['detail']}"), err=True)
    if copies := sum(part.get("copies_across_splits", 0) for part in parts):
        what = "document has the very text" if copies == 1 else "documents have the very texts"
        click.echo(f"{copies:,} training {what} of held-out ones (--dedupe removes copies within a domain).", err=True)
    for warning in [warning for part in parts for warning in part.get("warnings", [])]:
        click.echo(f"Warning: {warning}", err=True)


def _print_samples(shards: str, manifest: Manifest, domains: tuple[str, ...], split: str, count: int) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    from converters.inspecting import decoded_documents
    from mixer.names import plain, printable

    console = Console()
    for domain in domains:
        if split not in manifest.domains[domain].splits:
            click.echo(f"{domain}: no {split} split.", err=True)
            continue
        for number, (documents, padding) in enumerate(
            decoded_documents(shards, domain=domain, split=split, count=count)
        ):
            text = Text()
            for place, (document, has_end) in enumerate(documents):
                text.append(("\n" if place else "") + printable(document, keep="\n\t\xa0\u3000"))
                text.append("\n--- end of document ---" if has_end else "", "dim")
            text.append(f"\n--- {padding:,} tokens of padding ---" if padding else "", "dim")
            title = plain(f"{domain} / {split} / sample {number}")
            console.print(Panel(text, title=title, title_align="left"))
