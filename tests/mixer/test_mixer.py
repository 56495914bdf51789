"""The plan: counters in, draws out; the same however it is stopped, resumed, re-weighted and cut into batches."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.errors import ExhaustedError, InputError
from mixer.exhaustion import EXHAUSTION
from mixer.mixer import Mixer, RunEnded
from tests.helpers import assert_resumes, assert_same

SIZES = {"book": 5, "code": 60, "web": 200}


def make(**options):
    return Mixer(options.pop("sizes", SIZES), **{"weights": [0.2, 0.3, 0.5], "batch_size": 8, "seed": 3, **options})


def step(mixer):
    """Plan a batch; a state in itself when the run is over."""
    try:
        return mixer.next_batch()
    except (RunEnded, ExhaustedError) as end:
        return str(end)


def positions_by_domain(mixer, batches):
    """Return each domain's positions in the order in which they were planned."""
    found = {name: [] for name in mixer.names}
    for _ in range(batches):
        draws = mixer.next_batch()
        for domain, name in enumerate(mixer.names):
            found[name] += sorted(draws.positions[draws.domain_ids == domain].tolist())
    return found


def test_every_position_of_every_domain_is_drawn_once_and_in_order():
    mixer = make()
    found = positions_by_domain(mixer, 50)
    assert all(found[name] == list(range(len(found[name]))) for name in SIZES)
    assert sum(map(len, found.values())) == 400
    assert mixer.drawn.tolist() == [80, 120, 200]


def test_batch_lists_its_draws_in_a_seeded_order():
    draws, again, other = make().next_batch(), make().next_batch(), make(seed=4).next_batch()
    assert_same(draws, again)
    assert sorted(draws.domain_ids.tolist()) == sorted(other.domain_ids.tolist())
    assert draws.places.tolist() != other.places.tolist()
    listed = np.repeat(np.arange(3), draws.counts)
    np.testing.assert_array_equal(listed[draws.places], draws.domain_ids)


def test_weights_are_normalised_and_default_to_sizes():
    np.testing.assert_allclose(make(weights=None).weights, np.array([5, 60, 200]) / 265)
    np.testing.assert_allclose(make(weights={"web": 6, "code": 3, "book": 1}).weights, [0.1, 0.3, 0.6])


@pytest.mark.parametrize("independent", [False, True])
def test_mixer_resumes_at_every_step(independent):
    def moving(mixer):
        if mixer.step % 4 == 1:
            mixer.set_weights([1, mixer.step, 2])
        if mixer.step % 7 == 2:
            mixer.schedule(mixer.step + 5, [3, 1, mixer.step], ramp=3)
        return mixer.next_batch()

    assert_resumes(lambda: make(independent=independent), 40, moving)


@pytest.mark.parametrize("policy", EXHAUSTION)
@pytest.mark.parametrize("limits", [1, 2.5, {"book": 1.0, "code": 2.0, "web": 1.5}])
def test_every_policy_keeps_within_max_epochs_ends_and_resumes(policy, limits):
    def limited():
        return make(on_exhausted=policy, max_epochs=limits)

    mixer, ended = limited(), None
    allowed = [limits.get(n, 1) * size if isinstance(limits, dict) else limits * size for n, size in SIZES.items()]
    for _ in range(200):
        before = mixer.state_dict()
        result = step(mixer)
        assert (mixer.positions <= allowed).all()
        if isinstance(result, str):
            ended = result
            assert mixer.state_dict() == before, "a batch that cannot be planned moves nothing"
            assert step(mixer) == ended
            break
    assert ended is not None
    assert_resumes(limited, mixer.step + 3, step)


def test_repeat_without_a_limit_goes_on_for_ever():
    mixer = make(sizes={"a": 1, "b": 1000}, weights=[0.5, 0.5])
    for _ in range(1000):
        mixer.next_batch()
    assert mixer.positions.tolist() == [4000, 4000]


def test_repeat_beyond_its_limit_names_domain_epochs_and_the_three_ways_out():
    mixer = make(max_epochs=2)
    with pytest.raises(ExhaustedError, match=r"'book' after 2 epochs.*'drop'.*'stop'.*max_epochs"):
        for _ in range(100):
            mixer.next_batch()
    assert mixer.positions[0] <= 10


