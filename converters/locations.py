"""Where shards and stage files lie: a folder of this machine, or one behind a URL, with the same few operations.

    location("shards") / "web"              a pathlib.Path
    location("s3://bucket/shards") / "web"  a UrlPath, which has the methods of it that are used here

A file appears whole or not at all: on disk by a rename, on a server because a put is atomic there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.files import status
from converters.urls import file_system, is_url, persistently
from mixer.errors import DataError, InputError
from mixer.manifest import FILE_NAME, Manifest

__all__ = [
    "FetchedArray",
    "Location",
    "UrlPath",
    "children",
    "load_manifest",
    "local_file",
    "location",
    "output_location",
    "put",
    "read_items",
    "read_many",
    "read_range",
    "remove_tree",
    "size_of",
    "sizes_below",
    "write_file",
    "write_whole",
]


@dataclass(frozen=True)
class UrlPath:
    """A file or folder behind a URL; the methods mean what they mean on ``pathlib.Path``."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | os.PathLike[str]) -> UrlPath:
        return UrlPath(f"{self.url}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> UrlPath:
        return UrlPath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Return whether there is such an object, or any below."""
        return bool(self._ask("exists"))

    def is_dir(self) -> bool:
        """Return whether there is any object below."""
        return bool(self._ask("isdir"))

    def is_file(self) -> bool:
        return bool(self._ask("isfile"))

    def read_bytes(self) -> bytes:
        # One request: s3fs since 2026 would first ask for the size, to read a large object in parts at a time.
        system, _ = file_system(self.url)
        known = inspect.signature(getattr(system, "_cat_file", system.cat_file)).parameters
        options: dict[str, Any] = {"max_concurrency": 1} if "max_concurrency" in known else {}
        return self._ask("cat_file", **options)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _ask(self, method: str, *arguments: Any, what: str = "read", **options: Any) -> Any:
        system, name = file_system(self.url)
        return persistently(what, self.url, lambda: getattr(system, method)(name, *arguments, **options))


Location = Path | UrlPath


def location(path: str | os.PathLike[str] | UrlPath) -> Location:
    """Return the place that a path or URL names.

    >>> location("s3://bucket/shards/") / "web"
    UrlPath(url='s3://bucket/shards/web')
    """
    if isinstance(path, UrlPath):
        return path
    return UrlPath(os.fspath(path).rstrip("/")) if is_url(path) else Path(path)


def output_location(path: str | os.PathLike[str] | UrlPath) -> Location:
    """Return the place that a path or URL names, for writing.

    Raises: InputError: if files cannot be put there.
    """
    if not isinstance(path, UrlPath) and os.fspath(path).startswith(("http://", "https://")):
        raise InputError(f"cannot write into {path}: a web server takes no files. Use a folder, or s3:// or gs://.")
    return location(path)


# --- reading -------------------------------------------------------------------------------------------------------


def size_of(where: Location) -> int:
    """Return a file's bytes. Raises: FileNotFoundError."""
    return where.stat().st_size if isinstance(where, Path) else int(where._ask("info")["size"])


def read_range(where: Location, start: int, stop: int) -> bytes:
    """Return the bytes ``start`` to ``stop`` of a file."""
    if isinstance(where, Path):
        with open(where, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    return where._ask("cat_file", start=start, end=stop)


def read_many(places: Sequence[Location], at_a_time: int = 256) -> Iterator[bytes | None]:
    """Yield the bytes of many small files in order, None for those that are not there."""
    for first in range(0, len(places), at_a_time):
        several = places[first : first + at_a_time]
        urls = [where.url for where in several if isinstance(where, UrlPath)]
        found = _fetched(urls) if urls else {}
        for where in several:
            yield found.get(where.url) if isinstance(where, UrlPath) else _bytes_of(where)


def _fetched(urls: Sequence[str]) -> dict[str, bytes]:
    system, _ = file_system(urls[0])
    names = [file_system(url)[1] for url in urls]

    def fetch() -> Mapping[str, Any]:
        answers = system.cat(names, on_error="return")
        for answer in answers.values():
            if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                raise answer
        return answers

    answers = persistently("read", f"{urls[0]} and {len(urls) - 1} more", fetch)
    return {url: answers[name] for url, name in zip(urls, names) if isinstance(answers[name], bytes)}


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_items(where: str, dtype: np.dtype[Any], start: int, count: int) -> NDArray[Any]:
    """Return ``count`` items from ``start`` on of a file that is one array."""
    if not is_url(where):
        return np.fromfile(where, dtype, count, offset=start * dtype.itemsize)
    data = read_range(UrlPath(where), start * dtype.itemsize, (start + count) * dtype.itemsize) if count else b""
    return np.frombuffer(data, dtype)


_GAP_BYTES = 256 << 10


class FetchedArray:
    """Parts of an array file on a server, to be sliced like the array; near ones are fetched together."""

    def __init__(
        self, where: UrlPath, dtype: np.dtype[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        order = np.argsort(starts)
        begins, ends = starts[order], np.maximum.accumulate(starts[order] + lengths[order])
        apart = np.flatnonzero((begins[1:] - ends[:-1]) * dtype.itemsize > _GAP_BYTES) + 1
        self._begins = begins[np.concatenate(([0], apart))] if len(begins) else begins
        stops = ends[np.concatenate((apart, [len(ends)])) - 1] if len(ends) else ends
        with ThreadPoolExecutor(8) as threads:
            fetch = functools.partial(read_items, where.url, dtype)
            self._parts = list(threads.map(fetch, self._begins.tolist(), (stops - self._begins).tolist()))
        found, expected = sum(map(len, self._parts)), int((stops - self._begins).sum())
        if found != expected:
            raise DataError(f"{where} is too short: {found:,} of {expected:,} items came. Run with --fresh.")

    def __getitem__(self, which: slice) -> NDArray[Any]:
        part = int(np.searchsorted(self._begins, which.start, "right")) - 1
        begin = int(self._begins[part])
        return self._parts[part][which.start - begin : which.stop - begin]


def children(where: Location) -> list[str]:
    """Return the names of the files and folders right below, sorted; none if there is no such folder."""
    if isinstance(where, Path):
        return sorted(path.name for path in where.iterdir()) if where.is_dir() else []
    try:
        return sorted(name.rstrip("/").rpartition("/")[2] for name in where._ask("ls", detail=False, what="list"))
    except FileNotFoundError:
        return []


def sizes_below(where: Location) -> dict[str, int]:
    """Return the bytes of each file right below, by name; none if there is no such folder. On a server: one listing."""
    if isinstance(where, Path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(where) as files:
            return {file.name: file.stat().st_size for file in files if file.is_file()}
        return {}
    try:
        found = where._ask("ls", detail=True, what="list")
    except FileNotFoundError:
        return {}
    return {each["name"].rpartition("/")[2]: int(each["size"]) for each in found if each["type"] == "file"}


def load_manifest(where: Location) -> Manifest:
    """Read ``manifest.json``, see ``Manifest.load``."""
    if isinstance(where, Path):
        return Manifest.load(where)
    try:
        raw = json.loads((where / FILE_NAME).read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{where} has no {FILE_NAME}: the conversion did not finish, or this is another folder. Run `mixer convert`"
            " again with the same options; it continues."
        ) from error
    except ValueError as error:
        raise InputError(f"{where / FILE_NAME} is damaged ({error}). Convert again, or restore the file.") from error
    return Manifest.from_dict(raw, str(where / FILE_NAME))


def local_file(path: str) -> str:
    """Return a path of this machine with the content of a file, which is fetched once per process."""
    return _fetched_file(path, status(path).version) if is_url(path) else path


@functools.lru_cache(maxsize=8)
def _fetched_file(url: str, version: str) -> str:
    folder = _scratch()
    file = os.path.join(folder, f"{len(os.listdir(folder))}-{url.rpartition('/')[2]}")
    Path(file).write_bytes(UrlPath(url).read_bytes())
    return file


@functools.cache
def _scratch() -> str:
    import atexit

    folder = tempfile.mkdtemp(prefix="mixer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# --- writing -------------------------------------------------------------------------------------------------------

_GOOGLE = ("gs://", "gcs://")
_SMALL_BYTES = 5 << 20


def put(where: UrlPath, data: bytes, **options: Any) -> None:
    """Write an object; Google's answer with its digest is compared with what was sent."""
    if where.url.startswith(_GOOGLE):
        options["consistency"] = "md5"
        if data.endswith(b"\r"):
            # gcsfs ends a small object by a line feed and a boundary, and a server may take the carriage return for a
            # part of that; an upload in chunks, of which this makes one, has no boundary.
            options["chunksize"] = len(data)
    where._ask("pipe_file", data, what="write", **options)


def write_whole(where: Location, data: bytes | bytearray | memoryview) -> None:
    """Write a file that is there whole or not at all, also after a power failure."""
    if isinstance(where, UrlPath):
        return put(where, bytes(data))
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_name(f".{where.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, where)


def write_file(where: Location, source: Path) -> None:
    """Copy a file of this machine, so that the copy is there whole or not at all."""
    if isinstance(where, UrlPath):
        if source.stat().st_size <= _SMALL_BYTES:
            return put(where, source.read_bytes())
        system, name = file_system(where.url)
        options = {"consistency": "md5"} if where.url.startswith(_GOOGLE) else {}
        return persistently("write", where.url, lambda: system.put_file(str(source), name, **options))
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_name(f".{where.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    shutil.copyfile(source, partial)
    os.replace(partial, where)


def remove_tree(where: Location) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(where, Path):
        shutil.rmtree(where, ignore_errors=True)
        return
    try:
        where._ask("rm", recursive=True, what="remove")
    except FileNotFoundError:
        pass
