"""The folders import in one direction only, and the command line starts without heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixer

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "mixer": {"converters", "algorithms", "composer", "transformers"},
    "converters": {"algorithms", "composer", "transformers", "torch"},
    "algorithms": {"converters"},
}


def imported_names(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it; names under TYPE_CHECKING count too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_packages_import_in_one_direction(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported_names(path) & FORBIDDEN[package])
        for path in (ROOT / package).rglob("*.py")
        if imported_names(path) & FORBIDDEN[package]
    }
    assert wrong == {}


def test_streaming_is_imported_in_one_file_of_the_mixer() -> None:
    doors = [path.name for path in (ROOT / "mixer").rglob("*.py") if "streaming" in imported_names(path)]
    assert doors in ([], ["streaming_door.py"])


def test_the_installed_package_is_ours() -> None:
    assert Path(mixer.__file__).parent == ROOT / "mixer"


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["train", "--help"], ["optimize", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mixer.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as exit:\n    assert exit.code == 0, exit.code\n"
        "heavy = {'torch', 'streaming', 'composer', 'transformers', 'pyarrow', 'matplotlib', 'tokenizers'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "Examples:" in finished.stdout
