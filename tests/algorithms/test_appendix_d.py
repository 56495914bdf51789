"""The worked example in DoReMi's appendix D (arXiv:2305.10429): three unigram domains, of which one is pure noise.

Domain d has probabilities ROWS[d] over 3 symbols; its model after n samples is (counts + 1/3) / (n + 1). The weights
the paper prints for it, [0.39, 0.61, 0.0], are one draw: what holds on average is asserted here.
"""

from __future__ import annotations

import numpy as np
import pytest

from algorithms.rules.doremi import doremi, easiest, hardest
from algorithms.signals import Signals

ROWS = np.array([[1.0, 0.0, 0.0], [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
NAMES = ["certain", "skewed", "uniform"]
BUDGET = 500


def squared_error(samples):
    """Lemma 1: the expected squared error of each domain's model after so many samples of it, (3,)."""
    variance, bias = np.sum(ROWS * (1 - ROWS), axis=1), np.sum((1 / 3 - ROWS) ** 2, axis=1)
    return (samples * variance + bias) / (samples + 1) ** 2


def test_the_lemma_is_the_mean_of_simulated_errors():
    rng, samples = np.random.default_rng(0), np.array([30, 60, 90])
    for domain, row in enumerate(ROWS):
        counts = rng.multinomial(samples[domain], row, size=200_000)
        errors = np.sum(((counts + 1 / 3) / (samples[domain] + 1) - row) ** 2, axis=1)
        assert errors.mean() == pytest.approx(squared_error(samples)[domain], rel=0.01)


def test_the_papers_weights_help_every_domain_and_cost_none():
    uniform, published = squared_error(np.full(3, BUDGET / 3)), squared_error(BUDGET * np.array([0.39, 0.61, 0.0]))
    np.testing.assert_allclose(uniform, [2.37e-5, 2.73e-3, 3.95e-3], rtol=3e-3)
    np.testing.assert_allclose(published, [1.74e-5, 1.50e-3, 0.0], rtol=3e-3)
    assert np.all(published < uniform)


def found(rule, seed):
    """What ``rule`` ends with: each step scores 30 samples per domain, and learns one drawn by the weights."""
    rng = np.random.default_rng(seed)
    reference = np.array([(rng.multinomial(BUDGET // 3, row) + 1 / 3) / (BUDGET // 3 + 1) for row in ROWS])
    counts, state = np.zeros((3, 3)), rule.init(NAMES)
    for _ in range(BUDGET):
        model = (counts + 1 / 3) / (counts.sum(1, keepdims=True) + 1)
        seen = np.array([rng.multinomial(30, row) for row in ROWS])
        own, theirs = -np.log(model), -np.log(reference)
        signals = Signals(
            np.full(3, 30.0),
            np.sum(seen * own, axis=1),
            np.full(3, 30.0),
            reference_loss=np.sum(seen * theirs, axis=1),
            clipped_excess=np.sum(seen * np.maximum(own - theirs, 0.0), axis=1),
            excess_squared=np.sum(seen * (own - theirs) ** 2, axis=1),
        )
        state, weights = rule.update(state, signals)
        domain = rng.choice(3, p=weights)
        counts[domain, rng.choice(3, p=ROWS[domain])] += 1
    return rule.result(state)


def test_the_ablations_go_to_noise_and_to_what_is_certain():
    by_loss = np.mean([found(hardest(eta=0.5), seed) for seed in range(4)], axis=0)
    by_reference = np.mean([found(easiest(eta=0.5), seed) for seed in range(4)], axis=0)
    assert by_loss[2] > 0.8 and by_reference[0] > 0.97


def test_noise_is_not_starved_by_the_literal_method_and_gets_less_where_disagreement_scores_nothing():
    """Two models of noise disagree on every token for ever, and a clip per token pays for that."""
    share = {
        clip: np.mean([found(doremi(eta=0.5, clip=clip), seed)[2] for seed in range(8)])
        for clip in ("token", "domain", "confident")
    }
    assert share["token"] > 1 / 3 and share["domain"] < share["token"] and share["confident"] < share["token"]
