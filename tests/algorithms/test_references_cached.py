"""Losses computed once: equal to the online reference, bound to model and shards, resumable, never silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.models import HuggingFaceModel

from algorithms import DomainReweighting, doremi
from algorithms.domain_losses import DomainLosses
from algorithms.references import (
    BestSoFar,
    CachedLosses,
    FrozenModel,
    LossesInBatch,
    as_reference,
    count_bigrams,
    score,
)
from algorithms.rules import UPDATE_RULES
from mixer.cli import main as cli
from mixer.dataloader import MixtureLoader
from mixer.errors import DataError, InputError
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.tiny import VOCAB, batch, llama, t5, wrap
from tests.algorithms.training_helpers import fit
from tests.helpers import write_shards

SIZES = {"books": 7, "code": 50, "web": 90}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(folder, SIZES, seq_len=12, vocab_size=VOCAB, samples_per_shard=16, rows=row)


@pytest.fixture(scope="module")
def scores(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score(shards, FrozenModel(llama(seed=1)), tmp_path_factory.mktemp("scores") / "token", batch_size=7)


def make_loader(shards: Path, **options: Any) -> MixtureLoader:
    return MixtureLoader(shards, mixture="uniform", global_batch_size=12, seed=17, **options)


def test_cached_losses_are_the_online_ones_in_half_precision(shards: Path, scores: Path) -> None:
    online, cached = FrozenModel(llama(seed=1)), CachedLosses(scores)
    for part, _ in zip(make_loader(shards), range(8)):
        expected = online.token_losses(part)
        losses = cached.token_losses(part)
        assert losses.dtype == torch.float32
        assert (losses - expected).abs().max() <= expected.max() / 2048
        with_column = {**part, **cached.columns(part)}
        assert torch.equal(cached.token_losses(with_column), losses)


def test_weights_found_with_cached_losses_are_those_found_online(shards: Path, scores: Path) -> None:
    found = []
    for reference in (llama(seed=1), scores):
        algorithm = DomainReweighting(doremi(), reference=reference)
        fit(algorithm, loader=make_loader(shards), steps=5, micro=5)
        found.append(algorithm)
    np.testing.assert_allclose(found[1].trajectory.weights, found[0].trajectory.weights, rtol=1e-3)
    assert found[1].mixture().provenance["reference"] == found[0].mixture().provenance["reference"]


def test_one_sum_per_sample_serves_rules_that_do_not_clip_tokens(shards: Path, tmp_path: Path) -> None:
    sums = as_reference(score(shards, FrozenModel(llama(seed=1)), tmp_path / "sums", per="sample"))
    with pytest.raises(InputError, match=r"doremi\(clip='token'\) clips the excess of single tokens"):
        DomainReweighting(doremi(), reference=sums)
    found = []
    for reference in (llama(seed=1), sums):
        algorithm = DomainReweighting(doremi(clip="domain"), reference=reference)
        fit(algorithm, loader=make_loader(shards), steps=4, micro=5)
        found.append(algorithm.trajectory)
    np.testing.assert_allclose(found[1].weights, found[0].weights, rtol=1e-6)
    np.testing.assert_allclose(found[1].excess, found[0].excess, atol=1e-5)
    assert np.isnan(found[1].clipped_excess).all()
    size = sum(path.stat().st_size for path in (tmp_path / "sums").rglob("*.npy"))
    assert size < 150 * 4 + 12 * 200, "four bytes a sample and a header per shard"


def test_scoring_continues_where_it_was_interrupted(shards: Path, scores: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    done: list[str] = []

    def stop(domain: str, num_samples: int) -> None:
        done.append(domain)
        if len(done) == 3:
            raise Interrupted

    reference = FrozenModel(llama(seed=1))
    with pytest.raises(Interrupted):
        score(shards, reference, tmp_path, on_shard=stop)
    with pytest.raises(InputError, match="is unfinished"):
        CachedLosses(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(kept) == 3
    score(shards, reference, tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for path in scores.rglob("*.npy"):
        np.testing.assert_allclose(np.load(tmp_path / path.relative_to(scores)), np.load(path), rtol=1e-3)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    score(shards, reference, tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "finished: nothing to do"


def test_scores_of_another_model_do_not_mix(shards: Path, scores: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run with other settings: reference: 'xxh3:"):
        score(shards, FrozenModel(llama(seed=2)), scores)


def test_scores_of_other_shards_are_refused(scores: Path, tmp_path: Path) -> None:
    sizes = {"books": SIZES["books"], "web": 91}
    other = write_shards(tmp_path / "other", sizes, seq_len=12, vocab_size=VOCAB, rows=row)
    message = (
        r"other shards than the loader reads: the loader has no domains \['code'\]; other samples are in the domains "
        r"\['web'\]\. Run `mixer score`"
    )
    with pytest.raises(InputError, match=message):
        fit(DomainReweighting(doremi(), reference=scores), loader=make_loader(other))


def test_a_loop_of_ones_own_is_bound_to_its_shards_alike(shards: Path, scores: Path, tmp_path: Path) -> None:
    DomainLosses(make_loader(shards), reference=CachedLosses(scores))
    other = write_shards(tmp_path / "other", {**SIZES, "web": 91}, seq_len=12, vocab_size=VOCAB, rows=row)
    with pytest.raises(InputError, match=r"loader reads: other samples are in the domains .*'web'\]"):
        DomainLosses(make_loader(other), reference=CachedLosses(scores))
    with pytest.raises(InputError, match=r"names alone do not say which are read: DomainLosses\(loader"):
        DomainLosses(list(SIZES), reference=CachedLosses(scores))
    with pytest.raises(InputError, match=r"no target loss for the domains \['web'\]"):
        DomainLosses(list(SIZES), reference=as_reference({"books": 1.0, "code": 2.0}))
    DomainLosses(list(SIZES), reference=BestSoFar(3.0))


def test_scores_need_to_know_which_samples_these_are(scores: Path) -> None:
    with pytest.raises(InputError, match="Loader does not say which it reads"):
        fit(DomainReweighting(doremi(), reference=scores))
    with pytest.raises(InputError, match=r"the batch lacks \['sample_ids'\]"):
        CachedLosses(scores).token_losses(batch())


def test_a_split_that_was_not_scored_is_refused(tmp_path: Path) -> None:
    both = write_shards(tmp_path / "both", SIZES, seq_len=12, vocab_size=VOCAB, rows=row, validation=SIZES)
    held_out = score(both, FrozenModel(llama(seed=1)), tmp_path / "scores", split="validation")
    with pytest.raises(InputError, match="holds losses of split 'validation', the loader reads 'train'"):
        fit(DomainReweighting(doremi(), reference=held_out), loader=make_loader(both))


def test_a_damaged_file_is_named(shards: Path, tmp_path: Path) -> None:
    folder = score(shards, FrozenModel(llama(seed=1)), tmp_path)
    path = folder / "web" / "00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    part = {"domain_ids": torch.tensor([2]), "sample_ids": torch.tensor([3]), "input_ids": torch.zeros(1, 12).long()}
    with pytest.raises(DataError, match=r"web/00000.npy is missing or damaged"):
        CachedLosses(folder).token_losses(part)
    with pytest.raises(DataError, match="has 90 samples of 'web'; asked for number 90"):
        CachedLosses(folder).token_losses({**part, "sample_ids": torch.tensor([90])})


def test_lost_files_are_named_before_training_and_scored_again(shards: Path, tmp_path: Path) -> None:
    folder = score(shards, FrozenModel(llama(seed=1)), tmp_path)
    lost = folder / "web" / "00000.npy"
    before = lost.read_bytes()
    lost.unlink()
    with pytest.raises(
        DataError, match=r"are missing, such as .*web/00000\.npy \(1 in all\)\. Run the same `mixer score` again"
    ):
        fit(DomainReweighting(doremi(), reference=folder), loader=make_loader(shards))
    score(shards, FrozenModel(llama(seed=1)), tmp_path)
    assert lost.read_bytes() == before
    fit(DomainReweighting(doremi(), reference=folder), loader=make_loader(shards), steps=1)


def test_a_proxy_that_starts_as_the_model_that_was_scored_is_refused(shards: Path, scores: Path) -> None:
    with pytest.raises(InputError, match="the proxy starts as its own reference"):
        fit(DomainReweighting(doremi(), reference=scores), model=wrap(llama(seed=1)), loader=make_loader(shards))


def test_losses_of_next_tokens_are_no_reference_for_labels(shards: Path, scores: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an encoder-decoder model predicts labels, and shards hold none"):
        score(shards, FrozenModel(t5()), tmp_path / "scores")
    for reference in (scores, count_bigrams(shards, tmp_path / "bigrams")):
        algorithm = DomainReweighting(UPDATE_RULES["dro_lm"](), reference=reference)
        with pytest.raises(InputError, match="holds losses of next tokens, and an encoder-decoder model predicts"):
            fit(algorithm, model=HuggingFaceModel(t5()), loader=make_loader(shards))


def test_a_reference_that_fails_on_a_sample_is_an_error(shards: Path, tmp_path: Path) -> None:
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="sample 0 of domain 'books' is not finite"):
        score(shards, FrozenModel(broken), tmp_path)


def test_losses_may_come_in_the_batch_but_never_be_missing() -> None:
    part = batch()
    expected = FrozenModel(llama()).token_losses(part)
    reference = LossesInBatch()
    assert torch.equal(reference.token_losses({**part, "reference_loss": expected.double()}), expected)
    with pytest.raises(InputError, match=r"no 'reference_loss' column.*A missing reference is not 0"):
        reference.token_losses(part)
    with pytest.raises(InputError, match=r"has shape \(12, 12\), the batch's losses \(12, 11\)"):
        reference.token_losses({**part, "reference_loss": torch.zeros(12, 12)})


def test_the_command_scores_shards_for_use_as_a_reference(shards: Path, tmp_path: Path, capsys: Any) -> None:
    llama(seed=1).save_pretrained(tmp_path / "model")
    for arguments in (["--model", str(tmp_path / "model")], ["--bigram"]):
        out = tmp_path / arguments[0].strip("-")
        out = out.with_name(out.name + "-scores")
        with pytest.raises(SystemExit) as exit:
            cli(["score", str(shards), "--out", str(out), *arguments])
        assert exit.value.code == 0
        assert "147 samples of 3 domains" in capsys.readouterr().out
        fit(DomainReweighting(UPDATE_RULES["dro_lm"](), reference=out), loader=make_loader(shards), steps=1)
    with pytest.raises(SystemExit) as exit:
        cli(["score", str(shards), "--out", str(tmp_path / "none")])
    assert exit.value.code == 2 and "either --model PATH or --bigram" in capsys.readouterr().err
