"""``mixer train``: one model on one mixture, and its held-out loss per domain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from algorithms.commands.options import training_options, training_settings

__all__ = ["train"]


@click.command(short_help="Train a model on a mixture; held-out loss per domain.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--mixture", default="proportional", show_default=True, help="A mixture file, or 'proportional' or 'uniform'."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the run; the same command continues it."
)
@training_options
@click.option("--max-epochs", type=float, help="Read no domain more often than this.")
@click.option(
    "--on-exhausted",
    default="repeat",
    show_default=True,
    type=click.Choice(["repeat", "drop", "stop"]),
    help="What to do when a domain reaches --max-epochs.",
)
@click.option(
    "--force", is_flag=True, help="Use a mixture made for other shards or another tokenizer; recorded in the result."
)
def train(
    shards: Path,
    mixture: str,
    out: Path,
    heldout_samples: int,
    max_epochs: float | None,
    on_exhausted: str,
    force: bool,
    **options: Any,
) -> None:
    """Train a causal language model on SHARDS, drawn by a frozen mixture, and measure every domain's held-out loss.

    \b
    Examples:
      mixer train shards --mixture run/mixture.json --steps 400 --out main
      mixer train shards --mixture uniform --steps 400 --out main-uniform
      mixer train shards --mixture uniform --patience 3 --objective goals.json --out main-early
      mixer train shards --mixture unimax.json --max-epochs 4 --on-exhausted drop --out main-capped
    """
    from rich.console import Console

    from algorithms.report import train_table
    from algorithms.training_run import train_on
    from mixer.manifest import Manifest
    from mixer.setup import resolve_curriculum

    manifest = Manifest.load(shards)
    stages = resolve_curriculum(mixture, manifest, force=force)
    settings = training_settings(options, shards)
    limited = max_epochs is not None or on_exhausted != "repeat"
    caps: dict[str, Any] = {"max_epochs": max_epochs, "on_exhausted": on_exhausted} if limited else {}
    first = os.environ.get("RANK", "0") == "0"  # of the ranks of a launcher, which does the talking
    console = Console(stderr=True, quiet=not first)
    train_on(
        shards,
        stages[0].mixture,
        settings,
        out,
        label=out.name,
        console=console,
        heldout_samples=heldout_samples,
        curriculum=mixture if len(stages) > 1 else None,
        **caps,
    )
    Console(quiet=not first).print(train_table(out, settings.objective))
    console.print(f"Done: {out / 'result.json'}, model in {out / 'model'}", style="green", markup=False)
