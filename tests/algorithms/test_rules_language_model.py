"""Rules that train real language models on four domains of known entropy: what the methods are for, at two scales.

The domains are those of ``benchmarks.mixtures.corpora``: easy (a cycle), noise, order1, and order2, which has most to
learn. The ordinary tests take a smaller order2 and model and short runs, under a minute in all; with
DOMAIN_MIXER_NIGHTLY=1 the whole corpus, longer runs and three seeds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from algorithms.domain_losses import DomainLosses
from algorithms.losses import labels_of, token_losses
from algorithms.references import FrozenModel
from algorithms.rules import UPDATE_RULES
from algorithms.rules.base import UpdateRule, as_domains
from benchmarks.mixtures.corpora import FourDomains

Vector = NDArray[np.float64]
UNIFORM = np.full(4, 0.25)
EASY, NOISE, ORDER1, ORDER2 = range(4)


class Scale(NamedTuple):
    """``steps`` of references, proxies and main runs, ``short_steps`` of the ablations; ``gain``, nats on order2 that a
    main run must win, is for small models well below what four seeds gave (0.26 to 0.50)."""

    seed: int
    pair_symbols: int
    width: int
    batch_size: int
    learning_rate: float
    steps: int
    short_steps: int
    gain: float


SMALL = Scale(0, 16, 48, 48, 7e-3, steps=260, short_steps=60, gain=0.15)
WHOLE = [Scale(seed, 24, 64, 64, 3e-3, steps=360, short_steps=200, gain=0.3) for seed in (100, 200, 300)]
NIGHTLY = [
    pytest.mark.skipif(
        not os.environ.get("DOMAIN_MIXER_NIGHTLY"), reason="trains models for minutes; set DOMAIN_MIXER_NIGHTLY=1"
    ),
    pytest.mark.timeout(1800),
]
whole = [pytest.param(scale, marks=NIGHTLY, id=f"whole-{scale.seed}") for scale in WHOLE]
small = pytest.param(SMALL, marks=pytest.mark.timeout(600), id="small")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    """A Llama of two layers."""

    def __init__(self, scale: Scale, seed: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        torch.manual_seed(scale.seed + seed)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=FourDomains.vocab_size,
                hidden_size=scale.width,
                intermediate_size=3 * scale.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=FourDomains.length + 1,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
            )
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.llama(input_ids=input_ids).logits


@cache
def corpus(scale: Scale) -> FourDomains:
    return FourDomains(scale.pair_symbols)


def batch_of(scale: Scale, seed: int, step: int, weights: Vector) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng((scale.seed + seed, step))
    ids = np.sort(rng.choice(4, scale.batch_size, p=weights / weights.sum()))
    rows = np.concatenate([corpus(scale).sample(rng, domain, int(np.sum(ids == domain))) for domain in range(4)])
    return {"input_ids": torch.from_numpy(rows), "domain_ids": torch.from_numpy(ids)}


@torch.no_grad()
def heldout(scale: Scale, model: nn.Module, count: int = 64) -> Vector:
    """Mean loss per domain over fixed samples that training never sees."""
    losses = []
    for domain in range(4):
        rows = torch.from_numpy(corpus(scale).sample(np.random.default_rng((999, domain)), domain, count))
        losses.append(float(token_losses(model(rows), labels_of({"input_ids": rows})).mean()))
    return np.array(losses)


def train(
    scale: Scale,
    model: Model,
    rule: UpdateRule,
    num_steps: int,
    seed: int,
    *,
    sampling: Vector | None = None,
    reference: FrozenModel | None = None,
    every: int = 1,
    learning_rate: float | None = None,
    prior: list[float] | None = None,
) -> tuple[Any, Vector]:
    """Train by a rule's weights, on the loss or (``sampling=None``) by drawing domains; return its state and path."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate or scale.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2
    )
    warmup = max(1, round(0.06 * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.1 ** (max(step - warmup, 0) / num_steps))
    )
    losses = DomainLosses(FourDomains.names, reference=reference, normalization=rule.normalization)
    state, path = rule.init(as_domains(FourDomains.names, prior=prior)), []
    for step in range(num_steps):
        weights = rule.weights(state)
        path.append(weights)
        batch = batch_of(scale, seed, step, weights if sampling is None else sampling)
        losses(model(batch["input_ids"]), batch, None if sampling is None else weights).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        signals = losses.signals()
        if (step + 1) % every == 0:
            if "heldout" in rule.needs:
                tokens = np.full(4, 32.0)
                signals = signals._replace(heldout_loss=heldout(scale, model, 32) * tokens, heldout_tokens=tokens)
            state, _ = rule.update(state, signals)
    return state, np.array(path)


