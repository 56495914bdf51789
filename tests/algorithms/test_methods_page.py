"""docs/methods.md: a section for every method, and tables that are the measured ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from algorithms.rules import UPDATE_RULES
from benchmarks.mixtures.tables import publish

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """Return the text under the heading that names the method, up to the next heading."""
    found = re.search(rf"^### [^\n]*\b{name}\b[^\n]*\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/methods.md has no section for {name}"
    return found[1]


@pytest.mark.parametrize("name", sorted(UPDATE_RULES))
def test_every_method_says_when_to_use_it_and_what_it_costs(name: str) -> None:
    text = section(name)
    assert "Use " in text or "For comparison only" in text
    assert "Cost: " in text
    assert len(text.strip().splitlines()) <= 26


@pytest.mark.parametrize("corpus", ["synthetic", "redpajama"])
def test_the_tables_are_those_of_the_measured_numbers(corpus: str) -> None:
    measured = json.loads((DOCS / "measured" / f"{corpus}.json").read_text(encoding="utf-8"))
    assert measured["seeds"] >= 3
    assert publish(PAGE, measured) == PAGE
