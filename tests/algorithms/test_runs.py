"""A run folder continues the same run, shows a finished one, and refuses another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from algorithms.runs import begin_run, finish_run, read_result
from mixer.errors import InputError

SETTINGS = {"command": "train", "steps": 10, "mixture": {"code": 0.5, "web": 0.5}}


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    assert begin_run(tmp_path / "run", SETTINGS) is None
    assert begin_run(tmp_path / "run", SETTINGS) is None


def test_a_finished_run_gives_its_result(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", SETTINGS)
    finish_run(tmp_path / "run", {"average": 1.25})
    assert begin_run(tmp_path / "run", SETTINGS) == {"average": 1.25}


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", SETTINGS)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "latest-rank0.pt").touch()
    with pytest.raises(InputError, match=r"mixture.web: 0.5 there, 0.4 asked.*Choose another --out"):
        begin_run(tmp_path / "run", {**SETTINGS, "mixture": {"code": 0.5, "web": 0.4}})
    with pytest.raises(InputError, match="made by `mixer train`, not by `mixer optimize`"):
        begin_run(tmp_path / "run", {**SETTINGS, "command": "optimize"})
    with pytest.raises(InputError, match=r"steps: 10 there, 20 asked.*Choose another --out"):
        begin_run(tmp_path / "run", {**SETTINGS, "steps": 20})


def test_a_claim_under_which_nothing_was_done_gives_way(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", {**SETTINGS, "model": "nanoo"})
    assert begin_run(tmp_path / "run", SETTINGS) is None
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == SETTINGS


def test_a_search_that_failed_at_its_first_run_gives_way(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", {**SETTINGS, "model": "nanoo"})
    begin_run(tmp_path / "run" / "round-1" / "reference", {**SETTINGS, "model": "nanoo"})
    for folder in (tmp_path / "run", tmp_path / "run" / "round-1" / "reference"):
        assert begin_run(folder, SETTINGS) is None
        assert json.loads((folder / "run.json").read_text()) == SETTINGS


def test_what_a_killed_writer_leaves_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123.tmp").write_text("{")
    assert begin_run(tmp_path, SETTINGS) is None


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", SETTINGS)
    code = (
        "import sys\nfrom algorithms.runs import begin_run\nfrom mixer.errors import InputError\n"
        f"try:\n    begin_run(sys.argv[1], {SETTINGS!r})\nexcept InputError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    assert "another process works in" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finish_run(tmp_path / "run", {"average": 1.25})
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_tuples_and_lists_are_the_same_setting(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", {"hashes": ("xxh64",)})
    assert begin_run(tmp_path / "run", {"hashes": ["xxh64"]}) is None


def test_a_folder_with_other_files_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        begin_run(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_shards_and_weights_are_said_in_few_words(tmp_path: Path) -> None:
    domains = [f"d{number}" for number in range(9)]
    made = {
        "shards": dict.fromkeys(domains, "sha256:" + "a" * 64),
        "mixture": dict.fromkeys(domains, 1 / 9),
        "steps": 3,
    }
    begin_run(tmp_path / "run", made)
    (tmp_path / "run" / "trajectory.npz").write_bytes(b"")
    asked = {"shards": dict.fromkeys(domains, "sha256:" + "b" * 64), "mixture": dict.fromkeys(domains, 0.1), "steps": 4}
    text = (
        r"settings: other shards of d0, d1, d2, d3, and 5 more; steps: 3 there, 4 asked; "
        r"mixture.d0: 0.111111 there, 0.1 asked; mixture.d1: .* asked; and 7 more\. Choose another"
    )
    with pytest.raises(InputError, match=text):
        begin_run(tmp_path / "run", asked)


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="run is a file; --out is a folder for the run"):
        begin_run(tmp_path / "run", SETTINGS)


def test_an_unfinished_run_has_no_result(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", SETTINGS)
    with pytest.raises(InputError, match="is unfinished: run its command again"):
        read_result(tmp_path / "run")
    with pytest.raises(InputError, match="holds no run"):
        read_result(tmp_path)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    begin_run(tmp_path / "run", SETTINGS)
    (tmp_path / "run" / "result.json").write_text('{"average": 1.')
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        begin_run(tmp_path / "run", SETTINGS)


def test_a_folder_that_cannot_be_made_is_a_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*run: Not a directory\. Choose another --out\."):
        begin_run(tmp_path / "file" / "run", {})


def test_a_folder_that_is_not_there_has_no_result(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        read_result(tmp_path / "nowhere")


def test_a_report_is_not_of_scores(tmp_path: Path) -> None:
    pytest.importorskip("composer", reason="needs the composer extra")
    from algorithms.report import write_report

    begin_run(tmp_path / "scores", {"command": "score", "shards": {}})
    finish_run(tmp_path / "scores", {})
    with pytest.raises(InputError, match="scores was written by `mixer score`; a report is of"):
        write_report([tmp_path / "scores"], tmp_path / "report.html")


def test_the_demo_takes_no_folder_that_holds_something_else(tmp_path: Path) -> None:
    pytest.importorskip("composer", reason="needs the composer extra")
    from click.testing import CliRunner

    from algorithms.commands.demo import demo

    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty and holds no demo; choose another --out"):
        CliRunner().invoke(demo, ["--out", str(tmp_path)], catch_exceptions=False)
