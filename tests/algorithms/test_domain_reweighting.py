"""DomainReweighting in one Composer process: gradients, weights, events, logs, refusals."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import Callback, State
from composer.core import DataSpec, Precision
from composer.loggers import Logger
from composer.metrics import LanguageCrossEntropy
from composer.models import ComposerModel, HuggingFaceModel

from algorithms import DomainReweighting, doremi, group_dro
from algorithms.checks import check_auto_micro_batches, check_parallelism
from algorithms.domain_losses import DomainLosses
from algorithms.heldout import HeldOutWindows
from algorithms.losses import token_losses
from algorithms.micro_batch import share_of_the_sum
from algorithms.references import CachedLosses, FrozenModel, LossesInBatch, as_reference
from algorithms.rules.base import UpdateRule
from algorithms.rules.odm import odm
from algorithms.signals import Signals, loss_histogram
from mixer.errors import DataError, InputError
from mixer.mixture import Mixture
from tests.algorithms.tiny import DOMAINS, SEQ_LEN, VOCAB, Loader, batch, gpt2, llama, t5, wrap
from tests.algorithms.training_helpers import Gradients, Metrics, fit, flat, make_trainer, parameters

WEIGHTS = np.array([0.1, 0.7, 0.2])


def constant(weights: np.ndarray = WEIGHTS, **fields: Any) -> UpdateRule:
    """A rule whose weights never move, so that a gradient can be written out."""
    from typing import NamedTuple

    class Count(NamedTuple):
        updates: int

    return UpdateRule(
        name="constant",
        settings={"weights": weights.tolist()},
        init=lambda domains: Count(0),
        update=lambda state, signals: (Count(state.updates + 1), weights),
        weights=lambda state: weights,
        result=lambda state: weights,
        **fields,
    )


def written_out(
    model: torch.nn.Module, part: dict[str, torch.Tensor], weights: np.ndarray = WEIGHTS, scale: str = "domain"
) -> torch.Tensor:
    """Return the gradient of the objective as the papers write it, by autograd on the whole batch."""
    model.zero_grad()
    ids, mask = part["input_ids"], part.get("attention_mask")
    logits = model(input_ids=ids, attention_mask=mask).logits
    keep = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(keep.shape)
    domains = part["domain_ids"]
    of = domains[:, None].expand_as(keep) if domains.ndim == 1 else domains[:, 1:]
    if scale == "domain":
        total = sum(w * losses[keep & (of == d)].mean() for d, w in enumerate(weights) if (keep & (of == d)).any())
    else:
        factor = torch.as_tensor(weights, dtype=torch.float32)[of] * keep
        total = (factor * losses).sum() / factor.sum()
    total.backward()
    return flat(parameter.grad for parameter in model.parameters())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


PACKINGS = {
    "plain": {},
    "padded": {"padded": True},
    "per_token": {"per_token": True},
    "padded per_token": {"padded": True, "per_token": True},
}


@pytest.mark.parametrize("options", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("micro", [12, 5, 1])
def test_gradient_is_the_papers_for_any_micro_batch(micro: int, options: dict[str, bool]) -> None:
    seen = Gradients()
    fit(DomainReweighting(constant()), loader=Loader(**options), micro=micro, steps=1, callbacks=[seen])
    assert distance(seen.steps[0], written_out(llama(), batch(**options))) < 1e-6


def test_doremi_scores_tokens_by_their_own_domain_where_a_sample_holds_several() -> None:
    options = {"padded": True, "per_token": True}
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    fit(algorithm, loader=Loader(**options), micro=5, steps=1)
    part = batch(**options)
    keep, of = part["attention_mask"][:, 1:].bool(), part["domain_ids"][:, 1:]
    own, theirs = (FrozenModel(llama(seed=seed)).token_losses(part) for seed in (0, 1))
    for domain in range(3):
        here = keep & (of == domain)
        assert algorithm.trajectory.num_tokens[0, domain] == here.sum()
        assert algorithm.trajectory.excess[0, domain] == pytest.approx((own - theirs)[here].mean().item(), rel=1e-4)
        clipped = (own - theirs).clamp(min=0)[here].mean().item()
        assert algorithm.trajectory.clipped_excess[0, domain] == pytest.approx(clipped, rel=1e-4)
    with pytest.raises(InputError, match=r"losses are those of whole samples.*shape \(12, 12\)"):
        CachedLosses.columns(SimpleNamespace(), {**part, "sample_ids": torch.arange(12)})  # type: ignore[arg-type]


def test_gradient_does_not_change_when_composer_accumulates_by_tokens() -> None:
    seen, loader = Gradients(), Loader(padded=True)

    def count(part: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"total": part["input_ids"].numel(), "loss_generating": int(part["attention_mask"].sum())}

    spec = DataSpec(loader, get_num_tokens_in_batch=count)  # type: ignore[arg-type]
    fit(
        DomainReweighting(constant()),
        loader=spec,
        micro=4,
        steps=1,
        callbacks=[seen],
        accumulate_train_batch_on_tokens=True,
    )
    assert distance(seen.steps[0], written_out(llama(), batch(padded=True))) < 1e-6


def test_token_normalization_gives_the_official_codes_gradient() -> None:
    seen, loader = Gradients(), Loader(padded=True)
    fit(DomainReweighting(constant(normalization="tokens")), loader=loader, micro=4, steps=1, callbacks=[seen])
    assert distance(seen.steps[0], written_out(llama(), batch(padded=True), scale="tokens")) < 1e-6


def test_token_normalization_divides_by_the_shares_that_samples_are_drawn_by() -> None:
    shares = {"books": 0.5, "code": 0.3, "web": 0.2}
    loader, twin, seen = Loader(), Loader(), Gradients()
    loader.set_weights(shares)
    twin.set_weights(shares)
    fit(DomainReweighting(constant(normalization="tokens")), loader=loader, steps=1, callbacks=[seen])
    expected = written_out(llama(), next(iter(twin)), WEIGHTS / list(shares.values()), scale="tokens")
    assert distance(seen.steps[0], expected) < 1e-6


@pytest.mark.parametrize("model", [llama, gpt2])
def test_works_with_any_hugging_face_model(model: Any) -> None:
    seen = Gradients()
    fit(DomainReweighting(constant()), model=wrap(model()), micro=4, steps=1, callbacks=[seen])
    assert distance(seen.steps[0], written_out(model(), batch())) < 1e-6


class OwnModel(ComposerModel):
    """A model that is not Hugging Face's, returns logits, and reduces its loss or not."""

    def __init__(self, reduce: bool) -> None:
        super().__init__()
        self.lm, self.reduce = llama(), reduce

    def forward(self, batch: Any) -> torch.Tensor:
        return self.lm(input_ids=batch["input_ids"]).logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        losses = F.cross_entropy(outputs[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return losses.mean() if self.reduce else losses


@pytest.mark.parametrize("reduce", [True, False])
def test_works_with_a_composer_model_of_ones_own(reduce: bool) -> None:
    seen = Gradients()
    fit(DomainReweighting(constant()), model=OwnModel(reduce), micro=4, steps=1, callbacks=[seen])
    assert distance(seen.steps[0], written_out(llama(), batch())) < 1e-6


def test_the_proxy_runs_once_per_micro_batch_and_its_loss_function_never(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = llama(), []
    model.loss_function = lambda *args, **kwargs: pytest.fail("the model computed a second cross-entropy")
    model.register_forward_hook(lambda *args: calls.append(1))
    fit(DomainReweighting(constant()), model=wrap(model), micro=4, steps=2)
    assert len(calls) == 2 * 3


def test_without_a_rule_training_is_what_composer_would_do() -> None:
    class Labelled(Loader):
        def __iter__(self) -> Any:
            return ({**part, "labels": part["input_ids"]} for part in super().__iter__())

    observer = DomainReweighting()
    watched, plain = fit(observer, micro=4), fit(loader=Labelled(), micro=4)
    assert distance(parameters(watched), parameters(plain)) < 1e-7
    assert np.nansum(observer.trajectory.num_tokens) == 3 * 12 * 11
    assert list(observer.mixture().weights.values()) == [1 / 3] * 3, "what the loader draws by"


def test_models_that_return_tuples_work_with_composers_metrics() -> None:
    model, log, seen = llama(), Metrics(), Gradients()
    model.config.return_dict = False
    wrapped = HuggingFaceModel(model, use_logits=True, shift_labels=True, metrics=[LanguageCrossEntropy()])
    fit(DomainReweighting(constant()), model=wrapped, micro=4, steps=1, callbacks=[seen], loggers=[log])
    assert distance(seen.steps[0], written_out(llama(), batch())) < 1e-6
    part = batch()["input_ids"]
    expected = llama()(input_ids=part, labels=part).loss.item()
    assert log.series["metrics/train/LanguageCrossEntropy"][0][1].item() == pytest.approx(expected, rel=1e-5)


def test_callbacks_see_the_plain_mean_loss_after_the_forward() -> None:
    class Watch(Callback):
        def after_loss(self, state: State, logger: Logger) -> None:
            self.loss = state.loss.item()  # type: ignore[union-attr]

    watch = Watch()
    fit(DomainReweighting(constant()), steps=1, micro=12, callbacks=[watch])
    part = batch()["input_ids"]
    assert watch.loss == pytest.approx(llama()(input_ids=part, labels=part).loss.item(), rel=1e-6)


def test_logged_total_is_the_weighted_loss_and_series_share_their_steps() -> None:
    log = Metrics()
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    fit(algorithm, micro=5, steps=3, loggers=[log])
    total = log.series["loss/train/total"]
    assert [step for step, _ in total] == [0, 1, 2]
    assert [step for step, _ in log.series["domain_weight/code"]] == [0, 1, 2]
    assert {name for name in log.series if name.startswith("domain_loss/")} == {
        f"domain_loss/{name}" for name in DOMAINS
    }
    means = {name: dict(log.series[f"domain_loss/{name}"]) for name in DOMAINS}
    assert total[0][1] == pytest.approx(sum(means[name][0] / 3 for name in DOMAINS), rel=1e-5)
    before = {name: dict(log.series[f"domain_weight/{name}"])[0] for name in DOMAINS}
    assert total[1][1] == pytest.approx(sum(before[name] * means[name][1] for name in DOMAINS), rel=1e-5)
    assert set(log.series) >= {f"domain_excess/{name}" for name in DOMAINS}


def test_a_plain_loop_finds_the_weights_that_composer_finds() -> None:
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    trainer = fit(algorithm, steps=4, micro=12)
    model, loader, rule = llama(), Loader(), doremi()
    losses = DomainLosses(DOMAINS, reference=as_reference(llama(seed=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = rule.init(DOMAINS)
    for _, part in zip(range(4), loader):
        losses(model(input_ids=part["input_ids"]).logits, part, rule.weights(state)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state, weights = rule.update(state, losses.signals())
    np.testing.assert_array_equal(weights, algorithm.weights)
    assert torch.equal(flat(model.parameters()), parameters(trainer))


def test_weights_do_not_depend_on_the_micro_batch() -> None:
    results = []
    for micro in (12, 5, 1):
        algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
        fit(algorithm, micro=micro, steps=3, loader=Loader(padded=True))
        results.append(algorithm.weights)
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-6)


class FailOnce(Callback):
    """Run out of memory in the middle of a step, as a GPU would: the step is tried again with half the micro-batch."""

    def __init__(self, step: int) -> None:
        self.step, self.calls, self.failed = step, 0, False

    def fit_start(self, state: State, logger: Logger) -> None:
        state.auto_microbatching = True

    def after_forward(self, state: State, logger: Logger) -> None:
        self.calls += state.timestamp.batch.value == self.step
        if self.calls == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")


def test_a_retry_after_running_out_of_memory_changes_nothing() -> None:
    runs = []
    for callbacks in ([], [FailOnce(step=1)]):
        algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
        trainer = fit(algorithm, micro=4, steps=3, callbacks=callbacks)
        runs.append((algorithm, parameters(trainer), trainer.state.device_train_microbatch_size))
    (calm, calm_parameters, _), (retried, retried_parameters, micro) = runs
    assert micro == 2, "the failure has to have made Composer halve the micro-batch"
    assert calm.trajectory.num_tokens.tolist() == retried.trajectory.num_tokens.tolist()
    np.testing.assert_allclose(calm.weights, retried.weights, rtol=1e-6)
    assert distance(retried_parameters, calm_parameters) < 1e-6


def test_a_reference_may_run_out_of_memory_and_finds_the_activations_of_the_failed_attempt_gone() -> None:
    class Short(FrozenModel):
        """Fails at the first batch, in its second way of computing the losses."""

        alive: ClassVar[list[bool]] = []

        def _losses_of_plain_head(self, *inputs: Any) -> Any:
            if not self.alive:
                self.alive.append(True)
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super()._losses_of_plain_head(*inputs)

        def token_losses(self, part: Any) -> torch.Tensor:
            self.alive.extend(losses() is not None for losses in retry.losses)
            return super().token_losses(part)

    class Retry(FailOnce):
        def __init__(self) -> None:
            super().__init__(step=1)
            self.losses: list[Any] = []

        def after_forward(self, state: State, logger: Logger) -> None:
            self.losses = [weakref.ref(algorithm._micro.token_loss)]
            super().after_forward(state, logger)
            self.losses = []

    retry, reference = Retry(), Short(llama(seed=1))
    algorithm, calm = (DomainReweighting(doremi(), reference=model) for model in (reference, llama(seed=1)))
    trainer = fit(algorithm, micro=8, steps=3, callbacks=[retry])
    assert trainer.state.device_train_microbatch_size == 2, "two failures"
    assert reference.alive == [True, False], "once the reference itself, once before the second attempt at step 1"
    assert reference._in_parts
    fit(calm, micro=8, steps=3)
    np.testing.assert_allclose(algorithm.weights, calm.weights, rtol=1e-6)


def test_parallelism_that_would_count_samples_twice_or_wait_for_ever_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run: dict[str, Any] = {
        "train_dataloader": Loader(),
        "tp_config": None,
        "model": llama(),
        "precision": Precision.FP32,
        "auto_microbatching": True,
        "fsdp_enabled": True,
    }

    def state(**fields: Any) -> Any:
        return SimpleNamespace(**{**run, **fields})

    with pytest.raises(InputError, match="under tensor parallelism several ranks work on the same samples"):
        check_parallelism(state(tp_config=object()))
    with pytest.raises(InputError, match="under sequence parallelism several ranks"):
        check_parallelism(state(train_dataloader=SimpleNamespace(seq_parallel_world_size=2)))
    with pytest.raises(InputError, match=r"\['gradients'\] of single domains are too small for float16"):
        check_parallelism(state(precision=Precision.AMP_FP16), frozenset({"gradients"}))
    check_parallelism(state(precision=Precision.AMP_FP16), frozenset({"heldout"}))
    sharded, whole = (FrozenModel(llama(), sharded=choice) for choice in (True, False))
    check_auto_micro_batches(state(), sharded, "skip")
    monkeypatch.setattr("algorithms.checks.dist.get_world_size", lambda: 2)
    with pytest.raises(InputError, match="a sharded reference and device_train_microbatch_size='auto' do not go"):
        check_auto_micro_batches(state(), sharded, "fail")
    with pytest.raises(InputError, match="on_nonfinite='skip' under FSDP and device_train_microbatch_size='auto'"):
        check_auto_micro_batches(state(), whole, "skip")
    check_auto_micro_batches(state(), whole, "fail")
    check_auto_micro_batches(state(auto_microbatching=False), sharded, "skip")


def test_a_closure_optimiser_that_runs_the_step_twice_counts_it_once() -> None:
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    model = wrap(llama())
    fit(algorithm, model=model, micro=4, steps=2, optimizers=torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3))
    assert algorithm.trajectory.num_tokens.sum(1).tolist() == [12 * 11] * 2


def test_sampling_rules_drive_the_loader_and_leave_the_loss() -> None:
    seen, loader = Gradients(), Loader()
    algorithm = DomainReweighting(group_dro(eta=1.0), apply="sampling")
    fit(algorithm, loader=loader, micro=4, steps=2, callbacks=[seen])
    assert list(loader.weights.values()) == pytest.approx(algorithm.weights.tolist())
    counts = np.bincount(batch()["domain_ids"], minlength=3)
    assert distance(seen.steps[0], written_out(llama(), batch(), counts / counts.sum())) < 1e-6


def test_a_loader_that_draws_by_other_weights_than_the_rule_starts_from_is_refused() -> None:
    loader = Loader()
    loader.set_weights({"books": 0.5, "code": 0.3, "web": 0.2})
    with pytest.raises(InputError, match=r"draws by \{'books': 0.5.*'group_dro' starts from \{'books': 0.333333"):
        fit(DomainReweighting(group_dro(), apply="sampling"), loader=loader)


def test_updates_every_few_batches_or_samples_use_all_sums_in_between() -> None:
    for every, rows in (("2ba", [1, 3]), (3, [2]), ("24sp", [1, 3]), ("30sp", [2, 4])):
        algorithm = DomainReweighting(constant(), every=every)
        fit(algorithm, steps=5, micro=12)
        assert algorithm.trajectory.steps.tolist() == rows
    assert algorithm.trajectory.num_tokens.sum(1).tolist() == [3 * 12 * 11, 2 * 12 * 11]


def test_a_mixture_that_could_not_move_yet_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    early, moved = DomainReweighting(odm()), DomainReweighting(odm())
    fit(early, steps=3)
    assert early.mixture().weights == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3))
    assert "after 3 updates 'odm' still has the weights it began with" in caplog.text
    assert "is number 4." in caplog.text
    caplog.clear()
    fit(moved, steps=4)
    assert moved.mixture().weights != pytest.approx(dict.fromkeys(DOMAINS, 1 / 3))
    assert "still has the weights" not in caplog.text


def test_mixture_says_how_it_was_made(tmp_path: Any) -> None:
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    with pytest.raises(InputError, match="call trainer"):
        algorithm.mixture()
    fit(algorithm, steps=2)
    mixture = Mixture.load(algorithm.mixture(round=1).save(tmp_path / "mixture.json"))
    assert list(mixture.weights) == list(DOMAINS)
    assert (
        mixture.provenance["rule"] == "doremi"
        and mixture.provenance["updates"] == 2
        and mixture.provenance["round"] == 1
    )
    assert mixture.provenance["reference"] == FrozenModel(llama(seed=1)).fingerprint
    assert mixture.provenance["settings"]["eta"] == 1.0
    average = algorithm.trajectory.weights.mean(0)
    assert list(mixture.weights.values()) == pytest.approx(average.tolist())
    saved = np.load(algorithm.save_trajectory(tmp_path / "trajectory.npz"))
    assert saved["domains"].tolist() == list(DOMAINS) and saved["weights"].shape == (2, 3)


class Poison(Callback):
    """Mark the samples of one domain at one step."""

    def __init__(self, step: int, domain: int) -> None:
        self.step, self.domain = step, domain

    def before_forward(self, state: State, logger: Logger) -> None:
        self.rows = (state.batch["domain_ids"] == self.domain) & (state.timestamp.batch.value == self.step)


def poisoned_model(poison: Poison) -> HuggingFaceModel:
    model = llama()

    def spoil(module: Any, arguments: Any, outputs: Any) -> Any:
        # A forbidden token has probability 0: an infinite loss with a finite gradient elsewhere.
        outputs.logits = outputs.logits.masked_fill(
            poison.rows[:, None, None] & (torch.arange(VOCAB) < 20), float("-inf")
        )
        return outputs

    model.register_forward_hook(spoil)
    return wrap(model)


def test_a_non_finite_loss_stops_the_run_and_names_step_and_domain() -> None:
    poison = Poison(step=2, domain=0)
    with pytest.raises(DataError, match="at step 2 the training loss of domain 'books' is inf"):
        fit(DomainReweighting(constant()), model=poisoned_model(poison), callbacks=[poison], micro=4, steps=5)


def test_a_non_finite_loss_can_be_skipped_and_is_counted() -> None:
    poison, log = Poison(step=1, domain=0), Metrics()
    algorithm = DomainReweighting(group_dro(), on_nonfinite="skip")
    trainer = fit(algorithm, model=poisoned_model(poison), callbacks=[poison], micro=4, steps=3, loggers=[log])
    assert algorithm.num_nonfinite == {"books": 1, "code": 0, "web": 0}
    assert algorithm.trajectory.num_tokens[1].tolist()[0] == 0 and np.isnan(algorithm.trajectory.loss[1][0])
    assert np.isfinite(algorithm.weights).all() and parameters(trainer).isfinite().all()
    assert log.series["domain_nonfinite/books"] == [(1, 1.0)]


def broken_inside(poison: Poison) -> HuggingFaceModel:
    """A NaN in the hidden states of the marked samples, which reaches every gradient of its micro-batch."""
    model = llama()
    model.model.embed_tokens.register_forward_hook(
        lambda module, arguments, hidden: hidden.masked_fill(poison.rows[:, None, None], float("nan"))
    )
    return wrap(model)


def test_a_step_whose_gradients_are_broken_is_left_out_and_counted() -> None:
    poison, seen = Poison(step=1, domain=0), []

    class Parameters(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            seen.append(flat(state.model.parameters()).clone())

    algorithm = DomainReweighting(group_dro(), on_nonfinite="skip")
    fit(algorithm, model=broken_inside(poison), callbacks=[poison, Parameters()], micro=4, steps=3)
    assert algorithm.num_skipped_steps == 1 and algorithm.num_nonfinite["books"] == 1
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert seen[2].isfinite().all() and algorithm.state_dict()["num_skipped_steps"] == 1


def test_domains_wait_until_enough_of_their_tokens_add_up() -> None:
    rule, seen = recorder("behaviour")
    algorithm = DomainReweighting(rule, min_tokens=70)
    fit(algorithm, steps=4)
    tokens = [step.num_tokens for step in seen]
    assert any((step == 0).any() for step in tokens), "a domain of a few samples waits"
    assert all(((step == 0) | (step >= 70)).all() for step in tokens)
    waiting = algorithm.state_dict()["pending"]
    left = np.zeros(3) if waiting is None else np.array(waiting[0])
    np.testing.assert_array_equal(sum(tokens) + left, tokens_of_the_loader(4))
    np.testing.assert_allclose(sum(step.behaviour for step in seen), [4 / 3] * 3)


def tokens_of_the_loader(steps: int) -> np.ndarray:
    observer = DomainReweighting()
    fit(observer, steps=steps)
    return observer.trajectory.num_tokens.sum(0)


def test_skipping_ends_when_nothing_finite_is_left() -> None:
    with pytest.raises(DataError, match="no domain had a finite loss in the 10 steps up to 9: the model has diverged"):
        fit(DomainReweighting(constant(), on_nonfinite="skip"), model=_ruined(), steps=20)


class Unlabelled(Loader):
    def __iter__(self) -> Any:
        return ({**part, "labels": torch.full_like(part["input_ids"], -100)} for part in super().__iter__())


def test_data_without_a_label_that_counts_is_named_as_such(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"no token bears one\. Look at the labels"):
        fit(DomainReweighting(doremi(), reference=llama(seed=1)), loader=Unlabelled(), steps=20)
    assert "as if they were one model" not in caplog.text


def _ruined() -> HuggingFaceModel:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    return wrap(model)


def test_the_reference_is_neither_trained_nor_saved_nor_optimised() -> None:
    reference = llama(seed=1)
    algorithm = DomainReweighting(doremi(), reference=reference)
    trainer = fit(algorithm, steps=2)
    frozen = algorithm.reference.model  # type: ignore[union-attr]
    assert torch.equal(flat(frozen.parameters()), flat(llama(seed=1).parameters()))
    optimised = {id(p) for group in trainer.state.optimizers[0].param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in frozen.parameters()}
    assert set(trainer.state.state_dict()["model"]) == set(wrap(llama()).state_dict())
    assert all(parameter.requires_grad for parameter in reference.parameters()), "the caller's model stays trainable"


def test_batches_without_domains_or_of_the_wrong_kind_are_refused() -> None:
    class NoDomains(Loader):
        def __iter__(self) -> Any:
            return ({"input_ids": part["input_ids"]} for part in super().__iter__())

    class Tuples(Loader):
        def __iter__(self) -> Any:
            return ((part["input_ids"], part["domain_ids"]) for part in super().__iter__())

    class OtherLength(Loader):
        def __iter__(self) -> Any:
            return ({**part, "domain_ids": part["domain_ids"][:, None].expand(-1, 20)} for part in super().__iter__())

    with pytest.raises(InputError, match=r"have the shape \(12, 20\): expected one per sample"):
        fit(DomainReweighting(constant()), loader=OtherLength())
    with pytest.raises(InputError, match="needs 'domain_ids'"):
        fit(DomainReweighting(constant()), loader=NoDomains())
    with pytest.raises(InputError, match="have to be mappings"):
        fit(DomainReweighting(constant()), loader=Tuples())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="'doremi' compares with a reference, and none was given"):
        DomainReweighting(doremi())
    with pytest.raises(InputError, match='apply must be "loss" or "sampling"'):
        DomainReweighting(constant(), apply="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="normalization must be"):
        DomainReweighting(constant(), normalization="samples")  # type: ignore[arg-type]
    for every in ("1ep", "0ba", "soon"):
        with pytest.raises(InputError, match=f"every='{every}'"):
            DomainReweighting(constant(), every=every)
    with pytest.raises(InputError, match="a reference is a model"):
        DomainReweighting(doremi(), reference=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a rule is what a method returns when it is called, such as doremi"):
        DomainReweighting(doremi)  # type: ignore[arg-type]
    for wrong in ({"on_nonfinite": "ignore"}, {"min_tokens": -1}, {"min_tokens": 0.5}, {"gradients_of": "head"}):
        with pytest.raises(InputError, match=f"got {next(iter(wrong.values()))!r}"):
            DomainReweighting(constant(), **wrong)  # type: ignore[arg-type]
    rule, _ = recorder("heldout", "heldout_reference")
    with pytest.raises(InputError, match="on held-out windows, which this reference does not know"):
        DomainReweighting(rule, heldout=heldout_windows(), reference=LossesInBatch())


def test_a_compiled_proxy_finds_the_same_weights() -> None:
    found = []
    for options in ({}, {"compile_config": {"backend": "aot_eager"}}):
        algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
        trainer = fit(algorithm, loader=Loader(padded=True), micro=4, steps=2, **options)
        found.append((algorithm.weights, parameters(trainer)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    assert distance(found[1][1], found[0][1]) < 1e-6


def test_two_rules_in_one_run_are_refused() -> None:
    with pytest.raises(InputError, match="2 DomainReweighting algorithms in one run"):
        make_trainer(DomainReweighting(constant()), DomainReweighting(group_dro()))


def test_a_second_trainer_does_not_continue_silently() -> None:
    algorithm = DomainReweighting(constant())
    fit(algorithm, steps=1)
    with pytest.raises(InputError, match="has served another Trainer"):
        make_trainer(algorithm)


def test_another_fit_on_other_domains_is_refused() -> None:
    class Reordered(Loader):
        domains = ("web", "books", "code")

    trainer = make_trainer(DomainReweighting(constant()), steps=1)
    trainer.fit()
    trainer.fit(train_dataloader=Loader(seed=1), duration="1ba")
    with pytest.raises(InputError, match=r"begun on the domains \['books', 'code', 'web'\], this loader's are \['web'"):
        trainer.fit(train_dataloader=Reordered(), duration="1ba")


def test_domains_come_from_the_loader_and_must_agree_with_it() -> None:
    class Nameless(Loader):
        domains = None  # type: ignore[assignment]

    with pytest.raises(InputError, match="does not say what its domains are"):
        fit(DomainReweighting(constant()), loader=Nameless())
    algorithm = DomainReweighting(constant(), domains=["a", "b", "c"])
    fit(algorithm, loader=Nameless(), steps=1)
    assert algorithm.domains == ("a", "b", "c")
    with pytest.raises(InputError, match=r"given are \['a', 'b', 'c'\], the loader's are \['books'"):
        fit(DomainReweighting(constant(), domains=["a", "b", "c"]))


def test_sampling_needs_a_loader_that_takes_weights() -> None:
    class Fixed(Loader):
        set_weights = property()  # type: ignore[assignment]

    with pytest.raises(InputError, match="needs a loader with set_weights"):
        fit(DomainReweighting(constant(), apply="sampling"), loader=Fixed())


def heldout_windows(per_domain: int = 5) -> HeldOutWindows:
    rng = np.random.default_rng(0)
    return HeldOutWindows({name: rng.integers(0, VOCAB, (per_domain, SEQ_LEN)) for name in DOMAINS}, batch_size=4)


def pairs_of_windows() -> HeldOutWindows:
    rng = np.random.default_rng(1)
    columns = {
        name: {"input_ids": rng.integers(1, VOCAB, (5, SEQ_LEN)), "labels": rng.integers(1, VOCAB, (5, 7))}
        for name in DOMAINS
    }
    return HeldOutWindows(columns, batch_size=4)


def recorder(*needs: str) -> tuple[UpdateRule, list[Signals]]:
    """A rule that keeps the signals it gets."""
    seen: list[Signals] = []
    rule = constant(needs=frozenset(needs), applies="loss")
    return rule._replace(update=lambda state, signals: (seen.append(signals), rule.update(state, signals))[1]), seen


def test_heldout_windows_are_evaluated_in_place() -> None:
    windows, log = heldout_windows(), Metrics()
    rule, seen = recorder("heldout", "heldout_reference")
    trainer = make_trainer(
        DomainReweighting(rule, heldout=windows, every=1, reference=gpt2(dropout=0.5)),
        model=wrap(gpt2(dropout=0.5)),
        steps=1,
        loggers=[log],
        lr=0.0,
    )
    trainer.fit()
    assert trainer.state.model.training, "evaluation must leave the model in training mode"
    for index, name in enumerate(DOMAINS):
        ids = windows.input_ids[windows.domain_ids == index]
        expected = gpt2().eval()(input_ids=ids, labels=ids).loss.item()
        assert seen[0].heldout_loss[index] / seen[0].heldout_tokens[index] == pytest.approx(expected, rel=1e-5)
        assert log.series[f"domain_heldout_loss/{name}"] == [(0, pytest.approx(expected, rel=1e-5))]
    assert seen[0].heldout_tokens.tolist() == [5 * (SEQ_LEN - 1)] * 3
    np.testing.assert_allclose(seen[0].heldout_reference_loss, seen[0].heldout_loss, rtol=1e-5)


def test_measuring_that_runs_out_of_memory_says_what_to_make_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("algorithms.domain_reweighting.evaluate_windows", short)
    rule, _ = recorder("heldout")
    with pytest.raises(DataError, match=r"at step 0 what 'constant' reads did not fit.*HeldOutWindows\(batch_size"):
        fit(DomainReweighting(rule, heldout=heldout_windows(), every=1))


def test_heldout_windows_split_over_ranks_in_equal_numbers_of_batches() -> None:
    windows = heldout_windows(per_domain=3)
    parts = [list(windows.batches(rank, 4)) for rank in range(4)]
    assert len({len(part) for part in parts}) == 1
    labels = torch.cat([part["labels"] for rank in parts for part in rank])
    rows = labels[(labels != -100).any(1)]
    assert sorted(rows.tolist()) == sorted(windows.input_ids.tolist())


def test_rules_that_need_windows_or_more_are_told() -> None:
    rule, _ = recorder("heldout")
    with pytest.raises(InputError, match="'constant' reads held-out losses, and there are no windows"):
        DomainReweighting(rule)
    with pytest.raises(InputError, match=r"needs \['telepathy'\], which DomainReweighting does not gather"):
        DomainReweighting(constant(needs=frozenset({"telepathy"})))
    with pytest.raises(InputError, match=r"windows are of \['a', 'b'\], the domains are \['books'"):
        fit(DomainReweighting(rule, heldout=HeldOutWindows(dict.fromkeys("ab", np.ones((1, 4), dtype=np.int64)))))
    ones = np.ones((2, 4), dtype=np.int64)
    with pytest.raises(
        InputError, match=r"of 'b' have the columns \['input_ids'\], those of 'a' \['input_ids', 'labels'\]"
    ):
        HeldOutWindows({"a": {"input_ids": ones, "labels": ones}, "b": ones})
    with pytest.raises(InputError, match=r"pad them to one length"):
        HeldOutWindows({"a": ones, "b": ones[:, :2]})
    with pytest.raises(InputError, match=r"without held-out samples: \['b'\]"):
        HeldOutWindows({"a": np.ones((1, 4), dtype=np.int64), "b": np.ones((0, 4), dtype=np.int64)})


def test_rules_that_ask_get_the_weights_samples_were_drawn_by() -> None:
    rule, seen = recorder("behaviour")
    fit(DomainReweighting(rule, every=2), steps=2)
    np.testing.assert_allclose(seen[0].behaviour, [2 / 3] * 3)


def test_a_batch_is_credited_to_the_weights_that_drew_it_not_to_the_next_ones() -> None:
    class Scheduled(Loader):
        """Says, as a loader with a schedule does, by what the batch after the delivered one is drawn."""

        delivered = 0

        def __iter__(self) -> Any:
            for part in super().__iter__():
                self.delivered += 1
                yield part

        @property
        def weights(self) -> dict[str, float]:
            return {"books": 0.5, "code": 0.25, "web": 0.25} if self.delivered >= 1 else dict.fromkeys(DOMAINS, 1 / 3)

    rule, seen = recorder("behaviour")
    fit(DomainReweighting(rule), loader=Scheduled(), steps=2)
    np.testing.assert_allclose([step.behaviour for step in seen], [[1 / 3] * 3, [0.5, 0.25, 0.25]])


def test_without_a_reference_the_models_first_losses_are_what_later_ones_are_compared_with(tmp_path: Any) -> None:
    windows = heldout_windows()
    rule, seen = recorder("heldout", "heldout_reference")

    def run(steps: int, **options: Any) -> None:
        fit(DomainReweighting(rule, heldout=windows, every=1), steps=steps, **options)

    run(2, save_folder=str(tmp_path), save_interval="2ba")
    for index in range(3):
        ids = windows.input_ids[windows.domain_ids == index]
        expected = llama()(input_ids=ids, labels=ids).loss.item()
        assert [step.heldout_reference_loss[index] / 55 for step in seen] == [pytest.approx(expected, rel=1e-5)] * 2
    assert seen[1].heldout_loss.sum() != pytest.approx(seen[0].heldout_loss.sum(), rel=1e-6)
    run(3, load_path=str(tmp_path / "ep0-ba2-rank0.pt"))
    np.testing.assert_array_equal(seen[2].heldout_reference_loss, seen[0].heldout_reference_loss)


def test_a_proxy_that_starts_as_its_own_reference_is_refused() -> None:
    with pytest.raises(InputError, match="the proxy starts as its own reference"):
        fit(DomainReweighting(doremi(), reference=llama()))
    fit(DomainReweighting(doremi(clip="none"), reference=llama()), steps=1)


def test_a_proxy_that_is_its_own_reference_in_another_precision_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    half = FrozenModel(llama(), dtype=torch.bfloat16)
    with pytest.raises(InputError, match="the proxy starts as its own reference"):
        fit(DomainReweighting(doremi(), reference=half), steps=1)
    other_digest = FrozenModel(llama().bfloat16(), dtype=torch.float32)
    fit(DomainReweighting(doremi(), reference=other_digest), steps=2)
    (text,) = [record.getMessage() for record in caplog.records if "as if they were one model" in record.getMessage()]
    assert "no excess loss is above 0" in text
    caplog.clear()
    fit(DomainReweighting(doremi(), reference=llama(seed=1)), steps=1)
    fit(DomainReweighting(doremi(clip="none"), reference=other_digest), steps=1)
    assert "as if they were one model" not in caplog.text


def test_rules_that_ask_get_a_histogram_of_losses_per_sample() -> None:
    rule, seen = recorder("histogram")
    fit(DomainReweighting(rule), steps=1, micro=5)
    model, part = llama(), batch()
    losses = token_losses(model(input_ids=part["input_ids"]).logits, part["input_ids"]).mean(1).detach().double()
    np.testing.assert_array_equal(seen[0].histogram, loss_histogram(losses.numpy(), part["domain_ids"].numpy(), 3))


def test_an_encoder_decoder_model_is_reweighted_on_its_labels() -> None:
    class Pairs(Loader):
        def __iter__(self) -> Any:
            return ({**part, "labels": part["input_ids"][:, :7]} for part in super().__iter__())

    seen = Gradients()
    fit(DomainReweighting(constant()), model=HuggingFaceModel(t5()), loader=Pairs(), micro=4, steps=1, callbacks=[seen])
    model, part = t5(), batch()
    labels = part["input_ids"][:, :7].contiguous()
    losses = F.cross_entropy(
        model(input_ids=part["input_ids"], labels=labels).logits.transpose(1, 2), labels, reduction="none"
    )
    sum(w * losses[part["domain_ids"] == d].mean() for d, w in enumerate(WEIGHTS)).backward()
    assert distance(seen.steps[0], flat(p.grad for p in model.parameters())) < 1e-6
    windows = pairs_of_windows()
    rule, signals = recorder("heldout")
    fit(
        DomainReweighting(rule, heldout=windows, every=1), model=HuggingFaceModel(t5()), loader=Pairs(), steps=1, lr=0.0
    )
    ids, targets = windows.input_ids[windows.domain_ids == 1], windows._columns["labels"][windows.domain_ids == 1]
    assert signals[0].heldout_tokens.tolist() == [5 * 7] * 3
    expected = t5().eval()(input_ids=ids, labels=targets).loss.item()
    assert signals[0].heldout_loss[1] / (5 * 7) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="held-out windows for an encoder-decoder model need labels"):
        fit(DomainReweighting(constant(), heldout=heldout_windows()), model=HuggingFaceModel(t5()), loader=Pairs())
    with pytest.raises(InputError, match="an encoder-decoder model needs 'labels'"):
        fit(DomainReweighting(constant()), model=HuggingFaceModel(t5()))


def test_auxiliary_losses_of_the_model_are_kept() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def moe() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        more = {
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
        }
        return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, use_cache=False, **sizes, **more))

    seen, log = Gradients(), Metrics()
    fit(DomainReweighting(constant()), model=wrap(moe()), steps=1, callbacks=[seen], loggers=[log])
    model, part = moe(), batch()
    outputs = model(input_ids=part["input_ids"])
    losses = token_losses(outputs.logits, part["input_ids"])
    weighted = sum(w * losses[part["domain_ids"] == d].mean() for d, w in enumerate(WEIGHTS))
    (weighted + 0.5 * outputs.aux_loss).backward()
    expected = flat(p.grad for p in model.parameters() if p.grad is not None)
    assert distance(seen.steps[0], expected) < 1e-6
    assert log.series["loss/train/auxiliary"][0][1] == pytest.approx(0.5 * outputs.aux_loss.item(), rel=1e-5)
    assert log.series["loss/train/loss"][0][1] == pytest.approx(weighted.item(), rel=1e-5)


def test_gradient_scaling_keeps_its_factor() -> None:
    """fp16 scales the loss by a power of two and divides the gradient by it before the optimiser sees it."""
    found = []
    for factor in (1.0, 1024.0):
        loss = torch.tensor(3.0, requires_grad=True)
        state = SimpleNamespace(
            precision=Precision.AMP_FP16, scaler=SimpleNamespace(get_scale=lambda factor=factor: factor)
        )
        shown = share_of_the_sum(loss * 2, state, share=0.25)  # type: ignore[arg-type]
        # What Composer does with a micro-batch of a quarter of the rows.
        (shown * factor * 0.25).backward()
        found.append(loss.grad.item() / factor)
        assert shown.item() * 0.25 == pytest.approx(6.0)
    assert found == [2.0, 2.0]
