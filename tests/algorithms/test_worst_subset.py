"""Training on the worst part of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer import Algorithm
from composer.models import HuggingFaceModel
from torch.utils.flop_counter import FlopCounterMode

from algorithms import DomainReweighting
from algorithms.losses import token_losses
from algorithms.references import FrozenModel
from algorithms.worst_subset import WorstSubset, _gathered
from mixer.errors import DataError, InputError
from tests.algorithms.test_domain_reweighting import distance, written_out
from tests.algorithms.tiny import Loader, batch, gpt2, llama, t5, wrap
from tests.algorithms.training_helpers import Gradients, Metrics, fit, flat, parameters


def worst(
    part: dict[str, torch.Tensor], count: int, baseline: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    ids = part["input_ids"]
    scores = token_losses(llama()(input_ids=ids).logits, ids).mean(1)
    if baseline is not None:
        scores = scores - FrozenModel(baseline).token_losses(part).mean(1)
    rows = scores.argsort(descending=True)[:count].sort().values
    return {name: value[rows] for name, value in part.items()}


@pytest.mark.parametrize("baseline", [None, llama(seed=1)])
@pytest.mark.parametrize("micro", [12, 5])
def test_the_gradient_is_that_of_the_worst_samples(micro: int, baseline: torch.nn.Module | None) -> None:
    seen, log = Gradients(), Metrics()
    subset, observer = WorstSubset(keep=0.4, reference=baseline), DomainReweighting()
    fit(observer, subset, micro=micro, steps=1, callbacks=[seen], loggers=[log])
    kept = worst(batch(), 5, baseline)
    weights = torch.bincount(kept["domain_ids"], minlength=3).numpy() / 5
    assert distance(seen.steps[0], written_out(llama(), kept, weights)) < 1e-6
    assert observer.trajectory.num_tokens.sum() == 5 * 11, "only what is trained on is counted"
    shares = [log.series[f"worst_subset/{name}"][0] for name in Loader().domains]
    assert [value for _, value in shares] == pytest.approx(weights.tolist()) and shares[0][0] == 0


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def short(self: WorstSubset, state: Any, model: Any, part: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(part["labels"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole(self, state, model, part)

    calm = parameters(fit(WorstSubset(keep=0.4), DomainReweighting(), steps=2))
    whole = WorstSubset._excess
    monkeypatch.setattr(WorstSubset, "_excess", short)
    assert distance(parameters(fit(WorstSubset(keep=0.4), DomainReweighting(), steps=2)), calm) < 1e-6
    assert sizes == [12, 6] + [3] * 4 + [3] * 4, "and remembers the size that fits"


def test_ranks_whose_samples_are_padded_to_other_widths_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(8).view(2, 4)
    mine = {"input_ids": ids, "labels": ids.clone(), "domain_ids": torch.tensor([0, 1])}
    theirs = {**mine, "input_ids": ids[:, :3], "labels": ids[:, :3]}
    parts = [{name: value.numpy() for name, value in part.items()} for part in (theirs, mine)]
    monkeypatch.setattr("algorithms.worst_subset.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("algorithms.worst_subset.dist.all_gather_object", lambda part: parts)
    rows = _gathered(mine)
    assert rows["input_ids"].tolist() == [[0, 1, 2, 0], [4, 5, 6, 0], *ids.tolist()]
    assert rows["labels"].tolist() == [[0, 1, 2, -100], [4, 5, 6, -100], *ids.tolist()]
    assert rows["domain_ids"].tolist() == [0, 1, 0, 1]


def test_the_evaluation_uses_no_random_numbers_and_no_dropout() -> None:
    runs = [
        fit(*algorithms, DomainReweighting(), model=wrap(gpt2(dropout=0.3)), steps=3, micro=4, seed=2)
        for algorithms in ([], [WorstSubset(keep=1.0)])
    ]
    assert torch.equal(*(parameters(run) for run in runs))


def test_samples_are_counted_as_the_loader_delivers_them() -> None:
    trainer = fit(WorstSubset(keep=0.5), DomainReweighting(), steps=2)
    assert trainer.state.timestamp.sample.value == 24, "the position to resume from is the loader's"


def test_an_encoder_decoder_model_trains_on_its_worst_pairs() -> None:
    class Pairs(Loader):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return ({**part, "labels": part["input_ids"][:, :7]} for part in super().__iter__())

    seen, model, part = Gradients(), t5(), batch()
    fit(
        WorstSubset(keep=0.5),
        DomainReweighting(),
        model=HuggingFaceModel(t5()),
        loader=Pairs(),
        micro=5,
        steps=1,
        callbacks=[seen],
    )
    labels = part["input_ids"][:, :7].contiguous()
    logits = model(input_ids=part["input_ids"], labels=labels).logits
    losses = token_losses(logits, labels, shift=False).mean(1)
    losses.topk(6).values.mean().backward()
    assert distance(seen.steps[0], flat(p.grad for p in model.parameters())) < 1e-6


def test_half_of_a_double_batch_costs_five_thirds_of_a_step() -> None:
    """A backward pass is two forward passes; there is one more of these, over twice the samples."""

    def operations(*algorithms: Algorithm, size: int) -> int:
        with FlopCounterMode(display=False) as counter:
            fit(*algorithms, loader=Loader(global_batch_size=size), steps=1)
        return counter.get_total_flops()

    subset = operations(WorstSubset(keep=0.5), DomainReweighting(), size=24)
    assert subset / operations(DomainReweighting(), size=12) == pytest.approx(5 / 3, rel=0.02)


def test_what_cannot_work_is_refused() -> None:
    for keep in (0.0, 1.5):
        with pytest.raises(InputError, match=r"in \(0, 1\]"):
            WorstSubset(keep=keep)
    with pytest.raises(InputError, match="an encoder-decoder model needs 'labels'"):
        fit(WorstSubset(), model=wrap(t5()))
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite at step 0"):
        fit(WorstSubset(), model=wrap(broken))
