"""Tables, plots and one HTML page about finished runs: what was asked, which weights came out, what they brought.

Always per domain, with the average and the worst domain, against the size-proportional and uniform baselines where
they were run. Numbers are read from the run folders; nothing is computed twice and nothing is left out.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from algorithms.objective import objective_weights, weighted_average
from algorithms.plots import plot_comparison, plot_trajectory
from algorithms.runs import read_result, read_settings
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.names import plain

_PAGE = Path(__file__).with_name("report.html.j2")

__all__ = ["comparison_table", "draw_search", "search_table", "train_table", "write_report"]


def draw_search(out: str | os.PathLike[str]) -> list[Path]:
    """Draw the weights and the excess (or plain) losses of the last round's proxy into ``out``; return the files."""
    folder = _last_round(Path(out)) / "proxy"
    with np.load(folder / "trajectory.npz", allow_pickle=False) as saved:
        names = [str(name) for name in saved["domains"]]
        steps, weights, loss = saved["steps"], saved["weights"], saved["loss"]
        excess = saved["excess"] if "excess" in saved.files else None
    rule = read_settings(folder)["rule"]
    found = Mixture.load(Path(out) / "mixture.json").weights
    moved = max(abs(found[name] - last) for name, last in zip(names, weights[-1].tolist())) > 0.01
    files = [
        plot_trajectory(
            Path(out) / "weights.png",
            names,
            steps,
            weights,
            title=f"{rule}: domain weights" + (" (diamonds: the mixture found)" if moved else ""),
            unit="weight",
            baseline=1 / len(names),
            result=np.array([found[name] for name in names]) if moved else None,
        )
    ]
    if excess is not None and np.isfinite(excess).any():
        files.append(
            plot_trajectory(
                Path(out) / "excess.png",
                names,
                steps,
                excess,
                title="Excess loss of the proxy over the reference",
                unit="nats per token",
                baseline=0.0,
                smooth=15,
            )
        )
    files.append(
        plot_trajectory(
            Path(out) / "losses.png",
            names,
            steps,
            loss,
            title="Training loss of the proxy",
            unit="nats per token",
            smooth=15,
        )
    )
    return files


