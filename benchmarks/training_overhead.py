"""What does DomainReweighting add to a training step, compared with plain Composer?

    python -m benchmarks.training_overhead             # 4 layers of width 128: about two minutes on two cores
    python -m benchmarks.training_overhead --full      # and 6 layers of width 256

CPU time of one process with one thread, so that neighbours on the machine count less, from the end of one step to the
end of the next: data, all events of the algorithm, optimiser. Each round trains every configuration for some steps, in
turn and in another order each time; ratios compare with the plain run of the same round, and the median over rounds is
shown with the range.

There are two plain runs. One is Composer and Hugging Face as they come. The other takes its loss from our
cross-entropy, which is faster: only against it the cost of the method itself shows. The last column is measured inside:
CPU time in the algorithm's own events but for the cross-entropy, as a share of the plain step; it does not vary with
the noise of forward and backward passes. Results also go to benchmarks/results/training_overhead.json.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
import torch
from composer import Callback, Event, Logger, State, Trainer
from composer.models import HuggingFaceModel
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms import DomainReweighting, doremi
from algorithms.losses import loss_mask, token_losses
from algorithms.references import FrozenModel, score
from benchmarks import RESULTS
from mixer import MixtureLoader, mds

DOMAINS, VOCAB, SEQ_LEN, BATCH, MICRO = 7, 8192, 256, 8, 4
PLAIN, SAME_LOSS = "plain Composer", "plain Composer, our cross-entropy"
SIZES = {"small": (4, 128), "larger": (6, 256)}  # layers, width
WARMUP = 2  # steps


class StepTimes(Callback):
    """CPU seconds from the end of each step to the end of the next: algorithms act at the start before callbacks do."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.ends.append(time.process_time())

    @property
    def median(self) -> float:
        return statistics.median(np.diff(self.ends[WARMUP:]).tolist())


