"""Where a command may write: known before minutes of work, not after."""

from __future__ import annotations

import os
from pathlib import Path

from mixer.errors import InputError

__all__ = ["check_file", "make_folder"]


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless a file can be written there, in a folder that is there or can be made."""
    target = Path(path)
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder. Name a file.")
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {target}: {folder} is a file. Name a file in a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target}: no permission to write into {folder}.")


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, which may be there already; raise InputError if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"cannot make the folder {path}: {reason}. Choose another --out.") from error
