"""Samples of unequal length (one document each): training, references and evaluations count real tokens only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from algorithms import DomainReweighting, HeldOutWindows, doremi
from algorithms.evaluation import heldout_losses
from algorithms.references import FrozenModel, as_reference, count_bigrams, score
from algorithms.report import train_table
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from mixer.cli import cli
from mixer.dataloader import MixtureLoader
from mixer.mixture import Mixture
from mixer.shards import open_domain
from tests.algorithms.test_pipeline import QUIET
from tests.algorithms.tiny import wrap
from tests.algorithms.training_helpers import fit

LONGEST = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unequal")
    rng = np.random.default_rng(0)
    for domain, letters in {"code": "(){};=", "web": "abcdefgh "}.items():
        (folder / "corpus" / domain).mkdir(parents=True)
        for number in range(40):
            text = "".join(rng.choice(list(letters), size=int(rng.integers(1, LONGEST - 2))))
            (folder / "corpus" / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    arguments = ["--tokenizer", "bytes", "--seq-len", LONGEST, "--packing", "none", "--held-out", 0.3]
    words = ["convert", folder / "corpus", "--out", folder / "shards", *arguments]
    CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    return folder / "shards"


def model(seed: int = 0) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, use_cache=False, **sizes))


def documents(shards: Path, domain: str, split: str) -> list[torch.Tensor]:
    samples = open_domain(shards, domain, split)
    return [torch.from_numpy(row.astype(np.int64)) for row in samples.read_lists(np.arange(len(samples)))]


def mean_loss(network: Any, rows: list[torch.Tensor]) -> float:
    """Document by document, without padding."""
    rows = [row for row in rows if len(row) > 1]
    losses = [network(input_ids=row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    return sum(losses) / sum(len(row) - 1 for row in rows)


def test_held_out_losses_are_those_of_the_documents_without_padding(shards: Path) -> None:
    found, windows, network = heldout_losses(model(), shards), HeldOutWindows(shards, samples_per_domain=99), model()
    losses, tokens = windows.evaluate(FrozenModel(network).token_losses, 0, 1)
    for index, domain in enumerate(("code", "web")):
        rows = documents(shards, domain, "validation")
        assert len({len(row) for row in rows}) > 3
        assert found[domain].loss == pytest.approx(mean_loss(network, rows), rel=1e-5)
        assert found[domain].num_tokens == tokens[index] == sum(len(row) - 1 for row in rows)
        assert losses[index] / tokens[index] == pytest.approx(mean_loss(network, rows), rel=1e-5)


def test_cached_losses_find_the_weights_of_the_online_ones(shards: Path, tmp_path: Path) -> None:
    score(shards, FrozenModel(model(seed=1)), tmp_path / "scores", batch_size=7)
    found = []
    for reference in (model(seed=1), tmp_path / "scores"):
        loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=3)
        algorithm = DomainReweighting(doremi(), reference=as_reference(reference))
        fit(algorithm, model=wrap(model()), loader=loader, micro=3, steps=4)
        found.append(algorithm.trajectory)
    np.testing.assert_allclose(found[0].weights, found[1].weights, atol=2e-4)
    np.testing.assert_array_equal(found[0].num_tokens, found[1].num_tokens)
    assert found[0].num_tokens.sum() < 4 * 8 * (LONGEST - 1), "padding bears no loss"


def test_bigrams_do_not_reach_from_one_document_into_the_next(shards: Path, tmp_path: Path) -> None:
    reference: Any = as_reference(count_bigrams(shards, tmp_path / "bigrams"))
    for domain, table in zip(reference.domains, reference.tables):
        rows = documents(shards, domain, "train")
        assert int(table.counts.sum()) == sum(map(len, rows))
        assert int(table.pair_counts.sum()) == int(table.contexts.sum()) == sum(len(row) - 1 for row in rows)


def test_a_run_counts_the_tokens_that_it_read(shards: Path, tmp_path: Path) -> None:
    uniform = Mixture({"code": 0.5, "web": 0.5})
    settings = TrainSettings(steps=3, global_batch_size=8)
    result = train_on(shards, uniform, settings, tmp_path / "run", label="run", console=QUIET)
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, seed=settings.seed)
    batches = [next(iter(loader)) for _ in range(3)]
    read = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert result["num_tokens"] == read < 3 * 8 * LONGEST
    console = Console(width=80, file=io.StringIO())
    console.print(train_table(tmp_path / "run"))
    lines = {line.split()[0]: line.split() for line in console.file.getvalue().splitlines() if line.strip()}
    tokens = {name: sum(map(len, documents(shards, name, "train"))) for name in ("code", "web")}
    assert lines["domain"][:3] == ["domain", "tokens", "share"]
    for name, count in tokens.items():
        assert lines[name][1:3] == [f"{count:,}", f"{count / sum(tokens.values()):.2%}"]
