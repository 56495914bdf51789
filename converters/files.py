"""Input files on disk or behind a URL: find them, open them, tell when they change.

A path with ``://`` goes through fsspec, see ``converters.urls``; everything else is a local path. Compression goes by
the last suffix.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from converters.urls import BLOCK_BYTES, UrlReader, file_system, is_url, persistently, without_query
from mixer.errors import DataError, InputError

__all__ = [
    "Status",
    "before_magic",
    "can_seek",
    "compression_suffix",
    "find",
    "naming",
    "open_bytes",
    "open_raw",
    "skip",
    "status",
]


class Status(NamedTuple):
    """Size, and something that changes when the content does: the modification time, or a server's ETag."""

    size_bytes: int
    version: str


def open_raw(path: str, block_bytes: int = BLOCK_BYTES) -> io.BufferedReader:
    """Open a file for reading, as it is; ``block_bytes`` is what a server is asked for at a time."""
    if is_url(path):
        return io.BufferedReader(UrlReader(path), block_bytes)
    return io.BufferedReader(io.FileIO(path), 1 << 18)


@functools.lru_cache(maxsize=1 << 16)
def can_seek(path: str) -> bool:
    """Return whether a file can be read from its middle: always, but for some web servers."""
    if not path.startswith("http"):
        return True
    with UrlReader(path) as file:
        return file.has_ranges()


def status(path: str) -> Status:
    """Return a file's size and version; OSError if it is not there."""
    if not is_url(path):
        found = os.stat(path)
        return Status(found.st_size, str(found.st_mtime_ns))
    system, name = file_system(path)
    facts = persistently("ask for", path, lambda: system.info(name))
    keys = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
    version = next((str(facts[key]) for key in keys if facts.get(key)), "")
    return Status(int(facts.get("size") or 0), version)


