"""Plots stay readable with many domains."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation

from algorithms.plots import plot_comparison, plot_trajectory
from mixer.pictures import GREY, MAX_NAMED, spread


@pytest.fixture
def figures(monkeypatch):
    """Keep the figures that are saved."""
    kept = []
    save = matplotlib.figure.Figure.savefig

    def listening(figure, *arguments, **options):
        kept.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", listening)
    return kept


@pytest.mark.parametrize("count", [2, 7, 12, 40])
def test_names_stand_apart_within_the_height_of_the_axes(tmp_path, figures, count):
    values = np.linspace(0.5, 0.501, count) + np.linspace(0, 1, 20)[:, None] * (np.arange(count) == 0)
    names = [f"domain-{index}" for index in range(count)]
    plot_trajectory(tmp_path / "t.png", names, np.arange(20), values, title="weights", unit="weight")
    (figure,) = figures
    (axes,) = figure.axes
    texts = sorted(figure.findobj(Annotation), key=lambda text: text.xyann[1])
    places = [axes.transAxes.transform((0, text.xyann[1]))[1] for text in texts]
    assert len(texts) == min(count, MAX_NAMED)
    height = 9 / 72 * figure.dpi  # of the font
    assert np.diff(places).min() > height
    assert places[0] >= axes.bbox.y0 - 1 and places[-1] <= axes.bbox.y1 + 1
    ends = [text.xy[1] for text in texts]
    assert ends == sorted(ends)


def test_of_many_domains_the_largest_and_the_most_moved_are_named_and_the_rest_grey(tmp_path, figures):
    values = np.full((20, 40), 0.3)
    values[:, 5] = 0.9  # large
    values[3, 9] = 0.7  # moved, and came back
    values[:, 11] = np.nan  # absent
    plot_trajectory(
        tmp_path / "t.png", [f"d{i}" for i in range(40)], np.arange(20), values, title="weights", unit="weight"
    )
    (figure,) = figures
    named = {text.get_text() for text in figure.findobj(Annotation)}
    assert {"d5", "d9"} <= named and "d11" not in named and len(named) == MAX_NAMED
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours.count(GREY) == 40 - MAX_NAMED


def test_what_comes_of_the_weights_is_marked_beside_where_they_ended(tmp_path, figures):
    values, result = np.linspace([0.9, 0.1], [0.3, 0.7], 20), np.array([0.6, 0.4])
    plot_trajectory(tmp_path / "t.png", ["a", "b"], np.arange(20), values, title="w", unit="weight", result=result)
    (figure,) = figures
    lines = figure.axes[0].lines
    marks = [line for line in lines if line.get_marker() == "D"]
    assert [mark.get_ydata().tolist() for mark in marks] == [[0.6], [0.4]]
    assert [mark.get_color() for mark in marks] == [line.get_color() for line in lines[:2]]


def test_a_comparison_names_its_runs_above_the_bars_however_many_domains_there_are(tmp_path, figures):
    losses = {run: {f"d{index}": 3.0 + index for index in range(40)} for run in ("main", "other", "third")}
    plot_comparison(tmp_path / "c.png", losses, baseline="main")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["other", "third"]
    legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
    assert axes.bbox.y1 - 1 <= legend.y0 < legend.y1 <= title.y0
    assert axes.get_ylim() == (39.5, -0.5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.2))
def test_places_keep_order_gap_and_bounds(places, gap):
    moved = spread(np.sort(places), gap)
    allowed = min(gap, 1 / max(len(places) - 1, 1))
    assert moved.min() >= -1e-9 and moved.max() <= 1 + 1e-9
    assert len(places) < 2 or np.diff(moved).min() >= allowed - 1e-9


def test_places_far_enough_apart_stay():
    np.testing.assert_allclose(spread(np.array([0.1, 0.4, 0.8]), 0.2), [0.1, 0.4, 0.8])