def test_drop_gives_the_weight_to_the_others_in_proportion_and_uses_the_last_sample():
    mixer = make(on_exhausted="drop", max_epochs={"book": 1})
    for _ in range(10):
        mixer.next_batch()
    assert mixer.positions[0] == 5
    before = mixer.drawn
    for _ in range(10):
        mixer.next_batch()
    assert (mixer.drawn - before)[0] == 0
    np.testing.assert_allclose(mixer.drawn - before, [0, 30, 50], atol=1.5)


def test_drop_and_stop_allow_one_epoch_unless_told_otherwise():
    for policy in ("drop", "stop"):
        assert make(on_exhausted=policy).sample_limits.tolist() == [5, 60, 200]


def test_drop_ends_when_nothing_is_left():
    mixer = make(on_exhausted="drop")
    with pytest.raises(RunEnded, match="every domain with a positive weight is used up"):
        for _ in range(1000):
            mixer.next_batch()
    assert 265 - mixer.positions.sum() < 8


@pytest.mark.parametrize("policy", EXHAUSTION)
def test_a_batch_that_cannot_be_filled_moves_nothing(policy):
    mixer = make(sizes={"a": 8}, weights=[1], max_epochs=1, on_exhausted=policy)
    mixer.next_batch()
    mixer.set_weights([1])
    before = mixer.state_dict()
    with pytest.raises((RunEnded, ExhaustedError)):
        mixer.next_batch()
    assert mixer.state_dict() == before


def test_run_may_go_on_with_fewer_epochs_than_a_domain_was_read():
    mixer = make()
    for _ in range(5):
        mixer.next_batch()  # of "book" more than one epoch
    state, others = mixer.state_dict(), make(on_exhausted="drop")
    others.load_state_dict(state)
    assert others.next_batch().counts[0] == 0
    refusing = make(max_epochs=1)
    refusing.load_state_dict(state)
    with pytest.raises(ExhaustedError, match="'book' after 1 epochs"):
        refusing.next_batch()


def test_fraction_of_an_epoch_is_not_lost_to_rounding():
    assert make(sizes={"a": 30}, weights=[1], max_epochs=0.1, on_exhausted="stop").sample_limits.tolist() == [3]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 17),
    st.sampled_from(sorted(EXHAUSTION)),
    st.one_of(st.none(), st.floats(0.3, 3)),
    st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_prefix_error_stays_within_bounds_while_weights_move_and_domains_run_out(sizes, batch, policy, limit, seed):
    rng = np.random.default_rng(seed)
    names = {f"d{i}": size for i, size in enumerate(sizes)}
    mixer = Mixer(names, batch_size=batch, seed=seed, on_exhausted=policy, max_epochs=limit)
    for _ in range(40):
        if rng.random() < 0.5:
            mixer.set_weights(rng.dirichlet(np.full(len(sizes), 0.5)) + 1e-9)
        result = step(mixer)
        if isinstance(result, str):
            break
        assert result.counts.sum() == batch and result.counts.min() >= 0
        assert np.abs(mixer.credit).max() <= 1.5
        if mixer.sample_limits is not None:
            assert (mixer.positions <= mixer.sample_limits).all()


# --- weights over time ---------------------------------------------------------------------------------------------


def test_set_weights_decides_the_very_next_batch():
    mixer = make()
    mixer.next_batch()
    mixer.set_weights([0, 1, 0])
    assert mixer.next_batch().counts.tolist() == [0, 8, 0]


def test_schedule_takes_effect_at_its_batch():
    mixer = make(weights=[1, 0, 0])
    mixer.schedule(3, [0, 0, 1])
    mixer.schedule(5, {"book": 0, "code": 1, "web": 0})
    counts = [mixer.next_batch().counts.tolist() for _ in range(6)]
    assert counts == [[8, 0, 0]] * 3 + [[0, 0, 8]] * 2 + [[0, 8, 0]]


def test_ramp_moves_in_a_straight_line_from_the_weights_in_force():
    mixer = make(weights=[1, 0, 0])
    mixer.schedule(6, [0, 0, 1], ramp=4)
    seen = []
    for _ in range(8):
        seen.append(mixer.weights.tolist())
        mixer.next_batch()
    expected = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    np.testing.assert_allclose(seen, [[1 - w, 0, w] for w in expected], atol=1e-12)


