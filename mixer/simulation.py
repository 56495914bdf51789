"""What a mixture will draw, batch by batch, without reading data: the mixer's plan is all it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.errors import ExhaustedError
from mixer.mixer import Mixer, RunEnded
from mixer.pictures import GREY, look, name_ends, telling

__all__ = ["Simulation", "draw_plot", "simulate"]


class Simulation(NamedTuple):
    """Per domain (D,) and over time (n,) of a simulated run.

    Attributes:
        names: domains.
        steps: (n,) batches planned at each of the kept points, at most 1,000 of them, evenly spaced.
        drawn, weights: (n, D) samples drawn up to there, and weights in force there.
        epochs: (D,) at the end.
        worst_error: (D,) largest distance from the target at any batch, in samples, or in tokens where lengths differ.
        first_step: (D,) first batch with a sample of the domain, or -1.
        end: why the run ended early, or "".
        tokens: (D,) drawn, where samples differ in length (each as long as its domain's mean), else None.
    """

    names: tuple[str, ...]
    steps: NDArray[np.int64]
    drawn: NDArray[np.int64]
    weights: NDArray[np.float64]
    epochs: NDArray[np.float64]
    worst_error: NDArray[np.float64]
    first_step: NDArray[np.int64]
    end: str
    tokens: NDArray[np.int64] | None = None


def simulate(mixer: Mixer, num_batches: int) -> Simulation:
    """Plan ``num_batches`` batches, or fewer if the run ends, and return what they hold. ``mixer`` moves on.

    >>> run = simulate(Mixer({"code": 10, "web": 90}, weights=[0.5, 0.5], batch_size=4), 10)
    >>> run.drawn[-1].tolist(), run.epochs.tolist()
    ([20, 20], [2.0, 0.2222222222222222])
    """
    size, every, end = len(mixer.names), max(num_batches // 1000, 1), ""
    worst, first = np.zeros(size), np.full(size, -1, np.int64)
    kept: list[tuple[int, Any, Any]] = []
    for step in range(num_batches):
        weights = mixer.weights
        try:
            draws = mixer.next_batch()
        except (RunEnded, ExhaustedError) as error:
            end = str(error)
            break
        np.maximum(worst, np.abs(mixer.credit), out=worst)
        first[(first < 0) & (draws.counts > 0)] = step
        if step % every == every - 1 or step == num_batches - 1:
            kept.append((mixer.step, mixer.drawn, weights))
    if not kept or kept[-1][0] != mixer.step:
        kept.append((mixer.step, mixer.drawn, mixer.weights))
    steps, drawn, in_force = (np.array(column) for column in zip(*kept))
    epochs = mixer.positions / np.maximum(mixer.num_samples, 1)
    tokens = None if mixer.mean_tokens is None else mixer.snapshot().tokens
    return Simulation(mixer.names, steps, drawn, in_force, epochs, worst, first, end, tokens)


def draw_plot(run: Simulation, path: str, num_samples: NDArray[np.int64]) -> None:
    """Write a picture: the weights in force, and the epochs of every domain, over the batches.

    Of many domains those are named that say most, in either half; the rest are thin grey lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, gridspec_kw={"hspace": 0.15})
    epochs = run.drawn / np.maximum(num_samples, 1)
    rest = len(run.names) - len(telling(list(epochs.T)))
    above.set_title("Weights in force", loc="left", fontweight="bold")
    below.set_title("Times each domain has been read", loc="left", fontweight="bold")
    above.set(ylabel="weight", ylim=(0, 1.05 * max(run.weights.max(), 1e-9)))
    below.set(ylabel="epochs", ylim=(0, 1.05 * max(epochs.max(), 1e-9)))
    below.set_xlabel(f"batches (grey: {rest} other domains)" if rest else "batches")
    read = epochs[-1][epochs[-1] > 0]
    if len(read) and read.max() > 20 * read.min():  # of very unequal domains the slow ones would lie on the axis
        below.set(yscale="log", ylim=(min(read.min(), 0.5) / 2, 2 * read.max()))
        below.yaxis.set_major_formatter("{x:g}")
    for axes, lines in ((above, run.weights), (below, epochs)):
        named = telling(list(lines.T))
        for i in range(len(run.names)):
            colour, style = look(i) if i in named else (GREY, "-")
            thin = {} if i in named else {"linewidth": 0.6, "zorder": 1}
            axes.plot(run.steps, lines[:, i], color=colour, linestyle=style, **thin)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        lowest = axes.get_ylim()[0]
        name_ends(axes, [(max(lines[-1, i], lowest), run.names[i], i) for i in named])
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
