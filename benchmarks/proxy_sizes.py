"""Does the size of the proxy matter, and can the proxy itself replace the main model? DoReMi's questions 2 and 3.

    python -m benchmarks.proxy_sizes synthetic                     # half an hour of one core
    python -m benchmarks.proxy_sizes my/shards --widths 64,128,256 --steps 1000

For every width a reference and a proxy of that width are trained, and a main model of the *largest* width on the
mixture found (question 2: the paper has 70M to 1B proxies for an 8B model; the 280M one was best). Then a main model of
the proxy's own width on the same mixture, and on the uniform one (question 3: the paper's proxies were worse than the
main models of their size, by more the larger they were, arXiv:2305.10429, Table 6). Prints the weights of every
proxy, their distance in total variation, and held-out losses, as means over seeds with standard deviations; finished
runs are not done again.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from algorithms.rounds import SearchSettings, find_mixture
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from benchmarks import RESULTS
from benchmarks.mixtures.corpora import shards_of
from mixer.manifest import Manifest
from mixer.mixture import Mixture


@click.command()
@click.argument("corpus")
@click.option("--widths", default="32,64,128", show_default=True, help="Of the proxies; the last is the main model's.")
@click.option("--steps", default=300, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--method", default="doremi", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/proxy_sizes/CORPUS]")
def main(corpus: str, widths: str, steps: int, batch_size: int, seeds: int, method: str, out: Path | None) -> None:
    """Train proxies of several widths, and main models on what they find. CORPUS: synthetic, redpajama, or shards."""
    out = out or RESULTS / "proxy_sizes" / Path(corpus).name
    shards = Path(corpus) if Path(corpus).is_dir() else shards_of(corpus, RESULTS / "proxy_sizes" / "shards")
    manifest = Manifest.load(shards)
    sizes = [int(width) for width in widths.split(",")]
    rows: dict[int, list[dict[str, Any]]] = {width: [] for width in sizes}
    for seed in range(seeds):
        training = {"steps": steps, "global_batch_size": batch_size, "seed": seed}
        study = Study(shards, manifest, out / f"seed-{seed}", training, method)
        for width in sizes:
            rows[width].append(study.row(width, sizes[-1]))
    Console(width=120).print(weights_table(manifest, rows), losses_table(rows))
    (out / "proxy_sizes.json").write_text(json.dumps({"corpus": corpus, "method": method, "rows": rows}, indent=2))


class Study:
    """The runs of one corpus and seed, each in a folder of its own."""

    def __init__(self, shards: Path, manifest: Manifest, out: Path, training: dict[str, Any], method: str) -> None:
        self.shards, self.manifest, self.out, self.training, self.method = shards, manifest, out, training, method
        self.console = Console(stderr=True)

    def row(self, width: int, main_width: int) -> dict[str, Any]:
        """Return what a proxy of this width found, and what models trained on that reach."""
        rule = {"variant": "recommended"} if self.method == "doremi" else {}
        search = SearchSettings(self.method, rule, proxy=self._settings(width), reference_mixture="uniform")
        mixture = find_mixture(self.shards, search, self.out / f"search-{width}", self.console)
        proxy = json.loads((self.out / f"search-{width}" / "round-1" / "proxy" / "result.json").read_text())
        return {
            "weights": mixture.weights,
            "proxy": losses_of(proxy),
            "main": losses_of(self._train(main_width, mixture, f"main-{main_width}-by-{width}")),
            "same": losses_of(self._train(width, mixture, f"main-{width}-by-{width}")),
            "uniform": self.baseline(width),
        }

    def baseline(self, width: int) -> dict[str, float]:
        names = self.manifest.names
        uniform = Mixture(dict.fromkeys(names, 1 / len(names)))
        return losses_of(self._train(width, uniform, f"main-{width}-uniform"))

    def _train(self, width: int, mixture: Mixture, name: str) -> dict[str, Any]:
        settings = self._settings(width)
        return train_on(self.shards, mixture, settings, self.out / name, label=name, console=self.console)

    def _settings(self, width: int) -> TrainSettings:
        config = self.out / f"width-{width}.json"
        if not config.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            shape = LlamaConfig(
                vocab_size=self.manifest.tokenizer.vocab_size,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=self.manifest.seq_len,
                tie_word_embeddings=True,
                use_cache=False,
            )
            shape.to_json_file(config, use_diff=False)
        return TrainSettings(model=str(config), **self.training)


def losses_of(result: dict[str, Any]) -> dict[str, float]:
    return {name: value["loss"] for name, value in result["heldout"].items()}


def weights_table(manifest: Manifest, rows: dict[int, list[dict[str, Any]]]) -> Table:
    """Return the mixture of every proxy, and how far it is from that of the next smaller one with the same seed."""
    table = Table("domain", *(f"proxy {width}" for width in rows), title="Weights found")
    for name in manifest.names:
        table.add_row(name, *(spread([row["weights"][name] for row in seeds]) for seeds in rows.values()))
    found = [np.array([list(row["weights"].values()) for row in seeds]) for seeds in rows.values()]
    moves = [spread(0.5 * np.abs(a - b).sum(axis=1)) for a, b in pairwise(found)]
    table.add_section()
    table.add_row("distance from the left", "", *moves)
    return table


def losses_table(rows: dict[int, list[dict[str, Any]]]) -> Table:
    """Return average held-out losses: of the main model on each mixture, and of models of the proxy's own size."""
    titles = ("main model on it", "worst domain", "the proxy itself", "its size, resampled", "its size, uniform")
    table = Table("proxy", *titles, title="Held-out loss, nats per token")
    for width, seeds in rows.items():
        main = [average(row["main"]) for row in seeds]
        worst = [max(row["main"].values()) for row in seeds]
        own = [spread([average(row[key]) for row in seeds]) for key in ("proxy", "same", "uniform")]
        table.add_row(str(width), spread(main), spread(worst), *own)
    table.add_section()
    uniform = [row["uniform"] for row in list(rows.values())[-1]]
    table.add_row("uniform", spread([average(row) for row in uniform]), spread([max(row.values()) for row in uniform]))
    return table


def average(losses: dict[str, float]) -> float:
    return float(np.mean(list(losses.values())))


def spread(values: Any) -> str:
    """Return mean and standard deviation over seeds; the latter only where there are several.

    >>> spread([1.0, 2.0]), spread([1.5])
    ('1.500 ± 0.707', '1.500')
    """
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.3f}"


if __name__ == "__main__":
    main()
