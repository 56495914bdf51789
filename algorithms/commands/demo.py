"""``mixer demo``: the whole job, as the commands a person would type, on text that came with the install."""

from __future__ import annotations

import importlib.util
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["demo"]

_CONVERSION = ["--train-tokenizer", 4096, "--seq-len", 128, "--held-out", 0.03]
# A reference trained in proportion to size hardly sees the small domains, and is no yardstick for them.
_SEARCH = ["--method", "doremi", "--set", "variant=recommended", "--reference-mixture", "uniform"]


@click.command(short_help="The whole job on text that every install has.")
@click.option(
    "--out",
    default="demo-run",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for everything the demo writes.",
)
@click.option(
    "--steps", default=240, show_default=True, type=click.IntRange(20), help="Steps of each of the five training runs."
)
@click.option("--seed", default=17, show_default=True, type=int)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Processes that convert.")
def demo(out: Path, steps: int, seed: int, workers: int) -> None:
    """Build a corpus of seven very unequal domains from installed packages, convert it, find weights with DoReMi, and
    train the same model on DoReMi's, the size-proportional and the uniform mixture.

    Takes about six minutes on two CPU cores. Ctrl-C and the same command again continues where it stopped.

    \b
    Examples:
      mixer demo
      mixer demo --steps 600 --out longer-demo
    """
    from rich.console import Console

    from mixer.cli import cli
    from mixer.errors import InputError
    from mixer.outputs import make_folder

    for package in ("composer", "transformers"):  # known before minutes of work, not after
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    make_folder(out)
    if any(out.iterdir()) and not (out / "corpus").is_dir():
        raise InputError(f"{out} is not empty and holds no demo; choose another --out.")
    console = Console(stderr=True)
    start = time.monotonic()
    _prepare(out / "corpus", console)
    training = ["--steps", steps, "--batch-size", 32, "--seed", seed, "--heldout-samples", 128]
    mains = {"doremi": out / "search" / "mixture.json", "proportional": "proportional", "uniform": "uniform"}
    shards, folders = out / "shards", [out / f"main-{name}" for name in mains]
    for arguments in (
        ["convert", out / "corpus", "--out", shards, *_CONVERSION, "--workers", workers],
        ["inspect", shards],
        ["optimize", shards, *_SEARCH, *training, "--out", out / "search"],
        *(["train", shards, "--mixture", mains[name], *training, "--out", out / f"main-{name}"] for name in mains),
        ["report", out / "search", *folders, "--baseline", out / "main-proportional", "--out", out / "report.html"],
    ):
        words = [str(word) for word in arguments]
        console.print(
            f"\n$ mixer {shlex.join(words)}", style="bold cyan", highlight=False, markup=False, soft_wrap=True
        )
        cli.main(words, prog_name="mixer", standalone_mode=False)
    minutes = (time.monotonic() - start) / 60
    text = (
        f"\nDone in {minutes:.1f} minutes. Open {out}/report.html. Plots: {out}/search/weights.png, "
        f"{out}/search/excess.png, {out}/report.comparison.png"
    )
    console.print(text, style="green", markup=False)


def _prepare(folder: Path, console: Console) -> None:
    """Build the corpus once: another set of installed packages later must not change what is already converted."""
    from algorithms.commands.demo_corpus import build_corpus

    done = folder / ".complete"
    if done.exists():
        return
    with console.status("collecting text from the installed packages"):
        sizes = build_corpus(folder)
    done.touch()
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {size / total:.1%}" for name, size in sizes.items())
    console.print(
        f"Corpus: {total / 1e6:.1f} MB of text from installed packages in {len(sizes)} domains: {parts}.",
        highlight=False,
    )
