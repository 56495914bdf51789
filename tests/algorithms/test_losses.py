"""Losses per token and per domain, against the equations written out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from algorithms.domain_losses import DomainLosses
from algorithms.losses import (
    domain_ids_of,
    domain_sums,
    labels_of,
    loss_coefficients,
    loss_mask,
    to_signals,
    token_losses,
    tokens_per_domain,
    weighted_loss,
)
from algorithms.rules.doremi import doremi
from mixer.errors import DataError, InputError
from tests.algorithms.tiny import DOMAINS, Loader, batch, llama

CPU = torch.Generator().manual_seed(0)


def test_token_losses_equal_cross_entropy_of_the_next_token() -> None:
    logits, labels = torch.randn(3, 5, 7, generator=CPU), torch.randint(0, 7, (3, 5), generator=CPU)
    labels[1, 3] = -100
    losses = token_losses(logits, labels)
    assert losses.shape == (3, 4) and losses.dtype == torch.float32
    for row in range(3):
        for position in range(4):
            target = labels[row, position + 1]
            expected = 0.0 if target == -100 else F.cross_entropy(logits[row, position], target).item()
            assert losses[row, position].item() == pytest.approx(expected, abs=1e-6)


def test_token_losses_without_shift_predict_in_place() -> None:
    logits, labels = torch.randn(2, 3, 5, generator=CPU), torch.tensor([[1, 2, -100], [0, 4, 3]])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    assert torch.equal(token_losses(logits, labels, shift=False), expected)


def test_token_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    logits, labels = torch.randn(2, 4, 9, generator=CPU).bfloat16(), torch.randint(0, 9, (2, 4), generator=CPU)
    assert torch.equal(token_losses(logits, labels), token_losses(logits.float(), labels))


@pytest.mark.parametrize("rows_in_a_part", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_token_losses_is_that_of_cross_entropy(
    rows_in_a_part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = lambda logits: [slice(i, i + rows_in_a_part) for i in range(0, len(logits), rows_in_a_part)]  # noqa: E731
    monkeypatch.setattr("algorithms.cross_entropy._parts", parts)
    logits = (5 * torch.randn(3, 5, 7, generator=CPU)).to(dtype).requires_grad_()
    labels, weights = torch.randint(0, 7, (3, 5), generator=CPU), torch.rand(3, 4, generator=CPU)
    labels[1, 3] = -100
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    expected_losses = flat.view(3, 4)
    (expected,) = torch.autograd.grad((expected_losses * weights).sum(), logits)
    losses = token_losses(logits, labels)
    (found,) = torch.autograd.grad((losses * weights).sum(), logits)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(found, expected)
    assert torch.equal(token_losses(logits.detach(), labels), losses), "a proxy and an equal reference have no excess"


def test_a_forbidden_token_spoils_only_its_own_loss() -> None:
    logits = torch.randn(1, 3, 4, generator=CPU)
    logits[0, 0, 2] = float("-inf")
    logits.requires_grad_()
    losses = token_losses(logits, torch.tensor([[0, 2, 1]]))
    assert losses[0, 0] == float("inf") and losses[0, 1].isfinite()
    torch.where(losses.isfinite(), losses, 0.0).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_sums_are_those_of_float32_losses_of_the_half_precision_logits(
    dtype: torch.dtype,
) -> None:
    part, model, found = batch(), llama(), {}
    for micro in (12, 5):
        losses = DomainLosses(DOMAINS)
        losses.start(part)
        for start in range(0, 12, micro):
            rows = {name: value[start : start + micro] for name, value in part.items()}
            with torch.autocast("cpu", dtype):
                logits = model(input_ids=rows["input_ids"]).logits
                assert logits.dtype == dtype
                losses(logits, rows, np.full(3, 1 / 3)).backward()
        found[micro] = losses.signals()
    with torch.autocast("cpu", dtype):
        logits = model(input_ids=part["input_ids"]).logits.float()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), part["input_ids"][:, 1:], reduction="none").double().sum(1)
    expected = torch.zeros(3, dtype=torch.float64).index_add_(0, part["domain_ids"], each.detach())
    np.testing.assert_allclose(found[12].loss, expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found[5].loss, found[12].loss, rtol=1e-3)  # matrix products of other shapes round anew
    assert found[5].loss.dtype == np.float64


def test_a_row_that_is_left_out_of_the_loss_reaches_no_gradient_even_if_it_is_nan() -> None:
    logits = torch.randn(1, 4, 5, generator=CPU)
    logits[0, 1] = float("nan")
    logits.requires_grad_()
    losses = token_losses(logits, torch.tensor([[0, 2, 1, 3]]))
    assert losses[0].isnan().tolist() == [False, True, False]
    torch.where(losses.isfinite(), losses, 0.0).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[0, 1].eq(0).all()


def test_token_losses_are_those_that_hugging_face_averages() -> None:
    model, ids = llama(), batch()["input_ids"]
    outputs = model(input_ids=ids, labels=ids)
    assert token_losses(outputs.logits, ids).mean().item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_labels_are_the_inputs_without_the_padding() -> None:
    padded = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert labels_of(padded).tolist() == [[5, 6, -100]]
    assert labels_of({**padded, "labels": torch.tensor([[1, 2, 3]])}).tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match=r"needs 'labels' or 'input_ids'.*\['tokens'\]"):
        labels_of({"tokens": torch.zeros(1)})


def test_domain_sums_add_up_tokens_losses_and_excess() -> None:
    loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    reference = torch.tensor([[2.0, 1.0, 3.0], [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    signals = to_signals(domain_sums(loss, mask, torch.tensor([0, 2, 0]), 3, reference))
    assert signals.num_tokens.tolist() == [3, 0, 3]
    assert signals.loss.tolist() == [1 + 2 + 7, 0, 4 + 5 + 6]
    assert signals.num_sequences.tolist() == [2, 0, 1]
    assert signals.loss_squared.tolist() == [1.5**2 + 7**2, 0, 5**2]
    assert signals.reference_loss.tolist() == [2 + 1 + 9, 0, 3]
    assert signals.clipped_excess.tolist() == [1, 0, 12]


def test_a_sample_may_hold_tokens_of_several_domains() -> None:
    loss, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    ids = torch.tensor([[2, 0, 0, 1]])  # of T = 4 tokens; the first is predicted by nothing
    signals = to_signals(domain_sums(loss, mask, ids, 3))
    assert signals.loss.tolist() == [3, 3, 0]
    assert signals.num_tokens.tolist() == [2, 1, 0]
    assert signals.num_sequences.tolist() == [1, 1, 0]
    assert tokens_per_domain(mask, ids, 3).tolist() == [2, 1, 0]
    assert weighted_loss(loss, mask, ids, torch.tensor([1.0, 10.0, 100.0])).item() == 1 + 2 + 30


def test_ids_per_sample_and_per_token_give_the_same_sums() -> None:
    loss, mask = torch.rand(4, 5, generator=CPU), torch.rand(4, 5, generator=CPU) > 0.3
    ids = torch.tensor([1, 0, 2, 1])
    per_token = ids[:, None].expand(4, 6)
    reference = torch.rand(4, 5, generator=CPU)
    torch.testing.assert_close(
        domain_sums(loss, mask, ids, 3, reference), domain_sums(loss, mask, per_token, 3, reference), rtol=1e-12, atol=0
    )
    assert torch.equal(tokens_per_domain(mask, ids, 3), tokens_per_domain(mask, per_token, 3))


def test_an_id_outside_the_domains_is_named() -> None:
    with pytest.raises(DataError, match=r"lie in \[0, 3\], but there are 3 domains"):
        tokens_per_domain(torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 3]), 3)


def test_domain_normalization_is_the_weighted_sum_of_domain_means() -> None:
    loss, mask = torch.rand(6, 4, generator=CPU), torch.rand(6, 4, generator=CPU) > 0.2
    ids, weights = torch.tensor([0, 1, 1, 2, 0, 1]), torch.tensor([0.2, 0.5, 0.3])
    coefficients = loss_coefficients(weights, tokens_per_domain(mask, ids, 3))
    expected = sum(weights[d] * loss[ids == d][mask[ids == d]].mean() for d in range(3))
    assert weighted_loss(loss, mask, ids, coefficients).item() == pytest.approx(expected.item(), rel=1e-6)


def test_token_normalization_is_one_weighted_mean_and_divides_by_the_sampling() -> None:
    tokens, weights = torch.tensor([10, 30]), torch.tensor([0.5, 0.5])
    assert loss_coefficients(weights, tokens, "tokens").tolist() == pytest.approx([1 / 40, 1 / 40])
    # Drawn three times as often and weighted alike: a token counts a third.
    assert loss_coefficients(weights, tokens, "tokens", torch.tensor([0.25, 0.75])).tolist() == pytest.approx(
        [0.05, 0.05 / 3]
    )
    with pytest.raises(InputError, match='"domain" or "tokens"; got \'samples\''):
        loss_coefficients(weights, tokens, "samples")  # type: ignore[arg-type]


def test_absent_domains_have_no_coefficient_and_no_nan() -> None:
    for normalization in ("domain", "tokens"):
        assert loss_coefficients(torch.ones(2), torch.tensor([0, 0]), normalization).tolist() == [0, 0]


def gradient(model: torch.nn.Module, weights: np.ndarray, micro: int, **options: bool) -> tuple[torch.Tensor, object]:
    whole = batch(**options)
    losses = DomainLosses(DOMAINS)
    model.zero_grad()
    losses.start(whole)
    for first in range(0, 12, micro):
        part = {name: value[first : first + micro] for name, value in whole.items()}
        inputs = {name: part[name] for name in ("input_ids", "attention_mask") if name in part}
        losses(model(**inputs).logits, part, weights).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), losses.signals()


@pytest.mark.parametrize("options", [{}, {"padded": True}, {"per_token": True}, {"padded": True, "per_token": True}])
@pytest.mark.parametrize("micro", [1, 4, 5, 6])
def test_gradient_and_signals_do_not_depend_on_the_micro_batch(micro: int, options: dict[str, bool]) -> None:
    model, weights = llama(), np.array([0.1, 0.7, 0.2])
    whole, sums = gradient(model, weights, 12, **options)
    parts, sums_of_parts = gradient(model, weights, micro, **options)
    assert (whole - parts).norm() / whole.norm() < 1e-6
    for a, b in zip(sums, sums_of_parts):
        if a is not None:
            # Kernels of other sizes round a token's loss otherwise, in its last bits.
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_plain_loop_finds_weights_in_five_lines() -> None:
    model, loader, reference = llama(), Loader(), llama(seed=1)
    from algorithms.references import as_reference

    losses, rule = DomainLosses(loader, reference=as_reference(reference)), doremi()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = rule.init(loader.domains)
    for _, part in zip(range(3), loader):
        losses(model(input_ids=part["input_ids"]).logits, part, rule.weights(state)).backward()
        optimizer.step()
        optimizer.zero_grad()
        state, weights = rule.update(state, losses.signals())
    assert weights.sum() == pytest.approx(1) and not np.allclose(weights, 1 / 3, atol=1e-4)


def test_a_second_micro_batch_has_to_be_announced() -> None:
    model, losses, part = llama(), DomainLosses(DOMAINS), batch()
    logits = model(input_ids=part["input_ids"]).logits
    losses(logits, part)
    with pytest.raises(InputError, match=r"call start\(batch\) with the whole batch"):
        losses(logits, part)


def test_reset_forgets_a_failed_attempt() -> None:
    losses, part, model = DomainLosses(DOMAINS), batch(), llama()
    logits = model(input_ids=part["input_ids"]).logits
    losses.start(part)
    losses(logits, part)
    losses.reset()
    losses(logits, part)
    assert losses.signals().num_tokens.sum() == 12 * 11


def test_a_batch_without_domains_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs 'domain_ids'.*\['input_ids'\]"):
        DomainLosses(DOMAINS).start({"input_ids": torch.zeros(2, 4, dtype=torch.int64)})
    with pytest.raises(InputError, match="no losses were added"):
        DomainLosses(DOMAINS).signals()


def poisoned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = torch.ones(3, 4)
    loss[1, 2] = float("nan")
    return loss, torch.ones(3, 4, dtype=torch.bool), torch.tensor([0, 1, 2])


def test_a_nan_loss_names_its_domain() -> None:
    losses = DomainLosses(DOMAINS)
    losses.add(*poisoned())
    with pytest.raises(DataError, match="training loss of domain 'code' is nan"):
        losses.signals()
    losses.add(*poisoned()[::1])
    clean = torch.zeros(3, 4)
    losses.reset()
    losses.add(clean, poisoned()[1], poisoned()[2], poisoned()[0])
    with pytest.raises(DataError, match="reference's loss of domain 'code' is nan"):
        losses.signals()


def test_skipping_a_nan_makes_its_domain_absent_and_counts_it() -> None:
    losses = DomainLosses(DOMAINS, on_nonfinite="skip")
    losses.add(*poisoned())
    signals = losses.signals()
    assert signals.num_tokens.tolist() == [4, 0, 4] and signals.loss.tolist() == [4, 0, 4]
    assert losses.num_nonfinite.tolist() == [0, 1, 0]
    loss, mask, _ = poisoned()
    assert losses.usable(loss, mask).sum() == 11
    with pytest.raises(InputError, match='"fail" or "skip"'):
        DomainLosses(DOMAINS, on_nonfinite="ignore")  # type: ignore[arg-type]


def test_loss_mask_follows_the_labels() -> None:
    labels = torch.tensor([[1, -100, 3]])
    assert loss_mask(labels).tolist() == [[False, True]]
    assert loss_mask(labels, shift=False).tolist() == [[True, False, True]]


def test_a_plain_loop_needs_neither_composer_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from algorithms import DomainLosses, FrozenModel, HeldOutWindows, as_reference, doremi, warn_of_absences\n"
        "heavy = {'composer', 'transformers', 'streaming'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["code", "web"], "a tensor of integers .* got list"),
        (torch.zeros(2), "a tensor of integers .* got torch.float32"),
        (
            torch.zeros(3, dtype=torch.long),
            r"shape \(3,\): expected one per sample, \(2,\), or one per label, \(2, 5\)",
        ),
        (torch.zeros(2, 4, dtype=torch.long), r"shape \(2, 4\): expected"),
        (torch.zeros(2, 9, dtype=torch.long), r"shape \(2, 9\): expected"),
    ],
)
def test_domain_ids_that_would_be_read_at_the_wrong_place_are_refused(ids: Any, message: str) -> None:
    part = {"input_ids": torch.zeros(2, 9, dtype=torch.long), "labels": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises(InputError, match=message):
        domain_ids_of({**part, "domain_ids": ids})
    with pytest.raises(InputError, match="'domain_ids' have"):
        DomainLosses(DOMAINS, shift=False).start({**part, "domain_ids": ids})


@pytest.mark.parametrize(
    "ids", [torch.tensor([1, 0]), torch.tensor([[1], [0]]), torch.tensor([1, 0], dtype=torch.int32)]
)
def test_domain_ids_may_have_any_integer_type_and_a_second_axis(ids: torch.Tensor) -> None:
    assert domain_ids_of({"input_ids": torch.zeros(2, 4), "domain_ids": ids}).tolist() == [1, 0]
    assert domain_ids_of({"input_ids": torch.zeros(2, 4), "domain_ids": ids}).dtype == torch.int64


def test_a_reference_that_is_not_finite_is_told_from_a_model_that_is_not() -> None:
    losses, part = DomainLosses(("code", "web")), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    mask, ids = torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 1])
    for own, reference, message in (
        (1.0, float("nan"), r"the reference's loss of domain 'web' is nan. Look at the reference"),
        (float("inf"), 1.0, r"the training loss of domain 'web' is inf. Lower the learning rate"),
        (float("inf"), float("nan"), r"the training loss of domain 'web' is inf. Lower the learning rate"),
    ):
        losses.start({**part, "domain_ids": ids})
        values = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
        losses.add(
            values.index_fill(0, torch.tensor([1]), own), mask, ids, values.index_fill(0, torch.tensor([1]), reference)
        )
        with pytest.raises(DataError, match=message):
            losses.signals()
