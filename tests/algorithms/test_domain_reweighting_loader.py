"""DomainReweighting on the real loader, written as the README writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Evaluator, Trainer
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel

from algorithms import DomainLosses, DomainReweighting, HeldOutWindows, doremi, group_dro, token_losses
from algorithms.loader_facts import domains_of
from algorithms.rules import UPDATE_RULES
from mixer import Manifest, Mixture
from mixer.dataloader import MixtureLoader
from mixer.errors import InputError
from tests.algorithms.tiny import SEQ_LEN, VOCAB, gpt2, llama, wrap
from tests.algorithms.training_helpers import Metrics, fit, flat, make_trainer, parameters
from tests.helpers import write_shards


def row(domain: str, sample: int, seq_len: int, dtype: str) -> np.ndarray:
    step = {"books": 1, "code": 3, "web": 5}[domain]
    return ((np.arange(seq_len) * step + sample) % VOCAB).astype(dtype)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes, held_out = {"books": 7, "code": 50, "web": 200}, {"books": 2, "code": 5, "web": 9}
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(folder, sizes, seq_len=12, vocab_size=VOCAB, validation=held_out, rows=row)


def make_loader(shards: Path, mixture: str = "uniform") -> MixtureLoader:
    return MixtureLoader(shards, mixture=mixture, global_batch_size=12, seed=17)


def test_the_readme_example_finds_and_saves_a_mixture(shards: Path, tmp_path: Path) -> None:
    model, reference, loader = wrap(llama()), llama(seed=1), make_loader(shards)
    algorithm = DomainReweighting(doremi(), reference=reference)
    trainer = Trainer(
        model=model, train_dataloader=loader, algorithms=[algorithm], max_duration="5ba", progress_bar=False
    )
    trainer.fit()
    mixture = Mixture.load(algorithm.mixture().save(tmp_path / "mixture.json"))
    manifest = Manifest.load(shards)
    assert mixture.check(manifest).weights.keys() == {"books", "code", "web"}
    assert mixture.provenance["tokenizer"] == manifest.tokenizer.fingerprint
    assert mixture.provenance["shards"] == {n: manifest.split(n, "train").fingerprint for n in manifest.names}
    assert loader.step == 5
    np.testing.assert_array_equal(algorithm.trajectory.num_tokens, np.full((5, 3), 4 * 11))


def test_a_step_asks_the_other_ranks_once_and_the_plan_says_what_they_would(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import algorithms.domain_losses

    sizes: list[int] = []

    def counted(name: str) -> None:
        plain = getattr(algorithms.domain_losses, name)

        def call(tensor: torch.Tensor, *more: int) -> torch.Tensor:
            sizes.append(tensor.numel())
            return plain(tensor, *more)

        monkeypatch.setattr(algorithms.domain_losses, name, call)

    counted("all_reduce")
    counted("all_reduce_checked")
    planned, asked = DomainReweighting(group_dro()), DomainReweighting(group_dro())
    one = parameters(fit(planned, loader=make_loader(shards), micro=3, steps=4))
    assert len(sizes) == 4
    monkeypatch.setattr(MixtureLoader, "counts_of", lambda self, batch: None)
    other = parameters(fit(asked, loader=make_loader(shards), micro=3, steps=4))
    assert len(sizes) == 4 + 2 * 4
    assert torch.equal(one, other)
    np.testing.assert_array_equal(planned.trajectory.weights, asked.trajectory.weights)


def sampling() -> DomainReweighting:
    return DomainReweighting(group_dro(eta=2.0), apply="sampling")


@pytest.mark.parametrize("make", [lambda: DomainReweighting(doremi(), reference=llama(seed=1)), sampling])
def test_loader_rule_and_model_resume_together_to_the_bit(make: Any, shards: Path, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> tuple[MixtureLoader, torch.Tensor, DomainReweighting]:
        loader, algorithm = make_loader(shards), make()
        model = wrap(gpt2(dropout=0.2))
        return (
            loader,
            parameters(fit(algorithm, model=model, loader=loader, steps=steps, micro=5, **options)),
            algorithm,
        )

    loader, expected, whole = run(7)
    run(4, save_folder=str(tmp_path), save_interval="1ba")
    for step in range(1, 5):
        resumed_loader, resumed, algorithm = run(7, load_path=str(tmp_path / f"ep0-ba{step}-rank0.pt"), seed=3)
        assert torch.equal(resumed, expected)
        assert resumed_loader.state_dict() == loader.state_dict()
        np.testing.assert_array_equal(algorithm.trajectory.weights, whole.trajectory.weights)


def test_fit_called_twice_neither_repeats_nor_skips_samples(shards: Path) -> None:
    once, twice = make_loader(shards), make_loader(shards)
    expected = parameters(fit(DomainReweighting(doremi(), reference=llama(seed=1)), loader=once, steps=6))
    trainer = make_trainer(DomainReweighting(doremi(), reference=llama(seed=1)), loader=twice, steps=2)
    trainer.fit()
    trainer.fit(duration="4ba")
    assert torch.equal(parameters(trainer), expected)
    assert twice.state_dict() == once.state_dict()


def test_composers_own_metrics_see_labels_in_training_and_evaluation(shards: Path) -> None:
    model, log = llama(), Metrics()
    wrapped = HuggingFaceModel(model, use_logits=True, shift_labels=True, metrics=[LanguageCrossEntropy()])
    held_out = MixtureLoader(shards, mixture="uniform", global_batch_size=6, split="validation")
    evaluator = Evaluator(label="held-out", dataloader=held_out, subset_num_batches=1)
    options = {"eval_dataloader": evaluator, "eval_interval": "2ba", "loggers": [log]}
    fit(DomainReweighting(), model=wrapped, loader=make_loader(shards), steps=2, micro=5, lr=0.0, **options)
    part = next(iter(make_loader(shards)))["input_ids"]
    first = dict(log.series["metrics/train/LanguageCrossEntropy"])
    assert next(iter(first.values())).item() == pytest.approx(model(input_ids=part, labels=part).loss.item(), rel=1e-5)
    assert np.isfinite(log.series["metrics/held-out/LanguageCrossEntropy"][0][1].item())


def test_a_model_with_a_smaller_vocabulary_is_refused(shards: Path) -> None:
    small = llama()
    small.resize_token_embeddings(VOCAB - 1)
    with pytest.raises(InputError, match="the model in training has a vocabulary of 31 ids, the shards use 32"):
        fit(DomainReweighting(group_dro()), model=wrap(small), loader=make_loader(shards))
    with pytest.raises(InputError, match="the reference has a vocabulary of 31 ids, the shards use 32"):
        fit(DomainReweighting(doremi(), reference=small), loader=make_loader(shards))


def test_a_model_with_too_few_learnt_positions_is_refused(shards: Path) -> None:
    short = {"n_positions": SEQ_LEN - 1}
    with pytest.raises(InputError, match="in training has learnt 11 positions, a sample of the shards has 12"):
        fit(DomainReweighting(group_dro()), model=wrap(gpt2(**short)), loader=make_loader(shards))
    with pytest.raises(InputError, match="the reference has learnt 11 positions"):
        fit(DomainReweighting(doremi(), reference=gpt2(**short)), loader=make_loader(shards))
    rotary = llama(max_position_embeddings=SEQ_LEN - 1)
    fit(DomainReweighting(group_dro()), model=wrap(rotary), loader=make_loader(shards), steps=1)


def test_the_very_next_batch_is_drawn_by_new_weights(shards: Path) -> None:
    drawn = []

    class Watched(MixtureLoader):
        def _next(self) -> Any:
            drawn.append(list(self.weights.values()))
            return super()._next()

    loader = Watched(shards, mixture="uniform", global_batch_size=12, seed=17)
    algorithm = sampling()
    fit(algorithm, loader=loader, steps=4)
    np.testing.assert_allclose(drawn[1:4], algorithm.trajectory.weights[:3], rtol=1e-12)
    assert np.ptp(algorithm.trajectory.weights, axis=0).max() > 0.01, "the weights have to have moved"


def test_a_mixture_is_not_overruled_by_a_sampling_rule(shards: Path) -> None:
    with pytest.raises(InputError, match=r"the rule 'erm' starts from .*'web': 0.77821"):
        fit(DomainReweighting(UPDATE_RULES["erm"]()), loader=make_loader(shards))


def test_rules_may_read_heldout_losses_from_the_validation_split(shards: Path) -> None:
    algorithm = DomainReweighting(UPDATE_RULES["on_demand"](), heldout=shards, every=2)
    fit(algorithm, loader=make_loader(shards), steps=4)
    history = algorithm.trajectory
    assert history.steps.tolist() == [1, 3] and np.isfinite(history.heldout_loss).all()


def test_a_plain_loop_on_heldout_losses_finds_the_weights_that_composer_finds(shards: Path) -> None:
    rule = UPDATE_RULES["on_demand"]()
    algorithm = DomainReweighting(rule, heldout=shards, every=1)
    trainer = fit(algorithm, loader=make_loader(shards), steps=3, micro=12)
    loader, model, windows = make_loader(shards), llama(), HeldOutWindows(shards)
    losses, optimizer = DomainLosses(loader), torch.optim.SGD(model.parameters(), lr=0.1)
    state = rule.init(loader)

    def token_loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_losses(model(input_ids=part["input_ids"]).logits, part["labels"])

    for _, part in zip(range(3), loader):
        losses(model(input_ids=part["input_ids"]).logits, part).backward()
        optimizer.step()
        optimizer.zero_grad()
        held, tokens = windows.evaluate(token_loss, rank=0, world_size=1)
        signals = losses.signals()._replace(heldout_loss=held, heldout_tokens=tokens)
        state, weights = rule.update(state, signals)
        loader.set_weights(weights)
    np.testing.assert_allclose(weights, algorithm.weights, rtol=1e-9)
    assert torch.allclose(flat(model.parameters()), parameters(trainer), atol=1e-7)


# What rows need beside their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "unimax": {"budget": 1e4},
    "given": {"weights": {"books": 0.2, "code": 0.3, "web": 0.5}},
    "modified_doremi": {"targets": {"web": 2.0}},
    "sheared_llama": {"targets": {"books": 2.0, "code": 2.0, "web": 2.0}},
    "wasserstein": {"distances": {"books": {"code": 1.0, "web": 1.0}, "code": {"web": 1.0}}},
}


# "preset" holds tables for other domains.
@pytest.mark.parametrize("name", sorted(set(UPDATE_RULES) - {"preset"}))
def test_every_rule_trains(name: str, shards: Path) -> None:
    rule, loader = UPDATE_RULES[name](**SETTINGS.get(name, {})), make_loader(shards)
    if rule.applies == "sampling":
        loader.set_weights(rule.weights(rule.init(domains_of(None, loader))))
    algorithm = DomainReweighting(rule, reference=llama(seed=1), heldout=shards, every=1)
    fit(algorithm, loader=loader, steps=3, micro=5)
    assert algorithm.weights is not None and algorithm.weights.sum() == pytest.approx(1)
    assert len(algorithm.trajectory.steps) == 3
    assert sum(algorithm.mixture().weights.values()) == pytest.approx(1)
