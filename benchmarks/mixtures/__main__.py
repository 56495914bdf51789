"""The command; see the package."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
import torch
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.mixtures.corpora import entropy_floors, shards_of
from benchmarks.mixtures.methods import BASELINES, LATER, METHODS, Outcome, outcome
from benchmarks.mixtures.runs import Missing, Runs, Setting
from benchmarks.mixtures.tables import console_table, draw, publish, summary

DOCS = Path(__file__).resolve().parents[2] / "docs"
SETTINGS = {"synthetic": Setting(steps=400, batch_size=64), "redpajama": Setting(steps=240, batch_size=32)}


@click.command()
@click.argument("corpora", nargs=-1, required=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(40), help="Of every run.  [default: 400 synthetic, else 240]")
@click.option("--batch-size", type=click.IntRange(1), help="[default: 64 synthetic, else 32]")
@click.option("--only", multiple=True, metavar="NAME", help="These methods beside the baselines (repeatable).")
@click.option("--out", type=click.Path(path_type=Path), help="For the runs.  [default: benchmarks/results/mixtures]")
@click.option("--finished", is_flag=True, help="Train nothing: rows that are finished for all seeds.")
@click.option("--publish", "to_docs", is_flag=True, help="Write docs/measured/, docs/mixtures.png and docs/methods.md.")
def main(
    corpora: tuple[str, ...],
    seeds: int,
    steps: int | None,
    batch_size: int | None,
    only: tuple[str, ...],
    out: Path | None,
    finished: bool,
    to_docs: bool,
) -> None:
    """Compare methods with the baselines on "synthetic", "redpajama" or the path of shards; continues where it was.

    The baselines and the better known methods run for all seeds before the others do.
    """
    torch.set_num_threads(1)
    unknown = sorted(set(only) - set(METHODS))
    if unknown:
        raise click.UsageError(f"no methods {unknown}; there are {', '.join(METHODS)}.")
    if to_docs and (only or steps or batch_size):
        raise click.UsageError("--publish goes with all methods at the default size.")
    for corpus in corpora:
        runs = _runs(corpus, steps, batch_size, out or RESULTS / "mixtures", finished)
        measured = _compare(corpus, runs, seeds, [*BASELINES, *(only or METHODS)])
        Console(width=240).print(console_table(measured))
        print(summary(measured))
        if to_docs:
            (DOCS / "measured").mkdir(exist_ok=True)
            (DOCS / "measured" / f"{corpus}.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
            page = DOCS / "methods.md"
            page.write_text(publish(page.read_text(encoding="utf-8"), measured), encoding="utf-8")
    if to_docs:
        draw(DOCS / "mixtures.png", [json.loads((DOCS / "measured" / f"{name}.json").read_text()) for name in SETTINGS])


def _runs(corpus: str, steps: int | None, batch_size: int | None, out: Path, finished: bool) -> Runs:
    folder = out / Path(corpus).name
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    setting = SETTINGS.get(corpus, Setting(steps=240, batch_size=32))
    setting = replace(setting, steps=steps or setting.steps, batch_size=batch_size or setting.batch_size)
    return Runs(shards_of(corpus, folder), setting, folder / "runs", finished=finished)


def _compare(corpus: str, runs: Runs, seeds: int, names: Sequence[str]) -> dict[str, Any]:
    """Return what docs/measured/ holds; rows that are not finished are left out where nothing is to be trained."""
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    console = Console(stderr=True)
    # Seed by seed, then row by row: an interrupted comparison has all seeds of what matters most.
    early, late = ([name for name in names if (name in LATER) == is_late] for is_late in (False, True))
    all_seeds = range(0, 10 * seeds, 10)
    for seed, name in [*product(all_seeds, early), *((seed, name) for name, seed in product(late, all_seeds))]:
        try:
            found[name].append(outcome(name, runs, seed))
        except Missing:
            console.print(
                f"{corpus}, seed {seed}: {name} is not finished", highlight=False, markup=False, soft_wrap=True
            )
            continue
        average = np.mean(found[name][-1].result.test)
        console.print(
            f"{corpus}, seed {seed}: {name}: average {average:.3f}", highlight=False, markup=False, soft_wrap=True
        )
    plain = [one.seconds for one in found["uniform"]]
    rows = {
        name: {
            "losses": [_rounded(one.result.test) for one in outcomes],
            "weights": [_rounded(one.weights) for one in outcomes],
            "cpu": _rounded([one.seconds / base for one, base in zip(outcomes, plain)]),
        }
        for name, outcomes in found.items()
        if len(outcomes) == seeds
    }
    return {
        "corpus": Path(corpus).name,
        "domains": list(runs.domains),
        "shares": _rounded(runs.sizes / runs.sizes.sum()),
        "floors": [entropy_floors()[name] for name in runs.domains] if corpus == "synthetic" else None,
        "seeds": seeds,
        "setting": asdict(runs.setting),
        "seq_len": runs.manifest.seq_len,
        "num_parameters": sum(parameter.numel() for parameter in runs.model(0).parameters()),
        "rows": rows,
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


if __name__ == "__main__":
    main()
