"""Plots of a search and of its outcome: weights over steps, excess loss per domain, held-out losses compared.

Each domain keeps one colour and line style in every plot, lines are named at their right end instead of in a legend,
and the PNG files carry no machine-dependent data.
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
from numpy.typing import NDArray

__all__ = ["plot_comparison", "plot_trajectory"]

# Okabe & Ito's colours, safe for colour-blind readers; the style changes after each run through them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
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
) -> Path:
    """Draw one line per domain over the steps and save it as PNG.

    Args:
        steps, values: (N,) and (N, D); NaN where a domain was absent.
        baseline: a thin horizontal line, e.g. the uniform weight.
        smooth: centred running mean over so many rows, drawn bold over the raw line.
    """
    with plt.rc_context(_RC):
        figure, axes = plt.subplots(figsize=(8, 4.2))
        ends = []
        for index, name in enumerate(names):
            colour, style = _look(index)
            line = values[:, index]
            if smooth > 1:
                axes.plot(steps, line, color=colour, alpha=0.18, linewidth=0.8)
                line = _running_mean(line, smooth)
            axes.plot(steps, line, color=colour, linestyle=style, linewidth=1.8)
            finite = line[np.isfinite(line)]
            ends.append((float(finite[-1]) if len(finite) else 0.0, name, colour))
        if baseline is not None:
            axes.axhline(baseline, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.margins(x=0.01)
        _name_ends(axes, ends)
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
            axes.barh(where, gaps, height=height * 0.9, color=colour, label=name)
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
        axes.set_yticks(np.arange(len(domains)), domains)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(
            title=f"Held-out loss against the {baseline} mixture (left is better)",
            xlabel="difference in nats per token",
        )
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.25 / len(domains)), ncols=4)
        return _save(figure, path)


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]


def _name_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, pushed apart so that no two overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.05
    place = -np.inf
    for value, name, colour in sorted(ends):
        place = max(value, place + gap)
        axes.annotate(
            name,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _running_mean(line: NDArray[Any], window: int) -> NDArray[Any]:
    known = np.isfinite(line)
    kernel = np.ones(min(window, len(line)))
    total = np.convolve(np.where(known, line, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return Path(path)
