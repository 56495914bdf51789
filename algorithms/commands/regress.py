"""``mixer regress``: the best mixture by a law fitted to a table of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from algorithms.boosted_trees import fit_trees
from algorithms.mixture_regression import Runs, cross_validated, descend, fit_kernel, fit_log_linear, read_runs, search
from algorithms.objective import objective_weights
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.names import plain
from mixer.outputs import check_file
from mixer.projection import project
from mixer.units import parse_count

__all__ = ["propose", "regress"]

Vector = NDArray[np.float64]

FITS: dict[str, Any] = {"log-linear": fit_log_linear, "trees": fit_trees, "kernel": fit_kernel}


@click.command(short_help="Weights from a table of finished runs, within bounds.")
@click.argument("mixtures", type=click.Path(path_type=Path))
@click.argument("losses", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The mixture file to write.")
@click.option("--law", type=click.Choice(list(FITS)), default="log-linear", show_default=True)
@click.option(
    "--objective",
    default="average",
    show_default=True,
    help="The mean loss; the worst excess of a loss over the least it could be; or the average by a file of weights.",
)
@click.option("--floor", type=float, default=0.0, help="Give every domain at least this share.")
@click.option("--ceiling", type=float, default=1.0, help="Give no domain more than this share.")
@click.option("--pull", type=click.FloatRange(0), default=0.0, help="Stay near --prior: 0.05 to 0.1 nats, say.")
@click.option("--prior", type=click.Path(path_type=Path), help="A mixture file.  [default: the uniform mixture]")
@click.option("--shards", type=click.Path(path_type=Path), help="Sizes of the domains, for --max-epochs.")
@click.option("--max-epochs", type=float, help="Read no domain more often; needs --shards and --budget.")
@click.option("--budget", help="Tokens of the main run, such as 50M.")
@click.option("--strip", default="", help="A prefix of the table's domain names to leave out.")
@click.option("--seed", type=int, default=17, show_default=True, help="For the search of trees and kernel.")
def regress(mixtures: Path, losses: Path, out: Path, shards: Path | None, budget: str | None, **options: Any) -> None:
    """Fit losses as a function of weights over finished runs, and write the mixture that the fit says is best.

    MIXTURES and LOSSES are CSV files with a header and one row per run, in the same order; the first column names the
    run, the others are domains and metrics. A law knows least where no run was: --pull keeps the mixture near a prior,
    which trees and kernel are searched around anyway.

    \b
    Examples:
      mixer regress mixtures.csv losses.csv --out mixture.json
      mixer regress mixtures.csv losses.csv --objective worst --floor 0.002 --out mixture.json
      mixer regress mixtures.csv losses.csv --law trees --objective goals.json --out mixture.json
      mixer regress mixtures.csv losses.csv --pull 0.05 --prior by-size.json --out mixture.json
      mixer regress mixtures.csv losses.csv --shards shards --budget 50M --max-epochs 4 --out mixture.json
    """
    check_file(out)
    runs, strip = read_runs(mixtures, losses), options.pop("strip")
    runs = runs._replace(domains=tuple(name.removeprefix(strip) for name in runs.domains))
    caps = _caps(runs, shards, options.pop("max_epochs"), budget)
    prior_file = options.pop("prior")
    if prior_file is not None and options["law"] == "log-linear" and not options["pull"]:
        raise InputError(f"the prior {prior_file} would be ignored: say with --pull how strongly to stay near it.")
    prior = _prior(runs, prior_file)
    weights, facts = propose(runs, upper=np.minimum(options.pop("ceiling"), caps), prior=prior, **options)
    Mixture(dict(zip(runs.domains, weights.tolist())), {"method": "regress", **facts}).save(out)
    Console().print(_table(runs, weights, facts))
    click.echo(
        f"Rank correlation of predicted and real losses, runs left out in turn: {facts['rank_correlation']:.3f}.\n"
        f"Frozen: {out}"
    )


def propose(
    runs: Runs, law: str, objective: str, floor: float, upper: Vector, seed: int, prior: Vector, pull: float
) -> tuple[Vector, dict[str, Any]]:
    """Return the proposed mixture (D,), and what there is to know about how good it is."""
    if law != "log-linear" and pull:
        raise InputError(f"--pull is for the log-linear law; the law {law} is searched around --prior.")
    source = "uniform" if objective in ("average", "worst") else objective
    by_name = objective_weights(source, dict.fromkeys(runs.metrics, 1.0))
    importance = np.array([by_name[name] for name in runs.metrics])
    if law != "log-linear" and objective == "worst":
        raise InputError("--objective worst needs the log-linear law, whose least losses are known exactly.")
    uniform = np.full(len(runs.domains), 1.0 / len(runs.domains))
    project(uniform, floor, upper, names=runs.domains)  # bounds that leave no mixture are an error that names domains
    metrics = list(runs.metrics)
    if law == "trees":  # a thousand for each loss: one fit, of what is aimed at
        runs, importance = runs._replace(losses=(runs.losses @ importance)[:, None]), np.ones(1)
    fitted = FITS[law](runs.mixtures, runs.losses)
    if law == "log-linear":
        kind: Literal["average", "worst"] = "worst" if objective == "worst" else "average"
        weights = descend(fitted, kind, lower=floor, upper=upper, prior=prior, pull=pull, importance=importance)
    else:
        rng = np.random.default_rng(seed)
        weights = search(fitted, prior, rng, lower=floor, upper=upper, objective=lambda losses: losses @ importance)
    return weights, {
        "law": law,
        "objective": objective if source == "uniform" else by_name,
        "pull": pull,
        "prior": dict(zip(runs.domains, prior.tolist())),
        "runs": len(runs.mixtures),
        "metrics": metrics,
        "rank_correlation": cross_validated(FITS[law], runs),
        "best_run": int(np.argmin(runs.losses @ importance)),
        "best_run_mean_loss": float((runs.losses @ importance).min()),
        "predicted_mean_loss": float((fitted(weights[None]) @ importance)[0]),
        "predicted_mean_loss_of_uniform": float((fitted(uniform[None]) @ importance)[0]),
    }


def _prior(runs: Runs, path: Path | None) -> Vector:
    if path is None:
        return np.full(len(runs.domains), 1.0 / len(runs.domains))
    weights = Mixture.load(path).weights
    if set(weights) != set(runs.domains):
        raise InputError(
            f"the prior {path} has the domains {sorted(weights)}, the table {sorted(runs.domains)}: they must agree; "
            "--strip a prefix?"
        )
    return np.array([weights[name] for name in runs.domains])


def _caps(runs: Runs, shards: Path | None, max_epochs: float | None, budget: str | None) -> Vector:
    given = (shards is not None, max_epochs is not None, budget is not None)
    if not any(given):
        return np.ones(len(runs.domains))
    if shards is None or max_epochs is None or budget is None:
        raise InputError("--shards, --max-epochs and --budget belong together: caps are max_epochs * tokens / budget.")
    manifest = Manifest.load(shards)
    unknown = sorted(set(runs.domains) - set(manifest.names))
    if unknown:
        raise InputError(f"the table has the domains {unknown}, the shards {list(manifest.names)}; --strip a prefix?")
    sizes = np.array([manifest.split(name, "train").num_tokens for name in runs.domains], dtype=np.float64)
    return max_epochs * sizes / parse_count(budget, "a number of tokens")


def _table(runs: Runs, weights: Vector, facts: dict[str, Any]) -> Table:
    best = runs.mixtures[facts["best_run"]]
    kind = facts["objective"] if isinstance(facts["objective"], str) else "weighted"
    title = f"{facts['runs']} runs, {facts['law']} law, {kind} loss"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("domain", "best run", "proposal"):
        table.add_column(title, justify="left" if title == "domain" else "right")
    for index in np.argsort(-weights, kind="stable"):
        table.add_row(plain(runs.domains[index]), f"{best[index]:.4f}", f"{weights[index]:.4f}")
    table.add_section()
    table.add_row("mean loss, real", f"{facts['best_run_mean_loss']:.4f}", "")
    table.add_row("mean loss, predicted", "", f"{facts['predicted_mean_loss']:.4f}")
    table.add_row("  of the uniform mixture", "", f"{facts['predicted_mean_loss_of_uniform']:.4f}")
    return table
