"""The one door to mosaicml-streaming: its downloaders for every store, its rarer codecs. Imported when first needed.

Importing streaming takes seconds and needs a torchvision that fits torch; shards on a local disk, compressed by zstd or
not at all, never come here.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mixer.errors import InputError

__all__ = ["decode", "decompress", "download"]

# What pip has to install for a scheme of streaming's; most of it comes with streaming.
_PACKAGES = {
    "alipan": "AliPCS-py",
    "azure": "azure-storage-blob azure-identity",
    "azure-dl": "azure-storage-file-datalake azure-identity",
    "dbfs": "databricks-sdk",
    "gs": "google-cloud-storage",
    "hf": "huggingface_hub",
    "oci": "oci",
    "s3": "boto3",
    "sftp": "paramiko",
}
_making = threading.Lock()
# By what clients name these two kinds of failure: HTTP status, codes, classes.
_MISSING = frozenset(
    [
        "404",
        "NoSuchKey",
        "NoSuchBucket",
        "NotFound",
        "BlobNotFound",
        "ResourceNotFoundError",
        "EntryNotFoundError",
        "RemoteEntryNotFoundError",
        "RepositoryNotFoundError",
    ]
)
_DENIED = frozenset(
    [
        "401",
        "403",
        "AccessDenied",
        "Forbidden",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ClientAuthenticationError",
        "AuthenticationException",
        "BadAuthenticationType",
        "BadHostKeyException",
        "GatedRepoError",
    ]
)


def download(
    url: str, target: Path, timeout: float, clients: dict[Any, Any], connected: Callable[[], None] = lambda: None
) -> None:
    """Copy one remote file to ``target``, which must not exist. Any scheme that streaming's ``Stream`` supports.

    Args:
        timeout: seconds; only some of the stores' clients heed it.
        clients: those made so far by this thread; a new one is added.
        connected: called when imports are done and the client is there, which can take seconds without any network.
    Raises: FileNotFoundError: if there is no such file; PermissionError: if it may not be read; InputError: for an
        unknown scheme or a missing package; otherwise what the store's client raises.
    """
    scheme = urlparse(url).scheme
    if scheme in ("", "file"):
        connected()
        shutil.copyfile(urlparse(url).path if scheme else url, target)
        return
    try:
        client = _s3(url, timeout) if scheme == "s3" else clients.get((scheme, urlparse(url).netloc))
        if client is None:
            client = clients[scheme, urlparse(url).netloc] = _downloader(scheme, url)
        connected()
        client.download(url, str(target), timeout)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "its client")
        raise InputError(
            f"{scheme}: addresses need the package {package.replace(' ', ' and ')}, which cannot be imported here"
            f" ({error}). Run: pip install {package}"
        ) from error
    except InputError:
        raise
    except Exception as error:
        facts = _facts(error)
        if isinstance(error, FileNotFoundError) or facts & _MISSING:
            raise FileNotFoundError(f"no file {url}") from error
        if isinstance(error, PermissionError) or facts & _DENIED:
            raise PermissionError(f"{type(error).__name__}: {error}") from error
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


@lru_cache
def _s3_of(process: int, endpoint: str, timeout: float) -> Any:
    downloader = _downloader("s3", "s3://")
    downloader._create_s3_client(timeout=timeout)
    return downloader


def _s3(url: str, timeout: float) -> Any:
    """Return this process's client for S3: boto3's may be shared between threads, and take a second each to make.

    It is made here because making one is not safe in several threads at once; it reads the endpoint when it is made.
    """
    with _making:
        return _s3_of(os.getpid(), os.environ.get("S3_ENDPOINT_URL", ""), timeout)


def _downloader(scheme: str, url: str) -> Any:
    storage = _import("streaming.base.storage.download")
    known = {name.removesuffix("-uc") for name in storage.DOWNLOADER_MAPPINGS if name}
    if scheme not in known:
        raise InputError(
            f"{url} has the unknown scheme {scheme!r}: expected a path, file, or one of {sorted(known)}. Correct it, or"
            " copy the shards to a disk."
        )
    return storage.CloudDownloader.get(url)


def _import(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except Exception as error:  # streaming imports torchvision, which fails in many ways next to another torch
        raise InputError(
            f"this needs mosaicml-streaming, which cannot be imported here ({type(error).__name__}: {error}). Install a"
            " torchvision that fits this torch, or use local shards compressed by zstd."
        ) from error


def _facts(error: Exception) -> set[str]:
    """Return all that an error of some store's client says about its kind: classes, codes, HTTP status."""
    response = getattr(error, "response", None)
    facts = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(response, dict):
        facts.add(str(response.get("Error", {}).get("Code", "")))
    for thing in (error, response):
        facts |= {str(getattr(thing, name, "")) for name in ("status", "status_code", "code", "error_code")}
    return facts
