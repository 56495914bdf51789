"""Gradient-boosted regression trees: the law that RegMix fits to its runs (Liu et al. 2024, arXiv:2407.01492).

    law = fit_trees(runs.mixtures, runs.losses.mean(axis=1))
    weights = search(law, prior, np.random.default_rng(0))

Least squares, leaf by leaf where the error falls most, over at most 64 places per domain to split at; with the settings
that RegMix gives LightGBM: 1,000 trees at a rate of 0.01, of at most 31 leaves with 20 runs or more in each. Nothing is
random. A tree is constant between its splits: the law knows no trend beyond the runs, and ranks within them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from algorithms.mixture_regression import Matrix, checked_runs
from mixer.errors import InputError

__all__ = ["TreesLaw", "fit_trees"]

PLACES = 64


class Tree(NamedTuple):
    """By node: the domain it splits by and the weight up to which one goes left (-1 and 0 for leaves), the nodes to the
    left and right, and the value of a leaf."""

    domain: NDArray[np.int64]
    place: Matrix
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Matrix

    def __call__(self, mixtures: Matrix) -> Matrix:
        node, rows = np.zeros(len(mixtures), np.int64), np.arange(len(mixtures))
        while rows.size:
            rows = rows[self.domain[node[rows]] >= 0]
            here = node[rows]
            goes_left = mixtures[rows, self.domain[here]] <= self.place[here]
            node[rows] = np.where(goes_left, self.left[here], self.right[here])
        return self.value[node]


class TreesLaw(NamedTuple):
    """Means (M,) and the trees of each loss, whose values add up."""

    mean: Matrix
    trees: tuple[tuple[Tree, ...], ...]

    def __call__(self, mixtures: Matrix) -> Matrix:
        """Return the predicted losses (N, M) of mixtures (N, D)."""
        w = np.asarray(mixtures, dtype=np.float64)
        return np.stack([mean + sum(tree(w) for tree in trees) for mean, trees in zip(self.mean, self.trees)], axis=1)


def fit_trees(
    mixtures: ArrayLike, losses: ArrayLike, num_trees: int = 1000, rate: float = 0.01, leaves: int = 31, least: int = 20
) -> TreesLaw:
    """Return boosted trees; about a millisecond per tree and loss.

    Args:
        mixtures: (N, D), rows sum to 1.
        losses: (N, M) or (N,).
        rate: share of each tree's values that is added.
        leaves: at most so many per tree.
        least: runs in a leaf, at least.

    Raises: InputError: with fewer runs than two leaves take, or values that are not finite.

    >>> mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 400)
    >>> law = fit_trees(mixtures, (mixtures[:, 0] > 0.5) + 1.0, num_trees=50, rate=0.2)
    >>> law(np.array([[0.8, 0.1, 0.1], [0.2, 0.4, 0.4]])).round(1).tolist()
    [[2.0], [1.0]]
    """
    w, y = checked_runs(mixtures, losses)
    if len(w) < 2 * least:
        raise InputError(f"trees with {least} runs or more in a leaf need {2 * least} runs; got {len(w)}.")
    edges = [_edges(column) for column in w.T]
    bins = np.stack([np.searchsorted(edge, column) for edge, column in zip(edges, w.T)], axis=1)
    mean = y.mean(axis=0)
    trees = []
    for column in (y - mean).T:
        left, grown = column.copy(), []
        for _ in range(num_trees):
            tree, values = _grow(bins, edges, left, rate, leaves, least)
            left -= values
            grown.append(tree)
        trees.append(tuple(grown))
    return TreesLaw(mean, tuple(trees))


def _edges(column: Matrix) -> Matrix:
    """Return where a domain's weight may be split: half-way between neighbours, at most PLACES - 1 of them."""
    values = np.unique(column)
    middles = (values[:-1] + values[1:]) / 2
    return middles if len(middles) < PLACES else np.unique(np.quantile(middles, np.linspace(0, 1, PLACES - 1)))


def _grow(
    bins: NDArray[np.int64], edges: list[Matrix], target: Matrix, rate: float, leaves: int, least: int
) -> tuple[Tree, Matrix]:
    """Return a tree, and its values for the runs it was grown on."""
    nodes: list[list[float]] = [[-1, 0.0, 0, 0, 0.0]]
    open_leaves = [(_best_split(bins, target, np.arange(len(target)), least), 0, np.arange(len(target)))]
    for _ in range(leaves - 1):
        best = max(range(len(open_leaves)), key=lambda index: open_leaves[index][0][0])
        (gain, domain, place), node, rows = open_leaves[best]
        if not gain > 0:
            break
        is_left = bins[rows, domain] <= place
        nodes[node] = [domain, edges[domain][place], len(nodes), len(nodes) + 1, 0.0]
        parts = [rows[is_left], rows[~is_left]]
        new = [(_best_split(bins, target, part, least), len(nodes) + side, part) for side, part in enumerate(parts)]
        nodes += [[-1, 0.0, 0, 0, 0.0], [-1, 0.0, 0, 0, 0.0]]
        open_leaves[best : best + 1] = new
    values = np.empty(len(target))
    for _, node, rows in open_leaves:
        nodes[node][4] = values[rows] = rate * target[rows].mean()
    columns = np.array(nodes, dtype=np.float64).T
    split_by, left, right = (columns[index].astype(np.int64) for index in (0, 2, 3))
    return Tree(split_by, columns[1], left, right, columns[4]), values


def _best_split(bins: NDArray[np.int64], target: Matrix, rows: NDArray[np.int64], least: int) -> tuple[float, int, int]:
    """Return by how much the squared error falls at best, and the domain and place of that split."""
    num_domains, total, count = bins.shape[1], target[rows].sum(), len(rows)
    if count < 2 * least:
        return 0.0, -1, 0
    flat = (bins[rows] + PLACES * np.arange(num_domains)).ravel()
    size, shape = PLACES * num_domains, (num_domains, PLACES)
    sums = np.bincount(flat, np.repeat(target[rows], num_domains), size).reshape(shape).cumsum(axis=1)
    counts = np.bincount(flat, minlength=size).reshape(shape).cumsum(axis=1)
    allowed = (counts >= least) & (count - counts >= least)
    gains = sums**2 / np.maximum(counts, 1) + (total - sums) ** 2 / np.maximum(count - counts, 1) - total**2 / count
    gains = np.where(allowed, gains, 0.0)
    domain, place = divmod(int(np.argmax(gains)), PLACES)
    gain = float(gains[domain, place])
    return (gain, domain, place) if gain > 1e-12 * max(float(target[rows] @ target[rows]), 1e-300) else (0.0, -1, 0)
