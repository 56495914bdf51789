"""How fast is a conversion, compared with the tokenizer alone on the same documents?

    python -m benchmarks.conversion            # 30 MB of text
    python -m benchmarks.conversion --full     # 120 MB, three rounds
    python -m benchmarks.conversion --size 64MB --tokenizer tokenizer.json
    python -m benchmarks.conversion --cost     # the table of docs/converting.md, from the last results

The text is what this Python install already has: source files (.py), C and C++ headers (.h), stub files (.pyi) and
package metadata and documentation (.txt, .md, .rst, METADATA), each kind a domain, written as JSON lines. Without
``--tokenizer`` a byte-level BPE of 32,768 ids is trained on it first (not measured). A conversion is the command
``mixer convert`` as it is, its CPU seconds those of the whole process tree, from start to exit of a fresh interpreter;
the tokenizer alone is measured inside its process, without imports, one thread. "x own" is the CPU of a conversion over
the part of it spent inside the tokenizers library, in one process, which other work on the machine hardly disturbs. A
round runs everything once, and packing, which takes half a second, five times; the median over rounds is shown.
"two at once" halves the wall time of two: the most that a second process can gain on these cores. What two processes
gain, and "x bare", are taken within a round, from runs of two, and of the tokenizer, before and after that of one
worker, as shared cores get faster or slower by a fifth within minutes; those of each round are printed, too. "by ray"
starts Ray for itself, to be compared with 2 workers in wall time. llm-foundry is its functions for JSON lines as they
are, each kind at a time in one process, zstd:3, seq_len 2048; `python -m benchmarks.peers` installs it. At the end,
seconds until an interpreter has printed `mixer convert --help`, and until the first document is tokenised (medians of
five), and all that has a goal beside it. Results also go to benchmarks/results/conversion.json.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.goals import Row, print_goals
from benchmarks.peers import VENV
from converters.options import size_in_bytes
from converters.training import train_bpe

KINDS = {
    "python": (".py",),
    "headers": (".h", ".hpp", ".cuh"),
    "stubs": (".pyi",),
    "prose": (".txt", ".md", ".rst", "METADATA"),
}

COLUMNS = {
    "cpu_s": "CPU s",
    "cpu_ratio": "x bare",
    "own_ratio": "x own",
    "wall_s": "wall s",
    "mb_per_cpu_s": "MB/CPUs",
    "mtok_per_cpu_s": "Mtok/CPUs",
    "mb_per_s": "MB/s",
    "peak_mb": "peak MB",
}

GAINS = {"convert, 2 workers": "convert, 1 worker", "tokenizer alone, two at once": "tokenizer alone"}
AGAIN = ", again"

BARE = """
import json, os, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from pathlib import Path
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for path in sorted(Path(sys.argv[2]).rglob("*.jsonl")) for line in open(path, "rb")]
batches, size = [[]], 0
for text in texts:
    if size > 1 << 20:
        batches.append([])
        size = 0
    batches[-1].append(text)
    size += len(text)
start, wall, tokens = time.process_time(), time.perf_counter(), 0
for batch in batches:
    tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
