"""What holds for every row of ``UPDATE_RULES``: a new row is tested by being there."""

from __future__ import annotations

import copy
import inspect
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.rules import CATALOGUE, UPDATE_RULES, state_from_dict, state_to_dict
from algorithms.rules.base import as_domains
from algorithms.rules.bounds import bounded
from algorithms.rules.steps import normalized
from algorithms.signals import Signals
from mixer.errors import InputError
from tests.algorithms.rule_cases import (
    REQUIRED,
    VARIANTS,
    domains_for,
    equal_signals,
    make,
    names_for,
    permuted,
    random_signals,
)
from tests.helpers import assert_resumes

EVERY = pytest.mark.parametrize("name", list(UPDATE_RULES))
WITH_VARIANTS = pytest.mark.parametrize("name", [*UPDATE_RULES, *VARIANTS])
# Its probes take turns in the order of the domains, which is alphabetical everywhere.
ORDERED = {"aioli", "aioli:memory"}
NUM_UPDATES = 24


def absences(seed: int, num_domains: int) -> list[int]:
    """Which domains are missing from the batch of this seed: often none, sometimes all but one."""
    rng = np.random.default_rng((seed, 1))
    return rng.permutation(num_domains)[: int(rng.integers(0, num_domains))].tolist() if rng.random() < 0.5 else []


def signals_of(step: int, num_domains: int) -> Signals:
    return random_signals(step, num_domains, absences(step, num_domains))


def run(rule, domains, num_updates=NUM_UPDATES, signals=signals_of):
    state, path = rule.init(domains), []
    for step in range(num_updates):
        state, weights = rule.update(state, signals(step, len(domains.names)))
        path.append(weights)
    return state, np.array(path)


def leaves(state):
    for value in state:
        yield from leaves(value) if hasattr(value, "_asdict") else (value,)


def assert_mixture(weights, size):
    assert weights.shape == (size,) and weights.dtype == np.float64
    assert np.all(np.isfinite(weights)) and np.all(weights >= 0)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


@WITH_VARIANTS
def test_weights_are_a_mixture_after_every_update(name):
    rule, domains = make(name), domains_for(name)
    size = len(domains.names)
    state = rule.init(domains)
    assert_mixture(rule.weights(state), size)
    assert_mixture(rule.result(state), size)
    for step in range(NUM_UPDATES):
        state, weights = rule.update(state, signals_of(step, size))
        assert_mixture(weights, size)
        assert_mixture(rule.result(state), size)
        assert np.array_equal(rule.weights(state), weights)


@EVERY
def test_weights_move_unless_the_rule_is_fixed(name):
    rule, domains = make(name), domains_for(name)
    state, path = run(rule, domains)
    moved = not np.allclose(path[-1], rule.weights(rule.init(domains)), atol=1e-6)
    fixed = {"erm", "uniform", "temperature", "unimax", "preset", "given"}
    if name == "jtt":  # only its result moves
        assert not moved and not np.allclose(rule.result(state), path[-1], atol=1e-6)
    else:
        assert moved == (name not in fixed)


@WITH_VARIANTS
def test_states_hold_float64_arrays_and_ints(name):
    state, _ = run(make(name), domains_for(name), 3)
    for value in leaves(state):
        assert isinstance(value, np.ndarray | int) and not isinstance(value, bool)
        assert isinstance(value, int) or value.dtype == np.float64


class Searching:
    """A rule with its state, as ``assert_resumes`` wants it: one step is one update."""

    def __init__(self, rule, domains):
        self.rule, self.size, self.state, self.step = rule, len(domains.names), rule.init(domains), 0

    def state_dict(self):
        return {"rule": state_to_dict(self.state), "step": self.step}

    def load_state_dict(self, saved):
        self.state, self.step = state_from_dict(self.state, saved["rule"]), saved["step"]

    def __next__(self):
        self.state, weights = self.rule.update(self.state, signals_of(self.step, self.size))
        self.step += 1
        return weights, self.rule.result(self.state), *leaves(self.state)


@WITH_VARIANTS
def test_states_resume_to_the_bit_through_json_at_every_update(name):
    assert_resumes(lambda: Searching(make(name), domains_for(name)), steps=10)


@EVERY
def test_the_same_signals_give_the_same_bits(name):
    domains = domains_for(name)
    assert np.array_equal(run(make(name), domains)[1], run(make(name), domains)[1])


