"""``mixer upsample``: shards in which the samples that a first model learnt badly are there several times."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["upsample"]


@click.command(short_help="Shards with the badly learnt samples several times.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--scores",
    required=True,
    type=click.Path(path_type=Path),
    help="What `mixer score` wrote for SHARDS with the first model.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet.")
@click.option(
    "--upweight", default=5, show_default=True, type=click.IntRange(1), help="How often a bad sample is there."
)
@click.option(
    "--share",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of all samples that count as bad: those of the highest losses.",
)
@click.option(
    "--baseline",
    default="median",
    show_default=True,
    type=click.Choice(["median", "none"]),
    help="Compare losses above their domain's median, or as they are, which finds the noisiest domains.",
)
def upsample(shards: Path, scores: Path, out: Path, upweight: int, share: float, baseline: str) -> None:
    """Just train twice, by example: write SHARDS anew, with the samples of the highest losses UPWEIGHT times.

    \b
    The whole recipe:
      mixer train shards --steps 200 --out first
      mixer score shards --model first/model --per sample --out scores
      mixer upsample shards --scores scores --out again
      mixer train again --mixture proportional --out second
    """
    from algorithms import just_train_twice

    counts = just_train_twice.upsample(shards, scores, out, upweight=upweight, share=share, baseline=baseline)
    found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    click.echo(f"{out}: {sum(counts.values()):,} samples are there {upweight} times ({found}).")
    click.echo(f"Train on it by `mixer train {out} --mixture proportional`.")
