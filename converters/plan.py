"""Inputs -> units of work, in one fixed order.

A unit is a few pieces of input files that one process tokenises at a time. Units are cut by bytes alone, never by the
number of workers, and the order of documents is the order of (path, position), so neither changes the shards.
The plan is kept beside the stage files; a later run with other inputs or options is refused with the difference.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import orjson
import xxhash

from converters.files import (
    Status,
    before_magic,
    can_seek,
    compression_suffix,
    find,
    naming,
    open_bytes,
    open_raw,
    status,
)
from converters.options import StageOptions
from converters.readers import FORMATS, Piece
from converters.texts import text_columns
from converters.token_shards import holds_tokens, in_its_domain, is_conversion_file
from converters.urls import is_url, without_query
from mixer.errors import DataError, InputError

__all__ = ["CHOOSING", "Plan", "Unit", "around_finished", "difference", "is_mended", "make_plan", "piece_keys"]

_HEAD_BYTES = 1 << 20
CHOOSING = ("include", "exclude")  # options that say which files are inputs, and nothing of their text
_MIN_UNIT, _MAX_UNIT = 2 << 20, 128 << 20


class Unit(NamedTuple):
    """What one process tokenises at a time."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        return sum(piece_bytes(piece) for piece in self.pieces)


class Plan(NamedTuple):
    """All units of a conversion; ``facts`` is what must not change between runs, ``inputs`` one row per file,
    ``warnings`` what may be a mistake."""

    units: list[Unit]
    inputs: list[dict[str, Any]]
    facts: dict[str, Any]
    warnings: Sequence[str] = ()

    @property
    def size_bytes(self) -> int:
        return sum(unit.size_bytes for unit in self.units)


def piece_bytes(piece: Piece) -> int:
    """Return the input bytes of a piece (for row groups: the file's share)."""
    if piece.stop is None or FORMATS[piece.format].unit != "bytes":
        return piece.size_bytes
    return min(piece.stop, piece.size_bytes) - piece.start


def make_plan(
    inputs: Sequence[str | os.PathLike[str]],
    options: StageOptions,
    tokenizer: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]] | None = None,
    outputs: Sequence[str] = (),
) -> Plan:
    """Find the files, fingerprint them and cut them into units.

    Args:
        known: rows of files that were converted before, by name; they are left out of the plan.
        outputs: folders of shards and stage files: nothing in them is an input.
    Raises: InputError: if an input does not exist, nothing is left to convert, or a known file has changed.
    """
    files = list(_files(inputs, options, outputs))
    if not files:
        raise InputError(
            f"nothing to convert in {[os.fspath(item) for item in inputs]}: no file left after include"
            f" {list(options.include)} and exclude {list(options.exclude)}."
        )
    if known is None:  # an extension has the options of before, which may be about the inputs of before
        _require_token_shards(files, options)
    fingerprint = functools.partial(_fingerprint, reads_all=options.fingerprint == "full")
    with ThreadPoolExecutor(16) as threads:  # each waits for a disk or a server most of the time
        rows = _told_apart(list(threads.map(fingerprint, files)))
    warnings: list[str] = []
    if known:
        new = [number for number, row in enumerate(rows) if not _is_known(row, known)]
        files, rows = [files[number] for number in new], [rows[number] for number in new]
        warnings = _copies_of_known(rows, known)
    unit_bytes = options.unit_bytes or _default_unit(sum(piece.size_bytes for piece in files))
    files = [piece._replace(digest=f"{row['version']} {row['hash']}") for piece, row in zip(files, rows)]
    pieces = (part for piece in files for part in _cut(piece, unit_bytes))
    units = [Unit(number, tuple(group)) for number, group in enumerate(_grouped(pieces, unit_bytes))]
    facts = {**options.facts(), "unit_bytes": unit_bytes, "tokenizer": dict(tokenizer)}
    return Plan(units, rows, facts, warnings)


def _require_token_shards(files: Sequence[Piece], options: StageOptions) -> None:
    """Raise InputError if options for token ids are given that no input has."""
    if not options.retokenize and options.tokens_from is None:
        return
    if not any(piece.format == "mds" and holds_tokens(piece, options) for piece in files):
        raise InputError(
            f"{'--retokenize' if options.retokenize else '--tokens-from'} would be ignored: it is about token ids in"
            f" MDS shards, and no input has any; the first is {files[0].path}. Leave it out, or check the inputs."
        )


