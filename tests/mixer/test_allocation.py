"""Counts follow the weights at every prefix, however the weights move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.allocation import allocate, allocate_independently
from mixer.errors import InputError


def worst_error(weights_at, batch_size, num_batches):
    """Return the largest |target − count| of any domain at any prefix, from sums of its own."""
    target, given_, credit, worst = 0.0, 0, 0.0, 0.0
    for step in range(num_batches):
        w = weights_at(step)
        if step == 0:
            credit = np.zeros(len(w))
        counts, credit = allocate(w, credit, batch_size)
        assert counts.sum() == batch_size and counts.min() >= 0
        assert counts[w == 0].sum() == 0
        target, given_ = target + batch_size * w, given_ + counts
        np.testing.assert_allclose(target - given_, credit, atol=1e-6)
        worst = max(worst, np.abs(target - given_).max())
    return worst


def normal(w):
    return np.asarray(w, float) / np.sum(w)


@given(
    st.lists(st.floats(1e-9, 1), min_size=1, max_size=40),
    st.integers(1, 64),
)
@settings(max_examples=150, deadline=None)
def test_fixed_weights_stay_within_one_and_a_half_samples(weights, batch_size):
    assert worst_error(lambda _: normal(weights), batch_size, 60) <= 1.5


@given(st.integers(2, 40), st.integers(1, 64), st.integers(0, 2**32), st.sampled_from([0.05, 0.3, 1.0, 10.0]))
@settings(max_examples=150, deadline=None)
def test_weights_that_move_at_every_batch_stay_within_one_and_a_half_samples(domains, batch_size, seed, spread):
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(domains, spread), 60) + 1e-12
    assert worst_error(lambda step: normal(table[step]), batch_size, 60) <= 1.5


@pytest.mark.parametrize("batch_size", [8, 512])
@pytest.mark.parametrize("kind", ["uniform", "down to 1e-9", "one heavy", "drifting"])
def test_a_thousand_domains_stay_within_one_and_a_half_samples(kind, batch_size):
    rng, size = np.random.default_rng(0), 1000
    drift = np.cumsum(0.2 * rng.standard_normal((300, size)), axis=0)
    weights_at = {
        "uniform": lambda step: np.ones(size),
        "down to 1e-9": lambda step: np.geomspace(1, 1e-9, size),
        "one heavy": lambda step: np.r_[size, np.ones(size - 1)],
        "drifting": lambda step: np.exp(drift[step] - drift[step].max()) + 1e-9,
    }[kind]
    assert worst_error(lambda step: normal(weights_at(step)), batch_size, 300) <= 1.5


def test_rare_domain_keeps_its_share():
    weights, credit, total = np.array([1 - 1e-4, 1e-4]), np.zeros(2), 0
    for _ in range(10_000):
        counts, credit = allocate(weights, credit, 16)
        total += counts
    assert total.tolist() == [159_984, 16]


def test_opponent_reaches_the_harmonic_bound_and_no_more():
    """Weight only on those passed over: no rule without foresight does better than 1/2 + 1/3 + … + 1/D."""
    size = 30
    waiting, credit = np.ones(size, bool), np.zeros(size)
    worst = 0.0
    while waiting.sum() > 1:
        counts, credit = allocate(normal(waiting), credit, 1)
        waiting &= counts == 0
        worst = max(worst, np.abs(credit).max())
    harmonic = sum(1 / k for k in range(2, size + 1))
    assert 1.5 < worst <= harmonic + 1e-9


def test_equal_claims_go_to_the_lower_id():
    counts, _ = allocate(np.full(4, 0.25), np.zeros(4), 2)
    assert counts.tolist() == [1, 1, 0, 0]


def test_domain_of_weight_zero_is_not_drawn_even_if_owed():
    counts, credit = allocate(np.array([1.0, 0.0]), np.array([-0.9, 0.9]), 3)
    assert counts.tolist() == [3, 0] and credit[1] == 0.9


def test_more_whole_samples_owed_than_fit_are_taken_from_those_who_can_wait():
    counts, credit = allocate(np.array([0.5, 0.3, 0.2]), np.array([3.2, 2.9, -6.1]), 2)
    assert counts.tolist() == [1, 1, 0] and counts.min() >= 0
    np.testing.assert_allclose(credit, [3.2, 2.5, -5.7])


def test_arguments_are_not_changed():
    weights, credit = np.array([0.6, 0.4]), np.array([0.1, -0.1])
    allocate(weights, credit, 7)
    assert weights.tolist() == [0.6, 0.4] and credit.tolist() == [0.1, -0.1]


def test_no_positive_weight_is_refused():
    with pytest.raises(InputError, match="no domain has a positive weight"):
        allocate(np.zeros(2), np.zeros(2), 4)


def test_independent_draws_depend_on_seed_and_step_alone_and_follow_the_weights():
    weights = np.array([0.7, 0.0, 0.3])
    counts = [allocate_independently(weights, 100, 5, step) for step in range(400)]
    assert all(c.sum() == 100 and c[1] == 0 for c in counts)
    assert (allocate_independently(weights, 100, 5, 7) == counts[7]).all()
    assert (allocate_independently(weights, 100, 6, 7) != counts[7]).any()
    share = np.sum(counts, axis=0)[0] / 40_000
    assert abs(share - 0.7) < 5 * np.sqrt(0.21 / 40_000)
