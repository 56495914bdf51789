"""A run folder: what was asked is written first (``run.json``), what came out last (``result.json``).

So a folder without a result is unfinished and the same command continues it; a folder with one is done and the same
command only shows it; another command on the same folder is refused, with the difference printed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixer.errors import InputError

__all__ = ["begin_run", "finish_run", "read_result", "read_settings"]


def begin_run(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Claim ``folder`` for ``settings``; return the result if this very run is already finished, else None.

    Raises: InputError: if the folder holds a run with other settings, or files that are no run.
    """
    path = Path(folder)
    asked = json.loads(json.dumps(dict(settings)))
    if (path / "run.json").is_file():
        found = read_settings(path)
        differences = [
            f"{key}: {found.get(key)!r} there, {asked.get(key)!r} asked"
            for key in sorted({*found, *asked})
            if found.get(key) != asked.get(key)
        ]
        if differences:
            raise InputError(
                f"{path} holds a run with other settings ({'; '.join(differences)}). "
                f"Choose another --out, or remove {path} to start anew."
            )
        return read_result(path) if (path / "result.json").is_file() else None
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{path} is not empty and holds no run; choose another --out.")
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "run.json", asked)
    return None


def finish_run(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` and return its content as it will be read back."""
    _write(Path(folder) / "result.json", result)
    return read_result(folder)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``begin_run`` wrote."""
    return _read(Path(folder) / "run.json")


def read_result(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``finish_run`` wrote.

    Raises: InputError: if the run is unfinished or the folder holds none.
    """
    return _read(Path(folder) / "result.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        state = (
            "is unfinished: run its command again, it continues"
            if (path.parent / "run.json").exists()
            else "holds no run of `mixer optimize` or `mixer train`"
        )
        raise InputError(f"{path.parent} {state}.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}). Remove {path.parent} and run again.") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
