"""Early stop with extrapolated weights, the noise-aware stop of rounds, and the stop on the worst domain."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from algorithms.rules.doremi import doremi
from algorithms.rules.stopping import drift, extrapolate, round_verdict, standard_error, worst_domain_stop
from algorithms.signals import Signals
from mixer.errors import InputError


def transient(num_steps, time_constant=50.0):
    """Weights that start at one domain and settle at (0.2, 0.8)."""
    start = np.exp(-np.arange(num_steps) / time_constant)
    return np.column_stack([0.2 + 0.8 * start, 0.8 - 0.8 * start])


def autoregressive(rng, num_steps, memory=0.95):
    noise, values = rng.normal(0, 0.01, num_steps), np.zeros(num_steps)
    for step in range(1, num_steps):
        values[step] = memory * values[step - 1] + noise[step]
    return np.column_stack([0.5 + values, 0.5 - values])


def test_extrapolation_is_closer_to_the_full_run_than_the_mean_so_far():
    full = transient(1000)
    early = full[:300]
    expected = full.mean(axis=0)
    assert np.abs(extrapolate(early, 1000) - expected).max() < 0.01
    assert np.abs(early.mean(axis=0) - expected).max() > 0.08


def test_extrapolation_over_the_whole_run_is_the_mean_that_doremi_returns():
    rule = doremi()
    state, path = rule.init(["a", "b"]), []
    rng = np.random.default_rng(0)
    for _ in range(60):
        excess = rng.random(2)
        state, weights = rule.update(state, Signals(np.ones(2), excess, reference_loss=excess, clipped_excess=excess))
        path.append(weights)
    np.testing.assert_allclose(extrapolate(np.array(path), 60), rule.result(state), atol=1e-12)


def test_drift_tells_settled_runs_from_moving_ones():
    assert drift(transient(900)) < 1e-3
    assert drift(transient(30)) > 0.05


def test_the_bootstrap_error_covers_the_spread_of_independent_runs():
    rng = np.random.default_rng(0)
    paths = [autoregressive(rng, 1500) for _ in range(60)]
    spread = np.std([path.mean(axis=0) for path in paths], axis=0)
    errors = np.array([standard_error(path, np.random.default_rng(1)) for path in paths]).mean(axis=0)
    np.testing.assert_allclose(errors, spread, rtol=0.35)
    # Resampling single steps would miss the correlation between them.
    single = standard_error(paths[0], np.random.default_rng(1), block=1)
    assert np.all(errors > 3 * single)
    assert np.array_equal(
        standard_error(paths[0], np.random.default_rng(1)), standard_error(paths[0], np.random.default_rng(1))
    )


def test_rounds_stop_by_tolerance_or_by_noise_and_say_which():
    before = np.array([0.5, 0.3, 0.2])
    still = round_verdict(before, before + np.array([5e-4, -5e-4, 0]), errors=np.full(3, 1e-5))
    assert still.stop and still.reason == "no weight changed by 0.001"
    noisy = round_verdict(before, before + np.array([0.02, -0.02, 0]), errors=np.array([0.015, 0.02, 0.001]))
    assert noisy.stop and noisy.reason == "every change is within 2 standard errors"
    moving = round_verdict(before, before + np.array([0.02, -0.02, 0]), errors=np.array([0.005, 0.02, 0.001]))
    assert not moving.stop and moving.largest_change == pytest.approx(0.02)
    assert "its noise is 0.01" in moving.reason


def test_rounds_that_only_repeat_their_noise_are_told_from_rounds_that_move():
    """Rounds around one fixed point never come within 0.001 of each other; that they stand still is known all the same.

    Two standard errors let 95 % of them end, in each comparison of two.
    """
    rng = np.random.default_rng(5)
    rounds = [autoregressive(rng, 1500) for _ in range(30)]

    def verdict(before, after, shift=0.0):
        errors = (
            standard_error(before, np.random.default_rng(0)) ** 2 + standard_error(after, np.random.default_rng(1)) ** 2
        )
        return round_verdict(before.mean(0), after.mean(0) + np.array([shift, -shift]), np.sqrt(errors))

    still = [verdict(before, after) for before, after in pairwise(rounds)]
    assert np.mean([one.largest_change < 1e-3 for one in still]) < 0.3
    assert np.mean([one.stop for one in still]) > 0.8
    moved = [verdict(before, after, shift=0.1) for before, after in pairwise(rounds)]
    assert not any(one.stop for one in moved)


def test_the_worst_domain_is_judged_above_its_reference():
    heldout = np.array([[4.1, 3.0], [4.1, 2.5], [4.1, 2.6], [4.1, 2.7]])
    assert worst_domain_stop(heldout, patience=2) == (True, 0)  # the noise domain hides everything
    assert worst_domain_stop(heldout, reference=np.array([4.1, 1.0]), patience=2) == (True, 1)
    assert worst_domain_stop(heldout, reference=np.array([4.1, 1.0]), patience=3) == (False, 1)


def test_rows_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match=r"finite rows of shape \(T, D\)"):
        extrapolate(np.array([[np.nan, 1.0]]), 10)
    with pytest.raises(InputError, match="at least 3 rows"):
        drift(np.ones((2, 2)))
