"""Gradient-boosted regression trees: the law that RegMix fits to its runs (Liu et al. 2024, arXiv:2407.01492).

    law = fit_trees(runs.mixtures, runs.losses.mean(axis=1))

scikit-learn's histogram trees with the settings that RegMix gives LightGBM, whose design they follow: 1,000 trees at a
rate of 0.01, of at most 31 leaves with 20 runs or more in each. Nothing is random. A tree is constant between its
splits: the law knows no trend beyond the runs, and ranks within them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from algorithms.mixture_regression import Matrix, checked_runs
from mixer.errors import InputError

__all__ = ["TreesLaw", "fit_trees"]


class TreesLaw(NamedTuple):
    """A fitted regressor for each loss."""

    regressors: tuple[Any, ...]

    def __call__(self, mixtures: Matrix) -> Matrix:
        """Return the predicted losses (N, M) of mixtures (N, D)."""
        w = np.asarray(mixtures, dtype=np.float64)
        return np.stack([regressor.predict(w) for regressor in self.regressors], axis=1)


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

    Raises: InputError: with fewer runs than two leaves take, values that are not finite, or without scikit-learn.

    >>> mixtures = np.random.default_rng(0).dirichlet(np.ones(3), 400)
    >>> law = fit_trees(mixtures, (mixtures[:, 0] > 0.5) + 1.0, num_trees=50, rate=0.2)
    >>> law(np.array([[0.8, 0.1, 0.1], [0.2, 0.4, 0.4]])).round(1).tolist()
    [[2.0], [1.0]]
    """
    w, y = checked_runs(mixtures, losses)
    if len(w) < 2 * least:
        raise InputError(f"trees with {least} runs or more in a leaf need {2 * least} runs; got {len(w)}.")
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError as error:
        raise InputError("boosted trees need scikit-learn: pip install 'domain-mixer[trees]'.") from error
    settings = {"max_iter": num_trees, "learning_rate": rate, "max_leaf_nodes": leaves, "min_samples_leaf": least}
    grown = (HistGradientBoostingRegressor(**settings, early_stopping=False, random_state=0) for _ in y.T)
    return TreesLaw(tuple(regressor.fit(w, column) for regressor, column in zip(grown, y.T)))
