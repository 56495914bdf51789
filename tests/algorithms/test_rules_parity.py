"""The official variants give what the authors' code gave on the same input (see ``golden/README.md``)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from algorithms.rules.ado import ado
from algorithms.rules.agnostic import agnostic
from algorithms.rules.aioli import aioli
from algorithms.rules.balls import chi2_ball, chi2_divergence
from algorithms.rules.base import as_domains
from algorithms.rules.best_response import topic_cvar
from algorithms.rules.doremi import doremi
from algorithms.rules.feedback import sheared_llama
from algorithms.rules.gradients import doge
from algorithms.rules.group_dro import group_dro
from algorithms.rules.odm import odm
from algorithms.rules.on_demand import on_demand
from algorithms.rules.skill_it import skill_it
from algorithms.signals import Signals

GOLDEN = Path(__file__).parent / "golden"


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def names(size):
    return [f"d{index:03}" for index in range(size)]


def vector(values):
    return np.array(values, dtype=np.float64)


def heldout(losses):
    ones = np.ones(len(losses))
    return Signals(ones, vector(losses), heldout_loss=vector(losses), heldout_tokens=ones)


@pytest.mark.parametrize("case", cases("doremi"), ids=lambda case: f"{len(case['prior'])} domains")
def test_doremi_with_absent_domains(case):
    rule = doremi(case["eta"], case["smoothing"], variant="official", vocab_size=case["vocab_size"])
    state = rule.init(as_domains(names(len(case["prior"])), prior=case["prior"]))
    for step in case["steps"]:
        clipped = vector(step["clipped_excess"])
        signals = Signals(vector(step["num_tokens"]), clipped, reference_loss=clipped, clipped_excess=clipped)
        state, weights = rule.update(state, signals)
        np.testing.assert_allclose(weights, step["weights"], atol=2e-6)
        np.testing.assert_allclose(rule.result(state), step["average"], atol=1e-6)


@pytest.mark.parametrize("case", cases("doremi"), ids=lambda case: f"{len(case['prior'])} domains")
def test_our_doremi_differs_from_the_official_one_only_by_its_documented_choices(case):
    """Paper variant, once every domain has been seen: the same step, in float64."""
    rule = doremi(case["eta"], case["smoothing"])
    size = len(case["prior"])
    seen, steps = np.zeros(size), case["steps"]
    state = rule.init(names(size))
    for before, step in pairwise(steps):
        seen = np.maximum(seen, vector(before["num_tokens"]) > 0)
        clipped = vector(before["clipped_excess"])
        signals = Signals(vector(before["num_tokens"]), clipped, reference_loss=clipped, clipped_excess=clipped)
        state, _ = rule.update(state, signals)
        if seen.all():
            state = state._replace(log_weights=np.log(vector(before["weights"])))
            clipped = vector(step["clipped_excess"])
            signals = Signals(vector(step["num_tokens"]), clipped, reference_loss=clipped, clipped_excess=clipped)
            np.testing.assert_allclose(rule.update(state, signals)[1], step["weights"], atol=2e-6)
    assert seen.all()


@pytest.mark.parametrize("case", cases("group_dro"), ids=["plain", "adjusted", "mixed signs"])
def test_group_dro(case):
    size = len(case["sizes"])
    rule = group_dro(
        eta=case["eta"],
        adjustment=dict(zip(names(size), case["adjustment"])) if case["adjustment"] else 0.0,
        sizes=dict(zip(names(size), case["sizes"])),
        variant="official",
    )
    state = rule.init(names(size))
    for step in case["steps"]:
        state, weights = rule.update(state, Signals(vector(step["num_tokens"]), vector(step["loss"])))
        np.testing.assert_allclose(weights, step["weights"], atol=1e-6)


@pytest.mark.parametrize("case", cases("topic_cvar"), ids=["alpha 0.2", "alpha 0.5 and a share of the prior"])
def test_topic_cvar(case):
    rule = topic_cvar(case["alpha"], case["smoothing"], case["prior_share"])
    state = rule.init(as_domains(names(len(case["sizes"])), prior=case["sizes"]))
    for step in case["steps"]:
        state, weights = rule.update(state, Signals(vector(step["num_tokens"]), vector(step["loss"])))
        np.testing.assert_allclose(weights, step["weights"], atol=1e-6)


@pytest.mark.parametrize("case", cases("sheared_llama"), ids=lambda case: f"{len(case['prior'])} domains")
def test_sheared_llama(case):
    rule = sheared_llama(dict(zip(names(len(case["prior"])), case["targets"])), clip=False)
    state = rule.init(as_domains(names(len(case["prior"])), prior=case["prior"]))
    for step in case["steps"]:
        state, weights = rule.update(state, heldout(step["losses"]))
        np.testing.assert_allclose(weights, step["weights"], atol=5e-6)


@pytest.mark.parametrize("case", cases("odm"), ids=lambda case: f"{len(case['steps'][0]['weights'])} domains")
def test_odm(case):
    rule = odm(case["smoothing"], variant="official")
    state = rule.init(names(len(case["steps"][0]["weights"])))
    for step in case["steps"]:
        present = vector([loss is not None for loss in step["losses"]])
        state, weights = rule.update(state, Signals(present, vector([loss or 0.0 for loss in step["losses"]])))
        np.testing.assert_allclose(weights, step["weights"], atol=1e-14)


@pytest.mark.parametrize("case", cases("chi2_ball"))
def test_chi_square_best_response(case):
    prior, theirs = vector(case["prior"]), vector(case["weights"])
    ours = chi2_ball(vector(case["losses"]), prior, case["radius"], case["min_ratio"])
    assert chi2_divergence(theirs, prior) == pytest.approx(case["radius"], abs=2e-4)  # where their bisection stops
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    exact = chi2_ball(vector(case["losses"]), prior, chi2_divergence(theirs, prior), case["min_ratio"])
    np.testing.assert_allclose(exact, theirs, atol=1e-5)


@pytest.mark.parametrize("case", cases("aioli"), ids=lambda case: f"{case['num_domains']} domains")
def test_aioli(case):
    num_probes = case["num_domains"] * case["sweeps"]
    rule = aioli(case["eta"], case["sweeps"], case["focus"], period=num_probes + 2)
    state = rule.init(names(case["num_domains"]))
    for losses in case["losses"]:
        state, weights = rule.update(state, heldout(losses))
    np.testing.assert_allclose(weights, case["weights"], atol=1e-12)


def test_agnostic_where_their_projection_is_one():
    """Their projection counts positive entries with one term missing: some of its results sum to more than 1."""
    agreed = off_the_simplex = 0
    for case in cases("agnostic"):
        rule = agnostic(case["eta"])
        state = rule.init(names(len(case["steps"][0]["weights"])))
        for step in case["steps"]:
            _, weights = rule.update(state, heldout(step["losses"]))
            theirs = vector(step["weights"])
            if abs(theirs.sum() - 1.0) < 1e-9:
                np.testing.assert_allclose(weights, theirs, atol=1e-12)
                agreed += 1
            else:
                assert theirs.sum() > 1.001
                off_the_simplex += 1
            state = state._replace(weights=theirs)
    assert agreed >= 20 and off_the_simplex >= 5


@pytest.mark.parametrize("case", cases("on_demand"))
def test_on_demand(case):
    rule = on_demand(case["eta"])
    state = rule.init(names(len(case["steps"][0]["weights"])))
    for step in case["steps"]:
        state, weights = rule.update(state, heldout(step["losses"]))
        np.testing.assert_allclose(weights, step["weights"], atol=2e-6)


@pytest.mark.parametrize("case", cases("skill_it"), ids=lambda case: f"{len(case['first'])} domains")
def test_skill_it(case):
    domains = names(len(case["first"]))
    graph = {outer: dict(zip(domains, row)) for outer, row in zip(domains, case["graph"])}
    rule = skill_it(graph, case["eta"], case["window"], variant="official")
    state = rule.init(domains)
    np.testing.assert_allclose(rule.weights(state), case["first"], atol=1e-14)
    for step in case["steps"]:
        state, weights = rule.update(state, heldout(step["losses"]))
        np.testing.assert_allclose(weights, step["weights"], atol=1e-14)


@pytest.mark.parametrize("case", cases("doge"), ids=lambda case: f"{case['num_domains']} domains")
def test_doge_with_absent_domains(case):
    domains = names(case["num_domains"])
    targets = [domains[index] for index in case["targets"]]
    rule = doge(case["learning_rate"], case["mu"], targets, case["smoothing"], variant="official")
    state = rule.init(domains)
    for step in case["steps"]:
        here = np.isin(np.arange(len(domains)), step["present"]).astype(np.float64)
        state, weights = rule.update(
            state,
            Signals(here, here, gradient_products=vector(step["products"]), gradient_counts=np.outer(here, here)),
        )
        np.testing.assert_allclose(weights, step["weights"], atol=2e-6)
        np.testing.assert_allclose(rule.result(state), step["average"], atol=1e-6)


@pytest.mark.parametrize("case", cases("ado"), ids=lambda case: f"{len(case['prior'])} domains")
def test_ado_between_two_fits(case):
    rule = ado(warmup=1000, variant="official")
    state = rule.init(as_domains(names(len(case["prior"])), prior=case["prior"]))
    state = state._replace(curves=np.array([case["floor"], case["scale"], case["rate"]]).T)
    for step in case["steps"]:
        state, weights = rule.update(state, Signals(vector(step["counts"]), vector(step["counts"])))
        np.testing.assert_allclose(weights, step["weights"], atol=1e-12)
