"""A domain's order: an exact permutation per epoch, random access, and nothing else has a part in it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.errors import InputError
from mixer.order import WINDOW_SAMPLES, Order
from mixer.randomness import key, permutation, random_bits

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any)


@given(SIZES, st.integers(0, 2**63), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_epoch_holds_each_sample_once(sizes, seed, window, epoch):
    order = Order(seed, "web", sizes, window)
    n = sum(sizes)
    assert sorted(order.at(np.arange(epoch * n, (epoch + 1) * n)).tolist()) == list(range(n))


@given(SIZES, st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_any_position_is_the_same_whatever_was_read_before(sizes, window, data):
    n = sum(sizes)
    whole = Order(1, "web", sizes, window).at(np.arange(3 * n))
    order = Order(1, "web", sizes, window)
    for _ in range(5):
        first = data.draw(st.integers(0, 3 * n - 1))
        count = data.draw(st.integers(0, 3 * n - first))
        np.testing.assert_array_equal(order.take(first, count), whole[first : first + count])


@given(SIZES, st.integers(1, 40), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_shards_at_names_what_the_window_is_read_from(sizes, window, position):
    order = Order(1, "web", sizes, window)
    found = order.window(position)
    shards, end = order.shards_at(position)
    np.testing.assert_array_equal(shards, found.shards)
    assert end == found.epoch * order.num_samples + found.stop > position
    firsts = np.cumsum([0, *sizes])
    owners = np.searchsorted(firsts, found.samples, side="right") - 1
    assert set(owners.tolist()) <= set(shards.tolist())


@given(SIZES, SIZES, SIZES, st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_grown_domain_keeps_what_was_read_and_still_holds_every_sample_once(first, second, third, window, data):
    sizes, events, order = first, [], Order(5, "web", first, window)
    epoch, offset, read = data.draw(st.integers(0, 2)), 0, []
    for more in (second, third):
        stop = data.draw(st.integers(max(offset, 1), order.num_samples)) % order.num_samples or offset
        start = epoch * order.num_samples
        read += order.take(start + offset, max(stop - offset, 0)).tolist()
        offset = max(stop, offset)
        if offset:
            events.append((offset, order.num_samples))
        sizes = [*sizes, *more]
        order = Order(5, "web", sizes, window)
        order.grow(epoch, events)
        assert order.take(epoch * order.num_samples, offset).tolist() == read
    n = order.num_samples
    assert sorted(order.take(epoch * n, n).tolist()) == list(range(n))
    fresh = Order(5, "web", sizes, window)
    np.testing.assert_array_equal(order.take((epoch + 1) * n, n), fresh.take((epoch + 1) * n, n))


def test_growth_by_anything_but_new_shards_is_refused():
    with pytest.raises(InputError, match="'web' had 4 samples, and no shard ends there now"):
        Order(0, "web", [3, 3]).grow(0, [(2, 4)])


def test_seed_domain_and_epoch_all_change_the_order_and_do_not_add_up():
    def first(seed, domain, epoch):
        return tuple(Order(seed, domain, [100]).at(np.arange(epoch * 100, epoch * 100 + 100)).tolist())

    orders = {first(seed, domain, epoch) for seed in (0, 1, 2) for domain in ("a", "b") for epoch in (0, 1, 2)}
    assert len(orders) == 18


@pytest.mark.parametrize("num_samples", [10**9, 10**10])
def test_random_access_into_a_billion_samples_needs_no_table_of_them(num_samples):
    order = Order(0, "web", np.full(num_samples // 16_384, 16_384))
    tracemalloc.start()
    for position in (0, num_samples // 2, 2 * num_samples + 12_345):
        assert 0 <= order.take(position, 4).min() <= order.take(position, 4).max() < order.num_samples
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(order._sizes) + 30 * WINDOW_SAMPLES


def test_one_shard_of_a_billion_is_no_smaller_problem_than_many(monkeypatch):
    order = Order(0, "web", [1] * 5000, window_samples=100)
    assert len(order.window(0).shards) == 100


def test_neighbours_are_mixed_within_a_window_and_shards_within_an_epoch():
    order = Order(3, "web", [1000] * 40, window_samples=4000)
    samples = order.at(np.arange(40_000))
    assert abs(np.corrcoef(samples[:4000], np.arange(4000))[0, 1]) < 0.1
    assert len(set((samples[:4000] // 1000).tolist())) == 4
    firsts = [int(samples[start] // 1000) for start in range(0, 40_000, 4000)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [-1, 2]])
def test_domain_without_samples_has_no_order(sizes):
    with pytest.raises(InputError, match="'web' has no samples"):
        Order(0, "web", sizes)


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_permutation_holds_every_index_once(seed_key, count):
    assert sorted(permutation(seed_key, count).tolist()) == list(range(count))


def test_permutations_are_uniform():
    """All 24 orders of 4 appear equally often (chi-squared, 23 degrees of freedom, p < 1e-6 beyond 73)."""
    counts: dict[tuple[int, ...], int] = {}
    for i in range(24_000):
        order = tuple(permutation(key("test", i), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 73


def test_keys_tell_their_parts_apart():
    assert len({key(1, "a"), key(1, "b"), key("1", "a"), key("a", 1), key(11, "a"), key(1, 1, "a")}) == 6


def test_random_bits_are_splitmix64():
    """Known answers of the reference implementation (Vigna, splitmix64.c) seeded with 1234567."""
    assert random_bits(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


GOLDEN = Path(__file__).parent / "golden_order.json"


def test_order_for_a_seed_is_pinned():
    """A change here changes what every running training reads after its next restart: never by accident."""
    expected = json.loads(GOLDEN.read_text())
    order = Order(17, "web", [5, 3, 8, 1], window_samples=8)
    large = Order(17, "Ünïcode", np.full(70_000, 16_000))
    assert order.at(np.arange(51)).tolist() == expected["three epochs of 17 samples"]
    assert large.take(123_456_789_012, 5).tolist() == expected["samples at 123456789012 of 1.12e9"]
    assert permutation(key(17, "batch", 3), 12).tolist() == expected["places of batch 3 of 12"]