def search_table(shards: str | os.PathLike[str], out: str | os.PathLike[str]) -> Table:
    """Return a table of the frozen weights beside sizes and uniform weights."""
    manifest, mixture = Manifest.load(shards), Mixture.load(Path(out) / "mixture.json")
    tokens = {name: manifest.split(name, "train").num_tokens for name in manifest.names}
    total = sum(tokens.values())
    title = f"Weights found by {mixture.provenance.get('rule', 'the search')}"
    table = Table("domain", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("tokens", "by size", "found", "found / size"):
        table.add_column(column, justify="right")
    for name in sorted(tokens, key=lambda name: -tokens[name]):
        share = tokens[name] / total
        table.add_row(
            plain(name),
            f"{tokens[name]:,}",
            f"{share:.4f}",
            f"{mixture.weights[name]:.4f}",
            f"{mixture.weights[name] / share:.2f}x",
        )
    return table


def train_table(out: str | os.PathLike[str], objective: str | Mapping[str, float] | None = None) -> Table:
    """Return a table of one training run: weights and held-out loss per domain."""
    return comparison_table([Path(out)], objective)


def comparison_table(runs: Sequence[Path], objective: str | Mapping[str, float] | None = None) -> Table:
    """Return a table of main runs: per domain its share and, under each mixture, weight and held-out log-perplexity.

    Args:
        objective: weights by domain, or how to find them (``objective_weights``), of one more average.
    """
    results = {_name(run, runs): read_result(run) for run in runs}
    first = next(iter(results.values()))
    unit, sizes = _sizes(first)
    total = sum(sizes.values())
    best = {name: min(result["heldout"][name]["loss"] for result in results.values()) for name in sizes}
    title = "Held-out log-perplexity (nats per token) under each mixture"
    table = Table("domain", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    alone = len(results) == 1  # of several runs there is room for either size or names
    if alone:
        table.add_column(unit, justify="right")
    table.add_column("share", justify="right")
    for name in _titles(list(results)):
        table.add_column(f"{escape(name)}\nweight", justify="right")
        table.add_column("\nloss", justify="right")
    for domain in sorted(sizes, key=lambda name: -sizes[name]):
        cells = [f"{sizes[domain]:,}"] * alone + [f"{sizes[domain] / total:.2%}"]
        for result in results.values():
            loss = result["heldout"][domain]["loss"]
            mark = "bold green" if len(results) > 1 and loss == best[domain] else "default"
            cells += [f"{result['weights'][domain]:.4f}", f"[{mark}]{loss:.3f}[/{mark}]"]
        table.add_row(plain(domain), *cells)
    table.add_section()
    for key, values in _totals(list(results.values()), objective).items():
        cells = []
        for value in values:
            mark = "bold green" if len(results) > 1 and value == min(values) else "bold"
            cells += ["", f"[{mark}]{value:.3f}[/{mark}]"]
        table.add_row(f"[bold]{key}[/bold]", *[""] * alone, "", *cells)
    if _unequal(runs):
        table.caption = f"[yellow]{_unequal(runs)}[/yellow]"
    return table


def _sizes(result: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """Tokens, which is what weights are shares of where samples differ in length; older results know samples only."""
    return ("tokens", result["sizes"]) if "sizes" in result else ("samples", result["num_samples"])


def _shares(run: Path) -> dict[str, float]:
    """Return each domain's share of the data that a run was of, the largest first."""
    _, sizes = _sizes(read_result(run))
    total = sum(sizes.values())
    return {name: sizes[name] / total for name in sorted(sizes, key=lambda name: -sizes[name])}


def _totals(
    results: Sequence[Mapping[str, Any]], objective: str | Mapping[str, float] | None
) -> dict[str, list[float]]:
    """Return the losses over all domains, a number per run: average, worst, and the objective where there is one."""
    totals = {key: [result[key] for result in results] for key in ("average", "worst")}
    if objective is None or not results:
        return totals
    first = results[0]
    weights = objective if isinstance(objective, Mapping) else None
    weights = weights or objective_weights(str(objective), _sizes(first)[1])
    losses = [{name: row["loss"] for name, row in result["heldout"].items()} for result in results]
    return {**totals, "objective": [weighted_average(row, weights) for row in losses]}


def write_report(
    runs: Sequence[Path], out: Path, *, baseline: str | None = None, objective: str | None = None
) -> list[Path]:
    """Write the HTML page about ``runs`` and return those that are main runs.

    Raises: InputError: a folder is no finished run, the main runs are of different shards, or no such baseline.
    """
    searches: list[Path] = []
    mains: list[Path] = []
    for run in runs:
        command = read_settings(run)["command"]
        if command not in ("optimize", "train"):
            raise InputError(
                f"{run} was written by `mixer {command}`; a report is of `mixer optimize` and `mixer train`."
            )
        (searches if command == "optimize" else mains).append(run)
        read_result(run)
    domains = {tuple(sorted(read_settings(run)["shards"].items())) for run in runs}
    if len(domains) > 1:
        raise InputError(
            f"these runs are of different shards and cannot be compared: {', '.join(map(str, runs))}. "
            "Report them one by one."
        )
    plots = {str(run): [_embed(path) for path in draw_search(run)] for run in searches}
    comparison = None
    if len(mains) > 1:
        losses = {
            _name(run, mains): {name: read_result(run)["heldout"][name]["loss"] for name in _shares(mains[0])}
            for run in mains
        }
        comparison = _embed(
            plot_comparison(out.with_suffix(".comparison.png"), losses, baseline=_baseline(mains, baseline))
        )
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE.read_text(encoding="utf-8"))
        .render(
            searches=[
                {
                    "name": _name(run, searches),
                    "settings": read_settings(run),
                    "result": read_result(run),
                    "mixture": Mixture.load(run / "mixture.json"),
                    "shares": _shares(_last_round(run) / "proxy"),
                    "plots": plots[str(run)],
                }
                for run in searches
            ],
            mains=[
                {
                    "name": _name(run, mains),
                    "settings": read_settings(run),
                    "result": read_result(run),
                    "shares": _shares(run),
                }
                for run in mains
            ],
            best={
                name: min(read_result(run)["heldout"][name]["loss"] for run in mains)
                for name in (read_result(mains[0])["heldout"] if mains else ())
            },
            totals=_totals([read_result(run) for run in mains], objective),
            comparison=comparison,
            unequal=_unequal(mains),
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return mains


def _baseline(runs: Sequence[Path], asked: str | None) -> str:
    names = [_name(run, runs) for run in runs]
    if asked is not None:
        same = [run for run in runs if run.resolve() == Path(asked).resolve() or _name(run, runs) == asked]
        if not same:
            raise InputError(f"no run {asked!r} to compare with; there are {', '.join(names)}.")
        return _name(same[0], runs)
    return next((name for name in names if "proportional" in name), names[0])


def _unequal(runs: Sequence[Path]) -> str:
    """Say in what the trainings of ``runs`` differ beside the mixture, or ""."""
    settings = [read_settings(run) for run in runs]
    differing = []
    for key in ("model", "steps", "global_batch_size", "learning_rate", "seed", "heldout_samples"):
        values = sorted({str(one.get(key)) for one in settings})
        if len(values) > 1:
            differing.append(f"{key} {' / '.join(values)}")
    return f"Not on equal terms: these runs differ in {', '.join(differing)}." if differing else ""


def _last_round(out: Path) -> Path:
    return out / f"round-{read_result(out)['rounds']}"


def _titles(names: Sequence[str]) -> list[str]:
    """Names for narrow columns: without what all of them begin with, up to a dash.

    >>> _titles(["main-doremi", "main-uniform"]), _titles(["main"])
    (['doremi', 'uniform'], ['main'])
    """
    parts = [name.split("-") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({first for first, *_ in parts}) == 1:
        parts = [rest for _, *rest in parts]
    return ["-".join(rest) for rest in parts]


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The folder's own name, or its whole path where two runs share it."""
    same = [other for other in runs if other.resolve().name == run.resolve().name]
    return run.resolve().name if len(same) == 1 else str(run)


def _embed(path: Path) -> dict[str, Any]:
    return {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode("ascii")}
