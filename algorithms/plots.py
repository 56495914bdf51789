"""Plots of a search and of its outcome: weights over steps, excess loss per domain, held-out losses compared.

Each domain keeps one colour and line style in every plot, lines are named at their right end instead of in a legend,
and the PNG files carry no machine-dependent data. Of many domains only those are named that say most.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from mixer.names import plot_label

__all__ = ["plot_comparison", "plot_trajectory"]

# Okabe & Ito's colours, safe for colour-blind readers; the style changes after each run through them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
MAX_NAMED = 12
GREY = "#BBBBBB"
_RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.dpi": 130,
}


def plot_trajectory(
    path: str | os.PathLike[str],
    names: Sequence[str],
    steps: NDArray[Any],
    values: NDArray[Any],
    *,
    title: str,
    unit: str,
    baseline: float | None = None,
    smooth: int = 0,
    result: NDArray[Any] | None = None,
) -> Path:
    """Draw one line per domain over the steps and save it as PNG.

    Of more than ``MAX_NAMED`` domains half that many with the largest last values, and as many others that moved over
    the widest range, are coloured and named; the rest are thin grey lines.

    Args:
        steps, values: (N,) and (N, D); NaN where a domain was absent.
        baseline: a thin horizontal line, e.g. the uniform weight.
        smooth: centred running mean over so many rows, a twentieth of all at most, drawn bold over the raw line.
        result: (D,) what comes of the lines, such as their averages: a diamond each at the right end.
    """
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(8, min(4.2 + 0.1 * max(len(names) - 7, 0), 7.0)))
        lines = [_running_mean(line, smooth) if smooth > 1 else line for line in values.T]
        named = _telling(lines)
        for index, line in enumerate(lines):
            if index not in named:
                axes.plot(steps, line, color=GREY, linewidth=0.6, zorder=1)
                continue
            colour, style = _look(index)
            if smooth > 1:
                axes.plot(steps, values[:, index], color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(steps, line, color=colour, linestyle=style, linewidth=1.8)
        if baseline is not None:
            axes.axhline(baseline, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)))
        if result is not None:
            for index in named:
                mark: Any = {"color": _look(index)[0], "markersize": 5, "clip_on": False}
                axes.plot(steps[-1:], result[index : index + 1], "D", **mark)
        rest = len(names) - len(named)
        axes.set(title=plot_label(title), xlabel=f"step (grey: {rest} other domains)" if rest else "step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        _name_ends(axes, [(_known(lines[index])[-1], names[index], index) for index in named])
        return _save(figure, path)


def plot_comparison(path: str | os.PathLike[str], losses: Mapping[str, Mapping[str, float]], *, baseline: str) -> Path:
    """Draw, per domain, how far each mixture's held-out loss lies from the baseline's, and save it as PNG.

    Args:
        losses: mixture → domain → nats per token.
        baseline: the mixture that is the zero line.
    """
    domains = list(losses[baseline])
    others = [name for name in losses if name != baseline]
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(domains) * max(1, len(others))))
        height = 0.8 / max(1, len(others))
        for row, name in enumerate(others):
            colour, _ = _look(row)
            gaps = np.array([losses[name][domain] - losses[baseline][domain] for domain in domains])
            where = np.arange(len(domains)) + (row - (len(others) - 1) / 2) * height
            axes.barh(where, gaps, height=height * 0.9, color=colour, label=plot_label(name))
            for y, gap in zip(where, gaps):
                axes.annotate(
                    f"{round(gap, 2) + 0.0:+.2f}",
                    (gap, y),
                    xytext=(4 if gap >= 0 else -4, 0),
                    textcoords="offset points",
                    va="center",
                    ha="left" if gap >= 0 else "right",
                    fontsize=8,
                )
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_yticks(np.arange(len(domains)), [plot_label(domain) for domain in domains])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(
            title=f"Held-out loss against the {plot_label(baseline)} mixture (left is better)",
            xlabel="difference in nats per token",
        )
        below = axes.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # half an inch, under the label
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=4)
        return _save(figure, path)


def _look(index: int) -> tuple[str, Any]:
    return COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]


def _known(line: NDArray[Any]) -> NDArray[Any]:
    return line[np.isfinite(line)]


def _telling(lines: Sequence[NDArray[Any]]) -> list[int]:
    """Return which lines to name: all that have values, or those that ``plot_trajectory`` describes."""
    present = [index for index, line in enumerate(lines) if len(_known(line))]
    if len(present) <= MAX_NAMED:
        return present
    largest = sorted(present, key=lambda index: -_known(lines[index])[-1])[: MAX_NAMED // 2]
    others = [index for index in present if index not in largest]
    moved = sorted(others, key=lambda index: -np.ptp(_known(lines[index])))[: MAX_NAMED - len(largest)]
    return sorted([*largest, *moved])


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, int]]) -> None:
    """Write each line's name right of its end, with a thin line that leads there."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    inches = axes.bbox.height / axes.figure.dpi
    places = spread(np.array([(value - low) / (high - low) for value, _, _ in ordered]), 0.16 / inches)
    for (value, name, index), place in zip(ordered, places):
        colour, style = _look(index)
        leader: Any = {"arrowstyle": "-", "color": colour, "linestyle": style, "linewidth": 0.9}
        axes.annotate(
            plot_label(name),
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.06, place),
            textcoords="axes fraction",
            arrowprops={**leader, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def spread(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Return ascending places in 0…1 moved apart by ``gap`` or, if there is no room for that, evenly.

    Neighbours that are too close are centred on their common mean, so that all move as little as can be.

    >>> spread(np.array([0.5, 0.5, 0.9]), 0.1).round(2).tolist(), spread(np.array([0.0, 0.0]), 0.2).tolist()
    ([0.45, 0.55, 0.9], [0.0, 0.2])
    """
    if len(places) < 2:
        return np.clip(places, 0, 1)
    gap = min(gap, 1 / (len(places) - 1))
    steps = gap * np.arange(len(places))
    blocks: list[list[float]] = []  # pooled by adjacent violators: sum and count
    for place in places - steps:
        blocks.append([place, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    pooled = np.repeat([total / count for total, count in blocks], [int(count) for _, count in blocks])
    return np.clip(pooled, 0, 1 - steps[-1]) + steps


def _running_mean(line: NDArray[Any], window: int) -> NDArray[Any]:
    """Return the mean over ``window`` rows around each, of short lines a twentieth of them; fewer towards the ends.

    >>> _running_mean(np.array([4.0, 2.0, np.nan] + [0.0] * 57), 3)[:4].tolist()
    [4.0, 3.0, 1.0, 0.0]
    """
    known, places = np.isfinite(line), np.arange(len(line))
    # As many rows on either side, so that a line that falls is not pulled off where it begins.
    reach = np.minimum(min(window, max(len(line) // 20, 1)) // 2, np.minimum(places, places[::-1]))
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (np.where(known, line, 0.0), known.astype(float))
    )
    first, last = places - reach, places + reach + 1
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return Path(path)
