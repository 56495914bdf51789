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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mixer.names import plot_label
from mixer.pictures import GREY, known, look, name_ends, telling

__all__ = ["plot_comparison", "plot_trajectory"]

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

    Of many domains only those that ``telling`` picks are coloured and named; the rest are thin grey lines.

    Args:
        steps, values: (N,) and (N, D); NaN where a domain was absent.
        baseline: a thin horizontal line, e.g. the uniform weight.
        smooth: centred running mean over so many rows, a twentieth of all at most, drawn bold over the raw line.
        result: (D,) what comes of the lines, such as their averages: a diamond each at the right end.
    """
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(8, min(4.2 + 0.1 * max(len(names) - 7, 0), 7.0)))
        lines = [_running_mean(line, smooth) if smooth > 1 else line for line in values.T]
        named = telling(lines)
        for index, line in enumerate(lines):
            if index not in named:
                axes.plot(steps, line, color=GREY, linewidth=0.6, zorder=1)
                continue
            colour, style = look(index)
            if smooth > 1:
                axes.plot(steps, values[:, index], color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(steps, line, color=colour, linestyle=style, linewidth=1.8)
        if baseline is not None:
            axes.axhline(baseline, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)))
        if result is not None:
            for index in named:
                mark: Any = {"color": look(index)[0], "markersize": 5, "clip_on": False}
                axes.plot(steps[-1:], result[index : index + 1], "D", **mark)
        rest = len(names) - len(named)
        axes.set(title=plot_label(title), xlabel=f"step (grey: {rest} other domains)" if rest else "step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        name_ends(axes, [(known(lines[index])[-1], names[index], index) for index in named])
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
        figure, axes = plt.subplots(figsize=(8, 0.9 + len(domains) * max(0.32, 0.2 * len(others))))
        height = 0.8 / max(1, len(others))
        for row, name in enumerate(others):
            colour, _ = look(row)
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
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.margins(x=0.15)
        axes.set_xlabel("difference in nats per token")
        # Above the bars, where it is seen first, however many domains follow.
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)
        legend_lines = -(-len(others) // 4)
        title = f"Held-out loss against the {plot_label(baseline)} mixture (left is better)"
        axes.set_title(title, pad=8 + 20 * legend_lines)
        return _save(figure, path)


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
