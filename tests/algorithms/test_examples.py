"""The examples find the weights that DomainReweighting finds, and continue where they stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import DomainReweighting, doremi, group_dro
from algorithms.rules.best_response import divergence_ball
from mixer.dataloader import MixtureLoader
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.tiny import VOCAB, llama
from tests.algorithms.training_helpers import fit, flat, parameters
from tests.helpers import write_shards

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(folder, {"books": 7, "code": 50, "web": 90}, seq_len=12, vocab_size=VOCAB, rows=row)


@pytest.fixture(scope="module")
def expected(shards: Path) -> np.ndarray:
    algorithm = DomainReweighting(doremi(), reference=llama(seed=1))
    fit(algorithm, loader=make_loader(shards), steps=6, micro=4)
    return np.array(list(algorithm.mixture().weights.values()))


def make_loader(shards: Path, batch_size: int = 12) -> MixtureLoader:
    return MixtureLoader(shards, mixture="uniform", global_batch_size=batch_size, seed=17)


def test_the_plain_loop_finds_them_and_continues(shards: Path, expected: np.ndarray, tmp_path: Path) -> None:
    example = load("reweighting_plain_loop")
    found = example.train(llama(), make_loader(shards), llama(seed=1), steps=6, lr=0.1)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-9)
    kept = tmp_path / "run.pt"
    whole = example.train(llama(), make_loader(shards), llama(seed=1), steps=52, lr=0.1, checkpoint=kept)
    again = example.train(llama(seed=5), make_loader(shards), llama(seed=1), steps=52, lr=0.1, checkpoint=kept)
    assert again == whole


def test_the_plain_loop_knows_sizes_and_leaves_the_loss_to_rules_that_weigh_it(shards: Path) -> None:
    example = load("reweighting_plain_loop")
    found = example.train(llama(), make_loader(shards), None, method="erm", steps=1)
    assert found == pytest.approx({"books": 7 / 147, "code": 50 / 147, "web": 90 / 147})
    composer, loop, model = make_loader(shards), make_loader(shards), llama()
    trainer = fit(DomainReweighting(divergence_ball(radius=0.5)), loader=composer, steps=4, micro=4)
    example.train(model, loop, None, method="divergence_ball", settings={"radius": 0.5}, steps=4, lr=0.1)
    assert list(loop.weights.values()) == pytest.approx(list(composer.weights.values()), rel=1e-6)
    assert np.ptp(list(loop.weights.values())) > 0.1, "weights that would show in the loss"
    assert torch.allclose(flat(model.parameters()), parameters(trainer), atol=1e-6)


def test_the_plain_loop_runs_as_a_program(shards: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    llama(seed=1).save_pretrained(tmp_path / "reference")
    arguments = [
        str(shards),
        "--reference",
        str(tmp_path / "reference"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "2",
    ]
    result = CliRunner().invoke(load("reweighting_plain_loop").main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "run" / "mixture.json").exists()


def hugging_face(shards: Path, out: Path, steps: int, parts: int, rule: Any = None) -> Any:
    from transformers import TrainingArguments

    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        gradient_accumulation_steps=parts,
        ignore_data_skip=True,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
        disable_tqdm=True,
        seed=1,
    )
    return load("reweighting_hugging_face").ReweightingTrainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        loader=make_loader(shards, 12 // parts),
        rule=rule or doremi(),
        reference=llama(seed=1),
    )


def test_hugging_faces_trainer_finds_them(shards: Path, expected: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    trainer = hugging_face(shards, tmp_path / "whole", 6, parts=1)
    trainer.train()
    np.testing.assert_allclose(list(trainer.mixture().weights.values()), expected, rtol=1e-6)


def test_hugging_faces_trainer_accumulates_exactly_and_continues(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    trainer = hugging_face(shards, tmp_path / "whole", 6, parts=2)
    trainer.train()
    resumed = hugging_face(shards, tmp_path / "resumed", 6, parts=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.mixture() == trainer.mixture()
    assert resumed.loader.state_dict() == trainer.loader.state_dict()
    with pytest.raises(ValueError, match="need max_steps >= 1"):
        hugging_face(shards, tmp_path / "endless", -1, parts=1)


def lightning(shards: Path, out: Path, steps: int, rule: Any = None, checkpoint: Path | None = None) -> Any:
    import pytorch_lightning as pl

    example, loader = load("reweighting_lightning"), make_loader(shards)
    reweighting = example.Reweighting(loader, rule or doremi(), llama(seed=1))
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[
            reweighting,
            pl.callbacks.ModelCheckpoint(out, filename="{step}", every_n_train_steps=2, save_top_k=-1),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = example.CausalLM(llama(), reweighting, lr=0.1)
    trainer.fit(module, example.Steps(loader, steps), ckpt_path=checkpoint)
    return reweighting


def test_lightning_finds_them_and_continues(shards: Path, expected: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="the example is for PyTorch Lightning")
    whole = lightning(shards, tmp_path, 6)
    np.testing.assert_allclose(list(whole.mixture().weights.values()), expected, rtol=1e-6)
    resumed = lightning(shards, tmp_path / "again", 6, checkpoint=tmp_path / "step=4.ckpt")
    assert resumed.mixture() == whole.mixture()


def test_sampling_rules_decide_the_very_next_batch_everywhere(shards: Path, tmp_path: Path) -> None:
    algorithm = DomainReweighting(group_dro(eta=2.0), apply="sampling")
    composer = make_loader(shards)
    fit(algorithm, loader=composer, steps=4)
    rule = group_dro(eta=2.0)._replace(applies="sampling")
    pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
    trainer = hugging_face(shards, tmp_path / "sampling", 4, parts=1, rule=rule)
    trainer.train()
    pytest.importorskip("pytorch_lightning", reason="the example is for PyTorch Lightning")
    callback = lightning(shards, tmp_path / "lightning", 4, rule=rule)
    for loader in (trainer.loader, callback.loader):
        np.testing.assert_allclose(list(loader.weights.values()), list(composer.weights.values()), rtol=1e-6)
        assert loader.state_dict()["step"] == composer.state_dict()["step"] == 4
