"""How many samples a second does a loader deliver, in batches of (B, T), from four very imbalanced domains?

    python -m benchmarks.loader                     # 80 MB, batch 16, without and with worker processes
    python -m benchmarks.loader --full              # 819 MB
    python -m benchmarks.loader --workers 0 --loader mixer --loader mosaicml-streaming

Domains hold 70 / 25 / 4.5 / 0.5 % of the samples (2,048 int32 tokens) and are drawn by 0.4 / 0.3 / 0.2 / 0.1. Every
loader reads its own best format (benchmarks/peers.py), in a process of its own, page cache warm, one math thread;
rounds go through all loaders in turn. Rates are medians; ratios are medians of the ratios within a round, because the
machine is not quiet; without workers also by CPU time, which other programs disturb less. Memory is what the loader's
processes take more than after the imports, memory-mapped files aside. Results also go to results/loader.json.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.peers import LOADERS, OURS, SEQ_LEN, interpreter, write_data


def own_mb() -> tuple[float, float]:
    """Return MB of this process and its children: memory of their own, and mapped files (each shared page once)."""
    own = mapped = 0.0
    for pid in [os.getpid(), *children(os.getpid())]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        kilobytes = {name: int(value) for name, value in re.findall(r"^(Pss_\w+):\s+(\d+) kB", text, re.MULTILINE)}
        own += (kilobytes.get("Pss_Anon", 0) + kilobytes.get("Pss_Shmem", 0)) / 1024
        mapped += kilobytes.get("Pss_File", 0) / 1024
    return own, mapped


def children(pid: int) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [deeper for child in found for deeper in children(child)]


def measure(name: str, data: Path, batch: int, workers: int, seconds: float) -> dict[str, float]:
    """Return samples per second of one loader after a warm-up, and its memory."""
    import numpy
    import torch  # what every loader needs and none is charged for

    del numpy, torch
    before = own_mb()
    batches = LOADERS[name].batches(data, batch, workers)
    next(batches)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds / 2:
        next(batches)
    count, began, busy = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - began) < seconds:
        next(batches)
        count += 1
    busy = time.process_time() - busy
    own, mapped = own_mb()
    cpu = {} if workers else {"cpu_rate": count * batch / busy}
    return {"rate": count * batch / passed, **cpu, "own_mb": own - before[0], "mapped_mb": mapped - before[1]}


def in_own_process(name: str, data: Path, batch: int, workers: int, seconds: float) -> dict[str, float] | None:
    python = interpreter(LOADERS[name].package) or sys.executable
    command = [python, "-m", "benchmarks.loader", "--one", name, "--data", str(data), "--batch", str(batch)]
    command += ["--workers", str(workers), "--seconds", str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}, {workers} workers: no result in 180 s", file=sys.stderr)
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        print(f"{name}, {workers} workers: failed\n{done.stderr[-700:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure_all(
    names: list[str], workers: tuple[int, ...], data: Path, *, batch: int, rounds: int, seconds: float
) -> dict[str, dict[int, list[dict[str, float] | None]]]:
    results: dict[str, dict[int, list[Any]]] = {name: {} for name in names}
    cases = [(name, count) for count in workers for name in names if count in LOADERS[name].workers]
    for number in range(rounds):
        for name, count in cases[number % len(cases) :] + cases[: number % len(cases)]:
            found = results[name].setdefault(count, [])
            if found == [None]:  # it failed at once: not again
                continue
            found.append(in_own_process(name, data, batch, count, seconds))
    return results


@click.command()
@click.option("--full", is_flag=True, help="819 MB instead of 80 MB.")
@click.option("--loader", "names", multiple=True, type=click.Choice(list(LOADERS)), help="Only these.  [default: all]")
@click.option("--workers", multiple=True, type=int, default=(0, 1, 2), show_default=True, help="Worker processes.")
@click.option("--batch", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Per measurement.")
@click.option("--one", hidden=True)
@click.option("--data", type=click.Path(path_type=Path), help="Keep the data in this folder, and use what is there.")
def main(
    full: bool,
    names: tuple[str, ...],
    workers: tuple[int, ...],
    batch: int,
    rounds: int,
    seconds: float,
    one: str | None,
    data: Path | None,
) -> None:
    """Measure and print one table."""
    if one is not None and data is not None:
        print("RESULT " + json.dumps(measure(one, data, batch, workers[0], seconds)), flush=True)
        os._exit(0)  # leave worker processes and background threads of any loader behind
    wanted = list(names or LOADERS)
    chosen = [name for name in wanted if interpreter(LOADERS[name].package) is not None]
    missing = [f"{name} (needs {LOADERS[name].package})" for name in wanted if name not in chosen]
    num_samples = 100_000 if full else 10_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = data or Path(temporary)
        if not (folder / "mds").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_data(folder, num_samples)
        for name in chosen:  # a first look at each: formats are made, the page cache is warmed
            in_own_process(name, folder, batch, 0, 0.1)
        results = measure_all(chosen, workers, folder, batch=batch, rounds=rounds, seconds=seconds)
    report(results, {"samples": num_samples, "batch": batch, "rounds": rounds, "seq_len": SEQ_LEN}, missing)


def report(results: dict[str, dict[int, list[Any]]], setting: dict[str, Any], missing: list[str]) -> None:
    workers = sorted({count for by in results.values() for count in by})
    summary = {name: {count: summarise(results, name, count) for count in by} for name, by in results.items()}
    megabytes = setting["samples"] * SEQ_LEN * 4 / 1e6
    title = f"samples/s of {SEQ_LEN} tokens ({megabytes:,.0f} MB, batch {setting['batch']}, {setting['rounds']} rounds)"
    table = Table(title=title, padding=(0, 0, 0, 1))
    table.add_column("loader", no_wrap=True)
    for count in workers:
        table.add_column(f"{count} wrk", justify="right")
        table.add_column("÷", justify="right")
    table.add_column("/CPU s", justify="right")
    table.add_column("÷", justify="right")
    table.add_column("MB", justify="right")
    for name, by in summary.items():
        cells = []
        for count in workers:
            row = by.get(count) or {}
            cells.append(f"{row['rate']:,.0f}" if "rate" in row else "–")
            cells.append(f"{row['ours_over_it']:.2f}" if "ours_over_it" in row else "–")
        row = by.get(0) or {}
        cells.append(f"{row['cpu_rate']:,.0f}" if "cpu_rate" in row else "–")
        cells.append(f"{row['ours_over_it_cpu']:.2f}" if "ours_over_it_cpu" in row else "–")
        table.add_row(name, *cells, f"{row['own_mb']:,.0f}" if "own_mb" in row else "–")
    Console(width=100).print(table)
    print(
        "÷: mixer's rate ÷ this one's, same number of worker processes (wrk). MB: own memory beside imports and files"
    )
    print(
        "that are mapped, 0 wrk. On a machine that is not quiet, samples per CPU second say more than those per second."
    )
    if missing:
        print("left out, not installed (python -m benchmarks.peers):", ", ".join(missing))
    RESULTS.mkdir(exist_ok=True)
    result = {"setting": setting, "summary": summary, "runs": results, "not_installed": missing}
    (RESULTS / "loader.json").write_text(json.dumps(result, indent=2) + "\n")


def summarise(results: dict[str, dict[int, list[Any]]], name: str, count: int) -> dict[str, float]:
    """Return medians; the ratio is of the rounds in which both ran."""
    runs, ours = results[name][count], results.get(OURS, {}).get(count, [])
    good = [run for run in runs if run is not None]
    if not good:
        return {}
    found = {key: statistics.median(run[key] for run in good) for key in good[0]}
    pairs = [(own, run) for own, run in zip(ours, runs) if own and run]
    for key, label in (("rate", "ours_over_it"), ("cpu_rate", "ours_over_it_cpu")):
        if pairs and key in pairs[0][0]:
            found[label] = statistics.median(own[key] / run[key] for own, run in pairs)
    return found


if __name__ == "__main__":
    main()