class OwnLoss(HuggingFaceModel):
    """A plain run whose loss is computed as the library computes it."""

    def forward(self, batch: Any) -> Any:
        return super().forward({name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = token_losses(outputs.logits, batch["labels"])
        return losses.sum() / loss_mask(batch["labels"]).sum()


class Timed(DomainReweighting):
    """Adds up the CPU time of its own events, but for the cross-entropy, which a plain run computes in the model."""

    own_seconds = 0.0

    def apply(self, event: Event, state: State, logger: Logger) -> None:  # type: ignore[override]
        start = time.process_time()
        super().apply(event, state, logger)
        if event not in (Event.AFTER_FORWARD, Event.FIT_START, Event.INIT):
            self.own_seconds += time.process_time() - start


def llama(layers: int, width: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def write_shards(folder: Path) -> Path:
    columns = {"tokens": mds.token_encoding("uint16", SEQ_LEN)}
    for number in range(DOMAINS):
        rows = np.random.default_rng(number).integers(0, VOCAB, (60, SEQ_LEN)).astype(np.uint16)
        out = folder / f"domain-{number}" / "train"
        out.mkdir(parents=True)
        raw = mds.encode_shard(columns, rows, hashes=("xxh64",))
        (out / "shard.00000.mds").write_bytes(raw)
        entry = mds.shard_entry(columns, "shard.00000.mds", raw, num_samples=len(rows), hashes=("xxh64",))
        mds.write_index(out, [entry])
    return folder


class Labelled(MixtureLoader):
    """What a plain run needs: the labels that DomainReweighting would add."""

    def __iter__(self) -> Any:
        return ({**batch, "labels": batch["input_ids"]} for batch in super().__iter__())


class Configuration(NamedTuple):
    """A run to measure: what makes its algorithm, if it has one, and the Composer model it trains."""

    algorithm: Callable[[], Timed | None]
    model: type[HuggingFaceModel] = HuggingFaceModel


def train(configuration: Configuration, shards: Path, layers: int, width: int, steps: int) -> tuple[float, float]:
    """Return the median CPU seconds of a step, and of the algorithm's own part of one."""
    algorithm = configuration.algorithm()
    loader = (MixtureLoader if algorithm else Labelled)(shards, mixture="uniform", global_batch_size=BATCH)
    model, times = configuration.model(llama(layers, width)), StepTimes()
    total = WARMUP + steps + 1
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        algorithms=[] if algorithm is None else [algorithm],
        callbacks=[times],
        max_duration=f"{total}ba",
        device_train_microbatch_size=MICRO,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return times.median, 0.0 if algorithm is None else algorithm.own_seconds / total


def configurations(shards: Path, scores: Path, layers: int, width: int) -> dict[str, Configuration]:
    half, same = llama(max(layers // 2, 1), width, seed=1), llama(layers, width, seed=1)
    return {
        PLAIN: Configuration(lambda: None),
        SAME_LOSS: Configuration(lambda: None, OwnLoss),
        "statistics per domain": Configuration(lambda: Timed()),
        "DoReMi, cached reference": Configuration(lambda: Timed(doremi(), reference=str(scores))),
        "DoReMi, online, half depth": Configuration(lambda: Timed(doremi(), reference=half)),
        "DoReMi, online, same size": Configuration(lambda: Timed(doremi(), reference=same)),
    }


@click.command()
@click.option("--full", is_flag=True, help="Both sizes.")
@click.option("--steps", type=click.IntRange(2), default=5, show_default=True, help="Timed steps per run.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Runs of each configuration.")
def main(full: bool, steps: int, rounds: int) -> None:
    """Measure the CPU time per step with and without DomainReweighting."""
    torch.set_num_threads(1)
    logging.getLogger("composer").setLevel(logging.ERROR)
    sizes = SIZES if full else {"small": SIZES["small"]}
    found = [measure(layers, width, steps, rounds) for layers, width in sizes.values()]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_overhead.json").write_text(json.dumps(found, indent=2) + "\n")


def measure(layers: int, width: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one size of model, print its table and return it."""
    measured: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "shards")
        scores = score(shards, FrozenModel(llama(layers, width, seed=1)), Path(folder) / "scores")
        configured = configurations(shards, scores, layers, width)
        for number in range(rounds):
            names = list(configured)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                measured.setdefault(name, []).append(train(configured[name], shards, layers, width, steps))
    results = {name: summarize(measured, name) for name in configured}
    Console(width=120).print(table(results, f"{layers} layers of width {width}"))
    return {"layers": layers, "width": width, "steps": steps, "rounds": rounds, "threads": 1, "results": results}


def summarize(measured: dict[str, list[tuple[float, float]]], name: str) -> dict[str, Any]:
    """Return medians over the rounds, and the range of the ratios."""
    ratios = {
        base: [seconds / plain for (seconds, _), (plain, _) in zip(measured[name], measured[base])]
        for base in (PLAIN, SAME_LOSS)
    }
    own = [own / plain for (_, own), (plain, _) in zip(measured[name], measured[SAME_LOSS])]
    return {
        "ms": 1000 * statistics.median(seconds for seconds, _ in measured[name]),
        **{f"to {base}": [statistics.median(values), min(values), max(values)] for base, values in ratios.items()},
        "own_share": statistics.median(own),
    }


def table(results: dict[str, dict[str, Any]], size: str) -> Table:
    title = f"CPU time per step: {size}, V {VOCAB}, T {SEQ_LEN}, batch {BATCH}, {BATCH // MICRO} micro-batches"
    rows = Table(title=title)
    for column in ("configuration", "ms / step", "ratio to plain", "to plain, our cross-entropy", "own events, %"):
        rows.add_column(column, justify="left" if column == "configuration" else "right")
    for name, row in results.items():
        ratios = ["{:.3f} [{:.2f} .. {:.2f}]".format(*row[f"to {base}"]) for base in (PLAIN, SAME_LOSS)]
        rows.add_row(name, f"{row['ms']:.1f}", *ratios, f"{100 * row['own_share']:.2f}")
    return rows


if __name__ == "__main__":
    main()
