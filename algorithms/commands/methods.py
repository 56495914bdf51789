"""``mixer methods``: what each update rule optimises, needs and costs, and where it comes from."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import textwrap
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from algorithms.rules import CATALOGUE, UPDATE_RULES
from algorithms.rules.catalogue import COSTS
from mixer.errors import InputError

__all__ = ["describe", "methods"]

WIDE = 150  # columns of a terminal that has room for what each method optimises

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
        console = Console()
        console.print(_table(console.width))
        console.print(
            "acts on: what the weights multiply or drive (--apply). needs: beside training losses; NAME= with --set.\n"
            "cost: per update; D domains. Papers by arXiv number.\n"
            "`mixer methods NAME`: what it optimises, equations, settings.",
            style="dim",
            highlight=False,
        )


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


def _table(width: int) -> Table:
    """Return a line per method; what it optimises beside it, or below it where the terminal is narrow."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    for title in ("method", "acts on", "needs", "cost", "paper"):
        table.add_column(title, no_wrap=True, style="bold" if title == "method" else "")
    if width >= WIDE:
        table.add_column("optimises", no_wrap=True)
    for name in UPDATE_RULES:
        row = describe(name)
        cells = [name, row["applies"], _needs(row), row["cost"], _paper(row["paper"])]
        table.add_row(*cells, *([row["optimises"]] if width >= WIDE else []))
    return table


def _needs(row: dict[str, Any]) -> str:
    """Return what a rule reads beside the training losses, and the settings that it cannot do without."""
    short = {"gradient_variance": "variance"}
    signals = sorted((short.get(need, need) for need in row["needs"]), reverse=len(row["needs"]) == 1)
    return ", ".join([*signals, *(f"{setting}=" for setting in row["required"])])


def _paper(source: str) -> str:
    """Return the arXiv number of a source; "-" without one."""
    found = re.search(r"[0-9]{4}\.[0-9]{5}", source)
    return found[0] if found else "-"


def _print_one(name: str) -> None:
    row, factory = describe(name), UPDATE_RULES[name]
    facts = {
        "acts on": f"the {row['applies']}",
        "needs": _needs(row) or "training losses only",
        "cost": COSTS[row["cost"]],
        "paper": row["paper"],
    }
    width = min(Console().width, 120)
    page = click.HelpFormatter(width=width)
    page.write(f"{name}: {row['optimises']}\n\n")
    page.indent()
    page.write_dl([*facts.items()])
    page.dedent()
    notes, settings = _documented(inspect.getdoc(factory) or "")
    for text in filter(None, (inspect.getdoc(inspect.getmodule(factory)), notes)):
        page.write(f"\n{_wrapped(text, width)}\n")
    if lines := _settings(row, settings):
        page.write("\nsettings (--set NAME=VALUE)\n")
        page.indent()
        page.write_dl(lines)
    click.echo(page.getvalue().rstrip())


def _documented(doc: str) -> tuple[str, dict[str, str]]:
    """Return what a rule's docstring says beside its arguments, and of each argument (or several, ``a, b``)."""
    text = doc.split(">>>")[0].strip()
    paragraphs = re.split(r"\n\s*\n", text)
    notes = [each for each in paragraphs if not each.startswith(("Args:", "Raises:"))]
    if re.fullmatch(r"Return (\S+ ?){1,8}", notes[0]):
        del notes[0]  # says no more than the rule's name
    entries: dict[str, str] = {}
    for each in paragraphs:
        if each.startswith("Args:"):
            body = each.removeprefix("Args:").split("\nRaises:")[0]
            for names, about in re.findall(r"\n    (\w[\w, ]*): ((?:.|\n(?=        ))*)", body):
                entries[names] = " ".join(about.split())
    return "\n\n".join(notes), entries


def _settings(row: dict[str, Any], documented: dict[str, str]) -> list[tuple[str, str]]:
    """Return a line per setting, in the rule's order: its name, its default or "required", and what it does."""
    about = {name: text for names, text in documented.items() for name in names.split(", ")}
    lines = [(f"{name}=...", f"{about.get(name, '')} Required.".strip()) for name in row["required"]]
    for name, default in row["settings"].items():
        lines.append((f"{name}=" if default is None else f"{name}={default}", about.get(name, "")))
    return lines


def _wrapped(text: str, width: int) -> str:
    """Return a text with its paragraphs filled to the terminal's width, and what is indented, equations, as it is."""
    parts = []
    for indented, lines in itertools.groupby(text.splitlines(), lambda line: line[:1].isspace() or not line):
        if indented:  # of a line that is too long, the gap before its remark is narrowed
            parts += [line if len(line) <= width else re.sub(r"(?<=\S) {3,}", "   ", line) for line in lines]
        else:
            parts.append(textwrap.fill(" ".join(" ".join(lines).split()), width))
    return "\n".join(parts)
