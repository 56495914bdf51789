"""Folders of shards that others made: a manifest for those that have none.

root/<domain>/<split>/index.json      ours and most others'
root/<domain>/index.json              no splits: all of it is "train"
root/index.json, root/<split>/index.json    one domain, named after the folder
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from mixer.errors import DataError, InputError
from mixer.manifest import FILE_NAME, Domain, Manifest, Split, TokenizerInfo

if TYPE_CHECKING:
    from mixer.cache import RemoteCache
    from mixer.shards import DomainShards

__all__ = ["fetch_index", "load_manifest", "synthesise_manifest"]

_SPLITS = ("train", "validation", "val", "test", "train_small", "val_small", "val_xsmall")


def load_manifest(root: str | os.PathLike[str], cache: RemoteCache | None = None) -> Manifest:
    """Return the manifest of a folder of shards, or one made from the MDS folders in it where it has none.

    With ``cache`` it is fetched; what lies there already must be of the same corpus.

    Raises: InputError: if the folder is missing or holds no MDS; DataError: if it cannot be fetched or differs.
    """
    folder = Path(root)
    if cache is not None:
        return _fetch_manifest(folder, cache)
    if folder.is_dir() and not (folder / FILE_NAME).exists():
        found = _mds_folders(folder)
        if found:
            return synthesise_manifest(folder, found)
    return Manifest.load(folder)


def _fetch_manifest(folder: Path, cache: RemoteCache) -> Manifest:
    with cache.lock(FILE_NAME):
        fresh = cache.fetch(FILE_NAME, to=f".mixer/{FILE_NAME}")
        kept = folder / FILE_NAME
        if kept.is_file() and kept.read_bytes() != fresh.read_bytes():
            raise DataError(
                f"the cache {folder} holds shards of another corpus than {cache.remote}: their manifests differ. Use"
                " another folder for the cache, or empty this one."
            )
        os.replace(fresh, kept)
    return Manifest.load(folder)


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


def synthesise_manifest(root: Path, found: dict[str, dict[str, Path]]) -> Manifest:
    """Return a manifest for MDS folders by domain and split; of the tokenizer only the absence is known.

    Where samples differ in length, the tokens of a domain are estimated from those of its first shard.
    """
    from mixer.shards import DomainShards

    domains: dict[str, Domain] = {}
    shapes: dict[tuple[str, str], tuple[str, str, int]] = {}
    variable = False
    for domain, splits in sorted(found.items()):
        described = {}
        for split, folder in sorted(splits.items()):
            shards = DomainShards(domain, split, folder, verify="never", variable=None)
            shapes[domain, split] = (shards.column, shards.dtype.name, shards.seq_len)
            variable |= shards.variable
            described[split] = _describe(root, folder, shards)
        domains[domain] = Domain(described)
    if len({shape[:2] if variable else shape for shape in shapes.values()}) > 1:
        raise InputError(
            f"the domains in {root} differ in token column, dtype or length: {shapes}. One loader reads samples of one"
            " shape; convert them alike, or load them separately."
        )
    column, dtype, _ = next(iter(shapes.values()))
    return Manifest(
        domains,
        max(seq_len for *_, seq_len in shapes.values()),
        dtype,
        TokenizerInfo("unknown", "", 0, -1),
        column=column,
        converter={"synthesised": True},
        variable_length=variable,
    )


def _describe(root: Path, folder: Path, shards: DomainShards) -> Split:
    return Split(
        path=os.path.relpath(folder, root),
        num_samples=shards.num_samples,
        num_tokens=round(shards.num_samples * (shards.mean_length or shards.seq_len)),
        num_documents=0,
        num_shards=len(shards.shard_sizes),
        size_bytes=int(shards.index.raw_bytes.sum()),
        fingerprint=shards.fingerprint,
    )


def _mds_folders(root: Path) -> dict[str, dict[str, Path]]:
    own = _splits(root)
    if own:
        return {root.resolve().name: own}
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return {unquote(child.name): splits for child in folders if (splits := _splits(child))}


def _splits(folder: Path) -> dict[str, Path]:
    if (folder / "index.json").is_file():
        return {"train": folder}
    return {name: folder / name for name in _SPLITS if (folder / name / "index.json").is_file()}