@EVERY
def test_settings_of_the_wrong_kind_are_one_clear_error(name):
    names, required = names_for(name), REQUIRED[name](names_for(name)) if name in REQUIRED else {}
    for setting in inspect.signature(UPDATE_RULES[name]).parameters:
        for wrong in ("no", "", -1.5, float("nan"), float("inf"), [1], {"x": "y"}, True, b"x"):
            is_flag = wrong is True and setting in ("automatic", "clip", "partial")
            signed = wrong == -1.5 and setting in ("adjustment", "baseline", "lower")
            if is_flag or signed:
                continue
            with pytest.raises(InputError) as caught:
                UPDATE_RULES[name](**{**required, setting: wrong}).init(as_domains(names))
            assert len(str(caught.value)) < 400, "a sentence"


@WITH_VARIANTS
def test_arguments_are_not_changed(name):
    rule, domains = make(name), domains_for(name)
    state = rule.init(domains)
    for step in range(NUM_UPDATES):
        signals = signals_of(step, len(domains.names))
        before = copy.deepcopy([*leaves(state), *signals])
        new, _ = rule.update(state, signals)
        rule.weights(state), rule.result(state)
        np.testing.assert_equal([*leaves(state), *signals], before)
        state = new


@WITH_VARIANTS
def test_sums_of_any_split_give_the_same_bits(name):
    rule, domains = make(name), domains_for(name)
    size = len(domains.names)

    def parts(step, size):
        return [random_signals(100 * step + part, size, absences(100 * step + part, size)) for part in range(3)]

    def left_to_right(step, size):
        a, b, c = parts(step, size)
        return (a + b) + c

    def other_ranks_first(step, size):
        a, b, c = parts(step, size)
        return c + (b + a)

    first = run(rule, domains, 8, left_to_right)[1]
    second = run(rule, domains, 8, other_ranks_first)[1]
    assert np.array_equal(first, second)
    assert left_to_right(0, size).gradient_counts is not None


@WITH_VARIANTS
def test_order_of_domains_is_irrelevant(name):
    if name in ORDERED:
        pytest.skip("its probes take turns in the order of the domains")
    names = names_for(name)
    order = [3, 0, 2, 1, 4][: len(names)] if len(names) == 5 else [3, 0, 2, 1]
    straight = run(make(name), domains_for(name))[1]

    def reordered(step, size):
        return permuted(signals_of(step, size), order)

    shuffled = run(make(name), domains_for(name, [names[i] for i in order]), signals=reordered)[1]
    tolerance = 1e-6 if name == "doremi:official" else 1e-9  # it adds float32 numbers, in the order of the domains
    np.testing.assert_allclose(shuffled, straight[:, order], rtol=0, atol=tolerance)


@EVERY
def test_a_domain_that_was_never_seen_is_neutral(name):
    rule, size = make(name), len(names_for(name))
    domains = as_domains(names_for(name), num_tokens=[1000.0] * size)  # and a uniform prior

    def without_one(step, size):
        return equal_signals(size, absent=[1])

    def with_all(step, size):
        return equal_signals(size)

    # Everything that is seen is equal, so there is no reason to favour or to punish what is not seen.
    for update in range(1, 7):
        np.testing.assert_allclose(
            run(rule, domains, update, without_one)[1][-1], run(rule, domains, update, with_all)[1][-1], atol=1e-9
        )


@WITH_VARIANTS
def test_updates_without_any_sample_change_nothing(name):
    rule, domains = make(name), domains_for(name)
    size = len(domains.names)
    state, path = run(rule, domains, 6)
    nothing = random_signals(0, size, absent=range(size))
    after, weights = rule.update(state, nothing)
    assert np.array_equal(weights, path[-1])
    for a, b in zip(leaves(after), leaves(state), strict=True):
        assert np.array_equal(a, b)


@EVERY
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_extreme_losses_leave_finite_weights(name, data):
    rule, domains = make(name), domains_for(name)
    size = len(domains.names)
    state = rule.init(domains)
    value = st.one_of(st.sampled_from([0.0, 1e-12, 1e9]), st.floats(0.0, 1e9))
    for step in range(8):
        usual = random_signals(step, size)
        extreme = {
            key: np.array(data.draw(st.lists(value, min_size=size, max_size=size)))
            for key in ("loss", "reference_loss", "clipped_excess", "heldout_loss", "gradient_variance")
        }
        state, weights = rule.update(state, usual._replace(**extreme, gradient_products=usual.gradient_products * 1e6))
        assert_mixture(weights, size)
        assert_mixture(rule.result(state), size)
    for value in leaves(state):
        assert np.all(np.isfinite(value))