print(json.dumps({"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall, "tokens": tokens}))
"""

CONVERT = """
import json, sys, time
from pathlib import Path
import converters.cli  # as the command does, before anything imports numpy
from converters import tokenizers
from mixer.cli import main
spent = 0.0
def timed(self, texts):  # as HuggingFaceEncoder._encode, but taking the time of the tokenizers library alone
    global spent
    start = time.process_time()
    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    rows = [encoding.ids for encoding in encodings]
    spent += time.process_time() - start
    return tokenizers._joined(rows)
if __name__ == "__main__":
    tokenizers.HuggingFaceEncoder._encode = timed
    start = time.process_time()
    try:
        main(["convert", *sys.argv[1:]])
    except SystemExit as error:
        if error.code:
            raise
    out = next(Path(each[len("--out="):]) for each in sys.argv if each.startswith("--out="))
    domains = json.loads((out / "manifest.json").read_text())["domains"]
    facts = {"tokens": sum(split["num_tokens"] for domain in domains.values() for split in domain["splits"].values())}
    if spent > 1:
        facts["own_ratio"] = (time.process_time() - start) / spent
    print(json.dumps(facts))
"""

FOUNDRY = """
import importlib.util, json, sys, types
from pathlib import Path
import transformers
root = Path(importlib.util.find_spec("llmfoundry").submodule_search_locations[0])
sys.modules["llmfoundry"] = types.ModuleType("llmfoundry")  # without its __init__, which imports all of training
def load(name, file):
    spec = importlib.util.spec_from_file_location(name, root / file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
if __name__ == "__main__":
    load("llmfoundry.data", "data/data.py")
    converter = load("convert_dataset_json", "command_utils/data_prep/convert_dataset_json.py")
    tokenizer, corpus, out = sys.argv[1:]
    eos = "<|endoftext|>"
    named = Path(out) / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token=eos).save_pretrained(named)
    for path in sorted(Path(corpus).rglob("*.jsonl")):
        shards = f"{out}/{path.parent.name}"
        converter.convert_dataset_json(str(path), shards, "zstd:3", 2048, "train", str(named), eos_text=eos)
    indexes = [json.loads(file.read_text()) for file in Path(out).rglob("index.json")]
    print(json.dumps({"tokens": 2048 * sum(shard["samples"] for index in indexes for shard in index["shards"])}))
"""

FIRST_DOCUMENT = """
import json, sys, tempfile
from pathlib import Path
from mixer.cli import main
if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_text("one document")
        flags = ["--out", folder + "/out", "--tokenizer", sys.argv[1], "--seq-len=1", "--held-out=0"]
        try:
            main(["convert", f"one={folder}/a.txt", *flags])
        finally:
            print(json.dumps({"tokens": 1}))
"""

HELP = """
import json, sys
from mixer.cli import main
if __name__ == "__main__":
    sys.argv[1:] = ["convert", "--help"]
    try:
        main()
    finally:
        print(json.dumps({"tokens": 0}))
"""


@click.command()
@click.option("--size", default="30MB", show_default=True, help="Text to convert.")
@click.option("--full", is_flag=True, help="The same with 120 MB, in three rounds.")
@click.option("--tokenizer", help="A tokenizer.json; default: one trained on the text.")
@click.option("--cost", "only_cost", is_flag=True, help="Print what 1 T and 15 T tokens cost by the last results.")
@click.option("--rounds", type=click.IntRange(1), help="Runs of each, of which the median is shown.  [default: 1]")
def main(size: str, full: bool, tokenizer: str | None, only_cost: bool, rounds: int | None) -> None:
    """Measure conversions of one corpus by several settings."""
    if only_cost:
        click.echo(cost_table(json.loads((RESULTS / "conversion.json").read_text())))
        return
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text_bytes = write_corpus(folder / "corpus", size_in_bytes("120MB" if full else size))
        tokenizer = tokenizer or train(folder)
        console.print(f"{text_bytes / 1e6:.1f} MB of text; load average {os.getloadavg()[0]:.2f}")
        done = []
        for number in range(rounds or (3 if full else 1)):
            done.append(with_gains({name: run() for name, run in runs(folder, tokenizer, number).items()}))
        rows = {name: median([round_[name] for round_ in done]) for name in done[0]}
        started = starts(tokenizer)
    report(console, rows, text_bytes, started)
    for name in GAINS:
        gains = ", ".join(f"{round_[name]['gain']:.2f}" for round_ in done)
        console.print(f"{name}: {gains} times as fast as one, by round")
    ratios = ", ".join(f"{round_['convert, 1 worker']['cpu_ratio']:.3f}" for round_ in done)
    console.print(f"convert, 1 worker: {ratios} times the CPU of the tokenizer alone, by round")
    note = "" if text_bytes >= 100e6 else "; the goals are for 100 MB and more (--full)"
    print_goals(f"conversion of {text_bytes / 1e6:.0f} MB of text, medians of {len(done)}{note}", goals(rows, started))


def runs(folder: Path, tokenizer: str, number: int) -> dict[str, Any]:
    """Return what to measure in one round, by name; each conversion into a folder of its own."""
    corpus, count = str(folder / "corpus"), itertools.count()

    def conversion(**options: Any) -> Any:
        given = {"out": folder / f"out{number}-{next(count)}", "tokenizer": tokenizer, "seq_len": 2048, "workers": 1}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (given | options).items()]
        return measured(CONVERT, corpus, *flags)

    stage, theirs = str(folder / f"stage{number}"), str(folder / f"theirs{number}")
    found: dict[str, Any] = {
        "tokenizer alone, two at once": lambda: two_at_once(BARE, tokenizer, corpus),
        "convert, 2 workers": lambda: conversion(workers=2),
        "tokenizer alone": lambda: measured(BARE, tokenizer, corpus),
        "convert, 1 worker": lambda: conversion(stage=stage),
        "tokenizer alone" + AGAIN: lambda: measured(BARE, tokenizer, corpus),
        "convert, 2 workers" + AGAIN: lambda: conversion(workers=2),
        "tokenizer alone, two at once" + AGAIN: lambda: two_at_once(BARE, tokenizer, corpus),
        "pack again": lambda: median([conversion(stage=stage, seq_len=1024) for _ in range(5)]),
        "pack, best fit": lambda: median([conversion(stage=stage, packing="best_fit") for _ in range(5)]),
    }
    if importlib.util.find_spec("gigatoken"):
        found["by gigatoken"] = lambda: conversion(backend="gigatoken")
    if importlib.util.find_spec("ray"):
        found["by ray, 2 workers"] = lambda: wall_alone(conversion(workers=2, engine="ray"))
    if any(VENV.glob("lib/python*/site-packages/llmfoundry")):
        python = str(VENV / "bin" / "python")
        found["llm-foundry"] = lambda: measured(FOUNDRY, tokenizer, corpus, theirs, python=python)
    return found


def two_at_once(*program: str) -> dict[str, float]:
    """Run a program twice at the same time, and return what one of the two took, the wall seconds halved.

    What this gains over one alone is all that a second process can gain on this machine.
    """
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: measured(*program), range(2)))
    return {**both[0], "cpu_s": sum(row["cpu_s"] for row in both) / 2, "wall_s": max(row["wall_s"] for row in both) / 2}


def with_gains(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Take the mean of what ran twice, and add ratios to what one process took, in this very round."""
    once = {name: dict(row) for name, row in rows.items() if not name.endswith(AGAIN)}
    for name in once:
        if again := rows.get(name + AGAIN):
            once[name] = {key: (value + again[key]) / 2 for key, value in rows[name].items()}
            once[name]["peak_mb"] = max(rows[name]["peak_mb"], again["peak_mb"])
    for row in once.values():
        if "cpu_s" in row:
            row["cpu_ratio"] = row["cpu_s"] / once["tokenizer alone"]["cpu_s"]
    for two, one in GAINS.items():
        once[two]["gain"] = once[one]["wall_s"] / once[two]["wall_s"]
    return once


def wall_alone(row: dict[str, float]) -> dict[str, float]:
    """Leave out CPU and memory: Ray's processes are not children of the program, and so are not counted."""
    return {name: value for name, value in row.items() if name in ("wall_s", "tokens")}


def starts(tokenizer: str) -> dict[str, float]:
    """Return wall seconds of whole processes, medians of five."""
    programs = {"mixer convert --help": (HELP,), "first document, and its shard": (FIRST_DOCUMENT, tokenizer)}
    return {
        name: statistics.median(measured(*program)["wall_s"] for _ in range(5)) for name, program in programs.items()
    }


def measured(program: str, *arguments: str, python: str = sys.executable) -> dict[str, float]:
    """Run a program in a fresh interpreter; return CPU and wall seconds, peak memory of its largest process, tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"  # a file, because workers import the main module
        file.write_text(program)
        wrapper = Path(folder) / "wrapper.py"
        wrapper.write_text(WRAPPER)
        command = [python, str(wrapper), str(file), *arguments]
        # Modules are compiled once and not at every start, as those of an installed package are.
        compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**compiled, "PYTHONPATH": os.getcwd()})
        wall = time.perf_counter() - start
    if done.returncode:
        raise click.ClickException(done.stderr)
    usage, result = (json.loads(line) for line in reversed(done.stdout.splitlines()[-2:]))
    return {**usage, "wall_s": wall, **result}


WRAPPER = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}), flush=True)
sys.exit(done.returncode)
"""


def write_corpus(folder: Path, wanted: int) -> int:
    """Write JSON lines per kind of installed text, shared evenly as far as there is enough; return bytes of text."""
    found = {kind: list(installed(suffixes)) for kind, suffixes in KINDS.items()}
    total = 0
    for place, kind in enumerate(sorted(found, key=lambda kind: sum(path.stat().st_size for path in found[kind]))):
        budget = (wanted - total) // (len(found) - place)
        total += write_kind(folder / kind, found[kind], budget)
    return total


def write_kind(folder: Path, files: list[Path], budget: int) -> int:
    folder.mkdir(parents=True)
    written = 0
    with open(folder / "part.jsonl", "w", encoding="utf-8") as out:
        for path in files:
            if written >= budget:
                break
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            out.write(json.dumps({"text": text, "path": path.name}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def installed(suffixes: tuple[str, ...]) -> Iterator[Path]:
    installed_here = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    for root in dict.fromkeys([*installed_here, "/usr/include", "/usr/share/doc"]):
        for path in sorted(Path(root).rglob("*")):
            if path.name.endswith(suffixes) and path.is_file() and 0 < path.stat().st_size < 1 << 20:
                yield path


def train(folder: Path) -> str:
    """Train a tokenizer on every tenth document."""
    lines = [line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_bytes().splitlines()]
    file = folder / "tokenizer.json"
    file.write_text(train_bpe([json.loads(line)["text"] for line in lines[::10]], 32_768), encoding="utf-8")
    return str(file)


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def goals(rows: dict[str, dict[str, float]], started: dict[str, float]) -> list[Row]:
    """Return what was measured beside the goals; what was not run is left out."""
    one, two = rows["convert, 1 worker"], rows["convert, 2 workers"]
    most = rows["tokenizer alone, two at once"]["gain"]
    peaks = [row["peak_mb"] for name, row in rows.items() if name.startswith(("convert", "pack", "by giga"))]
    peak = 1.048576 * max(peaks)
    found = [
        at_most("CPU ÷ that of the tokenizer alone, whole processes", one["cpu_ratio"], 1.08),
        at_least(
            "2 workers: wall time of 1 ÷ theirs", two["gain"], 1.8, f"two bare tokenizers at once gain {most:.2f} here"
        ),
        at_most("largest process, MB", peak, 200),
        at_least("packing again, M tokens per CPU s", rows["pack again"]["mtok_per_cpu_s"], 60),
        at_most("seconds to `mixer convert --help`", started["mixer convert --help"], 0.4),
        at_most("seconds to the first document, and its shard", started["first document, and its shard"], 1.5),
    ]
    if "own_ratio" in one:
        found.insert(0, at_most("CPU ÷ that of the tokenizer in it", one["own_ratio"], 1.08))
    if fast := rows.get("by gigatoken"):
        found.append(at_least("gigatoken, MB of text per CPU s", fast["mb_per_cpu_s"], 45))
        if theirs := rows.get("llm-foundry"):
            found.append(at_least("gigatoken: CPU of llm-foundry ÷ it", theirs["cpu_s"] / fast["cpu_s"], 15))
    if ray := rows.get("by ray, 2 workers"):
        found.append(at_most("Ray: seconds, start included", ray["wall_s"], 1.1 * two["wall_s"] + 10))
    return found


def at_most(measure: str, value: float, goal: float, why: str = "") -> Row:
    return Row(measure, f"{value:.3g}", f"<= {goal:.3g}", value <= goal, why)


def at_least(measure: str, value: float, goal: float, why: str = "") -> Row:
    return Row(measure, f"{value:.3g}", f">= {goal:.3g}", value >= goal, why)


CORE_HOUR = 0.04  # of your currency
DOCUMENT_TOKENS, INDEX_ENTRY_BYTES = 700, 440  # English web pages; an entry of ``index.json`` by default options


def cost_table(results: dict[str, Any]) -> str:
    """Return the table of time, space and cost as Markdown; ids of two bytes, shards of 64 MiB, sizes as measured."""
    runs = results["runs"]
    lines = ["| | 1 T tokens | 15 T tokens |", "|---|---|---|"]
    for what, name in (
        ("tokenise and pack, `hf`", "convert, 1 worker"),
        ("tokenise and pack, `gigatoken`", "by gigatoken"),
        ("pack again", "pack again"),
    ):
        if name in runs:
            rate = runs[name]["tokens"] / runs[name]["cpu_s"]
            hours = 1e12 / rate / 3600
            lines.append(
                f"| {what}, {rate / 1e6:.2f} Mtok per CPU second |"
                f" {hours:,.0f} core-hours, {hours * CORE_HOUR:,.1f} |"
                f" {15 * hours:,.0f} core-hours, {15 * hours * CORE_HOUR:,.0f} |"
            )
    shards = 1e12 * 2 / (64 << 20)
    sizes = {
        "stage: 2 bytes per token, 16 per document": (2 + 16 / DOCUMENT_TOKENS) * 1e12,
        "shards before compression": 2e12,
        "all `index.json` together": shards * INDEX_ENTRY_BYTES,
        "tables of documents, read twice to plan": 16e12 / DOCUMENT_TOKENS,
        "with `shuffle_seed`: the order, 32 bytes per document": 32e12 / DOCUMENT_TOKENS,
    }
    lines += [f"| {what} | {amount(size)} | {amount(15 * size)} |" for what, size in sizes.items()]
    lines.append(f"| shards of 64 MiB | {shards:,.0f} | {15 * shards:,.0f} |")
    return "\n".join(lines)


def amount(size: float) -> str:
    """Return bytes for people.

    >>> amount(2.02e12), amount(13.1e6)
    ('2.0 TB', '13.1 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def report(console: Console, rows: dict[str, dict[str, float]], text_bytes: int, started: dict[str, float]) -> None:
    """Print the table and write the JSON."""
    table = Table(box=None)
    for title in ("", *COLUMNS.values()):
        table.add_column(title, no_wrap=True, justify="right" if title else "left")
    for name, row in rows.items():
        row |= {"mb_per_s": text_bytes / 1e6 / row["wall_s"], "mtok_per_s": row["tokens"] / 1e6 / row["wall_s"]}
        if "cpu_s" in row:
            row |= {
                "mb_per_cpu_s": text_bytes / 1e6 / row["cpu_s"],
                "mtok_per_cpu_s": row["tokens"] / 1e6 / row["cpu_s"],
            }
        table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for key in COLUMNS))
    console.print(table)
    for name, seconds in started.items():
        console.print(f"{name}: {seconds:.2f} s")
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "text_bytes": text_bytes,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "runs": rows,
        "start_s": started,
    }
    (RESULTS / "conversion.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
