"""What all plots share: a colour and line style per domain, names at the ends of lines, and where a picture may go.

Each domain keeps one colour and line style in every plot, lines are named at their right end instead of in a legend,
and of many domains only those are named that say most. matplotlib is imported by those who draw.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixer.errors import InputError
from mixer.names import plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GREY", "MAX_NAMED", "check_picture", "known", "look", "name_ends", "spread", "telling"]

# Okabe & Ito's colours, safe for colour-blind readers; the style changes after each run through them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
MAX_NAMED = 12
GREY = "#BBBBBB"


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless a picture can be written there."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in kinds:
        raise InputError(f"cannot draw {path}: its name must end in one of {', '.join(kinds)}.")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot draw {path}: there is no such folder.")


def look(index: int) -> tuple[str, Any]:
    """Return colour and line style of the domain with this number."""
    return COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]


def known(line: NDArray[Any]) -> NDArray[Any]:
    """Return the values that are not NaN."""
    return line[np.isfinite(line)]


def telling(lines: Sequence[NDArray[Any]]) -> list[int]:
    """Return which lines to name: all that have values, or ``MAX_NAMED`` of them.

    These are half that many with the largest last values, and as many others that moved over the widest range.
    """
    present = [index for index, line in enumerate(lines) if len(known(line))]
    if len(present) <= MAX_NAMED:
        return present
    largest = sorted(present, key=lambda index: -known(lines[index])[-1])[: MAX_NAMED // 2]
    others = [index for index in present if index not in largest]
    moved = sorted(others, key=lambda index: -np.ptp(known(lines[index])))[: MAX_NAMED - len(largest)]
    return sorted([*largest, *moved])


def name_ends(axes: Axes, ends: Sequence[tuple[float, str, int]]) -> None:
    """Write each line's name right of its end, with a thin line that leads there."""
    ordered = sorted(ends)
    inches = axes.bbox.height / axes.figure.dpi
    to_axes = axes.transData + axes.transAxes.inverted()  # also where the axis is logarithmic
    heights = [to_axes.transform((axes.get_xlim()[1], value))[1] for value, _, _ in ordered]
    places = spread(np.array(heights), 0.16 / inches)
    for (value, name, index), place in zip(ordered, places):
        colour, style = look(index)
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
