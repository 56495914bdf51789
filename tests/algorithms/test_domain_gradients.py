"""Gradients by domain, against autograd written out, and inside Composer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from composer.utils import reproducibility

from algorithms import DomainReweighting
from algorithms.domain_gradients import measured_parameters
from algorithms.losses import token_losses
from algorithms.signals import Signals
from mixer.errors import InputError
from tests.algorithms.test_domain_reweighting import recorder
from tests.algorithms.tiny import Loader, batch, gpt2, llama, wrap
from tests.algorithms.training_helpers import fit, flat, parameters


def gradient_of(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    ids, mask = rows["input_ids"], rows.get("attention_mask")
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    losses = token_losses(model(input_ids=ids, attention_mask=mask).logits, labels)
    (losses.sum() / (labels[:, 1:] != -100).sum()).backward()
    return flat(parameter.grad for parameter in model.parameters()).double()


def measured(needs: str, **options: Any) -> Signals:
    rule, seen = recorder(needs)
    fit(DomainReweighting(rule, every=1), steps=1, lr=0.0, **options)
    return seen[0]


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_products_are_those_of_the_domains_mean_loss_gradients(micro: int) -> None:
    signals, part, model = measured("gradients", micro=micro, loader=Loader(padded=True)), batch(padded=True), llama()
    gradients = []
    for domain in range(3):
        rows = part["domain_ids"] == domain
        gradients.append(gradient_of(model, {name: value[rows] for name, value in part.items()}))
    matrix = torch.stack(gradients)
    np.testing.assert_allclose(signals.gradient_products, (matrix @ matrix.T).numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(signals.gradient_counts, np.ones((3, 3)))


def test_absent_domains_have_no_products() -> None:
    loader = Loader()
    loader.set_weights({"books": 0.0, "code": 1.0, "web": 0.0})
    signals = measured("gradients", loader=loader)
    assert signals.gradient_counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert signals.gradient_products[1, 1] > 0 and np.count_nonzero(signals.gradient_products) == 1


def test_variance_is_the_trace_of_the_covariance_over_samples() -> None:
    signals, part, model = measured("gradient_variance", micro=5), batch(), llama()
    for domain in range(3):
        rows = [row for row in range(12) if part["domain_ids"][row] == domain]
        each = torch.stack([gradient_of(model, {"input_ids": part["input_ids"][row : row + 1]}) for row in rows])
        assert signals.gradient_variance[domain] == pytest.approx(each.var(0).sum().item(), rel=1e-4)
        assert signals.gradient_products[domain, domain] == pytest.approx(each.mean(0).square().sum().item(), rel=1e-4)


def test_measuring_changes_neither_training_nor_its_random_numbers() -> None:
    results = []
    for needs in ("gradients", "behaviour"):
        reproducibility.seed_all(3)
        rule, _ = recorder(needs)
        results.append(
            parameters(fit(DomainReweighting(rule, every=1), model=wrap(gpt2(dropout=0.2)), steps=3, micro=4))
        )
    assert torch.equal(*results)


def test_parameters_can_be_chosen_by_name() -> None:
    model = llama()
    assert len(measured_parameters(model, "all")) == len(list(model.parameters()))
    assert measured_parameters(model, lambda name: "lm_head" in name) == [model.lm_head.weight]
    with pytest.raises(InputError, match="no trainable parameter was chosen"):
        measured_parameters(model, lambda name: False)
    with pytest.raises(InputError, match="got 'head'"):
        measured_parameters(model, "head")
