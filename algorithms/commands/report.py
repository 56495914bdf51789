"""``mixer report``: one page about finished runs."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["report"]


@click.command(short_help="One HTML page with tables and plots.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(path_type=Path), help="The page, self-contained."
)
@click.option(
    "--baseline",
    help="Run that the comparison is drawn against.  [default: the proportional one, else the first]",
)
@click.option("--objective", help="Add a row with this average: uniform, proportional, or a file of weights by domain.")
def report(runs: tuple[Path, ...], out: Path, baseline: str | None, objective: str | None) -> None:
    """Put runs of `mixer optimize` and `mixer train` side by side: weights, held-out losses, plots.

    \b
    Examples:
      mixer report run main --out report.html
      mixer report run main-doremi main-proportional main-uniform --baseline main-proportional
      mixer report main-doremi main-uniform --objective goals.json
    """
    from rich.console import Console

    from algorithms.report import comparison_table, write_report
    from mixer.outputs import check_file

    check_file(out)
    main_runs = write_report(runs, out, baseline=baseline, objective=objective)
    if main_runs:
        Console().print(comparison_table(main_runs, objective))
    click.echo(f"Written: {out}", err=True)
