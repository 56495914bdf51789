"""``mixer optimize``: reference, proxy, frozen mixture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from algorithms.commands.options import parse_settings, training_options, training_settings

__all__ = ["optimize"]


@click.command(short_help="Find weights with a proxy model.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the run; the same command continues it."
)
@click.option("--method", default="doremi", show_default=True, help="An update rule; `mixer methods` lists them.")
@click.option(
    "--set",
    "rule",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the rule, e.g. eta=0.1, or targets=@targets.json to read a file (repeatable).",
)
@training_options
@click.option(
    "--reference",
    default="train",
    show_default=True,
    help="What losses are compared with: train (a model, first), cached (the same, its losses computed once), bigram, "
    "none, or a path: a model, an OUT of `mixer score`, or a file of target losses.",
)
@click.option("--reference-steps", type=click.IntRange(1), help="Steps of the reference model.  [default: --steps]")
@click.option(
    "--reference-mixture",
    default="proportional",
    show_default=True,
    help="What the reference is trained on: proportional, uniform, or a mixture file.",
)
@click.option(
    "--rounds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Iterate: each round's reference trains on the last weights.",
)
@click.option(
    "--tolerance",
    default=1e-3,
    show_default=True,
    type=float,
    help="Stop the rounds when no weight moves by this much.",
)
@click.option(
    "--apply",
    type=click.Choice(["loss", "sampling"]),
    help="What the weights act on while the proxy trains.  [default: the method's own]",
)
@click.option("--every", metavar="TIME", help="Time between updates: 20ba, 5000sp, 1Mtok.  [default: 1ba, or 20ba]")
@click.option(
    "--min-tokens",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Tokens of a domain that have to add up before it takes part in an update.",
)
@click.option(
    "--prior",
    default="uniform",
    show_default=True,
    help="What samples are drawn by where no rule decides: uniform, proportional, or a mixture file.",
)
@click.option("--floor", default=0.0, show_default=True, type=click.FloatRange(0, 1), help="Least weight of a domain.")
@click.option(
    "--ceiling", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Largest weight of a domain."
)
@click.option("--max-epochs", type=float, help="Cap the weights so that no domain repeats more often; needs --budget.")
@click.option("--budget", help="Tokens of the main run, e.g. 50M; for --max-epochs.")
@click.option("--extrapolate-to", type=click.IntRange(1), help="Steps that the average weights should stand for.")
@click.option("--resume", is_flag=True, help="Only continue a run that --out holds; never start one.")
def optimize(
    shards: Path,
    out: Path,
    rule: tuple[str, ...],
    resume: bool,
    budget: str | None,
    **options: Any,
) -> None:
    """Find how much of each domain to train on, with a small proxy model, and freeze it into OUT/mixture.json.

    Writes the reference and proxy runs, the weights at every step (trajectory.npz), and plots of weights and
    excess losses. Ctrl-C keeps what is done; the same command continues.

    \b
    Examples:
      mixer optimize shards --method doremi --steps 400 --out run
      mixer optimize shards --method doremi --set variant=recommended --rounds 3 --out run
      mixer optimize shards --method group_dro --steps 400 --out run
      mixer optimize shards --method dro_lm --reference bigram --out run
      mixer optimize shards --method on_demand --every 20ba --out run
      mixer optimize shards --method validation_feedback --model pretrained --set targets="{'new': 2.1}" \\
        --set others=reference --out stage
      mixer optimize shards --method doremi --max-epochs 4 --budget 50M --out run
    """
    from rich.console import Console

    from algorithms.report import draw_search, search_table
    from algorithms.rounds import SearchSettings, find_mixture
    from mixer.errors import InputError
    from mixer.units import parse_count

    if (options["max_epochs"] is None) != (budget is None):
        raise InputError("--max-epochs and --budget belong together: a cap in epochs needs the tokens of the main run.")
    if resume and not (out / "run.json").is_file():
        raise InputError(f"there is no run to resume in {out}. Leave out --resume to start one.")
    settings = SearchSettings(
        rule=parse_settings(rule),
        proxy=training_settings(options, shards),
        budget_tokens=parse_count(budget, "a number of tokens") if budget else None,
        **options,
    )
    first = os.environ.get("RANK", "0") == "0"  # of the ranks of a launcher, which does the talking
    console = Console(stderr=True, quiet=not first)
    find_mixture(shards, settings, out, console)
    if not first:
        return
    plots = draw_search(out)
    Console().print(search_table(shards, out))
    console.print(f"Frozen: {out / 'mixture.json'}   plots: {', '.join(map(str, plots))}", style="green", markup=False)