@EVERY
def test_floors_and_ceilings_hold_for_every_rule(name):
    rule, domains = make(name), domains_for(name)
    limited = bounded(rule, floor=0.05, ceiling=0.4)
    state, path = run(limited, domains)
    assert np.all(path >= 0.05 - 1e-12) and np.all(path <= 0.4 + 1e-12)
    assert np.all(limited.result(state) >= 0.05 - 1e-12) and np.all(limited.result(state) <= 0.4 + 1e-12)
    restored = state_from_dict(limited.init(domains), json.loads(json.dumps(state_to_dict(state))))
    assert np.array_equal(limited.weights(restored), path[-1])


@EVERY
def test_one_domain_has_all_the_weight(name):
    if name == "preset":
        pytest.skip("its table has more than one domain")
    rule, domains = make(name, ["web"]), as_domains(["web"], num_tokens=[1000.0])
    state, path = run(rule, domains, 8)
    np.testing.assert_allclose(path, 1.0, atol=1e-12)
    np.testing.assert_allclose(rule.result(state), 1.0, atol=1e-12)


@EVERY
def test_settings_survive_json_and_make_the_same_rule(name):
    rule, domains = make(name), domains_for(name)
    assert rule.name == name
    again = UPDATE_RULES[name](**json.loads(json.dumps(dict(rule.settings))))
    assert np.array_equal(run(rule, domains)[1], run(again, domains)[1])


NEEDED = {
    "reference": ("reference_loss",),
    "heldout": ("heldout_loss", "heldout_tokens"),
    "heldout_reference": ("heldout_reference_loss",),
    "gradients": ("gradient_products", "gradient_counts"),
    "gradient_variance": ("gradient_variance",),
    "histogram": ("histogram",),
    "behaviour": ("behaviour",),
}


@EVERY
def test_signals_beyond_needs_are_not_read(name):
    rule, domains = make(name), domains_for(name)
    promised = {"num_tokens", "loss", *(field for need in rule.needs for field in NEEDED[need])}
    promised |= {"clipped_excess"} if "reference" in rule.needs else set()

    def bare(step, size):
        full = signals_of(step, size)
        return Signals(**{key: value for key, value in full._asdict().items() if key in promised})

    def full_but_behaviour(step, size):
        return signals_of(step, size)._replace(behaviour=None)

    assert np.array_equal(run(rule, domains, 8, bare)[1], run(rule, domains, 8, full_but_behaviour)[1])


@EVERY
def test_a_missing_or_non_finite_signal_is_named(name):
    rule, domains = make(name), domains_for(name)
    size, state = len(domains.names), rule.init(domains)
    good = random_signals(0, size)
    # Only the bandit can do without what it reads: the weights that it handed out itself stand in for the behaviour.
    read = [field for need in rule.needs - {"behaviour"} for field in NEEDED[need]]
    if name == "doremi":  # per-token clipping reads the clipped sums alone
        read = ["clipped_excess"]
    for field in read:
        with pytest.raises(InputError, match=f"needs Signals.{field}, which was not gathered"):
            rule.update(state, good._replace(**{field: None}))
        broken = getattr(good, field).copy()
        broken.flat[0] = np.nan
        with pytest.raises(InputError, match=f"Signals.{field} is not finite"):
            rule.update(state, good._replace(**{field: broken}))


@EVERY
def test_the_catalogue_says_one_line_of_everything(name):
    entry = CATALOGUE[name]
    assert all(text and "\n" not in text for text in (entry.optimises, entry.cost, entry.paper))
    assert entry.make.__name__ == name


# Rules whose scores are compared with each other only, so that nats added to all of them change nothing.
SHIFT_INVARIANT = (
    "hardest",
    "easiest",
    "group_dro",
    "agnostic",
    "mero",
    "dro_lm",
    "topic_cvar",
    "divergence_ball",
    "wasserstein",
    "on_demand",
    "validation_feedback",
    "skill_it",
    "aioli",
)


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_nats_added_to_every_loss_change_nothing(name):
    rule, domains = make(name), domains_for(name)

    def shifted(step, size):
        signals = signals_of(step, size)
        return signals._replace(
            loss=signals.loss + 3 * signals.num_tokens,
            reference_loss=signals.reference_loss + 5 * signals.num_tokens,
            heldout_loss=signals.heldout_loss + 3 * signals.heldout_tokens,
        )

    np.testing.assert_allclose(run(rule, domains, signals=shifted)[1], run(rule, domains)[1], atol=1e-9)


