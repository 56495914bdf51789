"""Rules that train real language models on four corpora of known entropy; minutes, so only with DOMAIN_MIXER_NIGHTLY=1.

    easy     a fixed cycle over 64 symbols                                      0 nats per token
    noise    independent uniform symbols                                        ln 64 = 4.16
    order1   4 successors per symbol, p = (.55, .25, .15, .05)                  1.11
    order2   4 successors per pair of 24 symbols, the same p                    1.11, and 9 times as much to learn

The domains share nothing but the alphabet. A sequence is a domain tag and 32 symbols.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.domain_losses import DomainLosses
from algorithms.losses import labels_of, token_losses
from algorithms.references import FrozenModel
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import as_domains
from algorithms.signals import Signals

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("DOMAIN_MIXER_NIGHTLY"), reason="trains models for minutes; set DOMAIN_MIXER_NIGHTLY=1"
    ),
    pytest.mark.timeout(900),
]

DOMAINS = ("easy", "noise", "order1", "order2")
SYMBOLS, LENGTH, BATCH = 64, 32, 64
SUCCESSOR_SHARES = np.array([0.55, 0.25, 0.15, 0.05])


class Corpus:
    """Endless samples of the four domains, each a function of (seed, domain, count)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1234)
        self.cycle = rng.permutation(SYMBOLS)
        self.order1 = np.array([rng.permutation(SYMBOLS)[:4] for _ in range(SYMBOLS)])
        self.order2 = np.array([[rng.permutation(24)[:4] for _ in range(24)] for _ in range(24)])

    def sample(self, rng: np.random.Generator, domain: int, count: int) -> np.ndarray:
        rows = np.empty((count, LENGTH + 1), dtype=np.int64)
        rows[:, 0] = SYMBOLS + domain
        rows[:, 1:3] = rng.integers(0, 24 if domain == 3 else SYMBOLS, (count, 2))
        choices = rng.choice(4, size=(count, LENGTH + 1), p=SUCCESSOR_SHARES)
        for place in range(2, LENGTH + 1):
            last = rows[:, place - 1]
            if domain == 0:
                rows[:, place] = self.cycle[last]
            elif domain == 1:
                rows[:, place] = rng.integers(0, SYMBOLS, count)
            elif domain == 2:
                rows[:, place] = self.order1[last, choices[:, place]]
            elif place > 2:
                rows[:, place] = self.order2[rows[:, place - 2], last, choices[:, place]]
        return rows

    def batch(self, seed: int, step: int, weights: np.ndarray) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((seed, step))
        ids = np.sort(rng.choice(len(weights), BATCH, p=weights / weights.sum()))
        rows = np.concatenate([self.sample(rng, d, int(np.sum(ids == d))) for d in range(4)])
        return {"input_ids": torch.from_numpy(rows), "domain_ids": torch.from_numpy(ids)}


