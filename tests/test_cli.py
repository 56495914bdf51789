"""What a person sees of errors: one line, an exit code, a traceback only when asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

import mixer.cli
from mixer.errors import DataError, InputError


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit:
        mixer.cli.main(arguments)
    return exit.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_a_misspelt_command_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(["optimise"], capsys)
    assert code == 2
    assert "no command 'optimise'. Did you mean 'optimize'?" in error


def test_a_misspelt_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(["train", "shards", "--out", "x", "--mixtur", "y"], capsys)
    assert code == 2
    assert "No such option" in error and "--mixtur" in error


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (InputError("a wrong path."), 2, "Error: a wrong path.\n"),
        (DataError("a torn shard."), 1, "Error: a torn shard.\n"),
        (
            ModuleNotFoundError("No module named 'composer'", name="composer"),
            1,
            "Error: this command trains with Composer, and there is no package 'composer': "
            "pip install 'domain-mixer[composer]', or in a clone '.[composer]'.\n",
        ),
        (ZeroDivisionError("oh"), 1, "Error: ZeroDivisionError: oh (run `mixer --debug ...` for the traceback)\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    raised: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def failing() -> None:
        raise raised

    monkeypatch.setattr(mixer.cli._LazyGroup, "get_command", lambda self, ctx, name: failing)
    assert run(["train"], capsys) == (code, line)
    debug_code, shown = run(["--debug", "train"], capsys)
    assert debug_code == code and shown.startswith("Traceback") and shown.endswith(f"\n{line}")


def test_every_command_has_one_line_on_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        mixer.cli.main(["--help"])
    table = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in table.splitlines()] == list(mixer.cli.COMMANDS)


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mixer.cli._LazyGroup, "get_command", lambda self, ctx, name: interrupted)
    code, error = run(["train"], capsys)
    assert code == 130
    assert "The same command continues" in error


@pytest.mark.parametrize(
    "command", [["inspect"], ["weigh", "--method", "uniform"], ["train", "--out", "x"], ["optimize", "--out", "x"]]
)
def test_a_missing_folder_is_one_clear_line(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command[0] in ("train", "optimize"):
        pytest.importorskip("composer", reason="needs the composer extra")
    monkeypatch.chdir(tmp_path)
    code, error = run([command[0], "nowhere", *command[1:]], capsys)
    assert code == 2
    assert error.startswith("Error: no folder of shards at nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_package_runs_as_a_module() -> None:
    for module in ("mixer", "mixer.cli"):
        shown = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert shown.stdout == f"mixer, version {mixer.__version__}\n"
