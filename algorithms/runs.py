"""A run folder: what was asked is written first (``run.json``), what came out last (``result.json``).

So a folder without a result is unfinished and the same command continues it; a folder with one is done and the same
command only shows it; another command on the same folder is refused, with the difference printed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mixer.errors import InputError
from mixer.outputs import make_folder

__all__ = ["begin_run", "finish_run", "read_result", "read_settings"]


def begin_run(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Claim ``folder`` for ``settings``; return the result if this very run is already finished, else None.

    The claim is a lock as well, until ``finish_run`` or the end of the process. A claim under which nothing was done
    yet gives way to another.

    Raises: InputError: if the folder holds a run with other settings or files that are no run, or if another process
        works in it.
    """
    path = Path(folder)
    asked = json.loads(json.dumps(dict(settings)))
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; --out is a folder for the run.")
    content = _content(path)
    if "run.json" not in content and content:
        raise InputError(f"{path} is not empty and holds no run; choose another --out.")
    if "run.json" in content:
        found = read_settings(path)
        if found != asked and _holds_work(path):
            raise InputError(
                f"{path} holds a run with other settings: {_difference(found, asked)}. "
                f"Choose another --out, or remove {path} to start anew."
            )
        if found == asked and "result.json" in content:
            return read_result(path)
    make_folder(path)
    _lock(path)
    _write(path / "run.json", asked)
    return None


def _content(path: Path) -> set[str]:
    """Names in a folder, without what a lock or a process killed while writing leaves behind."""
    if not path.is_dir():
        return set()
    return {child.name for child in path.iterdir() if child.name != ".lock" and not child.name.endswith(".tmp")}


def _holds_work(path: Path) -> bool:
    """Return whether a folder has more than claims, its own and those of runs inside it, as a failed start leaves."""
    files = (child for child in path.rglob("*") if not child.is_dir())
    return any(child.name not in ("run.json", ".lock") and child.suffix != ".tmp" for child in files)


_LOCKS: dict[Path, FileLock] = {}


def _lock(path: Path) -> None:
    """Keep other processes out; of several ranks, rank 0 holds the lock for all."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    lock = _LOCKS.setdefault(path.resolve(), FileLock(path / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process works in {path}. Wait for it, or choose another --out.") from error


def _difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say what differs, setting by setting; of another command only that."""
    if found.get("command") != asked.get("command"):
        return f"it was made by `mixer {found.get('command')}`, not by `mixer {asked.get('command')}`"
    before, now = _flat(found), _flat(asked)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    others = [name.removeprefix("shards.") for name in names if name.startswith("shards.")]
    shown = [f"other shards of {_some(others, ', ', 4)}"] if others else []  # fingerprints tell a person nothing
    for name in sorted(names, key=lambda name: name.count(".")):  # of many, such as weights, the last
        if not name.startswith("shards."):
            shown.append(f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} asked")
    return _some(shown, "; ", 4)


def _some(parts: Sequence[str], mark: str, count: int) -> str:
    more = len(parts) - count
    return mark.join([*parts[:count], *([f"and {more} more"] if more > 0 else [])])


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def finish_run(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` and return its content as it will be read back."""
    path = Path(folder)
    _write(path / "result.json", result)
    lock = _LOCKS.pop(path.resolve(), None)
    if lock is not None:
        lock.release()
        (path / ".lock").unlink(missing_ok=True)
    return read_result(path)


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
        if not path.parent.exists():
            raise InputError(f"there is no folder {path.parent}.") from error
        state = (
            "is unfinished: run its command again, it continues"
            if (path.parent / "run.json").exists()
            else "holds no run of `mixer optimize`, `mixer train` or `mixer score`"
        )
        raise InputError(f"{path.parent} {state}.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}). Remove {path.parent} and run again.") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
