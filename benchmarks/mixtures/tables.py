"""What is printed of a comparison, and what docs/methods.md shows of it: both from the same JSON.

    {"corpus", "domains", "shares", "floors", "seeds", "setting", "rows": {name: {"losses", "weights", "cpu"}}}

``losses`` and ``weights`` are lists over seeds of lists over domains; ``cpu`` is over seeds, relative to the uniform
run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.mixtures.methods import BASELINES, LONGER

__all__ = ["console_table", "draw", "markdown", "publish", "summary"]

Losses = NDArray[np.float64]
SHOWN = (-0.16, 0.36)  # nats; differences beyond these are drawn at the edge


class Row(NamedTuple):
    """What a row shows; ``losses`` (S, D), the rest (S,) over seeds."""

    name: str
    losses: Losses
    average: Losses
    against_uniform: Losses
    worst: Losses
    worst_excess: Losses
    by_size: Losses
    cpu: float
    weights: Losses


def rows_of(measured: Mapping[str, Any]) -> list[Row]:
    """Return the rows by average loss, lowest first.

    The excess is over the floors, where the corpus has known ones, else over the lowest mean of the rows of equal
    steps.
    """
    losses = {name: np.array(row["losses"]) for name, row in measured["rows"].items()}
    floors = measured["floors"]
    equal = [one.mean(axis=0) for name, one in losses.items() if name != LONGER]
    least = np.min(equal, axis=0) if floors is None else np.array(floors)
    uniform = losses["uniform"].mean(axis=1)
    rows = []
    for name, one in losses.items():
        row = measured["rows"][name]
        rows.append(
            Row(
                name,
                one,
                one.mean(axis=1),
                one.mean(axis=1) - uniform,
                one.max(axis=1),
                (one - least).max(axis=1),
                one @ np.array(measured["shares"]),
                float(np.median(row["cpu"])),
                np.array(row["weights"]).mean(axis=0),
            )
        )
    return sorted(rows, key=lambda row: float(row.average.mean()))


def console_table(measured: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    title = f"{measured['corpus']}: {_setting(measured)}"
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=None)
    for header in _headers(measured):
        table.add_column(header, justify="left" if header in ("outcome", "weights, %") else "right", no_wrap=True)
    for row in rows_of(measured):
        table.add_row(*_cells(row), style="bold" if row.name in BASELINES else None)
    return table


def markdown(measured: Mapping[str, Any]) -> str:
    """Return the table for the documentation, and the wins and losses against uniform weights below it."""
    headers = _headers(measured)
    lines = ["| " + " | ".join(headers) + " |", "|---" + "|---:" * (len(headers) - 1) + "|"]
    for row in rows_of(measured):
        name, *cells = _cells(row)
        lines.append("| " + " | ".join([f"**{name}**" if row.name in BASELINES else name, *cells]) + " |")
    return "\n".join([f"{_setting(measured)}.", "", *lines, "", summary(measured)])


def summary(measured: Mapping[str, Any]) -> str:
    """Return one sentence each: which rows had a better average than uniform weights on all seeds, on none, on some."""
    parts: dict[str, list[str]] = {"on every seed": [], "on some seeds": [], "on no seed": []}
    for row in rows_of(measured):
        if row.name == "uniform":
            continue
        better = row.against_uniform < 0
        parts["on every seed" if better.all() else "on some seeds" if better.any() else "on no seed"].append(row.name)
    return "\n".join(
        f"- Lower average than uniform {when}: {'; '.join(names) or 'none'}." for when, names in parts.items()
    )


def _setting(measured: Mapping[str, Any]) -> str:
    setting = measured["setting"]
    return (
        f"{setting['steps']} steps of {setting['batch_size']} samples of {measured['seq_len']} tokens, "
        f"{measured['num_parameters']:,} parameters, {measured['seeds']} seeds"
    )


def _headers(measured: Mapping[str, Any]) -> list[str]:
    figures = ["average", "vs uniform", "worst", "worst excess", "by size", "CPU", "weights, %"]
    return ["outcome", *measured["domains"], *figures]


def _cells(row: Row) -> list[str]:
    difference = f"{_spread(row.against_uniform, '+')}" if row.name != "uniform" else ""
    figures = [_spread(row.average), difference, _spread(row.worst), _spread(row.worst_excess), _spread(row.by_size)]
    weights = " ".join(f"{100 * weight:.0f}" for weight in row.weights)
    return [row.name, *(_spread(column) for column in row.losses.T), *figures, f"{row.cpu:.1f}", weights]


def _spread(values: Losses, sign: str = "") -> str:
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():{sign}.3f} ± {deviation:.3f}".replace(" 0.", " .").replace("± .", "± .")


def draw(path: Path, corpora: Sequence[Mapping[str, Any]]) -> Path:
    """Draw each row's average loss against the uniform run of the same seed, a dot per seed, a panel per corpus."""
    heights = [len(one["rows"]) for one in corpora]
    options: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
    with plt.rc_context(options):
        figure, panels = plt.subplots(
            1, len(corpora), figsize=(5.6 * len(corpora), 0.9 + 0.19 * max(heights)), squeeze=False
        )
        for axes, measured in zip(panels[0], corpora):
            _panel(axes, measured)
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return path


def _panel(axes: Any, measured: Mapping[str, Any]) -> None:
    rows = [row for row in rows_of(measured) if row.name != "uniform"]
    for place, row in enumerate(rows):
        colour = "#D55E00" if row.name in BASELINES else "#0072B2"
        shown, mean = np.clip(row.against_uniform, *SHOWN), float(row.against_uniform.mean())
        axes.plot(shown, np.full(len(shown), place), "o", color=colour, markersize=4, alpha=0.75, clip_on=False)
        if not SHOWN[0] <= mean <= SHOWN[1]:
            edge, side, text = (SHOWN[0], 1, f"← {mean:+.2f}") if mean < 0 else (SHOWN[1], -1, f"{mean:+.2f} →")
            align = {"ha": "left" if side > 0 else "right", "va": "center"}
            axes.annotate(text, (edge, place), xytext=(6 * side, 0), textcoords="offset points", **align)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows):
        label.set_color("#D55E00" if row.name in BASELINES else "#000000")
    axes.invert_yaxis()
    axes.set_xlim(*SHOWN)
    axes.set_title(f"{measured['corpus']}: average loss against uniform", loc="left", weight="bold", fontsize=10)
    axes.set_xlabel("nats per token, left is better; a dot per seed")


def publish(text: str, measured: Mapping[str, Any]) -> str:
    """Return the page with the table of this corpus between its markers replaced.

    Raises: ValueError: if the page has no such markers.
    """
    start, end = f"<!-- measured: {measured['corpus']} -->", "<!-- end of measured -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no place for the table: expected {start} … {end}")
    return pattern.sub(lambda _: f"{start}\n\n{markdown(measured)}\n\n{end}", text)
