"""What keeps old domains and learns a new one when a pretrained model is continued? Policies for one stage, compared.

    python -m benchmarks.continual synthetic redpajama                # a quarter of an hour of one core

A model is trained on uniform weights of all domains but one, and continued on all of them for half as many steps at 0.3
of the learning rate: by fixed mixtures; by DoReMi with the pretrained model as the only reference, as a literal reading
has it; and by the two rules for stages. Their target for the new domain is what the uniform stage reaches ("near"), or
what a model trained on everything from the start has, out of reach of so short a stage ("far"), both on held-out
windows. Losses are held-out, on samples that neither training nor any rule saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.mixtures.__main__ import SETTINGS
from benchmarks.mixtures.corpora import shards_of
from benchmarks.mixtures.runs import Run, Runs, Setting
from benchmarks.proxy_sizes import spread
from mixer.static_weights import proportional, temperature, uniform

NEW = {"synthetic": "order2", "redpajama": "github"}
EVERY = 10  # steps between updates from held-out losses
ON_LOSS = ("doremi", "modified_doremi")


class Stage(NamedTuple):
    """One policy, one seed: held-out losses (D,) before and after, and the new domain's share of the samples, or of the
    loss for rules on the loss."""

    before: tuple[float, ...]
    after: tuple[float, ...]
    share: float


@click.command()
@click.argument("corpora", nargs=-1, required=True)
@click.option("--new", help="The new domain of a corpus given by path.  [default: order2 synthetic, github redpajama]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(8), help="Before the stage.  [default: as benchmarks.mixtures]")
@click.option("--batch-size", type=click.IntRange(1), help="[default: as benchmarks.mixtures]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/mixtures]")
def main(
    corpora: tuple[str, ...],
    new: str | None,
    seeds: int,
    steps: int | None,
    batch_size: int | None,
    out: Path | None,
) -> None:
    """Compare policies for a stage on "synthetic", "redpajama" or the path of shards; finished runs are kept."""
    torch.set_num_threads(1)
    for corpus in corpora:
        folder = (out or RESULTS / "mixtures") / Path(corpus).name
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        default = SETTINGS.get(corpus, Setting(steps=240, batch_size=32))
        setting = replace(default, steps=steps or default.steps, batch_size=batch_size or default.batch_size)
        runs = Runs(shards_of(corpus, folder), setting, folder / "runs")
        name = new or NEW.get(corpus)
        if name not in runs.domains:
            raise click.UsageError(f"--new must name one of {', '.join(runs.domains)}; got {name!r}.")
        click.echo(table(corpus, runs, name, [stages(runs, name, seed) for seed in range(0, 10 * seeds, 10)]))


def stages(runs: Runs, new: str, seed: int) -> dict[str, Stage]:
    """Return what every policy makes of the stage."""
    count, place = len(runs.domains), runs.domains.index(new)
    old = np.where(np.arange(count) == place, 0.0, 1.0 / (count - 1))
    before = runs.get(Run(seed, tuple(old.tolist())))

    def stage(policy: Mapping[str, Any]) -> Run:
        reference = before.key if policy.get("rule") in ON_LOSS else None
        return Run(seed + 1, **policy, reference=reference, start=before.key, steps=runs.setting.steps // 2)

    fixed = {
        "uniform": {"mixture": tuple(uniform(count).tolist())},
        "proportional": {"mixture": tuple(proportional(runs.sizes).tolist())},
        "temperature": {"mixture": tuple(temperature(runs.sizes, 2.0).tolist())},
    }
    everything = Run(seed, fixed["uniform"]["mixture"])
    # Targets on the very windows that the rules look at: a difference between samples would add up.
    near, far = (runs.targets(run)[new] for run in (stage(fixed["uniform"]), everything))
    found = {}
    for name, policy in {**fixed, **policies(new, near, far)}.items():
        result = runs.get(stage(policy))
        weights = result.weights if policy.get("rule") in ON_LOSS else result.drawn
        found[name] = Stage(before.test, result.test, weights[place])
    return found


def policies(new: str, near: float, far: float) -> dict[str, dict[str, Any]]:
    """Return the rules, as arguments of ``Run``."""

    def feedback(target: float) -> dict[str, Any]:
        settings = {"targets": {new: target}, "others": "reference"}
        return {"rule": "validation_feedback", "settings": settings, "every": EVERY}

    return {
        "DoReMi, the pretrained model its only reference": {"rule": "doremi", "settings": {"clip": "domain"}},
        "modified DoReMi, near target": {"rule": "modified_doremi", "settings": {"targets": {new: near}, "new": [new]}},
        "validation feedback, near target": feedback(near),
        "validation feedback, far target": feedback(far),
    }


def table(corpus: str, runs: Runs, new: str, seeds: list[dict[str, Stage]]) -> str:
    """Return the comparison in Markdown: mean and standard deviation over seeds."""
    place = runs.domains.index(new)
    lines = [
        f"| {corpus}: stage | share of {new}, % | {new} | old domains | forgotten | average |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    start = np.array([seed["uniform"].before for seed in seeds])
    lines.append(_line("before it", "", start, start, place))
    for name in seeds[0]:
        after = np.array([seed[name].after for seed in seeds])
        lines.append(_line(name, f"{100 * np.mean([seed[name].share for seed in seeds]):.0f}", start, after, place))
    return "\n".join(lines)


def _line(name: str, shown: str, before: np.ndarray, after: np.ndarray, place: int) -> str:
    old = np.delete(after, place, axis=1)
    forgotten = (old - np.delete(before, place, axis=1)).max(axis=1)
    columns = (after[:, place], old.mean(axis=1), forgotten, after.mean(axis=1))
    return f"| {name} | {shown} | {' | '.join(spread(column) for column in columns)} |"


if __name__ == "__main__":
    main()
