"""benchmarks.mixtures: runs that are kept and shared, and tables that say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.continual import main as continual
from benchmarks.mixtures.__main__ import main
from benchmarks.mixtures.corpora import FourDomains, entropy_floors
from benchmarks.mixtures.methods import BASELINES, METHODS, outcome
from benchmarks.mixtures.runs import Run, Runs, Setting
from benchmarks.mixtures.tables import draw, markdown, publish, rows_of, summary
from tests.helpers import write_shards


def random_row(domain: str, sample: int, seq_len: int, dtype: str) -> np.ndarray:
    return np.random.default_rng((len(domain), sample)).integers(0, 8 * len(domain), seq_len).astype(dtype)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    sizes = {"a": 300, "bb": 100, "ccc": 60}
    held_out = dict.fromkeys(sizes, 40)
    return write_shards(tmp_path / "shards", sizes, seq_len=9, validation=held_out, vocab_size=32, rows=random_row)


@pytest.fixture
def runs(shards: Path, tmp_path: Path) -> Runs:
    folder = tmp_path / "runs"
    folder.mkdir()
    return Runs(shards, Setting(steps=12, batch_size=6, width=16, layers=1), folder)


def test_a_finished_run_is_kept_and_another_seed_is_another_run(runs: Runs, shards: Path, tmp_path: Path) -> None:
    first = runs.get(Run(0, rule="group_dro"))
    again = Runs(shards, runs.setting, tmp_path / "runs")
    again._train = None  # type: ignore[assignment, method-assign]
    assert again.get(Run(0, rule="group_dro")) == first
    assert runs.get(Run(1, rule="group_dro")).test != first.test
    assert Runs(shards, Setting(steps=13, batch_size=6), tmp_path).key(Run(0)) != runs.key(Run(0))


def test_runs_repeat_exactly_and_no_method_sees_the_samples_it_is_judged_by(runs: Runs) -> None:
    run = Run(0, rule="on_demand", every=4)
    assert runs._train(run)[0].test == runs._train(run)[0].test
    for name in runs.domains:
        seen = {row.tobytes() for row in runs.seen[name]}
        assert {row.tobytes() for row in runs.windows[name]} <= seen
        assert not seen & {row.tobytes() for row in runs.test[name]}


@pytest.mark.parametrize("name", [*BASELINES, *METHODS])
def test_every_row_of_the_comparison_runs(runs: Runs, name: str) -> None:
    found = outcome(name, runs, 0)
    assert np.isfinite(found.result.test).all() and len(found.result.test) == 3
    assert abs(sum(found.weights) - 1) < 1e-6
    assert found.seconds > 0


def test_the_command_prints_every_finished_row_and_continues(shards: Path, tmp_path: Path) -> None:
    asked = [str(shards), "--seeds", "1", "--steps", "40", "--batch-size", "4", "--out", str(tmp_path)]
    first = CliRunner().invoke(main, [*asked, "--only", "ODM"])
    assert first.exit_code == 0, first.output
    assert all(name in first.stdout for name in (*BASELINES, "ODM", "40 steps of 4 samples"))
    again = CliRunner().invoke(main, [*asked, "--only", "ODM", "--only", "ADO", "--finished"])
    assert again.stdout == first.stdout
    assert "ADO is not finished" in again.stderr
    refused = CliRunner().invoke(main, [str(shards), "--only", "ODD"])
    assert refused.exit_code == 2 and "no methods ['ODD']" in refused.output


def test_floors_are_the_entropies_of_the_synthetic_domains() -> None:
    corpus, rng = FourDomains(), np.random.default_rng(0)
    rows = corpus.sample(rng, 2, 4000)
    first, second = rows[:, 20], rows[:, 21]
    places = np.array([np.flatnonzero(corpus.order1[a] == b)[0] for a, b in zip(first, second)])
    shares = np.bincount(places, minlength=4) / len(rows)
    successor = -float(np.sum(shares * np.log(shares)))
    assert entropy_floors()["order1"] == pytest.approx((np.log(64) + 31 * successor) / 32, abs=0.02)


def measured() -> dict[str, Any]:
    rows = {
        "uniform": {"losses": [[1.0, 3.0], [1.2, 3.0]], "weights": [[0.5, 0.5]] * 2, "cpu": [1.0, 1.0]},
        "better": {"losses": [[1.0, 2.0], [1.0, 2.4]], "weights": [[0.2, 0.8]] * 2, "cpu": [3.0, 3.2]},
        "mixed": {"losses": [[1.0, 2.9], [1.2, 3.4]], "weights": [[0.4, 0.6]] * 2, "cpu": [1.0, 1.0]},
    }
    return {
        "corpus": "small",
        "domains": ["a", "b"],
        "shares": [0.9, 0.1],
        "floors": None,
        "seeds": 2,
        "seq_len": 9,
        "num_parameters": 1000,
        "setting": {"steps": 12, "batch_size": 6},
        "rows": rows,
    }


def test_rows_are_ordered_by_average_and_compared_seed_by_seed() -> None:
    better, mixed, uniform = sorted(rows_of(measured()), key=lambda row: row.name)
    assert [row.name for row in rows_of(measured())] == ["better", "uniform", "mixed"]
    np.testing.assert_allclose(better.against_uniform, [-0.5, -0.4])
    np.testing.assert_allclose(mixed.against_uniform, [-0.05, 0.2])
    np.testing.assert_allclose(uniform.by_size, [0.9 * 1.0 + 0.1 * 3.0, 0.9 * 1.2 + 0.1 * 3.0])
    # Above the lowest means of any row, 1.0 and 2.2.
    np.testing.assert_allclose(uniform.worst_excess, [0.8, 0.8])


def test_the_table_states_wins_and_losses() -> None:
    text = markdown(measured())
    assert "| better | 1.000 ± .000 | 2.200 ± .283 | 1.600 ± .141 | -0.450 ± .071 |" in text
    assert "| **uniform** |" in text
    assert summary(measured()).splitlines() == [
        "- Lower average than uniform on every seed: better.",
        "- Lower average than uniform on some seeds: mixed.",
        "- Lower average than uniform on no seed: none.",
    ]


def test_publishing_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    page = "before\n<!-- measured: small -->\nold\n<!-- end of measured -->\nafter\n"
    new = publish(page, measured())
    assert new.startswith("before\n<!-- measured: small -->\n") and new.endswith("<!-- end of measured -->\nafter\n")
    assert "old" not in new and markdown(measured()) in new
    assert publish(new, measured()) == new
    with pytest.raises(ValueError, match="no place for the table"):
        publish("nothing", measured())
    assert draw(tmp_path / "plot.png", [measured()]).stat().st_size > 5_000


def test_a_stage_continues_the_model_that_was_trained_before_it(shards: Path, tmp_path: Path) -> None:
    arguments = [str(shards), "--new", "ccc", "--steps", "8", "--batch-size", "6", "--seeds", "1"]
    arguments += ["--out", str(tmp_path / "out")]
    first = CliRunner().invoke(continual, arguments, catch_exceptions=False).output
    rows = {line.split(" | ")[0].strip("| "): line for line in first.splitlines()[2:]}
    assert list(rows)[:2] == ["before it", "uniform"] and "validation feedback, far target" in rows and len(rows) == 8
    assert CliRunner().invoke(continual, arguments, catch_exceptions=False).output == first
    wrong = CliRunner().invoke(continual, [str(shards), "--new", "web", "--out", str(tmp_path / "out")])
    assert wrong.exit_code == 2 and "must name one of a, bb, ccc" in wrong.output
