"""``mixer methods``: what each update rule optimises, needs and costs, and where it comes from."""

from __future__ import annotations

import inspect
import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from algorithms.rules import CATALOGUE, UPDATE_RULES
from mixer.errors import InputError

__all__ = ["describe", "methods"]

# The least that a rule can be made with, to read what it needs from it.
_LEAST: dict[str, dict[str, Any]] = {
    "unimax": {"budget": 1.0},
    "preset": {"name": "llama-3.1"},
    "given": {"weights": {}},
    "wasserstein": {"distances": {}},
    "sheared_llama": {"targets": {}},
    "modified_doremi": {"targets": {}},
}


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def methods(name: str | None, as_json: bool) -> None:
    """List the methods that find weights; with NAME, its equations and settings.

    \b
    Examples:
      mixer methods
      mixer methods doremi
      mixer methods --json
    """
    if name is not None and name not in UPDATE_RULES:
        raise InputError(f"no method {name!r}; there are {', '.join(UPDATE_RULES)}.")
    if as_json:
        rows = [describe(row) for row in ([name] if name else UPDATE_RULES)]
        click.echo(json.dumps(rows, indent=2))
    elif name:
        _print_one(name)
    else:
        Console().print(_table())


def describe(name: str) -> dict[str, Any]:
    """Return what there is to say about a row of ``UPDATE_RULES``, as builtins."""
    rule = UPDATE_RULES[name](**_LEAST.get(name, {}))
    parameters = inspect.signature(UPDATE_RULES[name]).parameters.values()
    return {
        "name": name,
        "optimises": CATALOGUE[name].optimises,
        "cost": CATALOGUE[name].cost,
        "paper": CATALOGUE[name].paper,
        "needs": sorted(rule.needs),
        "applies": rule.applies,
        "required": [p.name for p in parameters if p.default is p.empty],
        "settings": {p.name: p.default for p in parameters if p.default is not p.empty},
    }


def _table() -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("what it optimises; what it needs beside the training losses, what it costs, where it is from")
    for name in UPDATE_RULES:
        row = describe(name)
        needs = ", ".join([*row["needs"], *(f"--set {setting}=" for setting in row["required"])]) or "nothing more"
        about = f"(weights the {row['applies']})\nneeds {needs}; cost {row['cost']}; {row['paper']}"
        table.add_row(name, Text.assemble(row["optimises"], " ", (about, "dim")))
    return table


def _print_one(name: str) -> None:
    row, factory = describe(name), UPDATE_RULES[name]
    about = (inspect.getdoc(inspect.getmodule(factory)) or "", (inspect.getdoc(factory) or "").split(">>>")[0].strip())
    settings = [f"  --set {setting}=..." for setting in row["required"]]
    settings += [f"  --set {setting}={value}" for setting, value in row["settings"].items()]
    click.echo("\n\n".join([f"{name}: {row['optimises']}", *about, "\n".join(["settings", *settings])]))
