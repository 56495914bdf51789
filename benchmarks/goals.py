"""One measure beside its goal, and the table of them that a benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

__all__ = ["Row", "print_goals"]


class Row(NamedTuple):
    """One measure beside its goal; ``reached`` is None where there is no goal."""

    measure: str
    value: str
    goal: str = ""
    reached: bool | None = None
    why: str = ""


def print_goals(title: str, goals: Sequence[Row]) -> None:
    """Print the table, and a line for each goal that is not reached."""
    table = Table(title=title)
    table.add_column("measure", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in goals:
        table.add_row(each.measure, each.value, each.goal, {True: "yes", False: "NO", None: ""}[each.reached])
    Console(width=110).print(table)
    for each in goals:
        if each.reached is False:
            why = f" ({each.why})" if each.why else ""
            print(f"not reached: {each.measure}: {each.value}, goal {each.goal}{why}")
