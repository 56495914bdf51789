"""Copies across splits are counted the same however few hashes are held at a time."""

from __future__ import annotations

import pytest

from converters import convert
from tests.converters.corpora import documents, write_jsonl


@pytest.mark.parametrize("options", [{}, {"shuffle_seed": 1}, {"packing": "best_fit"}, {"min_held_out": 60}], ids=str)
def test_copies_are_counted_in_passes_as_at_once(tmp_path, monkeypatch, options):
    texts = documents("web", 400)
    write_jsonl(tmp_path / "in" / "web" / "a.jsonl", texts)
    write_jsonl(tmp_path / "in" / "code" / "a.jsonl", [*texts[::3], *documents("code", 100)])
    given = {"tokenizer": "bytes", "seq_len": 64, "held_out": 0.1, **options}
    once = convert([tmp_path / "in"], tmp_path / "once", **given).converter["copies_across_splits"]
    monkeypatch.setattr("converters.splits._HELD_AT_ONCE", 5)
    passes = convert([tmp_path / "in"], tmp_path / "passes", **given).converter["copies_across_splits"]
    assert passes == once
    assert once > 0 or "min_held_out" not in options
