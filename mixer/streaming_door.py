"""The one door to mosaicml-streaming: its downloaders for every store, its rarer codecs. Imported when first needed.

Importing streaming takes seconds and needs a torchvision that fits torch; shards on a local disk, compressed by zstd or
not at all, never come here.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mixer.errors import InputError

__all__ = ["decode", "decompress", "download"]

_thread = threading.local()


def download(url: str, target: Path, timeout: float) -> None:
    """Copy one remote file to ``target``, which must not exist. Any scheme that streaming's ``Stream`` supports.

    Raises: FileNotFoundError: if there is no such file; otherwise what the store's client raises.
    """
    scheme = urlparse(url).scheme
    if scheme in ("", "file"):
        shutil.copyfile(urlparse(url).path if scheme else url, target)
        return
    # Clients are not safe to share between threads while they are being made; they read the endpoint when they are.
    clients: dict[tuple[str, str], Any] = _thread.__dict__.setdefault("clients", {})
    which = (scheme, os.environ.get("S3_ENDPOINT_URL", ""))
    if which not in clients:
        clients[which] = _import("streaming.base.storage.download").CloudDownloader.get(url)
    try:
        clients[which].download(url, str(target), timeout)
    except Exception as error:
        if _says_missing(error):
            raise FileNotFoundError(f"no file {url}") from error
        raise


def decompress(compression: str, data: bytes) -> bytes:
    """Return the content of a shard compressed by br, gz, bz2 or snappy."""
    return _import("streaming.base.compression").decompress(compression.partition(":")[0], data)


def decode(encoding: str, value: bytes) -> Any:
    """Return a value of any MDS encoding but pickle, which would run the code of whoever wrote the shard."""
    encodings = _import("streaming.base.format.mds.encodings")
    if not encodings.is_mds_encoding_safe(encoding):
        raise InputError(f"columns of type {encoding!r} are not read: decoding them runs code from the shard.")
    return encodings.mds_decode(encoding, value)


def _import(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except Exception as error:  # streaming imports torchvision, which fails in many ways next to another torch
        raise InputError(
            f"this needs mosaicml-streaming, which cannot be imported here ({type(error).__name__}: {error}). Install a"
            " torchvision that fits this torch, or use local shards compressed by zstd."
        ) from error


def _says_missing(error: Exception) -> bool:
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return isinstance(error, FileNotFoundError) or code in ("404", "NoSuchKey") or type(error).__name__ == "NotFound"
