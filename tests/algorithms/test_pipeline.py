"""From shards to a frozen mixture, a main run and a report: for real, on tiny data and few steps."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("composer", reason="needs the composer extra")

import torch
from composer import Algorithm, Event, Logger, State
from rich.console import Console

from algorithms import training_run
from algorithms.early_stopping import WorstDomainEarlyStopping
from algorithms.evaluation import heldout_losses, heldout_samples
from algorithms.models import build_model
from algorithms.report import comparison_table, draw_search, write_report
from algorithms.rounds import SearchSettings, find_mixture, make_rule
from algorithms.rules.stopping import drift, extrapolate, standard_error
from algorithms.training import TrainSettings
from algorithms.training_run import train_on
from mixer.cli import main as cli
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest
from mixer.mixture import Mixture
from tests.algorithms.tiny import llama, t5
from tests.helpers import write_shards

QUIET = Console(quiet=True)
TINY = TrainSettings(model="nano", steps=6, global_batch_size=6, learning_rate=1e-3)


def _row(domain: str, index: int, seq_len: int, dtype: str) -> np.ndarray:
    """Ids below 64; each domain repeats with another period, so that a model can tell them apart."""
    return ((np.arange(seq_len) * (len(domain) + 1) + index) % 64).astype(dtype)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(
        folder,
        {"code": 60, "web": 30, "wiki": 9},
        validation={"code": 5, "web": 4, "wiki": 3},
        seq_len=16,
        vocab_size=64,
        rows=_row,
    )
    return folder


@pytest.fixture(scope="module")
def search(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "run"
    find_mixture(shards, SearchSettings(method="doremi", proxy=TINY, rounds=2), out, QUIET)
    return out


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_a_search_freezes_a_mixture_with_its_provenance(shards: Path, search: Path) -> None:
    manifest, mixture = Manifest.load(shards), Mixture.load(search / "mixture.json")
    assert tuple(mixture.weights) == manifest.names
    assert sum(mixture.weights.values()) == pytest.approx(1)
    assert mixture.provenance["rule"] == "doremi"
    assert mixture.provenance["tokenizer"] == manifest.tokenizer.fingerprint
    assert mixture.provenance["shards"] == {name: manifest.split(name, "train").fingerprint for name in manifest.names}
    assert mixture.provenance["reference"].startswith("xxh3:")
    assert mixture.check(manifest) is mixture


def test_a_search_says_how_far_each_round_moved_beside_its_noise(search: Path, tmp_path: Path) -> None:
    result = json.loads((search / "result.json").read_text())
    assert len(result["largest_change"]) == len(result["noise"]) == result["rounds"]
    with np.load(search / "round-1" / "proxy" / "trajectory.npz") as saved:
        errors = standard_error(saved["weights"], np.random.default_rng(TINY.seed))
    # What the first round is compared with was given, and has no error of its own.
    assert any(result["noise"][0] == pytest.approx(2 * error) for error in errors)
    folders = [search / f"round-{number + 1}" for number in range(result["rounds"])]
    found = [np.array(list(Mixture.load(folder / "mixture.json").weights.values())) for folder in folders]
    before = [np.array([60, 30, 9]) / 99, *found]
    assert result["largest_change"] == pytest.approx([np.abs(b - a).max() for a, b in zip(before, found)])
    assert all(noise > 0 for noise in result["noise"]) and result["stopped"]
    write_report([search], tmp_path / "report.html")
    assert f"block bootstrap): {round(result['noise'][0], 4)}" in (tmp_path / "report.html").read_text()


def test_the_second_round_trains_its_reference_on_the_first_mixture(search: Path) -> None:
    first = Mixture.load(search / "round-1" / "mixture.json")
    settings = json.loads((search / "round-2" / "reference" / "run.json").read_text())
    assert settings["mixture"] == dict(first.weights)


def test_a_finished_search_is_not_done_twice(shards: Path, search: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in search.rglob("*") if path.is_file()}
    find_mixture(shards, SearchSettings(method="doremi", proxy=TINY, rounds=2), search, QUIET)
    assert before == {path: path.stat().st_mtime_ns for path in search.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="rounds: 2 there, 1 asked"):
        find_mixture(shards, SearchSettings(method="doremi", proxy=TINY, rounds=1), search, QUIET)


@pytest.mark.parametrize("steps", [None, 12])
def test_final_weights_keep_to_the_epoch_cap_also_extrapolated(steps: int | None, shards: Path, tmp_path: Path) -> None:
    caps: dict[str, Any] = {"max_epochs": 1, "budget_tokens": 40 * 16, "floor": 0.01}
    settings = SearchSettings(method="group_dro", proxy=TINY, extrapolate_to=steps, **caps)
    mixture = find_mixture(shards, settings, tmp_path / "run", QUIET)
    assert mixture.weights["wiki"] == pytest.approx(9 / 40), "a third without the cap"
    assert not (tmp_path / "run" / "round-1" / "reference").exists()


def test_a_proxy_that_stopped_early_is_extrapolated_from_where_it_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping: dict[str, Any] = {"every": "2ba", "patience": 1, "min_delta": 9.0}  # nats, which no step wins
    monkeypatch.setattr(
        training_run, "_early_stopping", lambda folder, settings: [WorstDomainEarlyStopping(folder, **stopping)]
    )
    proxy = replace(TINY, steps=20, patience=1)
    settings = SearchSettings(method="group_dro", proxy=proxy, rule={"eta": 1.0}, extrapolate_to=40)
    mixture = find_mixture(shards, settings, tmp_path / "run", Console(stderr=True, width=200))
    history = np.load(tmp_path / "run" / "round-1" / "proxy" / "trajectory.npz")["weights"]
    assert len(history) == 4, "stopped at the second evaluation"
    assert list(mixture.weights.values()) == pytest.approx(extrapolate(history, 40).tolist())
    assert mixture.provenance["extrapolated_from"] == 4 and mixture.provenance["drift"] == drift(history) > 0
    assert (
        "weights of 4 steps extrapolated to 40; from the middle third to the last they still moved"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(method="doremi", proxy=TINY, reference="cached"),
        SearchSettings(method="dro_lm", proxy=TINY, reference="bigram"),
        SearchSettings(method="on_demand", proxy=TINY, every="2ba", heldout_windows=3),
        SearchSettings(method="odm", proxy=TINY, floor=0.1),
        SearchSettings(method="topic_cvar", proxy=TINY, ceiling=0.4),
        SearchSettings(method="hardest", proxy=TINY, extrapolate_to=12),
    ],
    ids=lambda settings: settings.method,
)
def test_every_kind_of_search_ends_in_a_mixture(settings: SearchSettings, shards: Path, tmp_path: Path) -> None:
    mixture = find_mixture(shards, settings, tmp_path / "run", QUIET)
    assert sum(mixture.weights.values()) == pytest.approx(1)
    assert min(mixture.weights.values()) >= settings.floor - 1e-12
    assert max(mixture.weights.values()) <= settings.ceiling + 1e-12
    assert mixture.provenance["rule"] == settings.method
    assert (tmp_path / "run" / "round-1" / "reference").exists() == (settings.reference == "cached")


def test_the_cached_reference_finds_the_weights_of_the_online_one(shards: Path, search: Path, tmp_path: Path) -> None:
    settings = SearchSettings(method="doremi", proxy=TINY, reference="cached")
    cached = find_mixture(shards, settings, tmp_path / "run", QUIET).weights
    online = Mixture.load(search / "round-1" / "mixture.json").weights
    assert cached == pytest.approx(online, abs=1e-3)
    assert cached != online  # kept in half precision


def test_rounds_that_would_repeat_each_other_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 rounds of 'group_dro' .* would all be the same"):
        make_rule(SearchSettings(method="group_dro", rounds=2))


def test_resume_never_starts_a_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli(["optimize", str(shards), "--resume", "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert "there is no run to resume in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trained_model_loads_with_its_own_name(shards: Path, search: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(search / "round-1" / "reference" / "model")
    result = json.loads((search / "round-1" / "reference" / "result.json").read_text())
    again = heldout_losses(model, shards)
    assert {name: value.loss for name, value in again.items()} == pytest.approx(
        {name: value["loss"] for name, value in result["heldout"].items()}
    )
    assert not (search / "round-1" / "reference" / "checkpoints").exists()


class InterruptAt(Algorithm):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_FORWARD and state.timestamp.batch.value == self.step

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [3, 5], ids=["midway", "in the last step"])
def test_an_interrupted_run_continues_to_the_same_model(
    step: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import algorithms.training_run

    mixture = Mixture({"code": 0.5, "web": 0.3, "wiki": 0.2})
    whole = train_on(shards, mixture, TINY, tmp_path / "whole", label="whole", console=QUIET)

    plain, handler = algorithms.training_run.train, signal.getsignal(signal.SIGINT)

    def interrupted(*arguments: Any, **options: Any) -> None:
        plain(*arguments, **{**options, "algorithms": [*options["algorithms"], InterruptAt(step)]})

    with monkeypatch.context() as patch:
        patch.setattr(algorithms.training_run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_on(shards, mixture, TINY, tmp_path / "cut", label="cut", console=QUIET)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "cut" / "result.json").exists()
    cut = train_on(shards, mixture, TINY, tmp_path / "cut", label="cut", console=QUIET)

    assert {key: cut[key] for key in ("heldout", "average", "worst", "weights")} == {
        key: whole[key] for key in ("heldout", "average", "worst", "weights")
    }
    for name, value in state_of(tmp_path / "whole").items():
        assert torch.equal(value, state_of(tmp_path / "cut")[name]), name
    with np.load(tmp_path / "whole" / "trajectory.npz") as a, np.load(tmp_path / "cut" / "trajectory.npz") as b:
        assert a["steps"].tolist() == b["steps"].tolist() == list(range(6))
        np.testing.assert_array_equal(a["loss"], b["loss"])


def test_a_run_that_failed_after_its_last_step_continues(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import algorithms.training_run

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    mixture = Mixture({"code": 0.5, "web": 0.3, "wiki": 0.2})
    whole = train_on(shards, mixture, TINY, tmp_path / "whole", label="whole", console=QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(algorithms.training_run, "_save_tokenizer", full)
        with pytest.raises(OSError, match="No space left"):
            train_on(shards, mixture, TINY, tmp_path / "cut", label="cut", console=QUIET)
    cut = train_on(shards, mixture, TINY, tmp_path / "cut", label="cut", console=QUIET)
    assert cut["heldout"] == whole["heldout"]
    with np.load(tmp_path / "whole" / "trajectory.npz") as a, np.load(tmp_path / "cut" / "trajectory.npz") as b:
        np.testing.assert_array_equal(a["loss"], b["loss"])


def test_stop_ends_the_run_early_with_a_result(shards: Path, tmp_path: Path) -> None:
    mixture = Mixture({"code": 0.1, "web": 0.1, "wiki": 0.8})
    options = {"on_exhausted": "stop", "max_epochs": 1}
    result = train_on(shards, mixture, TINY, tmp_path / "run", label="short", console=QUIET, **options)
    assert result["loader"]["step"] == 1  # 9 samples of wiki are less than two batches want
    assert "'wiki' after 1 epochs" in result["ended"]
    assert result["num_tokens"] == 6 * 16
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_run_that_fixed_weights_end_at_their_epochs_is_refused_before_it_starts(shards: Path, tmp_path: Path) -> None:
    mixture = Mixture({"code": 0.1, "web": 0.1, "wiki": 0.8})
    with pytest.raises(InputError, match=r"'wiki' would be used up after about 1 of 6 steps\. Let it leave .*--on-exh"):
        train_on(shards, mixture, TINY, tmp_path / "run", label="short", console=QUIET, max_epochs=1)
    even = Mixture({"code": 60 / 99, "web": 30 / 99, "wiki": 9 / 99})
    train_on(shards, even, TINY, tmp_path / "run", label="whole", console=QUIET, max_epochs=1)


def test_a_mixture_of_stages_is_trained_stage_by_stage(shards: Path, tmp_path: Path) -> None:
    stages = [
        {"from_step": 0, "weights": {"code": 1, "web": 0, "wiki": 0}},
        {"from_step": 4, "weights": {"code": 0, "web": 0, "wiki": 1}},
    ]
    (tmp_path / "stages.json").write_text(json.dumps({"schema": 1, "stages": stages}))
    arguments = ["train", shards, "--mixture", tmp_path / "stages.json", "--steps", 6, "--batch-size", 3]
    with pytest.raises(SystemExit) as exit:
        cli([*map(str, arguments), "--out", str(tmp_path / "run")])
    assert not exit.value.code
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {name: row["samples"] for name, row in result["loader"]["domains"].items()} == {
        "code": 12,
        "web": 0,
        "wiki": 6,
    }
    assert result["weights"] == pytest.approx({"code": 2 / 3, "web": 0, "wiki": 1 / 3})


def test_force_uses_a_mixture_made_for_another_tokenizer_and_records_it(shards: Path, tmp_path: Path) -> None:
    weights = {"code": 0.5, "web": 0.3, "wiki": 0.2}
    Mixture(weights, {"tokenizer": "sha256:another"}).save(tmp_path / "m.json")
    arguments = ["train", shards, "--mixture", tmp_path / "m.json", "--steps", 1, "--batch-size", 3]
    for force, code in (([], 2), (["--force"], 0)):
        with pytest.raises(SystemExit) as exit:
            cli([*map(str, arguments), "--out", str(tmp_path / "run"), *force])
        assert (exit.value.code or 0) == code
    assert "sha256:another" in json.loads((tmp_path / "run" / "run.json").read_text())["forced"][0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["weights"] == weights


def test_missing_validation_data_is_known_before_training(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"code": 20, "web": 20}, validation={"code": 4}, vocab_size=64, rows=_row)
    mixture = Mixture({"code": 1, "web": 1})
    with pytest.raises(InputError, match="domain 'web' has no split 'validation'"):
        train_on(tmp_path / "shards", mixture, TINY, tmp_path / "run", label="run", console=QUIET)
    with pytest.raises(InputError, match="domain 'web' has no split 'validation'"):
        find_mixture(tmp_path / "shards", SearchSettings(proxy=TINY), tmp_path / "search", QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"proxy": replace(TINY, model="nanoo")}, "no model 'nanoo'"),
        ({"every": "banana"}, "every='banana' is not a time"),
        ({"every": "20ba"}, "no update would happen in 6 steps"),
        ({"every": "1Mtok"}, "no update would happen in 6 steps with one every 1000000tok"),
        ({"every": f"{TINY.steps * TINY.global_batch_size + 1}sp"}, "no update would happen in 6 steps"),
        ({"method": "on_demand"}, "no update would happen in 6 steps"),
        ({"floor": 0.5}, "a floor of 0.5 for 3 domains is more than 1"),
        ({"ceiling": 0.3}, "a ceiling of 0.3 for 3 domains is less than 1"),
        ({"reference": "nowhere"}, "no reference model at nowhere"),
        ({"method": "ado"}, "'ado' moves its weights at update 1000 for the first time, and 6 steps with one every 1"),
        ({"method": "aioli", "every": "2ba"}, "'aioli' moves its weights at update 13 for the first time, .* have 3"),
        ({"method": "group_dro", "reference": "nowhere"}, "'group_dro' compares with no such reference"),
        ({"method": "odm", "reference_steps": 5}, "no reference is trained for 'odm' with --reference train"),
        ({"reference": "bigram", "reference_steps": 5}, "no reference is trained for 'doremi' with --reference bigram"),
        ({"extrapolate_to": 5}, "--extrapolate-to 5 is less than the 6 steps"),
        ({"method": "jtt", "extrapolate_to": 12}, "whose result is the average of their weights; that of 'jtt' is not"),
        ({"max_epochs": 1, "budget_tokens": 10**9}, "the ceilings leave no mixture: .* less than 1 .*code "),
        ({"reference_mixture": "nowhere.json"}, "cannot read the mixture nowhere.json"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    settings: dict[str, Any], text: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=text):
        find_mixture(shards, SearchSettings(**{"proxy": TINY, **settings}), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_runs_on_unequal_terms_are_compared_with_a_warning(shards: Path, tmp_path: Path) -> None:
    mixture = Mixture({"code": 1, "web": 1, "wiki": 1})
    for name, steps in (("a/main", 1), ("b/main", 2)):
        settings = TrainSettings(steps=steps, global_batch_size=3)
        train_on(shards, mixture, settings, tmp_path / name, label=name, console=QUIET)
    runs = [tmp_path / "a" / "main", tmp_path / "b" / "main"]
    write_report(runs, tmp_path / "report.html", baseline=str(runs[1]))
    assert "Not on equal terms: these runs differ in steps 1 / 2" in (tmp_path / "report.html").read_text()
    assert "differ in steps 1 / 2" in str(comparison_table(runs).caption)


def test_a_diverging_run_is_one_clear_error(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli(["train", str(shards), "--steps", "6", "--batch-size", "6", "--lr", "1e30", "--out", str(tmp_path / "run")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1
    assert last.startswith("Error: ") and "training loss of domains" in last and "is nan" in last


def test_what_was_not_finite_and_skipped_is_told(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def poisoned(*args: Any, **options: Any) -> Any:
        def spoil(module: Any, inputs: Any, outputs: Any) -> None:
            if module.training:
                calls.append(1)
                outputs.logits = outputs.logits + float("nan" if len(calls) in (2, 3) else 0)

        model = build_model(*args, **options)
        model.register_forward_hook(spoil)
        return model

    monkeypatch.setattr(training_run, "build_model", poisoned)
    settings = SearchSettings(method="group_dro", proxy=replace(TINY, on_nonfinite="skip"))
    mixture = find_mixture(shards, settings, tmp_path / "run", Console(stderr=True, width=200))
    result = json.loads((tmp_path / "run" / "round-1" / "proxy" / "result.json").read_text())
    counted = {"code": 2, "web": 2, "wiki": 2}
    assert result["num_nonfinite"] == mixture.provenance["num_nonfinite"] == counted
    assert result["num_skipped_steps"] == 0, "left out of the loss, so that gradients are finite"
    assert "left out, in steps of 6: the loss of code in 2, web in 2, wiki in 2" in capsys.readouterr().err


def test_held_out_loss_of_an_untrained_model_is_near_that_of_guessing(shards: Path) -> None:
    manifest = Manifest.load(shards)
    vocabulary = manifest.tokenizer.vocab_size
    model = build_model("nano", vocab_size=vocabulary, seq_len=16, seed=0)
    losses = heldout_losses(model, shards)
    for name in manifest.names:
        samples = manifest.split(name, "validation").num_samples
        assert losses[name].num_samples == samples
        assert losses[name].num_tokens == samples * 15
        assert losses[name].loss == pytest.approx(np.log(vocabulary), rel=0.05)


def test_held_out_samples_are_spread_evenly(shards: Path) -> None:
    everything = heldout_samples(shards, "code", split="train")
    some = heldout_samples(shards, "code", split="train", max_samples=4)
    np.testing.assert_array_equal(some, everything[[0, 15, 30, 45]])


def test_a_search_on_held_out_losses_says_whether_they_agree_with_it(shards: Path, tmp_path: Path) -> None:
    settings = SearchSettings(method="on_demand", proxy=TINY, every="1ba")
    find_mixture(shards, settings, tmp_path / "run", QUIET)
    agreed = json.loads((tmp_path / "run" / "result.json").read_text())["hindsight"]
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert -1 <= agreed <= 1 and f"by a cosine of {agreed:.2f}" in (tmp_path / "report.html").read_text()


def test_the_report_shows_every_run(shards: Path, search: Path, tmp_path: Path) -> None:
    mains = []
    for name in ("proportional", "uniform"):
        weights = {"code": 60, "web": 30, "wiki": 9} if name == "proportional" else {"code": 1, "web": 1, "wiki": 1}
        train_on(shards, Mixture(weights), TINY, tmp_path / name, label=name, console=QUIET)
        mains.append(tmp_path / name)
    assert write_report([search, *mains], tmp_path / "report.html") == mains
    page = (tmp_path / "report.html").read_text()
    result = json.loads((mains[0] / "result.json").read_text())
    assert f"{result['average']:.3f}" in page and f"{result['heldout']['wiki']['loss']:.3f}" in page
    assert page.count("data:image/png;base64,") == len(draw_search(search)) + 1
    total = sum(result["sizes"].values())
    for name, size in result["sizes"].items():  # in the table of the search, and in that of the main runs
        assert page.count(f"<td>{name}</td><td>{100 * size / total:.2f}%</td>") == 2
    table = comparison_table(mains)
    assert [str(column.header) for column in table.columns][2::2] == ["proportional\nweight", "uniform\nweight"]
    with pytest.raises(InputError, match="no run 'main-x' to compare with; there are proportional, uniform"):
        write_report(mains, tmp_path / "report.html", baseline="main-x")


def test_an_unknown_method_or_setting_is_refused_before_anything_is_written(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no method 'doreme'; there are .*doremi"):
        find_mixture(shards, SearchSettings(method="doreme"), tmp_path / "run", QUIET)
    with pytest.raises(InputError, match="'group_dro' has no setting 'etta'; it has eta, adj"):
        find_mixture(shards, SearchSettings(method="group_dro", rule={"etta": 1}), tmp_path / "run", QUIET)
    with pytest.raises(InputError, match=r"'unimax' needs --set budget=\.\.\.; `mixer methods unimax` says"):
        find_mixture(shards, SearchSettings(method="unimax"), tmp_path / "run", QUIET)
    with pytest.raises(InputError, match="tolerance must be a finite number >= 0; got nan"):
        SearchSettings(tolerance=float("nan"))
    for wrong in ({"learning_rate": float("inf")}, {"weight_decay": float("nan")}, {"steps": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
            TrainSettings(**wrong)
    assert not (tmp_path / "run").exists()


def test_a_single_domain_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"web": 3}, validation={"web": 3}, seq_len=16, vocab_size=64, rows=_row)
    with pytest.raises(
        InputError, match=r"has one domain, 'web', whose weight can only be 1\. Convert with a --domain"
    ):
        find_mixture(tmp_path / "shards", SearchSettings(), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_nowhere_is_named() -> None:
    with pytest.raises(InputError, match="no model 'nan0': expected one of nano"):
        build_model("nan0", vocab_size=10, seq_len=4, seed=0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("t5", "cannot be loaded as a causal language model: Unrecognized configuration class"),
        ("bert", r"\(BertLMHeadModel\) sees the tokens that it is to predict"),
        ("damaged", "cannot be loaded as a causal language model: .*JSON"),
        ("no weights of its own", "cannot be loaded as a causal language model: "),
    ],
)
def test_a_model_that_is_not_causal_is_refused(kind: str, text: str, tmp_path: Path) -> None:
    if kind == "t5":
        t5().save_pretrained(tmp_path)
    elif kind == "bert":
        from transformers import BertConfig, BertLMHeadModel

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertLMHeadModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    else:
        llama().save_pretrained(tmp_path)
        (tmp_path / ("config.json" if kind == "damaged" else "model.safetensors")).write_text("{")
    with pytest.raises(InputError, match=text) as caught:
        build_model(str(tmp_path), vocab_size=10, seq_len=4, seed=0)
    assert len(str(caught.value)) < 400


def test_a_nan_held_out_loss_is_an_error(shards: Path) -> None:
    model = build_model("nano", vocab_size=Manifest.load(shards).tokenizer.vocab_size, seq_len=16, seed=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="held-out loss of domain 'code' is nan"):
        heldout_losses(model, shards)


def test_an_objective_of_ones_own_decides_when_to_stop_and_is_reported(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Mixture({"code": 0, "web": 1, "wiki": 3}).save(tmp_path / "goals.json")
    arguments = [
        "train",
        shards,
        "--steps",
        2,
        "--batch-size",
        6,
        "--patience",
        1,
        "--objective",
        tmp_path / "goals.json",
    ]
    with pytest.raises(SystemExit) as exit:
        cli([*map(str, arguments), "--out", str(tmp_path / "run")])
    assert not exit.value.code
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    losses = {name: row["loss"] for name, row in result["heldout"].items()}
    expected = losses["web"] / 4 + 3 * losses["wiki"] / 4
    assert result["objective"] == pytest.approx(expected) and result["best_step"] == 1
    assert result["best"] == pytest.approx(expected, rel=1e-5), "all validation samples, as in the windows"
    assert f"{expected:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli(["report", str(tmp_path / "run"), "--objective", "proportional", "--out", str(tmp_path / "report.html")])
    by_size = (60 * losses["code"] + 30 * losses["web"] + 9 * losses["wiki"]) / 99
    assert f"{by_size:.3f}" in (tmp_path / "report.html").read_text()
    assert "objective" in capsys.readouterr().out


def test_an_objective_has_to_weigh_all_domains(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Mixture({"code": 1, "law": 3}).save(tmp_path / "goals.json")
    with pytest.raises(SystemExit) as exit:
        cli(["train", str(shards), "--objective", str(tmp_path / "goals.json"), "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert "it has others ['law'] and lacks ['web', 'wiki']" in capsys.readouterr().err


def test_a_run_that_is_stopped_early_keeps_the_model_of_its_best_evaluation(shards: Path, tmp_path: Path) -> None:
    """At so high a learning rate the held-out loss rises from the first evaluation on."""
    mixture, folder = Mixture({"code": 1, "web": 1, "wiki": 1}), tmp_path / "run"
    settings = replace(TINY, steps=160, learning_rate=1.0, warmup=0.9, patience=1)
    result = train_on(shards, mixture, settings, folder, label="run", console=QUIET)
    assert result["best_step"] == 49 and result["ended"].startswith("the worst domain's held-out loss has not improved")
    assert result["worst"] == pytest.approx(result["best"], rel=1e-5)