@pytest.mark.parametrize(
    "name", ["doremi", "modified_doremi", "hardest", "easiest", "on_demand", "sheared_llama", "doge", "pike"]
)
def test_smoothing_leaves_every_domain_its_share(name):
    required = REQUIRED[name](names_for(name)) if name in REQUIRED else {}
    rule, domains = UPDATE_RULES[name](smoothing=0.05, **required), domains_for(name)
    size = len(domains.names)

    def one_takes_all(step, size):
        huge = np.where(np.arange(size) == 0, 1e6, 0.0)
        return random_signals(step, size)._replace(
            loss=huge,
            clipped_excess=huge,
            heldout_loss=huge,
            reference_loss=huge[::-1],
            gradient_products=np.diag(huge),
        )

    _, path = run(rule, domains, 5, one_takes_all)
    assert np.all(path >= 0.05 / size - 1e-15) and path.min() == pytest.approx(0.05 / size)


def test_floors_that_sum_to_more_than_one_are_refused():
    with pytest.raises(InputError, match="floors leave no mixture"):
        bounded(UPDATE_RULES["group_dro"](), floor=0.6).init(["a", "b"])


def test_epoch_caps_follow_what_is_left_of_each_domain():
    rule = bounded(UPDATE_RULES["on_demand"](eta=5.0), max_epochs=2, budget=1000)
    state = rule.init(as_domains(["big", "small"], num_tokens=[900, 100]))
    ask_for_small = equal_signals(2)._replace(heldout_loss=np.array([0.0, 64.0 * 4]))
    state, weights = rule.update(state, ask_for_small._replace(num_tokens=np.array([100.0, 100.0])))
    np.testing.assert_allclose(weights, [7 / 8, 1 / 8])  # 100 tokens of small's 200 are left, of 800 in all
    state, weights = rule.update(state, ask_for_small._replace(num_tokens=np.array([0.0, 100.0])))
    np.testing.assert_allclose(weights, [1.0, 0.0])
    np.testing.assert_allclose(rule.result(state), [0.8, 0.2])  # of a run from the start: 2 * 100 / 1000


@pytest.mark.parametrize("share", [0.4, 0.41])
def test_ceilings_that_just_fit_beside_epoch_caps_do_not_end_a_run_in_its_middle(share):
    """A ceiling of 0.6 for one domain, and texts for 0.4 of the budget in the other: what was drawn is never exact."""
    budget, rng = 10_000.0, np.random.default_rng(0)
    rule = bounded(UPDATE_RULES["on_demand"](), ceiling=0.6, max_epochs=2, budget=budget)
    state = rule.init(as_domains(["big", "small"], num_tokens=[90_000, share * budget / 2]))
    for _ in range(155):
        drawn = rng.multinomial(64, rule.weights(state)).astype(np.float64)
        ask_for_small = equal_signals(2)._replace(num_tokens=drawn, heldout_loss=np.array([0.0, 256.0]))
        state, weights = rule.update(state, ask_for_small)
        assert weights[0] < 0.75 and state.consumed[1] <= share * budget + 64
    np.testing.assert_allclose(rule.result(state), [1 - share, share])
    with pytest.raises(InputError, match="the ceilings leave no mixture"):
        rule.init(as_domains(["big", "small"], num_tokens=[90_000, 0.39 * budget / 2]))


@pytest.mark.parametrize("wrong", [[0, 0], [-1, 2], [float("nan"), 1], [1, 2, 3]])
def test_sizes_and_priors_that_make_no_sense_are_refused(wrong):
    for option in ({"num_tokens": wrong}, {"prior": wrong}):
        with pytest.raises(InputError, match=r"must (be finite, >= 0 and not all 0|have one entry per domain)"):
            as_domains(["a", "b"], **option)


def test_weights_of_nothing_are_refused():
    with pytest.raises(InputError, match="not all 0"):
        normalized(np.zeros(3))


@pytest.mark.parametrize("name", [*UPDATE_RULES, "ado:late"])
def test_a_rule_moves_no_sooner_than_it_says_and_then_it_does(name):
    if name in ("erm", "given", "preset", "temperature", "uniform", "unimax"):
        pytest.skip("its weights are fixed")
    late = {"warmup": 12, "ignore": 9, "refit_every": 4}  # three points at the first fit: too few for a curve
    settings = {"ado": {"warmup": 12, "ignore": 0}, "ado:late": late, "aioli": {"sweeps": 2}}.get(name, {})
    name = name.partition(":")[0]
    rule = UPDATE_RULES[name](**settings, **(REQUIRED[name](names_for(name)) if name in REQUIRED else {}))
    domains = domains_for(name)
    state, size = rule.init(domains), len(domains.names)
    start, first = rule.result(state), rule.first_move(size)
    for step in range(first):
        state, _ = rule.update(state, random_signals(step, size))
        if step < first - 1:
            np.testing.assert_allclose(rule.result(state), start, atol=1e-12)
    assert np.max(np.abs(rule.result(state) - start)) > 1e-9
