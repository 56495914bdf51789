"""``mixer weigh``: a mixture from sizes alone. ``mixer simulate``: what a mixture will draw, without reading data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["simulate", "weigh"]


@click.command(short_help="Weights from sizes alone: uniform, proportional, temperature, unimax.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--method",
    required=True,
    type=click.Choice(["uniform", "proportional", "temperature", "unimax"]),
    help="How sizes become weights.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the mixture to this file.")
@click.option("--budget", help="Tokens of the run it is for, such as 50M or 1.5T; shows epochs. Needed by unimax.")
@click.option("--max-epochs", type=float, help="Give no domain more than this many epochs of the budget.")
@click.option("--tau", type=float, default=2.0, show_default=True, help="Temperature: weight = size^(1/tau).")
@click.option("--floor", type=float, default=0.0, help="Give every domain at least this share.")
@click.option("--ceiling", type=float, default=1.0, help="Give no domain more than this share.")
def weigh(
    shards: Path,
    method: str,
    out: Path | None,
    budget: str | None,
    max_epochs: float | None,
    tau: float,
    floor: float,
    ceiling: float,
) -> None:
    """Make a mixture for SHARDS from the sizes of their domains, and show how often each would be read.

    \b
    Examples:
      mixer weigh shards --method unimax --budget 50M --max-epochs 4 --out unimax.json
      mixer weigh shards --method temperature --tau 3 --floor 0.01 --out flat.json
      mixer weigh shards --method proportional --budget 1.5T
    """
    import numpy as np
    from rich.console import Console

    from mixer.budget import plan_budget
    from mixer.folders import load_manifest
    from mixer.outputs import check_file
    from mixer.units import parse_count

    if out is not None:
        check_file(out)
    manifest = load_manifest(shards)
    names = manifest.names
    tokens = np.array([manifest.split(name, "train").num_tokens for name in names], np.float64)
    wanted = None if budget is None else parse_count(budget, "a number of tokens")
    fits = wanted if wanted is None or max_epochs is None else min(wanted, int(tokens.sum() * max_epochs))
    weights, settings = _weights(names, tokens, method, fits, max_epochs, tau, floor, ceiling)
    limits = np.full(len(names), np.inf if max_epochs is None else max_epochs)
    plan = plan_budget(names, weights, tokens, wanted or float(tokens.sum()), limits)
    console = Console()
    console.print(_table(plan, tokens, wanted))
    if fits != wanted:
        settings["asked_budget"] = wanted
        Console(stderr=True).print(
            f"[yellow]warning:[/yellow] {wanted:,} tokens cannot be drawn in {max_epochs:g} epochs: {fits:,} is all "
            f"there is, and the weights are for that. A run of {wanted:,} reads everything "
            f"{wanted / tokens.sum():.1f} times."
        )
    if out is not None:
        _mixture(manifest, weights, method, settings).save(out)
        click.echo(f"Wrote {out}")


def _weights(
    names: tuple[str, ...],
    tokens: Any,
    method: str,
    budget: int | None,
    max_epochs: float | None,
    tau: float,
    floor: float,
    ceiling: float,
) -> tuple[Any, dict[str, Any]]:
    """Return the weights and the settings that went into them."""
    import numpy as np

    from mixer.errors import InputError
    from mixer.projection import project
    from mixer.static_weights import STATIC_WEIGHTS

    if (max_epochs is None) != (budget is None) and (method == "unimax" or max_epochs is not None):
        raise InputError("epochs follow from a budget: give both --budget (tokens, such as 50M) and --max-epochs.")
    if method == "unimax" and budget is None:
        raise InputError("unimax needs --budget (tokens of the run, such as 50M) and --max-epochs.")
    function, takes = STATIC_WEIGHTS[method]
    given = {"tau": tau, "budget": budget, "max_epochs": max_epochs}
    settings = {name: given[name] for name in takes}
    weights = function(tokens, **settings)
    ceilings = np.full(len(names), ceiling)
    if budget is not None and max_epochs is not None:
        ceilings = np.minimum(ceilings, max_epochs * tokens / budget)
        settings |= {"budget": budget, "max_epochs": max_epochs}
    if floor > 0 or (ceilings < 1).any():
        weights = project(weights, floor, ceilings, names=names)
    settings |= {
        key: value for key, value in (("floor", floor), ("ceiling", ceiling)) if value != float(key == "ceiling")
    }
    return weights, settings


def _mixture(manifest: Any, weights: Any, method: str, settings: dict[str, Any]) -> Any:
    from mixer import __version__
    from mixer.mixture import Mixture

    provenance = {
        "rule": method,
        "settings": settings,
        "tokenizer": manifest.tokenizer.fingerprint,
        "shards": {name: manifest.split(name, "train").fingerprint for name in manifest.names},
        "made_by": f"domain-mixer {__version__}",
    }
    return Mixture(dict(zip(manifest.names, weights.tolist())), provenance)


def _table(plan: Any, tokens: Any, budget: int | None) -> Any:
    from rich import box
    from rich.table import Table

    from mixer.names import plain
    from mixer.units import short

    title = f"{short(tokens.sum())} tokens" + (f", a run of {short(budget)}" if budget else ", one epoch of all")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", overflow="fold")
    for column in ("tokens", "share", "weight", "× share", "epochs", "worth"):
        table.add_column(column, justify="right")
    for i, name in enumerate(plan.names):
        share = tokens[i] / tokens.sum()
        row = (
            short(tokens[i]),
            f"{share:.2%}",
            f"{plan.shares[i]:.4f}",
            f"{plan.shares[i] / share:.2f}" if share else "–",
        )
        mark = "[yellow] max[/yellow]" if plan.capped[i] else ""
        table.add_row(plain(name), *row, f"{plan.epochs[i]:.2f}{mark}", short(plan.effective[i]))
    caption = (
        f"worth: unique tokens of the same value, {short(plan.effective.sum())} in all (Muennighoff et al. 2023)."
        + (f" {plan.note[0].upper()}{plan.note[1:]}." if plan.note else "")
    )
    table.caption = plain(caption)
    table.caption_justify = "left"
    return table


@click.command(short_help="What a mixture will draw, batch by batch, without reading data.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--mixture",
    default="proportional",
    show_default=True,
    help="A mixture file (also one with stages), or 'proportional' or 'uniform'.",
)
@click.option("--batches", default=1000, show_default=True, type=click.IntRange(1), help="Batches to plan.")
@click.option(
    "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Samples in the global batch."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--max-epochs", type=float, help="Read no domain more often than this.")
@click.option("--on-exhausted", default="repeat", show_default=True, type=click.Choice(["repeat", "drop", "stop"]))
@click.option("--plot", type=click.Path(path_type=Path), help="Write weights and epochs over batches as a PNG.")
@click.option("--force", is_flag=True, help="Use a mixture made for other shards or another tokenizer.")
def simulate(
    shards: Path,
    mixture: str,
    batches: int,
    batch_size: int,
    seed: int,
    max_epochs: float | None,
    on_exhausted: str,
    plot: Path | None,
    force: bool,
) -> None:
    """Plan the batches of a run over SHARDS and show what they hold: shares, epochs, worst distance from the target.

    \b
    Examples:
      mixer simulate shards --mixture m.json --batches 1000
      mixer simulate shards --mixture staged.json --batches 20000 --plot schedule.png
      mixer simulate shards --mixture uniform --max-epochs 4 --on-exhausted drop
    """
    from rich.console import Console
    from rich.text import Text

    from mixer.folders import load_manifest
    from mixer.names import plain
    from mixer.pictures import check_picture
    from mixer.setup import mixer_for, resolve_curriculum
    from mixer.simulation import draw_plot
    from mixer.simulation import simulate as run

    if plot is not None:
        check_picture(plot)
    manifest = load_manifest(shards)
    stages = resolve_curriculum(mixture, manifest, force=force)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "max_epochs": max_epochs,
        "on_exhausted": on_exhausted,
    }
    mixer = mixer_for(manifest, stages, **options)
    found = run(mixer, batches)
    console = Console()
    console.print(_simulation_table(found, batch_size))
    if found.end:
        console.print(
            Text.assemble((f"Ends after {mixer.step:,} of {batches:,} batches: ", "yellow"), plain(found.end))
        )
    if plot is not None:
        draw_plot(found, str(plot), mixer.num_samples)
        click.echo(f"Wrote {plot}")


def _simulation_table(run: Any, batch_size: int) -> Any:
    from rich import box
    from rich.table import Table

    from mixer.names import plain

    counted, unit = (run.drawn[-1], "samples") if run.tokens is None else (run.tokens, "tokens")
    total = max(int(counted.sum()), 1)
    title = f"{run.steps[-1]:,} batches of {batch_size:,}: {total:,} {unit}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\ndomain", overflow="fold")
    for column in ("weight\nnow", "\nsamples", "\nshare", "\nepochs", "first\nbatch", "worst\nerror"):
        table.add_column(column, justify="right")
    for i, name in enumerate(run.names):
        drawn, first = int(run.drawn[-1, i]), int(run.first_step[i])
        row = (f"{run.weights[-1, i]:.4f}", f"{drawn:,}", f"{counted[i] / total:.4f}", f"{run.epochs[i]:.3f}")
        table.add_row(plain(name), *row, "never" if first < 0 else f"{first:,}", f"{run.worst_error[i]:.2f}")
    table.caption = f"worst error: largest distance from the target at any batch, in {unit}."
    if run.tokens is not None:
        table.caption += " Shares are of tokens; every sample is taken to be as long as its domain's mean."
    table.caption_justify = "left"
    return table
