"""``mixer score``: a reference's losses, computed once."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["score"]


@click.command(short_help="A reference's losses of every sample, computed once.")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder; the same command continues it.")
@click.option("--model", type=click.Path(), help="A Hugging Face model folder, or a Composer checkpoint.")
@click.option("--bigram", is_flag=True, help="Count bigram tables by domain instead of running a model.")
@click.option("--distances", is_flag=True, help="With --bigram: also write how far apart the domains are.")
@click.option(
    "--per",
    type=click.Choice(["token", "sample"]),
    default="token",
    show_default=True,
    help="Keep the loss of every token (2 bytes each), or one sum per sample (4 bytes), for rules that do not clip.",
)
@click.option("--split", default="train", show_default=True)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Samples per forward pass.")
@click.option("--half", is_flag=True, help="Run the model in bfloat16.")
def score(
    shards: Path,
    out: Path,
    model: str | None,
    bigram: bool,
    distances: bool,
    per: str,
    split: str,
    batch_size: int,
    half: bool,
) -> None:
    """Write the reference's losses of every sample to OUT, so that training needs no second model.

    Give OUT as --reference to `mixer optimize`. The losses are bound to these shards, their tokenizer and the model;
    elsewhere they are refused. Ctrl-C keeps what is done; the same command continues. With --distances,
    OUT/distances.json is for `mixer optimize --method wasserstein --set distances=@OUT/distances.json`.

    \b
    Examples:
      mixer score shards --model run/round-1/reference/model --out scores
      mixer score shards --model reference --per sample --out scores
      mixer score shards --bigram --distances --out bigrams
    """
    import json

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from algorithms.references import FrozenModel, bigram_distances, count_bigrams
    from algorithms.references import score as score_shards
    from algorithms.same_tokenizer import check_tokenizer
    from mixer.errors import InputError
    from mixer.folders import load_manifest
    from mixer.progress import LoggedProgress

    if (model is None) != bigram:
        raise InputError("give either --model PATH or --bigram.")
    if distances and not bigram:
        raise InputError("--distances are those of bigrams: give --bigram, too.")
    manifest = load_manifest(shards)
    if model is not None:
        check_tokenizer(model, shards, manifest)
    reference = None if model is None else FrozenModel(model, dtype=torch.bfloat16 if half else None)
    total = sum(manifest.split(name, split).num_samples for name in manifest.names)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with LoggedProgress(*columns, *times, console=Console(stderr=True)) as progress:
        task = progress.add_task("counting" if bigram else "scoring", total=total, rate="")

        def advance(domain: str, num_samples: int) -> None:
            speed = progress.tasks[task].speed  # of the last shards
            progress.update(task, advance=num_samples, rate=f"{speed:,.0f} samples/s" if speed else "")

        if reference is None:
            count_bigrams(shards, out, split=split, on_domain=advance)
        else:
            reference.to("cuda" if torch.cuda.is_available() else "cpu")
            score_shards(
                shards,
                reference,
                out,
                split=split,
                per="sample" if per == "sample" else "token",
                batch_size=batch_size,
                on_shard=advance,
            )
    if distances:
        (out / "distances.json").write_text(json.dumps(bigram_distances(out), indent=1) + "\n", encoding="utf-8")
    click.echo(f"{out}: {total:,} samples of {len(manifest.names)} domains. Give it to training by --reference {out}")
