"""What is said about the rules, in `mixer methods`, the catalogue and docs/methods.md, covers every row and is true."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from algorithms.commands.methods import describe, methods
from algorithms.rules import UPDATE_RULES
from mixer.errors import InputError
from tests.algorithms.rule_cases import make

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def run(*arguments):
    return CliRunner().invoke(methods, arguments, catch_exceptions=False)


def test_the_table_has_a_line_for_every_rule():
    output = run().output
    assert all(f"\n{name} " in output for name in UPDATE_RULES)


@pytest.mark.parametrize("name", list(UPDATE_RULES))
def test_one_method_shows_its_equations_paper_and_settings(name):
    output = run(name).output
    assert all(f"--set {setting}=" in output for setting in inspect.signature(UPDATE_RULES[name]).parameters)
    assert ">>>" not in output


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


def test_the_page_describes_every_rule():
    text = PAGE.read_text(encoding="utf-8")
    bold = {name for part in text.split("**")[1::2] for name in part.strip(".").replace(",", " ").split()}
    assert set(UPDATE_RULES) <= bold