def named(weights: Vector) -> dict[str, float]:
    return dict(zip(FourDomains.names, weights.tolist()))


def drawn_by(scale: Scale, weights: Vector, num_steps: int, seed: int) -> Model:
    model = Model(scale, seed)
    train(scale, model, UPDATE_RULES["given"](weights=named(weights)), num_steps, seed=11 * seed)
    return model


@cache
def reference(scale: Scale) -> FrozenModel:
    return FrozenModel(drawn_by(scale, UNIFORM, scale.steps, 1))


@cache
def proxy(scale: Scale, name: str, num_steps: int, variant: str | None = None) -> tuple[Vector, Vector]:
    """The weights that a rule finds on a proxy, and their path."""
    rule, model = UPDATE_RULES[name](**({"variant": variant} if variant else {})), Model(scale, 2)
    compared = reference(scale) if "reference" in rule.needs else None
    state, path = train(scale, model, rule, num_steps, seed=22, sampling=UNIFORM, reference=compared)
    return rule.result(state), path


@pytest.mark.parametrize("scale", [small, *whole])
def test_doremi_upweights_what_can_be_learnt_and_its_mixture_beats_uniform(scale: Scale) -> None:
    found, _ = proxy(scale, "doremi", scale.steps, "recommended")
    print("\nweights", found.round(3))
    assert np.argmax(found) == ORDER2
    assert found[ORDER2] > 0.25 > max(found[NOISE], found[EASY])
    ours, uniform = heldout(scale, drawn_by(scale, found, scale.steps, 3)), heldout(scale, reference(scale).model)
    print("found  ", ours.round(3), "\nuniform", uniform.round(3))
    assert ours[ORDER2] < uniform[ORDER2] - scale.gain
    if scale in WHOLE:  # the smallest models pay for it elsewhere: the domains share no content
        assert ours.mean() < uniform.mean() - 0.03
        assert np.max(ours - uniform) < 0.3


@pytest.mark.parametrize("scale", [small, *whole])
def test_the_ablations_collapse_to_the_extremes(scale: Scale) -> None:
    hardest, _ = proxy(scale, "hardest", scale.short_steps)
    easiest, _ = proxy(scale, "easiest", scale.short_steps)
    print("\nhardest", hardest.round(3), "easiest", easiest.round(3))
    assert hardest[NOISE] > 0.9
    assert easiest[EASY] > 0.9


@pytest.mark.parametrize("scale", whole)
def test_the_paper_variant_downweights_both_extremes_and_swings_more_than_the_recommended_one(scale: Scale) -> None:
    paper, paper_path = proxy(scale, "doremi", scale.steps, "paper")
    _, path = proxy(scale, "doremi", scale.steps, "recommended")
    moves = [float(np.abs(np.diff(one, axis=0)).mean()) for one in (path, paper_path)]
    print("\npaper", paper.round(3), "moves per step: recommended, paper", np.round(moves, 4))
    assert np.argmax(paper) == ORDER2 and max(paper[NOISE], paper[EASY]) < 0.25
    assert moves[0] < 0.5 * moves[1]


@pytest.mark.parametrize("scale", [small, *whole])
def test_a_stage_with_targets_learns_the_new_domain_that_the_literal_method_starves(scale: Scale) -> None:
    """Pretrained on easy and order1; order2 is new; noise takes no part."""
    old, all_three, steps = np.array([0.5, 0, 0.5, 0]), np.array([1, 0, 1, 1]) / 3, round(0.6 * scale.steps)
    pretrained = drawn_by(scale, old, steps, 4)
    before = heldout(scale, pretrained)
    lower = 0.3 * scale.learning_rate

    def continued(rule: UpdateRule, **options: Any) -> tuple[Vector, Vector]:
        model = Model(scale, 4)
        model.load_state_dict(pretrained.state_dict())
        _, path = train(scale, model, rule, steps, 55, learning_rate=lower, **options)
        return heldout(scale, model), path[:, ORDER2].mean()

    literal = UPDATE_RULES["doremi"](clip="domain")
    starved, literal_weight = continued(literal, sampling=all_three, reference=FrozenModel(pretrained))
    targets = {**named(before), "order2": 1.3}
    feedback = UPDATE_RULES["validation_feedback"](targets=targets, eta=0.3, smoothing=0.05)
    learnt, weight = continued(feedback, every=steps // 15, prior=[1.0, 0.0, 1.0, 1.0])
    print("\nbefore ", before.round(3))
    print("literal", np.round(literal_weight, 3), starved.round(3), "\nours   ", np.round(weight, 3), learnt.round(3))
    assert literal_weight < 0.25 < weight
    assert learnt[ORDER2] < starved[ORDER2] - 0.3
