"""Does the time to the first batch, and after a resume, grow with the number of samples?

    python -m benchmarks.startup            # ours to 1e9 samples, StreamingDataset to 1e6
    python -m benchmarks.startup --full     # StreamingDataset to 1e8 too (minutes, 6 GB)

Only ``index.json`` files are written, for four domains of 70 / 25 / 4.5 / 0.5 % of the samples in shards of 16,384: no
data is needed to decide what the first batch holds, and which shards and rows it lies in. Every measurement runs in a
process of its own; imports are shown apart. Memory is the growth of the peak resident size after the imports. For
StreamingDataset the time runs from its construction until the order of the epoch is there. Medians of ``--rounds``; the
very first start on an index, which has to parse it, is shown as "first of all". At the end: how long ``import mixer``
and what it offers take beside ``import torch``. Results also go to benchmarks/results/startup.json.
"""

from __future__ import annotations

import json
import os
import resource
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
from benchmarks.peers import SHARES, WEIGHTS

PER_SHARD, SEQ_LEN = 16_384, 2048


def write_indexes(folder: Path, num_samples: int) -> None:
    """Write a manifest and the indexes of a corpus of ``num_samples`` samples, without its shards."""
    from mixer import mds
    from mixer.manifest import Domain, Manifest, Split, TokenizerInfo

    domains, columns = {}, {"tokens": mds.token_encoding("uint16", SEQ_LEN)}
    for name, share in SHARES.items():
        count, out = max(round(share * num_samples), 1), folder / name / "train"
        out.mkdir(parents=True)
        entries = []
        for shard in range(-(-count // PER_SHARD)):
            samples = min(PER_SHARD, count - shard * PER_SHARD)
            raw: dict[str, Any] = {"bytes": 200 + samples * (4 + 2 * SEQ_LEN), "hashes": {"xxh64": f"{shard:016x}"}}
            zipped = {"bytes": raw["bytes"] // 2, "hashes": raw["hashes"]}
            entry = mds.shard_entry(
                columns,
                f"shard.{shard:05}.mds",
                raw,
                num_samples=samples,
                hashes=("xxh64",),
                compression="zstd:3",
                zipped=zipped,
            )
            entries.append(entry)
        fingerprint = "sha256:" + mds.hash_hex("sha256", mds.write_index(out, entries).read_bytes())
        split = Split(f"{name}/train", count, count * SEQ_LEN, count, len(entries), 0, fingerprint)
        domains[name] = Domain({"train": split})
    Manifest(domains, SEQ_LEN, "uint16", TokenizerInfo("none", "", 50_000, 0)).save(folder)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_mixer(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    from mixer import MixtureLoader

    imports, before = time.perf_counter() - began, peak_mb()

    def first_batch(state: object = None) -> tuple[float, MixtureLoader]:
        began = time.perf_counter()
        loader = MixtureLoader(folder, mixture=WEIGHTS, global_batch_size=16)
        if state is not None:
            loader.load_state_dict(state)  # type: ignore[arg-type]
        loader.reader._read_ahead = lambda *_: None  # type: ignore[method-assign]  # there are no shards to read
        loader.reader.sample_ids(loader.mixer.next_batch())
        return time.perf_counter() - began, loader

    start, loader = first_batch()
    memory = peak_mb() - before
    state = loader.state_dict()
    for name, domain in state["domains"].items():
        domain["position"] = int(1.5 * loader.num_samples[name])
    resume, _ = first_batch(json.loads(json.dumps(state)))
    return {"imports": imports, "first batch": start, "after resume": resume, "memory": memory}


def measure_streaming(folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    from streaming import Stream, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    imports, before = time.perf_counter() - began, peak_mb()
    clean_stale_shared_memory()
    began = time.perf_counter()
    streams = [Stream(local=str(folder / n / "train"), proportion=w) for n, w in WEIGHTS.items()]
    dataset = StreamingDataset(streams=streams, batch_size=16, shuffle=True, num_canonical_nodes=1)
    # What its __iter__ does before it waits for shards, which do not exist here.
    dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
    dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
    dataset._get_work(*dataset._resume_incr_epoch())
    start = time.perf_counter() - began
    return {"imports": imports, "first batch": start, "memory": peak_mb() - before}


KEYS = ("imports", "first of all", "first batch", "after resume")
MEASURED = {"mixer": measure_mixer, "streaming": measure_streaming}


def in_own_process(loader: str, folder: Path) -> dict[str, float] | None:
    command = [sys.executable, "-m", "benchmarks.startup", "--one", loader, "--data", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{loader}: failed\n{done.stderr[-500:]}", file=sys.stderr)
        return None
    return json.loads(lines[-1])


IMPORTS = {
    "torch": "import torch",
    "mixer": "import mixer",
    "MixtureLoader": "from mixer import MixtureLoader",
    "streaming": "import streaming",
}


def import_seconds(rounds: int) -> dict[str, float]:
    """Return medians of wall seconds that imports take in fresh processes, Python's own start taken off."""
    found: dict[str, list[float]] = {name: [] for name in ("nothing", *IMPORTS)}
    for _ in range(rounds):
        for name in found:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS.get(name, "pass")], check=False, capture_output=True)
            found[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {name: max(seconds - medians["nothing"], 0.0) for name, seconds in medians.items() if name != "nothing"}


@click.command()
@click.option("--full", is_flag=True, help="StreamingDataset up to 1e8 samples.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--one", hidden=True, type=click.Choice(list(MEASURED)))
@click.option("--data", hidden=True, type=click.Path(path_type=Path))
def main(full: bool, rounds: int, one: str | None, data: Path | None) -> None:
    """Measure and print one table."""
    if one is not None and data is not None:
        print(json.dumps(MEASURED[one](data)), flush=True)
        os._exit(0)
    limit = {"mixer": 10**9, "streaming": 10**8 if full else 10**6}
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in MEASURED}
    for size in (10**5, 10**6, 10**7, 10**8, 10**9):
        with tempfile.TemporaryDirectory() as folder:
            write_indexes(Path(folder), size)
            for name in MEASURED:
                runs = [in_own_process(name, Path(folder)) for _ in range(rounds) if size <= limit[name]]
                kept = [run for run in runs if run is not None]
                if kept:
                    results[name][size] = {key: statistics.median(run[key] for run in kept) for key in kept[0]}
                    results[name][size]["first of all"] = kept[0]["first batch"]
    report(results, import_seconds(rounds), rounds)


def report(results: dict[str, dict[int, dict[str, float]]], imports: dict[str, float], rounds: int) -> None:
    table = Table(title=f"time to the first batch, median of {rounds}")
    for column in ("loader", "samples", "imports s", "first of all s", "first batch s", "after resume s", "memory MB"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, by_size in results.items():
        for size, row in by_size.items():
            cells = [f"{row[key]:.3f}" if key in row else "–" for key in KEYS]
            table.add_row(name, f"{size:.0e}", *cells, f"{row['memory']:.0f}")
    Console().print(table)
    ours = results.get("mixer", {})
    if 10**5 in ours and 10**9 in ours:
        ratio = ours[10**9]["first batch"] / ours[10**5]["first batch"]
        print(f"mixer, first batch at 1e9 ÷ at 1e5: {ratio:.1f} (goal: 1.5 and under 1 s)")
    ratios = ", ".join(f"{name} {seconds / imports['torch']:.2f}" for name, seconds in imports.items())
    print(f"time of imports ÷ that of torch ({imports['torch']:.2f} s): {ratios}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(
        json.dumps({"rounds": rounds, "results": results, "imports": imports}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
