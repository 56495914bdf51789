"""``mixer weigh`` from the command line, and the budget arithmetic behind it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from mixer import DataError, InputError, Mixture
from mixer.budget import REPETITION_DECAY, effective_size, plan_budget
from mixer.commands import simulate, weigh
from mixer.folders import load_manifest
from mixer.outputs import check_file
from mixer.units import parse_bytes, parse_count
from tests.helpers import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), {"book": 3, "code": 150, "web": 400})  # × 16 tokens


def run(*arguments, **options):
    return CliRunner().invoke(weigh, [str(a) for a in arguments], catch_exceptions=False, **options)


def test_unimax_mixture_keeps_within_its_epochs_and_says_how_it_was_made(shards, tmp_path):
    out = tmp_path / "new" / "unimax.json"
    result = run(shards, "--method", "unimax", "--budget", "4k", "--max-epochs", "4", "--out", out)
    assert result.exit_code == 0 and "4.00 max" in result.output
    mixture = Mixture.load(out)
    np.testing.assert_allclose(list(mixture.weights.values()), [0.048, 0.476, 0.476])
    assert mixture.provenance["rule"] == "unimax"
    assert mixture.provenance["settings"] == {"budget": 4000, "max_epochs": 4.0}
    assert mixture.provenance["tokenizer"].startswith("sha256:")
    assert set(mixture.provenance["shards"]) == {"book", "code", "web"}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (("--method", "uniform"), [1 / 3] * 3),
        (("--method", "proportional"), np.array([3, 150, 400]) / 553),
        (("--method", "temperature", "--tau", "1"), np.array([3, 150, 400]) / 553),
        (("--method", "uniform", "--ceiling", "0.35", "--floor", "0.3"), [1 / 3] * 3),
        (("--method", "proportional", "--floor", "0.1"), [0.1, 0.9 * 150 / 550, 0.9 * 400 / 550]),
        (("--method", "proportional", "--budget", "8848", "--max-epochs", "2"), np.array([3, 150, 400]) / 553),
    ],
)
def test_every_method_writes_its_weights(shards, tmp_path, options, weights):
    run(shards, *options, "--out", tmp_path / "m.json")
    np.testing.assert_allclose(list(Mixture.load(tmp_path / "m.json").weights.values()), weights)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--method", "unimax"), "--budget"),
        (("--method", "uniform", "--max-epochs", "4"), "--budget"),
        (("--method", "unimax", "--budget", "fifty", "--max-epochs", "1"), "'fifty' is not a number of tokens"),
        (("--method", "uniform", "--floor", "0.5"), "book 0.5"),
        (("--method", "temperature", "--tau", "0"), "temperature must be > 0"),
    ],
)
def test_impossible_requests_are_refused(shards, options, text):
    with pytest.raises(InputError, match=text):
        run(shards, *options)


def test_a_budget_beyond_all_epochs_gives_the_weights_of_the_largest_that_fits(shards, tmp_path):
    result = run(shards, "--method", "unimax", "--budget", "1M", "--max-epochs", "4", "--out", tmp_path / "m.json")
    mixture = Mixture.load(tmp_path / "m.json")
    np.testing.assert_allclose(list(mixture.weights.values()), np.array([3, 150, 400]) / 553)
    assert mixture.provenance["settings"]["asked_budget"] == 1_000_000
    assert "1,000,000 tokens cannot be drawn in 4 epochs" in " ".join(result.output.split())


def test_mixture_that_cannot_be_written_is_named_as_it_was_asked_for(shards, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "m.json"):  # a folder, and one below a file
        with pytest.raises(DataError, match=f"cannot write the mixture {re.escape(str(place))}: "):
            Mixture({"web": 1.0}).save(place)
        with pytest.raises(InputError, match=f"cannot write {re.escape(str(place))}: .* is a f"):  # before the work
            run(shards, "--method", "uniform", "--out", place)
    assert [path.name for path in tmp_path.parent.glob(".*.tmp")] == []


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder of shards"):
        run(tmp_path / "nowhere", "--method", "uniform")


# --- budget --------------------------------------------------------------------------------------------------------

NAMES, SIZES = ("book", "code", "web"), np.array([10.0, 100.0, 1000.0])
WEIGHTS, FOREVER = np.array([0.2, 0.3, 0.5]), np.full(3, np.inf)


def test_plan_without_limits_draws_by_the_weights():
    plan = plan_budget(NAMES, WEIGHTS, SIZES, 500, FOREVER)
    assert plan.amounts.tolist() == [100, 150, 250] and plan.epochs.tolist() == [10, 1.5, 0.25]
    assert not plan.capped.any() and plan.note == "" and plan.budget == 500


def test_capped_weight_goes_to_the_others_in_proportion():
    plan = plan_budget(NAMES, WEIGHTS, SIZES, 500, np.full(3, 2.0))
    np.testing.assert_allclose(plan.amounts, [20, 480 * 3 / 8, 480 * 5 / 8])
    assert plan.capped.tolist() == [True, False, False]


def test_plan_says_where_a_run_ends_early():
    plan = plan_budget(NAMES, WEIGHTS, SIZES, 500, np.full(3, 2.0), "stop")
    assert plan.budget == 100 and "'book' is used up after 100 of 500" in plan.note
    plan = plan_budget(NAMES, WEIGHTS, SIZES, 5000, np.full(3, 2.0))
    assert plan.budget == 2220 and "every domain is used up after 2,220" in plan.note
    np.testing.assert_allclose(plan.epochs, 2)


def test_plan_is_what_the_mixer_then_draws():
    from mixer.mixer import Mixer

    sizes = {"book": 50, "code": 300, "web": 2000}
    mixer = Mixer(sizes, weights=WEIGHTS, batch_size=10, max_epochs=2, on_exhausted="drop")
    for _ in range(100):
        mixer.next_batch()
    plan = plan_budget(NAMES, WEIGHTS, np.array(list(sizes.values()), float), 1000, np.full(3, 2.0))
    np.testing.assert_allclose(mixer.drawn, plan.amounts, atol=10)


def test_repeated_data_is_worth_what_the_published_curve_says():
    """Muennighoff et al. 2023, eq. 5: four epochs are worth nearly four, forty level off, the limit is 1 + R*."""
    unique = np.ones(4)
    worth = effective_size(unique, np.array([1.0, 4.0, 40.0, 1e9]))
    expected = [1 + REPETITION_DECAY * (1 - np.exp(-r / REPETITION_DECAY)) for r in (0, 3, 39, np.inf)]
    np.testing.assert_allclose(worth, expected)
    assert 3.7 < worth[1] < 3.8 and worth[3] < 16.4


@pytest.mark.parametrize("text", ["", "M", "1.2.3M", "-5", "5X", "nan", "1,5", "2.5"])
def test_numbers_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="is not a count; write for example 50M"):
        parse_count(text)
    with pytest.raises(InputError, match="20GB"):
        parse_bytes(text)


def test_a_file_may_lie_in_a_folder_that_is_not_there_yet(tmp_path):
    check_file(tmp_path / "new" / "folder" / "m.json")
    assert not list(tmp_path.iterdir())


def test_of_a_mixture_for_other_domains_force_leaves_nothing(shards):
    with pytest.raises(InputError, match=r"nothing of this mixture is left .*\['news'\], the shards have \['book', "):
        Mixture({"news": 1.0}).check(load_manifest(shards), force=True)


# --- simulate ------------------------------------------------------------------------------------------------------


def simulated(*arguments):
    return CliRunner().invoke(simulate, [str(a) for a in arguments], catch_exceptions=False)


def test_simulation_shows_what_the_loader_then_delivers(shards, tmp_path):
    from mixer import MixtureLoader

    result = simulated(
        shards, "--mixture", "uniform", "--batches", 20, "--batch-size", 12, "--plot", tmp_path / "s.png"
    )
    assert result.exit_code == 0 and (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12)
    for _, _ in zip(range(20), loader):
        pass
    for name, one in loader.stats()["domains"].items():
        (line,) = [line for line in result.output.splitlines() if f" {name} " in line]
        assert f" {one['samples']} " in line and f"{one['epochs']:.3f}" in line


@pytest.mark.parametrize(
    "options, message",
    [(["--plot", "s.doc"], "its name must end in one of .*png"), (["--plot", "nowhere/s.png"], "no such folder")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_first(shards, options, message):
    with pytest.raises(InputError, match=message):
        simulated(shards, *options)


def test_no_batch_is_no_simulation(shards):
    assert "0 is not in the range x>=1" in simulated(shards, "--batches", 0).output


def test_of_many_domains_those_are_named_that_say_most_in_either_half(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    from mixer import Mixer
    from mixer.pictures import MAX_NAMED
    from mixer.simulation import draw_plot
    from mixer.simulation import simulate as run

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    sizes = {f"d{i:02}": 10 + i for i in range(30)}  # d29 has the most weight, d00 is read the most often
    mixer = Mixer(sizes, weights=[1 + i / 100 for i in range(30)], batch_size=60)
    draw_plot(run(mixer, 20), str(tmp_path / "s.png"), mixer.num_samples)
    above, below = ({text.get_text() for text in axes.findobj(Annotation)} for axes in kept[0].axes)
    assert len(above) == len(below) == MAX_NAMED
    assert "d29" in above and "d00" in below
    assert kept[0].axes[1].get_xlabel() == "batches (grey: 18 other domains)"


def test_simulation_reads_no_shard_and_says_where_a_run_ends(tmp_path):
    root = write_shards(tmp_path, {"book": 3, "web": 400})
    for path in root.rglob("*.mds"):
        path.unlink()
    result = simulated(root, "--mixture", "uniform", "--batch-size", 10, "--max-epochs", 2, "--on-exhausted", "stop")
    assert "Ends after 1 of 1,000 batches: used up: 'book' after 2 epochs" in " ".join(result.output.split())


def test_simulation_of_stages_shows_the_weights_in_force(shards, tmp_path):
    stages = [{"from_step": 0, "mixture": "a.json"}, {"from_step": 5, "weights": {"book": 0, "code": 1, "web": 0}}]
    Mixture({"book": 0, "code": 0, "web": 1}).save(tmp_path / "a.json")
    (tmp_path / "m.json").write_text(json.dumps({"stages": stages}))
    result = simulated(shards, "--mixture", tmp_path / "m.json", "--batches", 8, "--batch-size", 10)
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert " 30 " in lines["code"] and " 50 " in lines["web"] and "never" in lines["book"]
    assert "1.0000" in lines["code"]


def test_loader_plans_a_budget_in_tokens(shards):
    from mixer import MixtureLoader

    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=12, max_epochs=4, on_exhausted="drop")
    plan = loader.plan(4000)
    np.testing.assert_allclose(plan.epochs[0], 4)
    assert plan.capped.tolist() == [True, False, False] and abs(plan.amounts.sum() - 4000) < 1e-6
