"""What a remote holds: its manifest and indexes, brought into the cache; or a manifest made from indexes alone.

Stores are not listed. So domains of a remote without a manifest are those whose addresses are given, and domains that
lie in the cache folder itself, as in any folder of shards, are read there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mixer.cache import MissingError, RemoteCache
from mixer.errors import DataError, InputError
from mixer.folders import mds_folders, synthesise_manifest
from mixer.manifest import FILE_NAME, Manifest, Split, domain_folder

__all__ = ["fetch_index", "fetch_manifest"]

_AT_A_TIME = 16  # indexes
_MARK = ".remote"  # beside an index that was fetched by address: this domain is not one of the folder's own


def fetch_manifest(folder: Path, cache: RemoteCache, split: str) -> Manifest:
    """Return the manifest of what ``cache`` stands for, with the indexes of a split fetched.

    Raises: DataError: if files are missing or cannot be fetched, or the folder holds another corpus; InputError: if the
        domains do not fit together.
    """
    if cache.by_domain:
        return _of_domains(folder, cache, split)
    try:
        _fetch_to_keep(cache, FILE_NAME)
    except MissingError as error:
        cache.by_domain = _without_manifest(cache.remote, split)
        try:
            if cache.by_domain:
                return _of_domains(folder, cache, split)
        except MissingError:
            pass
        raise DataError(
            f"{error} Domains without a manifest are named with their addresses: remote={{'web': 's3://…/web'}}."
        ) from error
    manifest = Manifest.load(folder)
    entries = [domain.splits[split] for domain in manifest.domains.values() if split in domain.splits]
    missing = [entry for entry in entries if not (folder / entry.path / "index.json").is_file()]
    _side_by_side(lambda entry: fetch_index(cache, entry), missing)
    return manifest


def fetch_index(cache: RemoteCache, split: Split) -> None:
    """Bring the index of a split into the cache, unless it is there as the manifest describes it."""
    name = f"{split.path}/index.json"

    def check(path: Path) -> None:
        found = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        if split.fingerprint and found != split.fingerprint:
            raise DataError(f"it has fingerprint {found}, the manifest says {split.fingerprint}")

    with cache.lock(name):
        try:
            check(cache.local / name)
        except (OSError, DataError):
            cache.fetch(name, check=check)


def _fetch_to_keep(cache: RemoteCache, name: str) -> None:
    """Bring a file that describes others; what lies there already must be the same."""
    with cache.lock(name):
        new = f".mixer/new.{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        fresh, kept = cache.fetch(name, to=new), cache.local / name
        if kept.is_file() and kept.read_bytes() != fresh.read_bytes():
            raise DataError(
                f"the cache {cache.local} holds shards of another corpus than {cache.address(name)}: the copy there"
                " differs. Use another folder for the cache, or empty this one."
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh, kept)


def _without_manifest(remote: str, split: str) -> dict[str, str]:
    """Return the addresses of the domains in a folder on a disk, or of the one domain that an address is taken for."""
    url = urlparse(remote)
    if url.scheme not in ("", "file"):
        return {remote.rpartition("/")[2]: remote}
    root = Path(url.path if url.scheme else remote)
    found = mds_folders(root) if root.is_dir() else {}
    return {domain: str(splits[split]) for domain, splits in found.items() if split in splits}


def _of_domains(folder: Path, cache: RemoteCache, split: str) -> Manifest:
    """Return a manifest of the domains with addresses, and of those in the folder itself."""
    for domain in cache.by_domain:
        (folder / domain_folder(domain) / split).mkdir(parents=True, exist_ok=True)
    _side_by_side(lambda domain: _locate(cache, domain, split), sorted(cache.by_domain))
    remote = {domain: {split: folder / domain_folder(domain) / split} for domain in cache.by_domain}
    own = {
        domain: splits
        for domain, splits in mds_folders(folder).items()
        if domain not in remote and not any((path / _MARK).exists() for path in splits.values())
    }
    if not (folder / FILE_NAME).is_file():
        return synthesise_manifest(folder, own | remote, cache)
    theirs, ours = synthesise_manifest(folder, remote, cache), Manifest.load(folder)
    for fact in ("column", "dtype", "seq_len"):
        if getattr(theirs, fact) != getattr(ours, fact):
            raise InputError(
                f"the domains in {folder} have {fact} {getattr(ours, fact)!r}, the remote ones {sorted(remote)}"
                f" {getattr(theirs, fact)!r}. One loader reads samples of one shape; convert them alike."
            )
    return dataclasses.replace(ours, domains=dict(sorted((dict(ours.domains) | dict(theirs.domains)).items())))


def _locate(cache: RemoteCache, domain: str, split: str) -> None:
    """Fetch a domain's index from below its address, or from the address itself."""
    url, path = cache.by_domain[domain], f"{domain_folder(domain)}/{split}"
    tried = []
    for base in (f"{url}/{split}", url):
        cache.folders[path] = base
        tried.append(cache.address(f"{path}/index.json"))
        try:
            _fetch_to_keep(cache, f"{path}/index.json")
        except MissingError:
            continue
        (cache.local / path / _MARK).write_text(cache.address(f"{path}/index.json") + "\n")
        return
    raise MissingError(
        f"domain {domain!r}: neither {tried[0]} nor {tried[1]} exists. Correct its address in"
        " `remote`, or upload it again."
    )


def _side_by_side(do: Callable[[Any], None], things: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="mixer-index") as threads:
        for done in [threads.submit(do, thing) for thing in things]:
            done.result()
