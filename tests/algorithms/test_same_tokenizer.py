"""A model of another tokenizer reads other words than those that were written: refused wherever it meets shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from algorithms import DomainReweighting, group_dro
from algorithms.references import FrozenModel, score
from algorithms.rounds import SearchSettings, find_mixture
from algorithms.same_tokenizer import check_tokenizer
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from mixer.cli import cli
from mixer.dataloader import MixtureLoader
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from tests.algorithms.test_pipeline import QUIET
from tests.algorithms.tiny import wrap
from tests.algorithms.training_helpers import fit

TEXT = {"code": "def f(x): return x + x\n" * 40, "law": "the party of the first part shall pay the party\n" * 40}
STEPS = TrainSettings(steps=1, global_batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a model of theirs."""
    path = tmp_path_factory.mktemp("words")
    for domain, text in TEXT.items():
        (path / "corpus" / domain).mkdir(parents=True)
        for number in range(8):
            (path / "corpus" / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    arguments = ["--train-tokenizer", 300, "--seq-len", 16, "--held-out", 0.3]
    words = ["convert", path / "corpus", "--out", path / "shards", *arguments]
    CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    train_on(path / "shards", Mixture({"code": 1, "law": 1}), STEPS, path / "run", label="run", console=QUIET)
    return path


def other(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same model beside a tokenizer that differs."""
    model = shutil.copytree(folder / "run" / "model", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    change(tokenizer)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return model


def swapped(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def without_last_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def with_another_token(tokenizer: dict[str, Any]) -> None:
    known = tokenizer["model"]["vocab"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": len(known), "content": "<pad>", **special})


def test_models_of_the_shards_own_tokenizer_are_welcome(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(folder / "shards")
    check_tokenizer(folder / "run" / "model", folder / "shards", manifest)
    check_tokenizer(other(folder, tmp_path, with_another_token), folder / "shards", manifest)
    check_tokenizer("nano", folder / "shards", manifest)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (swapped, r"2 of 2\d\d tokens differ, such as 'a', id \d+ to the model, id \d+ in the shards"),
        (without_last_merge, r"its \d+ merges are not the shards' \d+"),
    ],
    ids=["other ids", "other merges"],
)
def test_others_are_refused_wherever_a_model_meets_shards(
    change: Callable[[dict[str, Any]], None], text: str, folder: Path, tmp_path: Path
) -> None:
    model, shards, even = other(folder, tmp_path, change), folder / "shards", Mixture({"code": 1, "law": 1})
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=4)
    proxy = TrainSettings(steps=1, global_batch_size=4, model=str(model))
    meetings: dict[str, Callable[[], Any]] = {
        "a reference in training": lambda: fit(
            DomainReweighting(group_dro(), reference=model), model=wrap(FrozenModel(model).model), loader=loader
        ),
        "a reference in a search": lambda: find_mixture(
            shards, SearchSettings(reference=str(model)), tmp_path / "search", QUIET
        ),
        "a proxy": lambda: find_mixture(shards, SearchSettings(proxy=proxy), tmp_path / "search", QUIET),
        "a main run": lambda: train_on(shards, even, proxy, tmp_path / "main", label="main", console=QUIET),
        "losses computed once": lambda: score(shards, FrozenModel(model), tmp_path / "scores"),
    }
    for meet in meetings.values():
        with pytest.raises(InputError, match=f"was trained with another tokenizer: {text}"):
            meet()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_bytes_are_no_tokens(folder: Path, tmp_path: Path) -> None:
    words = ["convert", folder / "corpus", "--out", tmp_path / "bytes", "--tokenizer", "bytes", "--seq-len", 16]
    CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    with pytest.raises(InputError, match="another tokenizer: the shards hold bytes"):
        check_tokenizer(folder / "run" / "model", tmp_path / "bytes", Manifest.load(tmp_path / "bytes"))
