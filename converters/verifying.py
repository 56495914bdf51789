"""Check finished shards against their manifest: quickly by structure, or deeply by every byte.

    fast   manifest, tokenizer, list of inputs and index files by digest; every shard present with its size, and none
           more, and what readers unpacked beside them; the accounting; columns beside the shards present and bound
           to them
    deep   also every shard's hashes and header, every token id below the vocabulary size

Every finding is reported, not only the first, each with the file and what to do.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from converters.engines import run_tasks
from converters.inspecting import manifest_digest, raw_shard, read_index, shard_rows
from converters.job import PACK
from converters.locations import Location, children, load_manifest, location, size_of, sizes_below
from mixer.errors import DataError, InputError
from mixer.manifest import FILE_NAME, Domain, Manifest, Split
from mixer.mds import hash_hex
from mixer.side_columns import SideColumn, file_digest, find_columns

__all__ = ["Finding", "require_shards", "verify"]

_REPAIR = "restore it from a copy, or convert elsewhere by the same options and copy this file (equal bytes come out)"


_CONTINUE = "run the same `mixer convert` again: it was stopped while it committed, and goes on"


class Finding(NamedTuple):
    """Something that is wrong: which file, what, and how to repair it."""

    path: str
    what: str
    repair: str


class _ShardCheck(NamedTuple):
    folder: str
    entry: dict[str, Any]
    column: str
    vocab_size: int
    deep: bool


class _Checked(NamedTuple):
    """What is wrong with a shard of a folder, and how many tokens are in it (None: not counted)."""

    folder: str
    findings: list[Finding]
    tokens: int | None = None


def verify(
    shards: str | os.PathLike[str],
    *,
    deep: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Return what is wrong with a folder of shards; an empty list if nothing is.

    Args:
        deep: read every shard and check its hashes, header and token ids, and that its tokens add up.
        workers: processes for the shards.
        progress: called with (shards checked, shards in all).
    Raises: InputError: if there is no readable manifest to check against.
    """
    folder = location(shards)
    manifest = load_manifest(folder)
    findings = [
        *_check_manifest(folder, manifest), *_check_tokenizer(folder, manifest), *_check_lists(folder, manifest),
        *_check_columns(str(folder), manifest, deep),
    ]  # fmt: skip
    is_growing = PACK in children(folder)
    checks: list[_ShardCheck] = []
    for name in manifest.names:
        domain = manifest.domains[name]
        for key, split in domain.splits.items():
            findings += _check_accounting(name, key, domain, split)
            entries = _entries(folder / split.path)
            if isinstance(entries, Finding):
                findings.append(entries)
                continue
            wrong = list(_check_index(folder, split, entries, _CONTINUE if is_growing else _REPAIR))
            findings += wrong
            if not wrong and not is_growing:  # else it may well be a shard that belongs here
                findings += _check_others(folder, split, entries)
            where = str(folder / split.path)
            checks += [
                _ShardCheck(where, entry, manifest.column, manifest.tokenizer.vocab_size, deep) for entry in entries
            ]
    counted: dict[str, list[int | None]] = {}
    in_shards: list[Finding] = []
    for done, shard in enumerate(run_tasks("local", _check_shard, checks, workers if deep else 1), start=1):
        in_shards += shard.findings
        counted.setdefault(shard.folder, []).append(shard.tokens)
        if progress:
            progress(done, len(checks))
    return [*findings, *sorted(in_shards), *_check_tokens(folder, manifest, counted)]


def require_shards(folder: Location, manifest: Manifest) -> None:
    """Look whether all shards are there with their sizes, by one listing per split.

    Raises: DataError: naming the first that is not, and how many are not.
    """
    splits = [split for domain in manifest.domains.values() for split in domain.splits.values()]
    with ThreadPoolExecutor(_LISTINGS_AT_A_TIME) as threads:
        found = [wrong for some in threads.map(functools.partial(_wrong_sizes, folder), splits) for wrong in some]
    if found:
        more = f" (and {len(found) - 1:,} more: `mixer verify {folder}` names all)" if len(found) > 1 else ""
        raise DataError(
            f"{found[0].path} {found[0].what}{more}. The conversion was finished, and does not write shards again by"
            " itself: restore them from a copy, or start over with --fresh."
        )


_LISTINGS_AT_A_TIME = 16


def _wrong_sizes(folder: Location, split: Split) -> list[Finding]:
    where = folder / split.path
    entries, sizes = _entries(where), sizes_below(where)  # in this order: another process may be adding shards
    if isinstance(entries, Finding):
        return [entries]
    stored = [entry.get("zip_data") or entry["raw_data"] for entry in entries]
    return [
        finding
        for each in stored
        if (finding := _compared(where / each["basename"], sizes.get(each["basename"]), each, _REPAIR)) is not None
    ]


