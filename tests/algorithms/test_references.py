"""Frozen models as references: same losses as the model, wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.models import HuggingFaceModel
from transformers.modeling_outputs import CausalLMOutput

from algorithms import DomainReweighting, doremi
from algorithms.losses import token_losses
from algorithms.references import FrozenModel, as_reference
from algorithms.references.frozen import fingerprint_of
from mixer.errors import InputError
from tests.algorithms.tiny import SEQ_LEN, Loader, batch, gpt2, llama, t5, wrap
from tests.algorithms.training_helpers import fit


def test_losses_are_the_models_own() -> None:
    model, part = llama(), batch(padded=True)
    losses = FrozenModel(model).token_losses(part)
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
    assert torch.equal(losses, token_losses(logits, labels))
    assert losses.shape == (12, SEQ_LEN - 1) and losses.dtype == torch.float32 and not losses.requires_grad


def test_dropout_is_off_and_the_callers_model_is_left_alone() -> None:
    model = gpt2(dropout=0.5).train()
    reference = FrozenModel(model)
    assert torch.equal(reference.token_losses(batch()), reference.token_losses(batch()))
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(reference.token_losses(batch()), FrozenModel(gpt2(dropout=0.5)).token_losses(batch()))


def test_half_precision_keeps_float32_losses_and_the_fingerprint_of_the_weights() -> None:
    exact, half = FrozenModel(llama()), FrozenModel(llama(), dtype=torch.bfloat16)
    assert half.fingerprint == exact.fingerprint
    losses = half.token_losses(batch())
    assert losses.dtype == torch.float32
    assert (losses - exact.token_losses(batch())).abs().max() < 0.05


def test_fingerprint_tells_models_apart() -> None:
    assert fingerprint_of(llama()) == fingerprint_of(llama())
    assert len({fingerprint_of(model) for model in (llama(), llama(seed=1), gpt2(), llama(hidden_size=8))}) == 4


def test_a_model_is_found_in_its_wrappers(tmp_path: Path) -> None:
    expected = FrozenModel(llama()).token_losses(batch())
    llama().save_pretrained(tmp_path / "folder")
    for source in (
        llama(),
        wrap(llama()),
        torch.nn.DataParallel(wrap(llama())),
        tmp_path / "folder",
        str(tmp_path / "folder"),
    ):
        assert torch.equal(as_reference(source).token_losses(batch()), expected)


def test_a_composer_checkpoint_is_a_reference(tmp_path: Path) -> None:
    from algorithms import DomainReweighting

    trainer = fit(DomainReweighting(), steps=2, save_folder=str(tmp_path), save_interval="2ba")
    trained = trainer.state.model.model
    reference = as_reference(tmp_path / "ep0-ba2-rank0.pt")
    assert torch.equal(reference.token_losses(batch()), FrozenModel(trained).token_losses(batch()))
    assert reference.fingerprint == fingerprint_of(trained)


def test_an_encoder_decoder_model_predicts_labels_in_place() -> None:
    model = t5().eval()
    part = {**batch(), "labels": batch()["input_ids"][:, :7].clone()}
    part["labels"][0, 5:] = -100
    losses = FrozenModel(model).token_losses(part)
    assert losses.shape == (12, 7)
    mean = losses.sum() / (part["labels"] != -100).sum()
    assert mean.item() == pytest.approx(model(input_ids=part["input_ids"], labels=part["labels"]).loss.item(), rel=1e-6)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no reference model at .*nowhere"):
        as_reference(tmp_path / "nowhere")
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"noise.pt is not a Composer checkpoint"):
        as_reference(tmp_path / "noise.pt")
    (tmp_path / "half").mkdir()
    llama().config.save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="cannot load the reference model in"):
        as_reference(tmp_path / "half")
    with pytest.raises(InputError, match="a reference is a model, a path, losses by domain, or a Reference; got int"):
        as_reference(3)

    class Hidden(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids.float()

    with pytest.raises(InputError, match=r"has to return logits of shape .* got Tensor"):
        FrozenModel(Hidden(1, 1)).token_losses(batch())


@pytest.mark.parametrize("model", [llama, gpt2])
def test_losses_without_all_logits_at_once_are_the_same(model: Any) -> None:
    reference, part = FrozenModel(model()), batch(padded=True)
    first, second = reference.token_losses(part), reference.token_losses(part)
    assert reference._in_parts, "the head of this model is one linear layer"
    assert torch.equal(first, second), "a resumed run starts with a first batch of its own"
    labels = part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)
    logits = model()(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    torch.testing.assert_close(first, token_losses(logits, labels).detach(), rtol=1e-5, atol=1e-6)


def test_models_that_change_their_logits_are_run_whole() -> None:
    class Doubled(type(llama())):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            outputs = super().forward(input_ids=input_ids, **options)
            return CausalLMOutput(logits=20 * outputs.logits)

    model = Doubled(llama().config)
    reference = FrozenModel(model)
    for _ in range(2):
        expected = token_losses(model(input_ids=batch()["input_ids"]).logits, batch()["input_ids"]).detach()
        torch.testing.assert_close(reference.token_losses(batch()), expected)
    assert reference._in_parts is False
    announced = llama()
    announced.config.final_logit_softcapping = 30.0
    capped = FrozenModel(announced)
    capped.token_losses(batch())
    assert capped._in_parts is False


def test_models_whose_inner_model_hides_its_states_are_run_whole() -> None:
    class Closed(type(llama())):  # type: ignore[misc]
        @property
        def base_model(self) -> Any:
            return lambda **inputs: (self.model(**inputs).last_hidden_state,)

    reference = FrozenModel(Closed(llama().config))
    assert torch.equal(reference.token_losses(batch()), reference.token_losses(batch()))
    assert reference._in_parts is False


def test_a_reference_of_the_other_kind_is_refused() -> None:
    with pytest.raises(InputError, match="the reference is an encoder-decoder model, the model in training a ca"):
        fit(DomainReweighting(doremi(), reference=t5()))

    class Pairs(Loader):
        def __iter__(self) -> Any:
            return ({**part, "labels": part["input_ids"][:, :7]} for part in super().__iter__())

    with pytest.raises(InputError, match="the reference is a causal model, the model in training an enc"):
        fit(DomainReweighting(doremi(), reference=llama()), model=HuggingFaceModel(t5()), loader=Pairs())
