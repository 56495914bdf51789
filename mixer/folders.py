"""Folders of shards that others made: a manifest for those that have none.

root/<domain>/<split>/index.json      ours and most others'
root/<domain>/index.json              no splits: all of it is "train"
root/index.json, root/<split>/index.json    one domain, named after the folder
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mixer.errors import InputError
from mixer.manifest import FILE_NAME, Domain, Manifest, Split, TokenizerInfo

if TYPE_CHECKING:
    from mixer.cache import RemoteCache
    from mixer.shards import DomainShards

__all__ = ["load_manifest", "mds_folders", "synthesise_manifest"]

_SPLITS = ("train", "validation", "val", "test", "train_small", "val_small", "val_xsmall")


def load_manifest(root: str | os.PathLike[str], cache: RemoteCache | None = None, split: str = "train") -> Manifest:
    """Return the manifest of a folder of shards, or one made from the MDS folders in it where it has none.

    With ``cache`` it is fetched, and the indexes of ``split`` with it; what lies there already must be of the same
    corpus.

    Raises: InputError: if the folder is missing or holds no MDS; DataError: if it cannot be fetched or differs.
    """
    folder = Path(root)
    if cache is not None:
        from mixer.remote_folders import fetch_manifest

        return fetch_manifest(folder, cache, split)
    if folder.is_dir() and not (folder / FILE_NAME).exists():
        found = mds_folders(folder)
        if found:
            return synthesise_manifest(folder, found)
    return Manifest.load(folder)


def synthesise_manifest(
    root: Path, found: Mapping[str, Mapping[str, Path]], cache: RemoteCache | None = None
) -> Manifest:
    """Return a manifest for MDS folders by domain and split; of the tokenizer only the absence is known.

    Where samples differ in length, the tokens of a domain are estimated from those of its first shard.
    """
    domains: dict[str, Domain] = {}
    shapes: dict[tuple[str, str], tuple[str, str, int]] = {}
    variable = False
    for domain, splits in sorted(found.items()):
        described = {}
        for split, folder in sorted(splits.items()):
            shards = _opened(root, cache, domain, split, folder, verify="never", variable=None)
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


def _opened(
    root: Path, cache: RemoteCache | None, domain: str, split: str, folder: Path, **options: Any
) -> DomainShards:
    from mixer.shards import DomainShards

    path = os.path.relpath(folder, root)
    if cache is None or not cache.holds(path):
        return DomainShards(domain, split, folder, **options)
    from mixer.remote_shards import RemoteShards

    return RemoteShards(domain, split, path, cache=cache, **options)


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


def mds_folders(root: Path) -> dict[str, dict[str, Path]]:
    """Return the MDS folders in a folder, by domain and split."""
    own = _splits(root)
    if own:
        return {root.resolve().name: own}
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return {unquote(child.name): splits for child in folders if (splits := _splits(child))}


def _splits(folder: Path) -> dict[str, Path]:
    if (folder / "index.json").is_file():
        return {"train": folder}
    return {name: folder / name for name in _SPLITS if (folder / name / "index.json").is_file()}
