"""A domain may be called anything: no command reads its name as markup, a formula or a command to the terminal."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.text import Text

from mixer.cli import cli
from mixer.manifest import Manifest
from tests.converters.corpora import documents, write_jsonl

NAMES = ("[/]", "[code]", "$x_$ y^", ":smile:", "_x", "a\x1b[31m")
SHOWN = ("[/]", "[code]", "$x_$ y^", ":smile:", "_x", r"a\x1b[31m")


def mixer(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        write_jsonl(folder / "corpus" / f"{number}.jsonl", documents(name, 40), set=name)
    options = ["--tokenizer", "bytes", "--seq-len", "64", "--domain", "field:set", "--workers", "1"]
    output = mixer("convert", folder / "corpus", "--out", folder / "[b]shards", *options)
    return folder / "[b]shards", output


@pytest.fixture
def drawn_texts(monkeypatch) -> list[str]:
    """Collect what the figures that are saved say, as it is drawn; without what is drawn as a formula."""
    texts: list[str] = []
    save = matplotlib.figure.Figure.savefig

    def listening(figure, *arguments, **options):
        for text in figure.findobj(Text):
            shown, is_formula = text._preprocess_math(text.get_text())
            if not is_formula:  # as the labels of a logarithmic axis are
                texts.append(shown.strip())
        return save(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", listening)
    return texts


def first_words(output: str) -> list[str]:
    """Return the lines of a table without frames."""
    return [line.strip(" │┃|") for line in output.splitlines()]


def assert_rows(output: str) -> None:
    for name in SHOWN:
        assert any(re.match(re.escape(name) + r"[ │]", line) for line in first_words(output)), (name, output)


def test_convert_ends_with_all_names(converted):
    assert Manifest.load(converted[0]).names == tuple(sorted(NAMES))
    assert_rows(converted[1])


def test_inspect_shows_all_names_in_table_and_titles(converted):
    output = mixer("inspect", converted[0], "--sample", 1)
    assert_rows(output)
    for name in SHOWN:
        assert f"─ {name} / train / sample 0 ─" in output


def test_weigh_shows_all_names_and_its_file(converted, tmp_path):
    output = mixer("weigh", converted[0], "--method", "uniform", "--out", tmp_path / "[b]m.json")
    assert_rows(output)
    assert "[b]m.json" in output


def test_simulate_shows_and_draws_all_names(converted, tmp_path, drawn_texts):
    output = mixer("simulate", converted[0], "--batches", 20, "--plot", tmp_path / "[b]s.png")
    assert_rows(output)
    assert "[b]s.png" in output
    assert set(SHOWN) <= set(drawn_texts)


def test_simulate_names_the_domain_at_which_it_ends(converted):
    options = ["--mixture", "uniform", "--batches", 10_000, "--on-exhausted", "stop"]
    assert any(f"'{name}'" in mixer("simulate", converted[0], *options) for name in ("[/]", "[code]", "$x_$ y^"))


def test_stats_shows_and_draws_all_names(converted, tmp_path, drawn_texts):
    assert_rows(mixer("stats", converted[0], "--plot", tmp_path / "s.png"))
    assert set(SHOWN) <= set(drawn_texts)


def test_verify_names_what_is_damaged(converted):
    assert "No findings" in mixer("verify", converted[0])


def test_plots_of_runs_show_all_names(tmp_path, drawn_texts):
    from algorithms.plots import plot_comparison, plot_trajectory

    values = np.random.default_rng(0).random((10, len(NAMES)))
    plot_trajectory(tmp_path / "t.png", NAMES, np.arange(10), values, title="$t$", unit="weight")
    assert {*SHOWN, "$t$"} <= set(drawn_texts)
    drawn_texts.clear()
    losses = {run: {name: 1.0 + i for i, name in enumerate(NAMES)} for run in ("$b$", "_r", "[/]")}
    plot_comparison(tmp_path / "c.png", losses, baseline="$b$")
    assert {*SHOWN, "_r", "Held-out loss against the $b$ mixture (left is better)"} <= set(drawn_texts)


def test_tables_of_runs_show_all_names(tmp_path):
    from rich.console import Console

    from algorithms.report import comparison_table

    result = {
        "num_samples": dict.fromkeys(NAMES, 10),
        "weights": dict.fromkeys(NAMES, 1 / len(NAMES)),
        "heldout": {name: {"loss": 2.0} for name in NAMES},
        "average": 2.0,
        "worst": 2.0,
    }
    runs = [tmp_path / "[b]", tmp_path / "[code]"]
    for run in runs:
        run.mkdir()
        (run / "result.json").write_text(json.dumps(result))
        (run / "run.json").write_text("{}")
    with (console := Console(width=100)).capture() as captured:
        console.print(comparison_table(runs))
    assert_rows(captured.get())
    assert all(run.name in captured.get().split("─")[0] for run in runs)


def test_regress_shows_all_names(tmp_path):
    mixtures = np.random.default_rng(0).dirichlet(np.ones(len(NAMES)), 40)
    losses = 2 + np.exp(-mixtures[:, :2])
    for file, columns, rows in (("m", NAMES, mixtures), ("l", ("a", "b"), losses)):
        with open(tmp_path / f"{file}.csv", "w", newline="") as opened:
            csv.writer(opened).writerows([["run", *columns], *([n, *row] for n, row in enumerate(rows))])
    output = mixer("regress", tmp_path / "m.csv", tmp_path / "l.csv", "--out", tmp_path / "[b]m.json")
    assert_rows(output)
    assert "[b]m.json" in output
