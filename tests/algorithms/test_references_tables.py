"""References without a model: bigram tables, target losses, the best loss so far."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from algorithms import DomainReweighting, doremi, group_dro
from algorithms.commands.score import score
from algorithms.references import BestSoFar, BigramLosses, TargetLosses, as_reference, count_bigrams
from algorithms.references.bigram import BigramTable
from algorithms.rules import UPDATE_RULES
from algorithms.signals import Signals
from mixer.dataloader import MixtureLoader
from mixer.errors import DataError, InputError
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.tiny import DOMAINS, VOCAB, Loader, batch, llama
from tests.algorithms.training_helpers import fit
from tests.helpers import write_shards


def test_bigram_losses_follow_the_equation() -> None:
    rows = np.array([[0, 1, 0, 1, 2], [1, 1, 0, 0, 0]])
    table = BigramTable.of(iter([rows[:1], rows[1:]]), vocab_size=4)
    pairs = {(0, 1): 2, (1, 0): 2, (1, 2): 1, (1, 1): 1, (0, 0): 2}
    for first in range(4):
        for second in range(4):
            count, alone = int((rows == second).sum()), sum(n for (a, _), n in pairs.items() if a == first)
            unigram = (count + 1) / (10 + 4)
            expected = -math.log((pairs.get((first, second), 0) + 5 * unigram) / (alone + 5))
            assert table.losses(torch.tensor(first), torch.tensor(second)).item() == pytest.approx(expected, rel=1e-6)


def test_bigram_probabilities_sum_to_one() -> None:
    rows = np.random.default_rng(0).integers(0, 9, (20, 8))
    table = BigramTable.of(iter([rows]), vocab_size=9)
    grid = torch.arange(9)
    total = torch.exp(-table.losses(grid[:, None].expand(9, 9), grid[None, :].expand(9, 9), smoothing=0.3)).sum(1)
    torch.testing.assert_close(total, torch.ones(9))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(folder, {"books": 7, "code": 50, "web": 90}, seq_len=12, vocab_size=VOCAB, rows=row)


def test_bigram_tables_are_counted_per_domain_in_one_resumable_pass(shards: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(domain: str, num_samples: int) -> None:
        if domain == "code":
            raise Interrupted

    with pytest.raises(Interrupted):
        count_bigrams(shards, tmp_path, on_domain=stop)
    with pytest.raises(InputError, match="is unfinished"):
        BigramLosses(tmp_path)
    reference = as_reference(count_bigrams(shards, tmp_path))
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12)
    part = next(iter(loader))
    part["labels"] = part["input_ids"].clone()
    part["labels"][0, 5:] = -100
    losses = reference.token_losses(part)
    assert losses.shape == (12, 11) and losses[0, 4:].eq(0).all() and losses[1:].gt(0).all()
    # Every domain moves by its own constant step: known almost surely in its own table, unknown in another's.
    strange = {**part, "domain_ids": (part["domain_ids"] + 1) % 3}
    assert losses[1:].mean() < 1.5 < reference.token_losses(strange)[1:].mean()
    per_token = {**part, "domain_ids": part["domain_ids"][:, None].expand(12, 12)}
    assert torch.equal(reference.token_losses(per_token), losses)


def test_bigram_distances_are_the_jensen_shannon_metric_that_wasserstein_takes(tmp_path: Path) -> None:
    """b has one of a's two pairs half of the time and one of its own; c shares none."""
    rows = {"a": [[0, 1, 2]], "b": [[0, 1, 3]], "c": [[4, 4, 4]], "d": [[1, 2, 9], [9, 0, 1]]}

    def tokens_of(domain: str, sample: int, seq_len: int, dtype: str) -> Any:
        return np.array(rows[domain][sample], dtype)

    sizes = {name: len(ids) for name, ids in rows.items()}
    shards = write_shards(tmp_path / "shards", sizes, seq_len=3, vocab_size=10, rows=tokens_of)
    out = tmp_path / "bigrams"
    CliRunner().invoke(score, [str(shards), "--bigram", "--distances", "--out", str(out)], catch_exceptions=False)
    found = json.loads((out / "distances.json").read_text())
    assert found["a"]["c"] == found["b"]["c"] == pytest.approx(math.sqrt(math.log(2)))
    # p = (1/2, 1/2, 0), q = (1/2, 0, 1/2): half of both is in common.
    assert found["a"]["b"] == pytest.approx(math.sqrt(0.5 * math.log(2)))
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0.25, 0.25, 0.25, 0.25])
    middle = (p + q) / 2
    kl = [float(np.sum(x[x > 0] * np.log(x[x > 0] / middle[x > 0]))) for x in (p, q)]
    assert found["a"]["d"] == pytest.approx(math.sqrt(sum(kl) / 2))
    rule = UPDATE_RULES["wasserstein"](found, radius=0.1, smoothing=1.0)
    weights = rule.update(rule.init("abcd"), Signals(np.ones(4), np.array([3.0, 1.0, 1.0, 1.0])))[1]
    moved = 0.1 / found["a"]["d"]  # the radius takes part of d, the nearest to a, and nothing of the others
    np.testing.assert_allclose(weights, [0.25 + moved, 0.25, 0.25, 0.25 - moved])
    with pytest.raises(InputError, match="give --bigram, too"):
        score.main([str(shards), "--model", "m", "--distances", "--out", str(out)], standalone_mode=False)


