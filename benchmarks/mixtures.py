"""Does a found mixture beat the fixed ones? Held-out losses over several seeds, on the same shards and budget.

    python -m benchmarks.mixtures demo-run/shards --seeds 3 --steps 240
    python -m benchmarks.mixtures shards --method group_dro --method doremi:uniform --seeds 3

A method is the name of an update rule, or NAME:MIXTURE with what its reference is trained on (by default
size-proportional). For every seed: each method's search (reference and proxy), then one main run per mixture, the found
ones and the baselines uniform, size-proportional and temperature (tau = 2). Prints mean ± standard deviation over the
seeds per domain, the average and the worst domain, and writes benchmarks/results/mixtures.json. Interrupted runs
continue.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from algorithms.rounds import SearchSettings, find_mixture
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from benchmarks import RESULTS
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.static_weights import proportional, temperature, uniform


@click.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--method", "methods", multiple=True, default=("doremi", "doremi:uniform"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=240, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the runs.  [default: benchmarks/results/mixtures]"
)
def main(shards: Path, methods: tuple[str, ...], seeds: int, steps: int, batch_size: int, out: Path | None) -> None:
    """Compare methods with baselines over seeds."""
    console, out = Console(stderr=True), out or RESULTS / "mixtures"
    manifest = Manifest.load(shards)
    losses: dict[str, list[list[float]]] = {}
    weights: dict[str, list[list[float]]] = {}
    for seed in range(17, 17 + 100 * seeds, 100):
        settings = TrainSettings(steps=steps, global_batch_size=batch_size, seed=seed)
        mixtures = _baselines(manifest)
        for method in methods:
            name, _, reference = method.partition(":")
            search = SearchSettings(
                method=name,
                rule={"variant": "recommended"} if name == "doremi" else {},
                proxy=settings,
                reference_mixture=reference or "proportional",
            )
            mixtures[method] = find_mixture(shards, search, out / f"seed-{seed}" / method.replace(":", "-"), console)
        for name, mixture in mixtures.items():
            folder = out / f"seed-{seed}" / f"main-{name.replace(':', '-')}"
            result = train_on(shards, mixture, settings, folder, label=f"seed {seed} {name}", console=console)
            losses.setdefault(name, []).append([result["heldout"][domain]["loss"] for domain in manifest.names])
            weights.setdefault(name, []).append([mixture.weights[domain] for domain in manifest.names])
    Console(width=120).print(_table(manifest, losses, weights, seeds, steps))
    RESULTS.mkdir(exist_ok=True)
    content = {"domains": manifest.names, "seeds": seeds, "steps": steps, "losses": losses, "weights": weights}
    (RESULTS / "mixtures.json").write_text(json.dumps(content, indent=2))


def _baselines(manifest: Manifest) -> dict[str, Mixture]:
    sizes = np.array([manifest.split(name, "train").num_tokens for name in manifest.names], dtype=np.float64)
    rows = {"proportional": proportional(sizes), "temperature": temperature(sizes, 2.0), "uniform": uniform(len(sizes))}
    return {name: Mixture(dict(zip(manifest.names, row.tolist()))) for name, row in rows.items()}


def _table(
    manifest: Manifest,
    losses: dict[str, list[list[float]]],
    weights: dict[str, list[list[float]]],
    seeds: int,
    steps: int,
) -> Table:
    table = Table("domain", title=f"Held-out loss, mean ± sd over {seeds} seeds, {steps} steps (mean weight)")
    for name in losses:
        table.add_column(name, justify="right")
    values = {name: np.array(rows) for name, rows in losses.items()}
    for index, domain in enumerate(manifest.names):
        cells = [
            f"{_spread(value[:, index])} ({np.mean(weights[name], axis=0)[index]:.2f})"
            for name, value in values.items()
        ]
        table.add_row(domain, *cells)
    table.add_section()
    table.add_row("average", *(_spread(value.mean(axis=1)) for value in values.values()))
    table.add_row("worst", *(_spread(value.max(axis=1)) for value in values.values()))
    return table


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
