"""What does DomainReweighting add to a training step, compared with plain Composer?

    python -m benchmarks.training_overhead             # about a minute on two cores
    python -m benchmarks.training_overhead --full      # the 9 M model, more steps and rounds

CPU time per step of one process with one thread, so that neighbours on the machine count less. Each round trains every
configuration for some steps, in turn and in another order each time; a ratio compares with the plain run of the same
round, and the median over rounds is shown with its range. The last column is measured inside: the CPU time of the
algorithm's own events, without the cross-entropy that the plain run computes too, as a share of the step. It does not
vary with the noise of forward and backward passes. Results also go to benchmarks/results/training_overhead.json.
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
from typing import Any

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
from algorithms.references import FrozenModel, score
from benchmarks import RESULTS
from mixer import MixtureLoader, mds

DOMAINS, VOCAB, SEQ_LEN, BATCH, MICRO = 7, 8192, 256, 8, 4
PLAIN = "plain Composer"


class StepTimes(Callback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self._start = time.process_time()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(time.process_time() - self._start)


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


def train(algorithm: Timed | None, shards: Path, layers: int, width: int, steps: int) -> tuple[float, float]:
    """Return the median CPU seconds of a step, and of the algorithm's own part of one; the first two are left out."""
    loader = (MixtureLoader if algorithm else Labelled)(shards, mixture="uniform", global_batch_size=BATCH)
    model, times = HuggingFaceModel(llama(layers, width)), StepTimes()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        algorithms=[] if algorithm is None else [algorithm],
        callbacks=[times],
        max_duration=f"{steps + 2}ba",
        device_train_microbatch_size=MICRO,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    own = 0.0 if algorithm is None else algorithm.own_seconds / (steps + 2)
    return statistics.median(times.seconds[2:]), own


def configurations(shards: Path, scores: Path, layers: int, width: int) -> dict[str, Callable[[], Timed | None]]:
    half, same = llama(max(layers // 2, 1), width, seed=1), llama(layers, width, seed=1)
    return {
        PLAIN: lambda: None,
        "statistics per domain": lambda: Timed(),
        "DoReMi, cached reference": lambda: Timed(doremi(), reference=str(scores)),
        "DoReMi, online, half depth": lambda: Timed(doremi(), reference=half),
        "DoReMi, online, same size": lambda: Timed(doremi(), reference=same),
    }


@click.command()
@click.option("--full", is_flag=True, help="6 layers of width 256, 8 steps, 5 rounds.")
@click.option("--steps", type=int, help="Timed steps per run.")
@click.option("--rounds", type=int, help="Runs of each configuration.")
def main(full: bool, steps: int | None, rounds: int | None) -> None:
    """Measure the CPU time per step with and without DomainReweighting."""
    torch.set_num_threads(1)
    logging.getLogger("composer").setLevel(logging.ERROR)
    layers, width = (6, 256) if full else (4, 128)
    steps, rounds = steps or (8 if full else 5), rounds or (5 if full else 4)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "shards")
        scores = score(shards, FrozenModel(llama(layers, width, seed=1)), Path(folder) / "scores")
        configured = configurations(shards, scores, layers, width)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in configured}
        for number in range(rounds):
            names = list(configured)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                measured[name].append(train(configured[name](), shards, layers, width, steps))
    report(measured, {"layers": layers, "width": width, "steps": steps, "rounds": rounds, "threads": 1})


def report(measured: dict[str, list[tuple[float, float]]], setting: dict[str, Any]) -> None:
    table = Table(
        title=f"CPU time per step: {setting}, V {VOCAB}, T {SEQ_LEN}, batch {BATCH}, {BATCH // MICRO} micro-batches"
    )
    for column in ("configuration", "ms / step", "ratio to plain [range]", "own events, % of plain step"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    plain = [seconds for seconds, _ in measured[PLAIN]]
    results = {}
    for name, runs in measured.items():
        ratios = [seconds / reference for (seconds, _), reference in zip(runs, plain)]
        seconds, own = statistics.median(s for s, _ in runs), statistics.median(o for _, o in runs)
        share = own / statistics.median(plain)
        results[name] = {"ms": 1000 * seconds, "ratio": statistics.median(ratios), "own_share": share}
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]"
        table.add_row(name, f"{1000 * seconds:.1f}", spread, f"{100 * share:.2f}")
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"setting": setting, "results": results}, indent=2) + "\n"
    (RESULTS / "training_overhead.json").write_text(text)


if __name__ == "__main__":
    main()
