"""``project`` is the KL projection: feasible, optimal, exact at the corners; the static weights are special cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixer.errors import InputError
from mixer.projection import project
from mixer.static_weights import STATIC_WEIGHTS, proportional, temperature, uniform, unimax

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1.0), st.floats(1e-9, 1.0)), min_size=1, max_size=12)


@st.composite
def problems(draw):
    w = np.array(draw(WEIGHTS))
    assume(w.any())
    unit = st.floats(0, 1)
    lo = np.array(draw(st.lists(unit, min_size=len(w), max_size=len(w)))) / len(w)
    hi = lo + np.array(draw(st.lists(st.floats(0, 2), min_size=len(w), max_size=len(w))))
    assume(lo.sum() < 1 and np.where(w > 0, hi, lo).sum() > 1 + 1e-6)
    return w, lo, hi


@given(problems())
@settings(max_examples=300, deadline=None)
def test_projection_is_feasible_and_one_scale_explains_every_free_entry(problem):
    w, lo, hi = problem
    x = project(w, lo, hi)
    assert abs(x.sum() - 1) < 1e-9
    assert (x >= lo).all() and (x <= hi).all()
    free = (w > 1e-200) & (x > lo) & (x < hi)
    if free.any():
        scale = (x[free] / w[free]).max()
        np.testing.assert_allclose(x[free], scale * w[free], rtol=1e-9)
        at_floor, at_ceiling = (x == lo) & (w > 0) & ~free, (x == hi) & (w > 0) & ~free
        assert (scale * w[at_floor & ~at_ceiling] <= lo[at_floor & ~at_ceiling] * (1 + 1e-9)).all()
        assert (scale * w[at_ceiling & ~at_floor] >= hi[at_ceiling & ~at_floor] * (1 - 1e-9)).all()


@given(problems(), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_projection_ignores_the_scale_of_the_weights_and_repeats_itself(problem, scale):
    w, lo, hi = problem
    x = project(w, lo, hi)
    np.testing.assert_allclose(project(w * scale, lo, hi), x, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(project(x, lo, hi), x, rtol=1e-6, atol=1e-9)


def test_weights_of_1e_300_stay_proportional():
    np.testing.assert_allclose(project([1, 1e-300, 3e-300], upper=[0.6, 1, 1]), [0.6, 0.1, 0.3])


def test_domain_of_weight_zero_keeps_its_floor_and_gets_no_more():
    np.testing.assert_allclose(project([0, 1, 1], lower=[0.2, 0, 0]), [0.2, 0.4, 0.4])


def test_weights_within_the_bounds_are_kept():
    np.testing.assert_allclose(project([0.2, 0.3, 0.5], 0.1, 0.6), [0.2, 0.3, 0.5], rtol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1, 1], 0.6), r"sum to 1\.2 > 1 \(domain 0 0\.6"),
        (([1, 1], 0, 0.4), r"may take 0\.8 in all"),
        (([1, 0], 0, [0.4, 1]), r"may take 0\.4 in all"),
        (([1, 1], 0.5, 0.4), r"floors domain 0 0\.5"),
        (([1, -1],), "finite numbers >= 0"),
        (([0, 0],), "at least one positive"),
        (([1, np.nan],), "finite"),
        (([1, 1], [0.1, 0.1, 0.1]), "one per domain"),
    ],
)
def test_impossible_bounds_are_refused_with_the_arithmetic(arguments, text):
    with pytest.raises(InputError, match=text):
        project(*arguments)


def test_errors_name_the_domains():
    with pytest.raises(InputError, match=r"web 0\.3"):
        project([1, 1], upper=[0.5, 0.3], names=["code", "web"])


# --- static weights ------------------------------------------------------------------------------------------------

SIZES = np.array([5.0, 4000.0, 300.0, 20.0])
SETTINGS = {"tau": 3.0, "budget": 1000.0, "max_epochs": 2.0}


@pytest.mark.parametrize("name", STATIC_WEIGHTS)
def test_every_static_rule_gives_weights_whatever_the_order_and_unit(name):
    function, takes = STATIC_WEIGHTS[name]
    options = {key: SETTINGS[key] for key in takes}
    weights = function(SIZES, **options)
    assert weights.min() > 0 and abs(weights.sum() - 1) < 1e-12
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(function(SIZES[order], **options), weights[order])
    scaled = {key: value * 7 if key == "budget" else value for key, value in options.items()}
    np.testing.assert_allclose(function(SIZES * 7, **scaled), weights)


def test_temperature_runs_from_proportional_to_uniform():
    np.testing.assert_allclose(temperature(SIZES, 1), proportional(SIZES))
    np.testing.assert_allclose(temperature(SIZES, 1e12), uniform(4), rtol=1e-9)


def unimax_as_published(sizes, budget, max_epochs):
    """Algorithm 1 of arXiv:2304.09151: share what is left equally, smallest domain first, capped at N epochs."""
    left, given = budget, {}
    order = np.argsort(sizes)
    for rank, i in enumerate(order):
        equal = left / (len(sizes) - rank)
        given[i] = min(equal, sizes[i] * max_epochs)
        left -= given[i]
    amounts = np.array([given[i] for i in range(len(sizes))])
    return amounts / amounts.sum()


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=10), st.floats(0.01, 0.99), st.floats(0.5, 16))
@settings(max_examples=100, deadline=None)
def test_unimax_is_the_published_algorithm(sizes, part, epochs):
    n = np.array(sizes)
    budget = part * n.sum() * epochs
    np.testing.assert_allclose(unimax(n, budget, epochs), unimax_as_published(n, budget, epochs), rtol=1e-9)


def test_unimax_beyond_all_data_is_refused_with_the_epochs_it_would_take():
    with pytest.raises(InputError, match=r"budget of 1,000 .* max_epochs to at least 10"):
        unimax([60, 40], 1000, 4)


@pytest.mark.parametrize("sizes", [[], [0, 0], [-1, 2], [np.inf]])
def test_unusable_sizes_are_refused(sizes):
    with pytest.raises(InputError, match="sizes must be"):
        proportional(sizes)