def _default_unit(total_bytes: int) -> int:
    """Return a power of two, which stays the same if a file is mended or left out."""
    return 1 << max(_MIN_UNIT, min(_MAX_UNIT, total_bytes // 256)).bit_length() - 1


# --- files ---------------------------------------------------------------------------------------------------------


def _files(inputs: Sequence[str | os.PathLike[str]], options: StageOptions, outputs: Sequence[str]) -> Iterator[Piece]:
    seen: dict[str, str] = {}
    ours = tuple(f"{_absolute(folder)}/" for folder in outputs)
    for item in _listed(inputs):
        root, path = _named_input(item)
        if f"{_absolute(path)}/".startswith(ours):
            raise InputError(
                f"{path} lies where shards or stage files are written to; choose another --out or --stage."
            )
        for file, name in _wanted_files(path, options):
            where = _absolute(file)
            if where.startswith(ours):
                continue
            if where in seen:
                raise InputError(f"{file} comes in twice, by {seen[where]!r} and {item!r}; give it once.")
            seen[where] = item
            if is_url(path) and file == path and not root.startswith("="):
                root = without_query(path).split("/")[-2] or root  # it is a file, and not the folder
            size, version = _status(file)
            piece = Piece(
                file, name, root, _format(file, options), size, version, max_record_bytes=options.max_record_bytes
            )
            yield in_its_domain(piece, options)


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.abspath(path).rstrip("/")


def _listed(inputs: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Yield the inputs; ``@list.txt`` stands for one per line of that file."""
    for item in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        text = os.fspath(item)
        if not text.startswith("@"):
            yield text
            continue
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the list of inputs {text[1:]}: {why}.") from error
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _named_input(item: str) -> tuple[str, str]:
    """Split ``name=path``; the root of a plain path is its own name.

    A path that exists as written goes first, and one with a ``=`` in a folder below, ``data/lang=*/``, is no name.
    """
    name, equals, rest = item.partition("=")
    if equals and name and "/" not in name and not os.path.exists(item):
        return f"={name}", rest
    return _root(item), item


def _root(path: str) -> str:
    """Return the name of the folder that a path is, that its file lies in, or that its glob begins in."""
    if not is_url(path):
        absolute = Path(path).absolute()
        if not absolute.exists():
            return Path(before_magic(path)).absolute().name
        return absolute.name if absolute.is_dir() else absolute.parent.name
    is_glob = glob.has_magic(path) and not path.startswith("http")
    return (before_magic(path) if is_glob else without_query(path).rstrip("/")).rpartition("/")[2]


def _wanted_files(path: str, options: StageOptions) -> Iterator[tuple[str, str]]:
    """Yield (path, name below the input), sorted by the bytes of the name."""
    found = list(find(path, lambda name: not _matches(name, options.exclude)))
    names = {name for _, name in found}
    alone = len(found) == 1 and not os.path.isdir(path)  # named by the user: no glob hides it
    for file, name in sorted(found, key=lambda pair: os.fsencode(pair[1])):
        if not alone and (_is_side_file(name, names) or not _wanted(name, options)):
            continue
        if not is_url(file) and not _is_utf8(file):
            raise InputError(
                f"the name of {os.fsencode(file)!r} is not UTF-8. Rename it, or leave it out with --exclude."
            )
        if not is_url(file) and not os.path.exists(file):
            raise InputError(f"cannot read {file}: it is a link to nothing. Repair it, or leave it out with --exclude.")
        if not is_url(file) and not os.path.isfile(file):
            raise InputError(
                f"cannot convert {file}: a pipe, socket or device is no file. Leave it out with --exclude."
            )
        yield file, name


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_side_file(name: str, names: set[str]) -> bool:
    """Return whether a file only describes others: the JSON beside a saved Hugging Face dataset or MDS shards."""
    folder, _, last = name.rpartition("/")
    if last.endswith(".mds") and any(f"{name}.{end}" in names for end in ("zstd", "zst", "gz", "bz2")):
        return True  # unpacked beside the compressed shard
    if is_conversion_file(name, names):
        return True
    prefix = f"{folder}/" if folder else ""
    if last.startswith("cache-") and last.endswith(".arrow") and f"{prefix}state.json" in names:
        return True  # what map() and filter() of a saved Hugging Face dataset left beside it
    if last in ("state.json", "dataset_info.json"):
        return {f"{prefix}state.json", f"{prefix}dataset_info.json"} <= names
    if last == "dataset_dict.json":
        return any(other.startswith(prefix) and other.endswith("/state.json") for other in names)
    return last == "index.json" and any(other.startswith(f"{prefix}shard.") and ".mds" in other for other in names)


def _wanted(name: str, options: StageOptions) -> bool:
    return not _matches(name, options.exclude) and (not options.include or _matches(name, options.include))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a path or its last name matches; ``build/`` is ``build``, and ``**/x`` also ``x`` at the top."""
    last = PurePosixPath(name).name
    plain = [pattern.rstrip("/").removeprefix("**/") for pattern in patterns]
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in {*patterns, *plain} for text in (name, last))


def _status(file: str) -> Status:
    try:
        return status(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}.") from error


def _format(file: str, options: StageOptions) -> str:
    if options.format != "auto":
        return options.format
    name = without_query(file).lower()
    name = name.removesuffix(compression_suffix(name))
    for kind, row in FORMATS.items():
        if row.extensions and name.endswith(row.extensions):
            return kind
    return "jsonl" if name.endswith(".json") and _looks_like_jsonl(file, options.text_field) else "text"


def _looks_like_jsonl(file: str, text_field: str) -> bool:
    """Many corpora call JSON lines ``.json``: they are meant if the first line is an object with the text field, or if
    the second is an object, too. Raises: InputError: if the file is an array of such objects."""
    try:
        with naming(file), open_bytes(file) as opened:
            first = opened.readline(1 << 24)
            second = opened.read(1 << 16) if first.lstrip()[:1] == b"[" else opened.readline(1 << 24)
    except DataError:
        return False  # the reader will say what is wrong with it
    fields = _object(first)
    if fields is None and first.lstrip()[:1] == b"[" and _array_of(first + second, text_columns(text_field)):
        raise InputError(
            f"{file} is one JSON array, which is not read; write one object per line (jq -c '.[]' a.json > a.jsonl),"
            " leave it out with --exclude, or take files as texts with --format text."
        )
    return fields is not None and (bool(text_columns(text_field) & fields.keys()) or _object(second) is not None)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _array_of(start: bytes, names: frozenset[str]) -> bool:
    """Return whether these are the first lines of an array of objects with any of these fields."""
    text = start.decode("utf-8", "replace").lstrip("[ \t\r\n")
    try:
        first, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return isinstance(first, dict) and bool(names & first.keys())


def _fingerprint(piece: Piece, reads_all: bool = False) -> dict[str, Any]:
    """Return name, size, version and a hash of the first and last MiB (the first, where a server gives no other).

    With ``reads_all`` the hash is of every byte, and a version is not needed.
    """
    digest = xxhash.xxh3_128()
    try:
        with open_raw(piece.path, _HEAD_BYTES) as file:
            digest.update(file.read(_HEAD_BYTES))
            if reads_all:
                while more := file.read(_HEAD_BYTES):
                    digest.update(more)
            elif piece.size_bytes > _HEAD_BYTES and can_seek(piece.path):
                file.seek(max(piece.size_bytes - _HEAD_BYTES, _HEAD_BYTES))
                digest.update(file.read(_HEAD_BYTES))
    except OSError as error:
        raise DataError(
            f"cannot read {piece.path}: {error.strerror or error}. Make it readable, or leave it out with --exclude."
        ) from error
    name = f"{piece.root}/{piece.name}".lstrip("=")
    version = "" if reads_all else piece.version
    return {"name": name, "bytes": piece.size_bytes, "version": version, "hash": digest.hexdigest()}


def _told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number files of the same name (``a/x.jsonl`` in two places), so that an extension can tell them apart."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["name"]] += 1
        if counts[row["name"]] > 1:
            row["name"] += f" ({counts[row['name']]})"
    return rows


def _is_known(row: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> bool:
    before = known.get(row["name"])
    if before is not None and (before["bytes"], before["hash"]) != (row["bytes"], row["hash"]):
        raise InputError(
            f"{row['name']} was converted before and has changed since ({before['bytes']:,} -> {row['bytes']:,} bytes)."
            " An extension only adds: give the new text as another file, or start over with --fresh."
        )
    return before is not None


def _copies_of_known(rows: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning if some new files have the content of known ones. Raises: InputError: if all of them have."""
    names = {(row["bytes"], row["hash"]): name for name, row in known.items() if row["bytes"]}
    copies = [row for row in rows if (row["bytes"], row["hash"]) in names]
    if not copies:
        return []
    first = copies[0]
    what = (
        f"{len(copies):,} of {len(rows):,} new files have the content of files that were converted before; the first is"
        f" {first['name']}, as {names[first['bytes'], first['hash']]}"
    )
    if len(copies) == sum(row["bytes"] > 0 for row in rows):
        raise InputError(
            f"{what}. There is nothing new in them: give inputs by the folders of before, the last of which is a part"
            " of their names."
        )
    return [f"{what}. Their text is in the shards more than once."]


def inputs_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one digest over names, sizes and hashes (not times) of all input files."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(orjson.dumps([row["name"], row["bytes"], row["hash"]]))
    return f"sha256:{digest.hexdigest()}"


# --- units ---------------------------------------------------------------------------------------------------------


def _cut(piece: Piece, unit_bytes: int) -> Iterator[Piece]:
    """Cut a large file where its format allows it."""
    unit = FORMATS[piece.format].unit
    if piece.size_bytes <= unit_bytes or not can_seek(piece.path):
        yield piece
    elif unit == "bytes" and not compression_suffix(piece.path):
        for start in range(0, piece.size_bytes, unit_bytes):
            yield piece._replace(start=start, stop=min(start + unit_bytes, piece.size_bytes))
    elif unit == "groups":
        yield from _cut_groups(piece, unit_bytes)
    else:
        yield piece


def _cut_groups(piece: Piece, unit_bytes: int) -> Iterator[Piece]:
    count_groups = FORMATS[piece.format].count_groups
    count = count_groups(piece.path) if count_groups else 1
    step = max(1, count * unit_bytes // max(piece.size_bytes, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield piece._replace(start=start, stop=stop, size_bytes=piece.size_bytes * (stop - start) // count)


def _grouped(pieces: Iterator[Piece], unit_bytes: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece_bytes(piece) > unit_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece_bytes(piece)
    if group:
        yield group


# --- going on ------------------------------------------------------------------------------------------------------


def piece_keys(unit: Unit) -> list[str]:
    """Return for each piece of a unit what tells it, and its file's content, from all others."""
    facts = ([piece.root, piece.name, piece.digest, piece.start, piece.stop] for piece in unit.pieces)
    return [xxhash.xxh3_64_hexdigest(orjson.dumps(each)) for each in facts]


def around_finished(plan: Plan, finished: Mapping[int, Sequence[str]]) -> Plan | None:
    """Return the plan with units that were finished before as they were, and all else cut anew around them.

    Args:
        finished: the keys of their pieces, by number.
    Returns: None if the plan lacks a piece of them, or has it elsewhere.
    """
    firsts = {keys[0]: number for number, keys in finished.items()}
    pieces = [piece for unit in plan.units for piece in unit.pieces]
    keys = [key for unit in plan.units for key in piece_keys(unit)]
    free = (number for number in itertools.count() if number not in finished)
    units: list[Unit] = []
    loose: list[Piece] = []

    def cut_loose() -> None:
        units.extend(Unit(next(free), tuple(group)) for group in _grouped(iter(loose), plan.facts["unit_bytes"]))
        loose.clear()

    at = 0
    while at < len(pieces):
        number = firsts.pop(keys[at], None)
        if number is None:
            loose.append(pieces[at])
            at += 1
            continue
        stop = at + len(finished[number])
        if keys[at:stop] != list(finished[number]):
            return None
        cut_loose()
        units.append(Unit(number, tuple(pieces[at:stop])))
        at = stop
    cut_loose()
    return None if firsts else plan._replace(units=units)


def is_mended(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether files were only written anew, or chosen by other globs, since a plan was written down."""
    if any(before.get(key) != now.get(key) for key in {*before, *now} - {"inputs", "units", *CHOOSING}):
        return False
    if any(before[key] != now[key] for key in CHOOSING):
        return True
    return [row["name"] for row in before["inputs"]] == [row["name"] for row in now["inputs"]]


# --- comparing -----------------------------------------------------------------------------------------------------


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one short line per fact that is not the same.

    >>> difference({"seq_len": 512, "inputs": [{"name": "a", "bytes": 1}]}, {"seq_len": 1024, "inputs": []})
    ['inputs: a is gone', 'seq_len: 512 -> 1024']
    """
    lines = []
    for key in sorted({*old, *new}):
        if key == "inputs":
            lines += _input_difference(old.get(key, []), new.get(key, []))
        elif isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            lines += [f"{key} {line}" for line in difference(old[key], new[key])]
        elif old.get(key) != new.get(key):
            lines.append(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}")
    return lines


def _input_difference(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    before, after = ({row["name"]: row for row in rows} for rows in (old, new))
    lines = [f"inputs: {name} is gone" for name in before if name not in after]
    lines += [f"inputs: {name} is new" for name in after if name not in before]
    for name in before:
        if name in after and (what := _changes(before[name], after[name])):
            lines.append(f"inputs: {name} has {what}")
    if not lines and old != new:
        lines.append("inputs: the same files in another order")
    return lines


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what is another about a file, or nothing."""
    what = []
    if before["bytes"] != after["bytes"]:
        what.append(f"{after['bytes']:,} bytes instead of {before['bytes']:,}")
    if before["hash"] != after["hash"]:
        what.append("other content")
    if not what and before.get("version") != after.get("version"):
        what.append("the same size and ends, but was written anew")
    return " and ".join(what)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