def find(path: str, is_wanted_folder: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield (path, name below ``path``) of a file, of all files in a folder, or of all that match a glob.

    Raises: InputError: if there is nothing.
    """
    if is_url(path):
        yield from _find_url(path)
    elif os.path.isdir(path):
        yield from _find_folder(path, is_wanted_folder)
    elif os.path.exists(path):
        yield path, Path(path).name
    else:
        yield from _find_glob(path, is_wanted_folder)


def _find_folder(path: str, is_wanted_folder: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    for folder, subfolders, names in os.walk(path, onerror=_raise_unreadable, followlinks=True):
        below = os.path.relpath(folder, path)
        prefix = "" if below == "." else below.replace(os.sep, "/") + "/"
        subfolders[:] = [name for name in subfolders if is_wanted_folder(prefix + name)]
        for name in subfolders:
            _check_no_loop(os.path.join(folder, name))
        for name in names:
            yield os.path.join(folder, name), prefix + name


def _check_no_loop(folder: str) -> None:
    if not os.path.islink(folder):
        return
    target = os.path.realpath(folder)
    within = {os.path.realpath(parent) for parent in Path(folder).parents}  # by way of other links, too
    if target in within or target in map(str, Path(os.path.realpath(os.path.dirname(folder))).parents):
        raise InputError(f"{folder} is a link to a folder that it lies in. Remove it, or leave it out with --exclude.")


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}.") from error


def _find_glob(pattern: str, is_wanted_folder: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    matches = _matches(pattern)
    if not matches:
        raise InputError(f"no input at {pattern}.")
    base = before_magic(pattern)
    for match in matches:
        if not os.path.isdir(match):
            yield match, os.path.relpath(match, base or ".").replace(os.sep, "/")
        elif not pattern.endswith("**"):
            for file, _ in _find_folder(match, is_wanted_folder):
                yield file, os.path.relpath(file, base or ".").replace(os.sep, "/")


def _matches(pattern: str) -> list[str]:
    """Return what matches a glob, without hidden names; ``**`` does not follow links, which may lead in a circle."""
    if "**" not in pattern.split("/"):
        return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []
    base = before_magic(pattern)
    root = Path(base or ("/" if pattern.startswith("/") else "."))
    wanted = pattern[len(base) :].lstrip("/") + ("/*" if pattern.endswith("**") else "")
    found = {path for path in root.glob(wanted) if not any(map(_is_hidden, path.relative_to(root).parts))}
    return sorted(map(str, found))


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def before_magic(pattern: str) -> str:
    """Return the folder that a glob begins in.

    >>> before_magic("corpus/web/a*/**/x.jsonl"), before_magic("*.jsonl")
    ('corpus/web', '')
    """
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _find_url(url: str) -> Iterator[tuple[str, str]]:
    try:
        found, base = _listed(url)
    except FileNotFoundError:
        found = []
    if not found:
        raise InputError(f"no input at {url}.")
    if found == [base]:
        yield url, without_query(base).rpartition("/")[2]
        return
    system, _ = file_system(url)
    for file in found:
        yield system.unstrip_protocol(file), file.removeprefix(base).lstrip("/")


def _listed(url: str) -> tuple[list[str], str]:
    """Return the names at a URL, and what of them all is the place where they were looked for."""
    system, name = file_system(url)
    if glob.has_magic(name) and not url.startswith("http"):
        return persistently("list", url, lambda: system.glob(name)), before_magic(name)
    if url.startswith("http"):  # where ``isfile`` also says no of a server that is busy
        persistently("ask for", url, lambda: system.info(name))
        return [name], name
    if persistently("ask for", url, lambda: system.isfile(name)):
        return [name], name
    return persistently("list", url, lambda: system.find(name)), name


# --- compression ---------------------------------------------------------------------------------------------------


class _Frames(io.RawIOBase):
    """Decompress the frames of a file (streams, as bz2 and xz call them) one after another.

    Unlike what the libraries offer, an input that ends inside a frame is an error for zstd, and one that goes on with
    something else than a frame is one for bz2 and xz, where all that follows would be lost. Zeros between are padding.
    """

    def __init__(self, file: IO[bytes], new_frame: Callable[[], Any], step: int, **limit: int) -> None:
        self._file, self._new_frame, self._step, self._limit = file, new_frame, step, limit
        self._frame: Any = None
        self._packed = self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if (self._frame is None or self._frame.eof) and not self._begin():
                return 0
            some = self._some() if getattr(self._frame, "needs_input", True) else b""
            self._ready = memoryview(self._frame.decompress(some, **self._limit))
            if self._frame.eof and (unused := self._frame.unused_data):
                self._packed = memoryview(unused + bytes(self._packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _begin(self) -> bool:
        """Begin a frame if there is another."""
        while self._packed or self._fill():
            if self._packed[0]:
                self._frame = self._new_frame()
                return True
            self._packed = memoryview(bytes(self._packed).lstrip(b"\0"))
        return False

    def _some(self) -> memoryview:
        if not self._packed and not self._fill():
            raise EOFError("the file ends inside a compressed frame")
        some, self._packed = self._packed[: self._step], self._packed[self._step :]
        return some

    def _fill(self) -> int:
        self._packed = memoryview(self._file.read(1 << 18))
        return len(self._packed)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Closing(io.BufferedReader):
    """A decompressor that closes the file below it, too."""

    def __init__(self, raw: Any, below: IO[bytes]) -> None:
        super().__init__(raw, 1 << 18)
        self._below = below

    def close(self) -> None:
        super().close()
        self._below.close()


_MOST_MEMORY = 128 << 20  # that unpacking may take, as zstd has it; the levels that people use take 8 to 64 MiB


def _open_zstd(file: IO[bytes]) -> _Frames:
    import zstandard

    # All that so many bytes unpack to comes at once: a block of 128 KiB may take no more than four of them.
    return _Frames(file, zstandard.ZstdDecompressor().decompressobj, step=512)


def _open_bz2(file: IO[bytes]) -> _Frames:
    return _Frames(file, bz2.BZ2Decompressor, step=1 << 14, max_length=1 << 18)


def _open_xz(file: IO[bytes]) -> _Frames:
    new_frame = functools.partial(lzma.LZMADecompressor, memlimit=_MOST_MEMORY)
    return _Frames(file, new_frame, step=1 << 14, max_length=1 << 18)


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
    ".bz2": _open_bz2,
    ".xz": _open_xz,
}


def compression_suffix(name: str) -> str:
    """Return ``.gz``, ``.zst``, ``.zstd``, ``.bz2``, ``.xz`` or nothing.

    >>> compression_suffix("web.jsonl.zst"), compression_suffix("web.jsonl")
    ('.zst', '')
    """
    suffix = "." + without_query(name).rpartition(".")[2].lower()
    return suffix if suffix in COMPRESSIONS else ""


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, decompressing by its suffix. Raises: EOFError: if an archive has no bytes at all."""
    suffix = compression_suffix(path)
    file = open_raw(path)
    if not suffix:
        return file
    opened = _Closing(COMPRESSIONS[suffix](file), file)
    if not file.peek(1):
        opened.close()
        raise EOFError("it is empty, which no archive is")
    return opened


def skip(file: IO[bytes], count: int) -> int:
    """Read past so many bytes, and hold few of them; return how many there were."""
    left = count
    while left and (data := file.read(min(left, 1 << 20))):
        left -= len(data)
    return count - left


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn the many ways in which reading a damaged archive fails into one error that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _too_large(path) if "Memory usage limit" in str(error) else damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # bz2 and gzip report bad data as OSError without a number
            raise damaged(path, error) from error
        raise DataError(
            f"cannot read {path}: {error.strerror}. Finished work is kept; make it readable and run the same command"
            " again, or leave it out with --exclude."
        ) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # without importing zstandard for every format
            raise _too_large(path) if "too much memory" in str(error) else damaged(path, error) from error
        raise


def _too_large(path: str) -> DataError:
    return DataError(
        f"{path} takes more than {_MOST_MEMORY >> 20} MiB of memory to unpack. Pack it again with a smaller window or"
        " dictionary (zstd --long=27 or none, xz -9), or leave it out with --exclude."
    )


def damaged(path: str, error: object) -> DataError:
    """Return the error for a container that cannot be read to its end."""
    return DataError(f"{path} is truncated or damaged ({error}). Fetch it again, or leave it out with --exclude.")