def _entries(where: Location) -> list[dict[str, Any]] | Finding:
    """Return the shard entries of one MDS directory, or what is wrong with its index."""
    try:
        return read_index(where)
    except DataError as error:
        index = f"{where}/index.json"
        return Finding(index, str(error).removeprefix(f"{index} ").partition(". ")[0], _REPAIR)


def _check_tokens(
    folder: Location, manifest: Manifest, counted: Mapping[str, Sequence[int | None]]
) -> Iterator[Finding]:
    """Compare the tokens that the shards hold with the manifest, where all of them could be counted."""
    for name in manifest.names:
        for key, split in manifest.domains[name].splits.items():
            tokens = counted.get(str(folder / split.path), [])
            if len(tokens) == split.num_shards and None not in tokens and sum(filter(None, tokens)) != split.num_tokens:
                what = f"says {split.num_tokens:,} tokens, its shards hold {sum(filter(None, tokens)):,}"
                yield Finding(f"manifest.json, domain {name!r}, {key}", what, "restore the manifest, or convert again")


def _check_manifest(folder: Location, manifest: Manifest) -> Iterator[Finding]:
    """Check that the manifest is as it was written; others than ``mixer convert`` do not note its digest."""
    if manifest.converter.get("digest", manifest_digest(manifest)) != manifest_digest(manifest):
        yield Finding(str(folder / FILE_NAME), "was changed: it does not have the digest that it notes", _REPAIR)


def _check_tokenizer(folder: Location, manifest: Manifest) -> Iterator[Finding]:
    if manifest.tokenizer.file is None:
        return
    file = folder / manifest.tokenizer.file
    found = _digest(file)
    if found != manifest.tokenizer.fingerprint:
        what = "is missing" if found is None else f"has {found[:20]}…, not {manifest.tokenizer.fingerprint[:20]}…"
        yield Finding(str(file), what, "restore the tokenizer that the shards were made with")


def _check_lists(folder: Location, manifest: Manifest) -> Iterator[Finding]:
    """Check what lies beside the manifest: the list of inputs, which has its digest in its name, and the quarantine."""
    facts = [manifest.converter, *manifest.converter.get("extensions", [])]
    if name := manifest.converter.get("inputs"):
        digest = _digest(folder / name)
        repair = "restore it from a copy; only --extend needs it"
        if digest is None:
            yield Finding(str(folder / name), "is missing", repair)
        elif digest.removeprefix("sha256:")[:16] != name.split(".")[1]:
            yield Finding(str(folder / name), "is not the list that the manifest names", repair)
    for name in (each["quarantine"] for each in facts if "quarantine" in each):
        if not (folder / name).exists():
            yield Finding(str(folder / name), "is missing", "restore it from a copy; only people read it")


def _check_columns(folder: str, manifest: Manifest, deep: bool) -> Iterator[Finding]:
    """Check the columns beside the shards: that they are whole and belong to them; with ``deep`` every byte."""
    for name, split, where in find_columns(folder):
        repair = f"run `mixer add-column {name} --split {split} --replace` again, or remove {where}"
        try:
            column = SideColumn(where)
            column.check(manifest, split)
        except InputError as error:
            yield Finding(str(where), str(error), repair)
            continue
        for domain, files in column.files.items():
            for shard, (_, _, digest) in enumerate(files):
                path = column.path(domain, shard)
                if not path.is_file():
                    yield Finding(str(path), "is missing", repair)
                elif deep and file_digest(path) != digest:
                    yield Finding(str(path), f"does not have the digest {digest} of its list", repair)


def _digest(path: Location) -> str | None:
    try:
        return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _check_accounting(name: str, key: str, domain: Domain, split: Split) -> Iterator[Finding]:
    where = f"manifest.json, domain {name!r}, {key}"
    if key not in domain.tokens_in:
        return  # written by an older version, or by others
    padding, dropped = domain.padding_tokens.get(key, 0), domain.dropped_tokens.get(key, 0)
    if domain.tokens_in[key] != split.num_tokens - padding + dropped:
        what = (
            f"{domain.tokens_in[key]:,} tokens came in, but {split.num_tokens:,} - {padding:,} of padding +"
            f" {dropped:,} dropped went out"
        )
        yield Finding(where, what, "restore the manifest, or convert again")


