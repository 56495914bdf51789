"""Just train twice by example: the samples that the first model learnt badly are there several times."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from streaming import LocalDataset

from algorithms.just_train_twice import upsample
from algorithms.references import FrozenModel, score
from algorithms.rules.jtt import error_set
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from converters.extending import known_inputs
from converters.locations import location
from converters.verifying import verify
from mixer.cli import cli
from mixer.errors import InputError
from mixer.manifest import Domain, Manifest, Split, domain_folder
from mixer.mixture import Mixture
from mixer.shards import open_domain
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.test_pipeline import QUIET
from tests.algorithms.tiny import VOCAB, llama
from tests.helpers import write_domain, write_shards

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


def rows_of(folder: Path) -> list[Any]:
    found = LocalDataset(str(folder))
    return [found[number] for number in range(len(found))]


def test_samples_keep_their_length_and_their_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    domains = {}
    for name in ("books", "code"):
        lengths = rng.integers(2, 13, 20)
        rows = [
            {"tokens": rng.integers(0, VOCAB, n).astype(np.uint16), "note": f"{name}{i}"} for i, n in enumerate(lengths)
        ]
        folder = tmp_path / "shards" / domain_folder(name) / "train"
        write_domain(folder, rows, columns={"tokens": "ndarray:uint16", "note": "str"}, samples_per_shard=7)  # type: ignore[arg-type]
        index = (folder / "index.json").read_bytes()
        split = Split(
            path=str(folder.relative_to(tmp_path / "shards")),
            num_samples=20,
            num_tokens=int(lengths.sum()),
            num_documents=20,
            num_shards=3,
            size_bytes=sum(entry["raw_data"]["bytes"] for entry in json.loads(index)["shards"]),
            fingerprint="sha256:" + hashlib.sha256(index).hexdigest(),
        )
        domains[name] = Domain({"train": split})
    plain = Manifest.load(write_shards(tmp_path / "plain", {"books": 2}, seq_len=12, vocab_size=VOCAB))
    replace(plain, domains=domains, variable_length=True).save(tmp_path / "shards")
    scores = score(tmp_path / "shards", FrozenModel(llama()), tmp_path / "scores", per="token")
    counts = upsample(tmp_path / "shards", scores, tmp_path / "again", upweight=3, share=0.25)
    assert sum(counts.values()) == 10
    model, bad = FrozenModel(llama()), 0
    for name in domains:
        old, new = (rows_of(tmp_path / one / domain_folder(name) / "train") for one in ("shards", "again"))
        assert [row["note"] for row in new[:20]] == [row["note"] for row in old]
        times = Counter(row["note"] for row in new)
        assert sorted(times.values()) == [1] * (20 - counts[name]) + [3] * counts[name]
        assert all(row["tokens"].tolist() == old[int(row["note"][len(name) :])]["tokens"].tolist() for row in new)
        split = Manifest.load(tmp_path / "again").split(name, "train")
        assert split.num_tokens == sum(len(row["tokens"]) for row in new)
        losses = [
            model.token_losses({"input_ids": torch.from_numpy(row["tokens"].astype(np.int64))[None]}) for row in old
        ]
        above = np.array([row.mean().item() for row in losses])
        above -= np.median(above)
        chosen = np.array([times[row["note"]] == 3 for row in old])
        if chosen.any():
            assert above[chosen].min() > above[~chosen].max(), "those of the highest mean loss per token"
        bad += int(chosen.sum())
    assert bad == 10


def test_the_command_does_it(shards: Path, tmp_path: Path) -> None:
    score(shards, FrozenModel(llama()), tmp_path / "scores", per="sample")
    words = [
        "upsample",
        shards,
        "--scores",
        tmp_path / "scores",
        "--upweight",
        3,
        "--share",
        0.1,
        "--out",
        tmp_path / "again",
    ]
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert "15 samples are there 3 times (books " in result.output
    assert sum(Manifest.load(tmp_path / "again").split(name, "train").num_samples for name in SIZES) == 150 + 2 * 15


def test_files_beside_the_old_shards_are_not_missed_beside_the_new(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    beside = {"inputs": "inputs.0.jsonl", "quarantine": "quarantine.0.jsonl"}
    converter = {"name": "domain-mixer", **beside, "extensions": [{"documents_read": 3, **beside}]}
    replace(Manifest.load(shards), converter=converter).save(tmp_path / "shards")
    score(shards, FrozenModel(llama()), tmp_path / "scores", per="sample")
    upsample(tmp_path / "shards", tmp_path / "scores", tmp_path / "again")
    made = Manifest.load(tmp_path / "again").converter
    assert made.pop("upsampled")["upweight"] == 5
    assert made == {"name": "domain-mixer", "extensions": [{"documents_read": 3}]}
    assert list(verify(tmp_path / "again")) == []
    with pytest.raises(InputError, match=r"again: it records no inputs\. Extend the shards that it was made from"):
        known_inputs(location(tmp_path / "again"), Manifest.load(tmp_path / "again"))


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
    with pytest.raises(InputError, match="computed for other shards than the loader reads"):
        upsample(shards, scores, tmp_path / "again")
    assert not (tmp_path / "again").exists()
