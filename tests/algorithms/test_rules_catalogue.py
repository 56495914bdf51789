"""What is said about the rules, in `mixer methods`, the catalogue and docs/methods.md, covers every row and is true."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from algorithms.commands.methods import describe, methods
from algorithms.rules import CATALOGUE, UPDATE_RULES
from algorithms.rules.catalogue import COSTS
from mixer.errors import InputError
from tests.algorithms.rule_cases import make

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def run(*arguments):
    return CliRunner().invoke(methods, arguments, catch_exceptions=False)


def test_the_table_has_one_line_for_every_rule_and_fits_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run().output.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(UPDATE_RULES)]] == list(UPDATE_RULES)
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in lines)
    (doremi,) = [line.split() for line in lines if line.startswith("doremi ")]
    assert doremi == ["doremi", "loss", "reference", "reference", "pass", "2305.10429"]


def test_every_cost_is_explained():
    assert {entry.cost for entry in CATALOGUE.values()} == set(COSTS)
    assert "1/3 of a step" in run("doremi").output and "Xie et al. 2023, arXiv:2305.10429" in run("doremi").output


@pytest.mark.parametrize("name", list(UPDATE_RULES))
def test_one_method_shows_its_equations_paper_and_settings(name):
    output = run(name).output
    settings = output.partition("\nsettings (--set NAME=VALUE)\n")[2].splitlines()
    shown = dict(re.findall(r"  (\w+)=\S* *(.*)", line)[0] for line in settings if re.match(r"  \w+=", line))
    assert set(shown) == set(inspect.signature(UPDATE_RULES[name]).parameters)
    assert all(shown.values()), "each is explained"
    assert ">>>" not in output and "Args:" not in output and "Raises:" not in output


def test_one_method_fits_a_terminal_of_80_columns_but_for_equations(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in UPDATE_RULES:
        assert [line for line in run(name).output.splitlines() if len(line) > 80 and not line.startswith("  ")] == []


@pytest.mark.parametrize("name", list(UPDATE_RULES))
def test_what_is_said_of_needs_is_what_the_rule_needs(name):
    row, rule = describe(name), make(name)
    assert row["needs"] == sorted(rule.needs) and row["applies"] == rule.applies
    if row["required"]:
        with pytest.raises(TypeError):
            UPDATE_RULES[name]()


def test_json_is_for_programs():
    rows = json.loads(run("--json").output)
    assert [row["name"] for row in rows] == list(UPDATE_RULES)
    (one,) = json.loads(run("doremi", "--json").output)
    assert one["settings"]["variant"] == "paper" and one["needs"] == ["reference"]


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="no method 'doremy'; there are erm, uniform"):
        run("doremy")


def test_the_page_names_every_rule():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in UPDATE_RULES if not re.search(rf"\b{name}\b", text)] == []