def _check_index(folder: Location, split: Split, entries: Sequence[dict[str, Any]], repair: str) -> Iterator[Finding]:
    index = folder / split.path / "index.json"
    if _digest(index) != split.fingerprint:
        yield Finding(str(index), "is not the index that the manifest names", repair)
    try:
        samples = sum(entry["samples"] for entry in entries)
        size = sum((entry.get("zip_data") or entry["raw_data"])["bytes"] for entry in entries)
    except (KeyError, TypeError):
        return
    found, expected = (len(entries), samples, size), (split.num_shards, split.num_samples, split.size_bytes)
    if found != expected:
        lists, says = ("{:,} shards of {:,} samples in {:,} bytes".format(*sizes) for sizes in (found, expected))
        yield Finding(str(index), f"lists {lists}, the manifest says {says}", repair)


def _check_others(folder: Location, split: Split, entries: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Name shards that no index lists; an unpacked shard beside its own is what readers leave."""
    listed = {data["basename"] for entry in entries for data in (entry.get("zip_data"), entry["raw_data"]) if data}
    for name in children(folder / split.path):
        if name.startswith("shard.") and name not in listed:
            path = folder / split.path / name
            yield Finding(str(path), "is a shard that its index does not list", "remove it; nothing reads it")


def _check_shard(check: _ShardCheck) -> _Checked:
    stored = check.entry.get("zip_data") or check.entry["raw_data"]
    path = location(check.folder) / stored["basename"]
    unpacked = list(_check_unpacked(check, stored["basename"]))
    wrong = _size_finding(path, stored, _REPAIR)
    if wrong is not None or not check.deep:
        return _Checked(check.folder, [*unpacked, *([wrong] if wrong else [])])
    checked = _check_bytes(check, path, stored)
    return checked._replace(findings=[*unpacked, *checked.findings])


def _check_unpacked(check: _ShardCheck, packed: str) -> Iterator[Finding]:
    """Check the copy that a reader may have unpacked beside a compressed shard, which other readers take unchecked."""
    raw = check.entry["raw_data"]
    path = location(check.folder) / raw["basename"]
    if raw["basename"] == packed or not isinstance(path, Path) or not path.exists():
        return
    repair = f"remove it; readers unpack {packed} again"
    wrong = _size_finding(path, raw, repair) or (_hash_finding(path, raw, repair) if check.deep else None)
    if wrong is not None:
        yield wrong


def _size_finding(path: Location, stored: Mapping[str, Any], repair: str) -> Finding | None:
    try:
        size = size_of(path)
    except FileNotFoundError:
        size = None
    except OSError as error:
        return Finding(str(path), f"cannot be read: {error.strerror or error}", repair)
    return _compared(path, size, stored, repair)


def _compared(path: Location, size: int | None, stored: Mapping[str, Any], repair: str) -> Finding | None:
    if size is None:
        return Finding(str(path), "is missing", repair)
    if size == stored["bytes"]:
        return None
    return Finding(str(path), f"has {size:,} bytes, its index says {stored['bytes']:,}", repair)


def _hash_finding(path: Location, stored: Mapping[str, Any], repair: str) -> Finding | None:
    for algorithm, expected in stored["hashes"].items():
        found = hash_hex(algorithm, path.read_bytes())
        if found != expected:
            return Finding(str(path), f"has {algorithm} {found}, its index says {expected}", repair)
    return None


def _check_bytes(check: _ShardCheck, path: Location, stored: Mapping[str, Any]) -> _Checked:
    if wrong := _hash_finding(path, stored, _REPAIR):
        return _Checked(check.folder, [wrong])
    try:
        raw = raw_shard(location(check.folder), check.entry)
        rows = shard_rows(location(check.folder), check.entry, check.column)
    except DataError as error:
        return _Checked(check.folder, [Finding(str(path), str(error), _REPAIR)])
    return _Checked(check.folder, list(_check_rows(check, path, raw, rows)), sum(map(len, rows)))


def _check_rows(check: _ShardCheck, path: Location, raw: bytes, rows: Sequence[NDArray[Any]]) -> Iterator[Finding]:
    for algorithm, expected in check.entry["raw_data"]["hashes"].items():
        if (found := hash_hex(algorithm, raw)) != expected:
            yield Finding(str(path), f"decompresses to {algorithm} {found}, its index says {expected}", _REPAIR)
    if len(rows) != check.entry["samples"]:
        yield Finding(str(path), f"holds {len(rows):,} samples, its index says {check.entry['samples']:,}", _REPAIR)
    largest = max((int(row.max()) for row in rows if len(row)), default=0)
    if largest >= check.vocab_size:
        what = f"holds token id {largest:,}, the vocabulary has {check.vocab_size:,}"
        yield Finding(str(path), what, "convert again with the right tokenizer")
