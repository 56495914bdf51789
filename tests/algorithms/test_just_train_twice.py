"""Just train twice by example: the samples that the first model learnt badly are there several times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms.just_train_twice import upsample
from algorithms.references import FrozenModel, score
from algorithms.rules.jtt import error_set
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from mixer.shards import open_domain
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.test_pipeline import QUIET
from tests.algorithms.tiny import VOCAB, llama
from tests.helpers import write_shards

SIZES = {"books": 30, "code": 50, "web": 70}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twice") / "shards"
    validation = dict.fromkeys(SIZES, 4)
    options = {"seq_len": 12, "vocab_size": VOCAB, "rows": row, "validation": validation, "samples_per_shard": 16}
    return write_shards(folder, SIZES, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("per", ["sample", "token"])
def test_bad_samples_are_there_as_often_as_asked_and_all_others_once(per: str, shards: Path, tmp_path: Path) -> None:
    scores = score(shards, FrozenModel(llama()), tmp_path / "scores", per=per)  # type: ignore[arg-type]
    counts = upsample(shards, scores, tmp_path / "again", upweight=3, share=0.1)
    assert sum(counts.values()) == 15, "a tenth of 150 samples, over all domains together"
    opened = {name: open_domain(shards, name, "train") for name in SIZES}
    ids = {name: samples.read(np.arange(len(samples))).astype(np.int64) for name, samples in opened.items()}
    losses = [FrozenModel(llama()).token_losses({"input_ids": torch.from_numpy(rows)}).mean(1) for rows in ids.values()]
    flat, domains = torch.cat(losses).double().numpy(), np.repeat(np.arange(3), list(SIZES.values()))
    bad = error_set(flat, domains, share=0.1)
    manifest = Manifest.load(tmp_path / "again")
    for index, (name, size) in enumerate(SIZES.items()):
        samples = open_domain(tmp_path / "again", name, "train")
        mine = bad[domains[bad] == index] - sum(list(SIZES.values())[:index])
        expected = [*ids[name].tolist(), *(ids[name][number].tolist() for number in mine for _ in range(2))]
        assert samples.read(np.arange(len(samples))).tolist() == expected
        assert manifest.split(name, "train").num_samples == size + 2 * len(mine) == size + 2 * counts[name]
        held_out = [open_domain(folder, name, "validation") for folder in (shards, tmp_path / "again")]
        np.testing.assert_array_equal(*(part.read(np.arange(4)) for part in held_out))


def test_the_second_model_trains_on_them(shards: Path, tmp_path: Path) -> None:
    scores = score(shards, FrozenModel(llama()), tmp_path / "scores", per="sample")
    upsample(shards, scores, tmp_path / "again")
    with pytest.raises(InputError, match="exists already"):
        upsample(shards, scores, tmp_path / "again")
    settings = TrainSettings(steps=2, global_batch_size=6)
    uniform = Mixture(dict.fromkeys(SIZES, 1 / 3))
    result = train_on(tmp_path / "again", uniform, settings, tmp_path / "second", label="second", console=QUIET)
    assert set(result["heldout"]) == set(SIZES)


def test_scores_of_other_shards_are_refused(shards: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", {**SIZES, "books": 31}, seq_len=12, vocab_size=VOCAB, rows=row)
    scores = score(other, FrozenModel(llama()), tmp_path / "scores", per="sample")
    with pytest.raises(InputError, match="was computed for shards"):
        upsample(shards, scores, tmp_path / "again")
    assert not (tmp_path / "again").exists()
