"""What lies behind a URL (``s3://bucket/corpus``, ``https://host/a.jsonl.zst``): through fsspec, in spite of the net.

Every request is tried a few times. A file is read by byte ranges, so that a connection that breaks costs one block and
not the file; from a server without byte ranges it is fetched whole first, into a temporary file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

from mixer.errors import DataError, InputError

__all__ = ["UrlReader", "file_system", "is_url", "persistently"]

Result = TypeVar("Result")

BLOCK_BYTES = 4 << 20
ATTEMPTS = 5
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_S3_CONFIG = {"retries": {"mode": "standard", "max_attempts": 3}, "connect_timeout": 20, "read_timeout": 60}
_RANGES = "range requests"  # what fsspec says of a server without byte ranges
# Another try changes nothing about these.
_FINAL = (
    *(FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(NotImplementedError, TypeError, InputError),
)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path goes through fsspec.

    >>> is_url("s3://bucket/a.jsonl"), is_url("corpus/a.jsonl")
    (True, False)
    """
    return "://" in os.fspath(path)


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL and the path in it.

    Listings are not kept: other machines write there, too. ``S3_ENDPOINT_URL`` names another S3 server, as it does for
    the loader.

    Raises: InputError: naming the package, if the protocol's is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options |= {"endpoint_url": os.environ.get("S3_ENDPOINT_URL"), "config_kwargs": _S3_CONFIG}
    try:
        system, name = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        hint = f"pip install {package}" if package else "install the package that fsspec needs for this protocol"
        extra = " (or 'domain-mixer[remote]')" if package in ("s3fs", "gcsfs") else ""
        raise InputError(f"{url} needs a package that is not installed ({error}): {hint}{extra}.") from error
    except ValueError as error:
        raise InputError(f"{url} has no protocol that fsspec knows ({error}).") from error
    if protocol in ("s3", "s3a"):
        system.retries = 1  # else three layers multiply their attempts
    elif protocol in ("gs", "gcs"):
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of what is told in one line
    return system, name


def without_query(path: str) -> str:
    """Return a path without what a web server is told behind it, such as a signature.

    >>> without_query("https://host/a.jsonl.gz?download=true"), without_query("s3://bucket/what?.txt")
    ('https://host/a.jsonl.gz', 's3://bucket/what?.txt')
    """
    return path.partition("?")[0].partition("#")[0] if path.startswith(("http://", "https://")) else path


def persistently(what: str, url: str, request: Callable[[], Result]) -> Result:
    """Return what ``request`` does, after ``ATTEMPTS`` tries if need be.

    Raises: DataError: saying what could not be done to the URL, and the last error; OSError at once where another try
        is no use: a file that is missing, or forbidden.
    """
    # gcsfs tries six times by itself, over half a minute.
    attempts = min(ATTEMPTS, 2) if url.startswith(("gs://", "gcs://")) else ATTEMPTS
    for attempt in range(attempts):
        try:
            return request()
        except Exception as raised:
            error = _what_was_said(raised, url)
            if isinstance(error, _FINAL):
                raise
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
                raise InputError(f"cannot {what} {url}: {error}. Give credentials in the environment.") from error
            if attempt == attempts - 1 or _is_refusal(error):
                detail = str(error) if str(error) and "message=''" not in str(error) else type(error).__name__
                tried = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"
                raise DataError(
                    f"cannot {what} {url} in {tried} ({detail}). Finished work is kept: run the same command again."
                ) from error
        time.sleep(0.1 * 3**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _what_was_said(error: Exception, url: str) -> Exception:
    """Return the error, or what is behind ``FileNotFoundError``, which is also what fsspec says of busy web servers."""
    cause = error.__cause__
    if not url.startswith("http") or not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return error if getattr(cause, "status", 0) in (404, 410) else cause


def _is_refusal(error: Exception) -> bool:
    """Return whether a web server said that it will not, rather than cannot now."""
    status = getattr(error, "status", 0)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


class UrlReader(io.RawIOBase):
    """A file behind a URL, for reading and seeking."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        self._file: IO[bytes] | Any = None
        self._file = persistently("open", url, self._opened)
        self.size_bytes = self._file.size if hasattr(self._file, "size") else self._file.seek(0, 2)

    def _opened(self) -> Any:
        system, name = file_system(self._url)
        file = system.open(name, "rb", cache_type="none")
        if not file.seekable() or getattr(file, "size", 0) is None:
            return self._fetched_whole()
        return file

    def _fetched_whole(self) -> IO[bytes]:
        system, name = file_system(self._url)
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        system.get_file(name, file)
        if self._file is not None and file.tell() != self.size_bytes:
            raise OSError(f"{file.tell():,} of {self.size_bytes:,} bytes came")
        return file

    def has_ranges(self) -> bool:
        """Return whether a part of the file can be had without all that comes before it."""
        try:
            self._file.seek(1)
            if len(self._file.read(1)) != 1:
                return False
        except ValueError as error:
            return _RANGES not in str(error)
        except Exception:
            self._file = self._opened()
        return getattr(self._file, "size", None) is not None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size_bytes - self._at)
        if wanted <= 0:
            return 0
        data = persistently("read", self._url, lambda: self._block(wanted))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BLOCK_BYTES) or b"", b""))

    def _block(self, wanted: int) -> bytes:
        try:
            self._file.seek(self._at)
            data = self._file.read(wanted)
        except ValueError as error:
            if _RANGES not in str(error):
                raise
            self._file = self._fetched_whole()
            return self._block(wanted)
        except Exception:
            with contextlib.suppress(Exception):
                self._file.close()
            self._file = self._opened()
            raise
        if len(data) > wanted:  # all of it, compressed for the way: the server knows no ranges of that
            self._file = self._fetched_whole()
            return self._block(wanted)
        if not data:
            raise OSError(f"nothing came at byte {self._at:,} of {self.size_bytes:,}")
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