class Model(nn.Module):
    """A transformer of two layers and about 110,000 parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.places = nn.Embedding(SYMBOLS + 4, 64), nn.Embedding(LENGTH + 1, 64)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(64, 4, 256, **options)
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, SYMBOLS + 4, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        hidden = self.tokens(input_ids) + self.places(torch.arange(length))
        return self.head(self.body(hidden, mask=mask, is_causal=True))


CORPUS = Corpus()


@torch.no_grad()
def heldout(model: Model, count: int = 64) -> np.ndarray:
    """Mean loss per domain over fixed samples that training never sees."""
    losses = []
    for domain in range(4):
        rows = torch.from_numpy(CORPUS.sample(np.random.default_rng((999, domain)), domain, count))
        batch = {"input_ids": rows}
        losses.append(float(token_losses(model(rows), labels_of(batch)).mean()))
    return np.array(losses)


def train(model, rule, num_steps, seed, sampling=None, reference=None, every=1, lr=3e-3):
    """Train by a rule's weights, on the loss or (``sampling=None``) by drawing domains; return its state and path."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    warmup = max(1, round(0.06 * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.1 ** (max(step - warmup, 0) / num_steps))
    )
    losses = DomainLosses(DOMAINS, reference=reference, normalization=rule.normalization)
    state, path = rule.init(as_domains(DOMAINS)), []
    for step in range(num_steps):
        weights = rule.weights(state)
        path.append(weights)
        batch = CORPUS.batch(seed, step, weights if sampling is None else sampling)
        on_loss = None if sampling is None else weights
        losses(model(batch["input_ids"]), batch, on_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        signals = losses.signals()
        if (step + 1) % every == 0:
            if "heldout" in rule.needs:
                signals = held_out_signals(signals, model)
            state, _ = rule.update(state, signals)
    return state, np.array(path)


def held_out_signals(signals: Signals, model: Model) -> Signals:
    return signals._replace(heldout_loss=heldout(model, 32) * 32, heldout_tokens=np.full(4, 32.0))


UNIFORM = np.full(4, 0.25)


@cache
def uniform_model() -> Model:
    """Trained on uniform samples: the reference, and what the found mixture has to beat."""
    model = Model(seed=1)
    train(model, UPDATE_RULES["uniform"](), 500, seed=11)
    return model


@cache
def proxy(name, num_steps=500, **settings):
    """The weights that a rule finds on a proxy, and their path."""
    rule, model = UPDATE_RULES[name](**settings), Model(seed=2)
    state, path = train(model, rule, num_steps, seed=22, sampling=UNIFORM, reference=FrozenModel(uniform_model()))
    return dict(zip(DOMAINS, rule.result(state))), path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_doremi_upweights_what_can_be_learnt_and_its_mixture_beats_uniform():
    found, _ = proxy("doremi")
    assert found["order2"] == max(found.values()) and found["order2"] > 0.25
    assert found["noise"] < 0.25 and found["easy"] < 0.25
    model = Model(seed=3)
    train(model, UPDATE_RULES["given"](weights=found), 500, seed=33)
    ours, uniform = heldout(model), heldout(uniform_model())
    print(
        "\nweights",
        {k: round(float(v), 3) for k, v in found.items()},
        "\nfound  ",
        ours.round(3),
        "\nuniform",
        uniform.round(3),
    )
    assert ours[3] < uniform[3] - 0.3
    assert ours.mean() < uniform.mean() - 0.05
    assert np.max(ours - uniform) < 0.25  # nothing is for free: the domains share no content


def test_the_recommended_variant_finds_the_same_order_with_less_swing():
    _, paper_path = proxy("doremi")
    recommended, path = proxy("doremi", variant="recommended")
    steps = [float(np.abs(np.diff(one, axis=0)).mean()) for one in (path, paper_path)]
    print("\nrecommended", {k: round(float(v), 3) for k, v in recommended.items()}, "moves per step", steps)
    assert recommended["order2"] == max(recommended.values()) and recommended["noise"] < 0.25
    assert steps[0] < 0.5 * steps[1]
    assert paper_path.max(axis=0).min() > path.max(axis=0).min()


def test_the_ablations_collapse_to_the_extremes():
    hardest, _ = proxy("hardest", 200)
    easiest, _ = proxy("easiest", 200)
    assert hardest["noise"] > 0.9
    assert easiest["easy"] > 0.9


def test_a_stage_with_targets_learns_the_new_domain_that_the_literal_method_starves():
    """Pretrained on easy and order1; order2 is new; noise takes no part."""
    old_and_new, old = np.array([1.0, 0.0, 1.0, 1.0]) / 3, np.array([0.5, 0.0, 0.5, 0.0])
    pretrained = Model(seed=4)
    train(pretrained, UPDATE_RULES["given"](weights=dict(zip(DOMAINS, old))), 300, seed=44)
    before = heldout(pretrained)

    def continued() -> Model:
        model = Model(seed=4)
        model.load_state_dict(pretrained.state_dict())
        return model

    literal, reference = continued(), FrozenModel(pretrained)
    rule = UPDATE_RULES["doremi"](clip="domain")
    _, path = train(literal, rule, 300, 55, sampling=old_and_new, reference=reference, lr=1e-3)
    targets = {"easy": before[0], "noise": 4.16, "order1": before[2], "order2": 1.3}
    ours = continued()
    rule = UPDATE_RULES["validation_feedback"](targets=targets, eta=0.3, smoothing=0.05)
    rule = rule._replace(init=lambda _: _without_noise(rule))
    _, ours_path = train(ours, rule, 300, 55, every=20, lr=1e-3)
    starved, learnt = heldout(literal), heldout(ours)
    print(
        "\nliteral",
        path[:, 3].mean().round(3),
        starved.round(3),
        "\nours   ",
        ours_path[:, 3].mean().round(3),
        learnt.round(3),
    )
    assert path[:, 3].mean() < 0.25 < ours_path[:, 3].mean()
    assert learnt[3] < starved[3] - 0.3


def _without_noise(rule):
    fresh = UPDATE_RULES[rule.name](**rule.settings)
    return fresh.init(as_domains(DOMAINS, prior=[1.0, 0.0, 1.0, 1.0]))