def test_bigram_tables_train_dro_lm(shards: Path, tmp_path: Path) -> None:
    reference = as_reference(count_bigrams(shards, tmp_path))
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12)
    algorithm = DomainReweighting(UPDATE_RULES["dro_lm"](), reference=reference)
    fit(algorithm, loader=loader, steps=3, micro=5)
    assert np.isfinite(algorithm.trajectory.excess).all()
    path = tmp_path / "web.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"web.npz is missing or damaged"):
        BigramLosses(tmp_path)
    with pytest.raises(InputError, match="smoothing of a bigram table must be > 0"):
        BigramLosses(tmp_path, smoothing=0)


def test_clipping_above_bigram_tables_is_warned_of(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = count_bigrams(shards, tmp_path)
    DomainReweighting(doremi(clip="none"), reference=tables)
    assert not caplog.records
    DomainReweighting(doremi(), reference=tables)
    assert "doremi(clip='token') counts losses below the reference as 0" in caplog.text


def test_targets_are_subtracted_by_domain(tmp_path: Path) -> None:
    targets = {"web": 3.0, "code": 2.0, "books": 1.0}
    (tmp_path / "targets.json").write_text(json.dumps(targets))
    for source in (targets, tmp_path / "targets.json", TargetLosses(targets)):
        algorithm = DomainReweighting(doremi(clip="none"), reference=source)
        fit(algorithm, steps=2, micro=5)
        history = algorithm.trajectory
        np.testing.assert_allclose(history.loss - history.excess, [[1, 2, 3]] * 2, rtol=1e-6)


def test_targets_may_belong_to_tokens_of_several_domains() -> None:
    reference = TargetLosses({"books": 1.0, "code": 2.0, "web": 3.0})
    reference.bind(DOMAINS)
    part = batch(per_token=True)
    assert torch.equal(reference.token_losses(part), part["domain_ids"][:, 1:] + 1.0)


def test_targets_that_miss_a_domain_or_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no target loss for the domains \['books', 'web'\]; there are targets for \['code'\]"
    ):
        fit(DomainReweighting(doremi(clip="none"), reference={"code": 2.0}))
    with pytest.raises(InputError, match="clips the excess of single tokens"):
        DomainReweighting(doremi(), reference=dict.fromkeys(DOMAINS, 2.0))
    with pytest.raises(InputError, match=r"finite numbers >= 0.*'code': nan"):
        TargetLosses({"code": float("nan")})
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(InputError, match=r"bad.json holds no target losses"):
        as_reference(tmp_path / "bad.json")
    for content in ('{"a": "2"}', '{"a": null}', '{"a": true}', '{"a": -1}', "[1]", "3"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=r"bad.json holds no target losses"):
            as_reference(str(tmp_path / "bad.json"))
    with pytest.raises(InputError, match=r"finite numbers >= 0, in nats per token, by domain; got \{'a': 'x'\}"):
        as_reference({"a": "x", "b": 1.0})


def test_targets_are_read_off_scaling_curves() -> None:
    sizes = np.geomspace(1e6, 1e9, 8)
    curves = {name: (sizes, floor + 30 * sizes**-0.25) for name, floor in zip(DOMAINS, (1.0, 2.0, 3.0))}
    targets = TargetLosses.from_curves(curves, at=1e11).losses
    for name, floor in zip(DOMAINS, (1.0, 2.0, 3.0)):
        assert targets[name] == pytest.approx(floor + 30 * 1e11**-0.25, abs=2e-3)
    with pytest.raises(InputError, match="at a positive size"):
        TargetLosses.from_curves(curves, at=0)


def test_best_so_far_keeps_the_lowest_smoothed_loss() -> None:
    reference = BestSoFar(initial=3.0, smoothing=0.5)
    reference.bind(("a", "b"))
    part = {"input_ids": torch.zeros(2, 3).long(), "domain_ids": torch.tensor([0, 1])}

    def see(*means: float | None) -> list[float]:
        tokens = np.array([0.0 if mean is None else 2.0 for mean in means])
        reference.observe(Signals(tokens, tokens * [mean or 0.0 for mean in means]))
        return reference.token_losses(part)[:, 0].tolist()

    assert reference.token_losses(part).tolist() == [[3, 3], [3, 3]]
    assert see(2.0, None) == [2, 3]
    assert see(4.0, 5.0) == [2, 3]  # the average of a is 3, of b 5
    assert see(0.0, 0.0) == [1.5, 2.5]
    assert see(9.0, 9.0) == [1.5, 2.5]


def test_best_so_far_resumes_with_the_run(tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> DomainReweighting:
        algorithm = DomainReweighting(doremi(clip="none"), reference=BestSoFar(math.log(VOCAB)))
        fit(algorithm, steps=steps, loader=Loader(), **options)
        return algorithm

    whole = run(6)
    run(3, save_folder=str(tmp_path), save_interval="3ba")
    resumed = run(6, load_path=str(tmp_path / "ep0-ba3-rank0.pt"))
    np.testing.assert_array_equal(resumed.trajectory.weights, whole.trajectory.weights)
    np.testing.assert_array_equal(resumed.trajectory.excess, whole.trajectory.excess)
    with pytest.raises(InputError, match=r"smoothing must lie in \(0, 1\]"):
        BestSoFar(3.0, smoothing=0)


def test_a_run_folder_is_not_mistaken_for_scores(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "train"}')
    with pytest.raises(InputError, match="is a run, but not one of `mixer score`"):
        as_reference(tmp_path)
    assert isinstance(as_reference(llama()), type(as_reference(llama(seed=1))))
    assert group_dro().needs == frozenset()
