"""The experiment on the size of the proxy runs from shards to tables, and again without training."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.proxy_sizes import main
from tests.algorithms.test_domain_reweighting_loader import row
from tests.algorithms.tiny import VOCAB
from tests.helpers import write_shards


def test_every_proxy_gets_a_main_model_and_is_compared_with_its_own_size(tmp_path: Path) -> None:
    sizes, validation = {"books": 40, "code": 60, "web": 90}, dict.fromkeys(("books", "code", "web"), 4)
    shards = write_shards(tmp_path / "shards", sizes, seq_len=12, vocab_size=VOCAB, rows=row, validation=validation)
    arguments = [str(shards), "--widths", "8,16", "--steps", "2", "--batch-size", "6", "--seeds", "2"]
    arguments += ["--out", str(tmp_path / "out")]
    first = CliRunner().invoke(main, arguments, catch_exceptions=False).output
    rows = json.loads((tmp_path / "out" / "proxy_sizes.json").read_text())["rows"]
    assert set(rows) == {"8", "16"} and set(rows["8"][0]) == {"weights", "proxy", "main", "same", "uniform"}
    assert rows["16"][1]["main"] == rows["16"][1]["same"], "the largest width is the main model's"
    assert rows["8"][0]["same"] != rows["8"][0]["main"] and rows["8"][0]["main"] != rows["8"][1]["main"]
    models = {path.name for path in (tmp_path / "out" / "seed-1").glob("main-*")}
    assert models == {"main-16-by-8", "main-16-by-16", "main-8-by-8", "main-8-uniform", "main-16-uniform"}
    again = CliRunner().invoke(main, arguments, catch_exceptions=False).output
    assert "distance from the left" in first and first.splitlines()[-12:] == again.splitlines()[-12:]