def test_scheduling_the_past_is_refused():
    mixer = make()
    mixer.next_batch()
    with pytest.raises(InputError, match="batch 1 is the next to be planned"):
        mixer.schedule(0, [1, 1, 1])


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"book": 1, "web": 1}, r"unknown \[\], missing \['code'\]"),
        ({"book": 1, "web": 1, "code": 1, "wiki": 1}, r"unknown \['wiki'\]"),
        ([1, 1], r"shape \(2,\)"),
        ([1, -1, 1], "'code': -1"),
        ([np.nan, 1, 1], "'book': nan"),
        ([0, 0, 0], "only zeros"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(weights, text):
    mixer = make()
    before = mixer.state_dict()
    with pytest.raises(InputError, match=text):
        mixer.set_weights(weights)
    assert mixer.state_dict() == before


def test_domain_without_samples_cannot_have_weight():
    with pytest.raises(InputError, match=r"without a single sample.*'b'"):
        Mixer({"a": 3, "b": 0}, weights=[1, 1], batch_size=2)
    mixer = Mixer({"a": 3, "b": 0}, weights=[1, 0], batch_size=2)
    assert mixer.next_batch().counts.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch size must be >= 1"),
        ({"sizes": {}}, "at least one domain"),
        ({"max_epochs": 0}, "max_epochs must be > 0"),
        ({"max_epochs": {"wiki": 1}}, r"unknown domains \['wiki'\]"),
        ({"on_exhausted": "explode"}, r"\['drop', 'repeat', 'stop'\]; got 'explode'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, text):
    with pytest.raises(InputError, match=text):
        make(**options)


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tokens", [False, True], ids=["by samples", "by tokens"])
def test_state_is_small_constant_and_readable(by_tokens):
    names = [f"{i:03}" for i in range(300)]
    mixer = Mixer(
        dict.fromkeys(names, 10**10),
        weights=dict(zip(names, np.geomspace(1, 1e-9, 300))),
        batch_size=64,
        fingerprints={name: hashlib.sha256(name.encode()).hexdigest() for name in names},
        mean_tokens=dict.fromkeys(names, 1234.5) if by_tokens else None,
    )
    state = mixer.state_dict()
    for domain in state["domains"].values():  # after 300 epochs of every domain
        domain.update(position=3 * 10**12, **({"tokens": 4 * 10**15} if by_tokens else {}))
    mixer.load_state_dict(state)
    sizes = []
    for _ in range(400):
        mixer.next_batch()
        sizes.append(len(json.dumps(mixer.state_dict())))
    assert max(sizes) / 300 < 200
    assert json.loads(json.dumps(mixer.state_dict())) == mixer.state_dict()


def test_batch_size_may_change_on_resume_without_a_gap():
    mixer = make()
    first = positions_by_domain(mixer, 10)
    other = make(batch_size=5, weights=[1, 1, 1])
    other.load_state_dict(mixer.state_dict())
    second = positions_by_domain(other, 16)
    for name in SIZES:
        assert first[name] + second[name] == list(range(len(first[name]) + len(second[name])))
    np.testing.assert_allclose(other.drawn, 160 * np.array([0.2, 0.3, 0.5]), atol=1.5)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 4}, "state has seed 3, this run 4"),
        ({"sizes": {"book": 5, "code": 61, "web": 200}}, "'code' had 60 samples, has 61"),
        (
            {"sizes": {"book": 5, "code": 60, "wiki": 200}},
            r"\['book', 'code', 'web'\], these shards \['book', 'code', 'wiki'\]",
        ),
        ({"fingerprints": {"book": "sha256:bbb"}}, "'book' had fingerprint sha256:aaa, has sha256:bbb"),
    ],
)
def test_state_of_other_data_is_refused_with_both_sides_named(other, text):
    state = make(fingerprints={"book": "sha256:aaa"}).state_dict()
    with pytest.raises(InputError, match=text):
        make(**other).load_state_dict(state)


def test_something_else_is_not_taken_for_a_state():
    with pytest.raises(InputError, match="not a mixer state"):
        make().load_state_dict({"model": 1})


def test_remap_keeps_what_was_consumed_adds_and_drops():
    mixer = make()
    for _ in range(10):
        mixer.next_batch()
    other = Mixer({"code": 60, "web": 200, "wiki": 40}, weights=[0.25, 0.25, 0.5], batch_size=8, seed=3)
    other.load_state_dict(mixer.state_dict(), remap=True)
    assert other.positions.tolist() == [24, 40, 0] and other.step == 10
    assert other.weights.tolist() == [0.25, 0.25, 0.5]
    assert other.next_batch().firsts.tolist() == [24, 40, 0]
