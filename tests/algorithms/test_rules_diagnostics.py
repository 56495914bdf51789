"""What a run's losses say about what helps what."""

from __future__ import annotations

import numpy as np
import pytest

from algorithms.rules.diagnostics import agreement, hindsight, transfer_from_history
from mixer.errors import InputError


def history(truth, num_intervals, noise, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(truth.shape[1]), num_intervals)
    drops = weights @ truth.T + noise * rng.normal(size=(num_intervals, truth.shape[0]))
    return weights, 5.0 - np.concatenate([np.zeros((1, truth.shape[0])), np.cumsum(drops, axis=0)])


def test_the_matrix_is_found_from_noisy_drops():
    truth = np.random.default_rng(1).uniform(0, 0.1, (6, 4))
    found = transfer_from_history(*history(truth, 300, noise=0.005))
    np.testing.assert_allclose(found, truth, atol=0.01)
    assert agreement(found, truth) > 0.9


def test_a_diagonal_guess_disagrees_where_help_comes_from_elsewhere():
    """Training on the first domain helps all others; the losses of the second are the highest."""
    truth = np.array([[0.1, 0.0, 0.0], [0.1, 0.0, 0.0], [0.1, 0.0, 0.0]])
    measured = transfer_from_history(*history(truth, 100, noise=0.001))
    assert agreement(np.diag([0.5, 2.0, 0.5]), measured) < 0
    assert agreement(np.diag([2.0, 0.5, 0.5]), measured) > 0.99


def test_hindsight_tells_a_rule_that_went_the_right_way_from_one_that_chased_noise():
    """Only the first domain teaches anything; weights drift to it, or away from it, with jitter."""
    rng = np.random.default_rng(2)
    for sign in (1, -1):
        drift = sign * np.linspace(0, 1.5, 80)[:, None] * np.array([1.0, -0.5, -0.5]) + rng.normal(0, 0.3, (80, 3))
        weights = np.exp(drift) / np.exp(drift).sum(axis=1, keepdims=True)
        drops = weights[:-1, :1] * np.array([[0.1, 0.05]]) + rng.normal(0, 0.002, (79, 2))
        losses = 5 - np.concatenate([np.zeros((1, 2)), np.cumsum(drops, axis=0)])
        assert sign * hindsight(weights, losses) > 0.8
    assert hindsight(weights, np.full((80, 3), np.nan)) is None
    assert hindsight(weights[:4], losses[:4]) is None, "too few intervals for three domains"


def test_constant_weights_tell_nothing_about_differences_and_shapes_are_checked():
    weights = np.tile([0.25, 0.75], (10, 1))
    losses = 5.0 - 0.1 * np.arange(11.0)[:, None]
    np.testing.assert_allclose(transfer_from_history(weights, losses), [[0.1, 0.1]], atol=1e-3)
    assert agreement(np.eye(2), np.ones((1, 2))) == 0.0
    with pytest.raises(InputError, match=r"got \(10, 2\) and \(10, 1\)"):
        transfer_from_history(weights, losses[:-1])
