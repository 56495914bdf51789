"""MDS shards of token ids as input: the documents that were packed into them, to be packed or tokenised again.

    mixer convert shards --out longer --tokenizer shards/tokenizer --seq-len 8192
    mixer convert shards --out other --tokenizer other.json --seq-len 2048 --retokenize
    mixer convert web=mds/ --out shards --tokenizer gpt.json --tokens-from gpt.json --seq-len 2048   # written by others

The end-of-text id divides the ids into documents. A document belongs to the shard in which it begins and is read on
into those after it; where samples were filled best-fit, it never leaves its sample. Its text is decoded: the hash by
which documents are held out or found equal is that of the text, as in any other conversion. A document stays on its
side of a split: what lies in a folder ``validation`` (``val``, ``test``) is held out again.

Which tokenizer made the ids is what the manifest of the shards says, or the caller.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Set
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.files import damaged, naming, open_bytes, status
from converters.mds_files import ShardFile
from converters.options import StageOptions
from converters.readers import Bad, Piece, oversized
from converters.texts import text_columns
from converters.tokenizers import Encoder, decode_long, load_encoder
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest, TokenizerInfo
from mixer.mds import Header, column_spans, decode_value

__all__ = [
    "TokenDocument",
    "check_same_tokenizer",
    "holds_tokens",
    "in_its_domain",
    "is_conversion_file",
    "is_held_out",
    "token_documents",
]

MAX_DOCUMENT_TOKENS = 16 << 20
_HELD_OUT = ("validation", "valid", "val", "test", "val_small", "val_xsmall")


class Source(NamedTuple):
    """How to read the shards of one folder.

    Args:
        column: of token ids.
        dtype: of the ids where the encoding does not say (raw bytes).
        joined: samples follow one another as they were cut; else each stands for itself.
        tokenizer: the one that made the ids, with a file to decode them by.
        shards: basenames in order, as they are stored.
    """

    column: str
    dtype: str
    joined: bool
    tokenizer: TokenizerInfo
    shards: tuple[str, ...]

    @property
    def encoder(self) -> Encoder:
        return load_encoder(self.tokenizer.kind, self.tokenizer.file)


class TokenDocument(NamedTuple):
    """A document's ids without the end of text, its text, and the sample (from 1) of its shard in which it begins."""

    ids: NDArray[Any]
    text: str
    at: int


def token_documents(piece: Piece, options: StageOptions) -> Iterator[TokenDocument | Bad]:
    """Yield the documents that begin in a shard; a verdict for those that are too long.

    Raises: InputError: if the tokenizer is not known; DataError: naming the shard, if it is damaged or no end of text
        comes for too long.
    """
    source = _source(*_folder(piece), options.tokens_from)
    encoder = source.encoder
    for ids, at in _joined(piece, source) if source.joined else _by_sample(piece, source):
        if ids is None:
            yield oversized(piece.max_record_bytes, at, 0, b"")
        elif len(ids):
            yield TokenDocument(ids, decode_long(encoder, ids), at)


def check_same_tokenizer(piece: Piece, options: StageOptions, target: TokenizerInfo) -> None:
    """Raise InputError unless ids in the shard can be taken as they are."""
    made_by = _source(*_folder(piece), options.tokens_from).tokenizer
    if (made_by.fingerprint, made_by.eos_id) != (target.fingerprint, target.eos_id):
        raise InputError(
            f"the ids in {piece.path} were made by the tokenizer {made_by.fingerprint[:20]}… (end of text"
            f" {made_by.eos_id}), not by {target.fingerprint[:20]}… ({target.eos_id}). Give that one to keep the ids,"
            " or --retokenize to decode them and encode the text anew."
        )


# --- which shards these are ----------------------------------------------------------------------------------------


def holds_tokens(piece: Piece, options: StageOptions) -> bool:
    """Return whether an MDS shard has token ids and not the text that is asked for."""
    columns = _columns(piece)
    return not text_columns(options.text_field) & columns.keys() and any(map(_may_be_tokens, columns.values()))


def is_held_out(piece: Piece) -> bool:
    """Return whether a shard lies in the folder of a validation split."""
    return _folder(piece)[0].rpartition("/")[2] in _HELD_OUT


def in_its_domain(piece: Piece, options: StageOptions) -> Piece:
    """Return the piece as an input of its domain, where a manifest says of which it is."""
    if piece.format != "mds" or options.domain != "folder" or piece.root.startswith("="):
        return piece
    folder = _folder(piece)[0]
    if _manifest(folder) is None:
        return piece
    return piece._replace(root="=" + unquote(folder.split("/")[-2]))


def is_conversion_file(name: str, names: Set[str]) -> bool:
    """Return whether a file among ``names`` was written by a conversion there, but is none of its shards."""
    match = _BESIDE_SHARDS.fullmatch(name)
    if match is None or f"{match['root']}manifest.json" not in names:
        return False
    return any(other.startswith(match["root"]) and other.endswith("/index.json") for other in names)


_BESIDE_SHARDS = re.compile(
    r"(?P<root>(.*/)?)(manifest\.json|inputs\.[0-9a-f]+\.jsonl|quarantine(\.\d+)?\.jsonl|tokenizer/[^/]+)"
)


def _folder(piece: Piece) -> tuple[str, str]:
    folder, _, name = piece.path.rpartition("/")
    return folder or ".", name


@functools.lru_cache(maxsize=256)
def _columns(piece: Piece) -> dict[str, str]:
    """Read the header alone."""
    with naming(piece.path), open_bytes(piece.path) as file:
        head = file.read(4)
        table = file.read(4 * (int.from_bytes(head, "little") + 1)) if len(head) == 4 else b""
        if len(table) < 8:
            return {}  # the reader will say what is wrong with it
        size = int.from_bytes(table[:4], "little") - 4 - len(table)
        config = file.read(size) if 0 < size < 1 << 20 else b""
    try:
        facts = orjson.loads(config)
        return dict(zip(facts["column_names"], facts["column_encodings"]))
    except (ValueError, KeyError, TypeError):
        return {}


def _may_be_tokens(encoding: str) -> bool:
    return encoding == "bytes" or (encoding.startswith("ndarray") and "float" not in encoding)


def _source(folder: str, shard: str, tokens_from: TokenizerInfo | None) -> Source:
    manifest, shards = _manifest(folder), _shards(folder, shard)
    if manifest is None or manifest.tokenizer.kind == "unknown":
        if tokens_from is None:
            raise InputError(
                f"{folder} holds token ids, and no manifest says which tokenizer made them: name it by --tokens-from."
            )
        return Source("tokens", "int64", True, tokens_from, shards)
    joined = manifest.converter.get("request", {}).get("packing") != "best_fit"
    made_by = tokens_from or _with_file(folder, manifest.tokenizer)
    if made_by.fingerprint != manifest.tokenizer.fingerprint:
        raise InputError(
            f"the manifest of {folder} says that its ids were made by the tokenizer"
            f" {manifest.tokenizer.fingerprint[:20]}…, --tokens-from is {made_by.fingerprint[:20]}…. Leave it out."
        )
    return Source(manifest.column, manifest.dtype, joined, made_by, shards)


def _manifest(folder: str) -> Manifest | None:
    """Return the manifest of the conversion that a folder ``<domain>/<split>`` belongs to."""
    manifest = _load_manifest(f"{_root(folder)}/manifest.json", _version(f"{_root(folder)}/manifest.json"))
    if manifest is None:
        return None
    paths = {split.path for domain in manifest.domains.values() for split in domain.splits.values()}
    return manifest if "/".join(folder.split("/")[-2:]) in paths else None


@functools.lru_cache(maxsize=8)
def _load_manifest(path: str, version: str) -> Manifest | None:
    try:
        with open_bytes(path) as file:
            return Manifest.from_dict(orjson.loads(file.read()), path)
    except (OSError, ValueError, InputError, DataError):
        return None


def _version(path: str) -> str:
    """Return what changes when a file does, so that what was read of it before is not used again."""
    try:
        return status(path).version
    except (OSError, InputError, DataError):
        return ""


def _root(folder: str) -> str:
    return "/".join(folder.split("/")[:-2]) or "."


def _with_file(folder: str, tokenizer: TokenizerInfo) -> TokenizerInfo:
    if tokenizer.file is None:
        return tokenizer
    file = f"{_root(folder)}/{tokenizer.file}"
    if "://" in file:
        raise InputError(f"the tokenizer of {folder} lies behind a URL; name a copy of it on disk by --tokens-from.")
    return dataclasses.replace(tokenizer, file=file)


def _shards(folder: str, shard: str) -> tuple[str, ...]:
    """Return the names of all shards of a folder in order, as they are stored; without an index only this one."""
    path = f"{folder}/index.json"
    both = _names(path, _version(path))
    if both is None:
        return (shard,)
    names = both[0] if shard in both[0] else both[1]
    if shard not in names:
        raise DataError(f"{folder}/{shard} is not in the index of its folder. Restore that, or leave the file out.")
    return names


@functools.lru_cache(maxsize=8)
def _names(path: str, version: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the names of all shards, raw and compressed ("" where there is none)."""
    try:
        with open_bytes(path) as file:
            entries = orjson.loads(file.read())["shards"]
        raw = tuple(str(entry["raw_data"]["basename"]) for entry in entries)
        return raw, tuple(str(entry["zip_data"]["basename"]) if entry.get("zip_data") else "" for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, InputError, DataError):
        return None


# --- documents -----------------------------------------------------------------------------------------------------


def _groups(path: str, source: Source, limit: int) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Yield the ids of consecutive samples of a shard one after another, and how many each sample has."""
    last = None
    with naming(path), ShardFile(path) as shard:
        try:
            name = source.column if source.column in shard.columns else _only_tokens(path, shard.columns)
            for data, header in shard.groups(_GROUP_BYTES, 2 * limit):
                ids, lengths = _unpacked(path, data, header, shard.columns, name, source.dtype)
                last = int(ids[-1]) if len(ids) else last
                yield ids, lengths
        except (DataError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
            raise error if path in str(error) else damaged(path, error) from error
    _last_id(path, _version(path)).append(last)


_GROUP_BYTES = 1 << 20


def _unpacked(
    path: str, data: NDArray[np.uint8], header: Header, columns: dict[str, str], name: str, dtype: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    starts, sizes = column_spans(data, header, columns, name)
    rows = []
    for start, size in zip(starts.tolist(), sizes.tolist()):
        value = data[start : start + size].tobytes()
        row = np.frombuffer(value, dtype) if columns[name] == "bytes" else decode_value(columns[name], value)
        if row.dtype.kind not in "iu" or (row.size and int(row.min()) < 0):
            raise DataError(f"{path}: its column {name!r} does not hold token ids, but {row.dtype} like {row[:4]}.")
        rows.append(row.ravel())
    return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)


def _only_tokens(path: str, columns: dict[str, str]) -> str:
    found = [name for name, encoding in columns.items() if _may_be_tokens(encoding)]
    named = [name for name in ("tokens", "input_ids") if name in found] or found
    if len(named) != 1:
        raise InputError(f"{path} has columns {columns}; one column 'tokens' of ids was expected.")
    return named[0]


class _Collected:
    """The ids of a document so far; of one that is too long only how many there are."""

    def __init__(self, limit: int, at: int = 1) -> None:
        self._limit = limit
        self._parts: list[NDArray[Any]] = []
        self.size, self.at = 0, at

    def add(self, ids: NDArray[Any]) -> None:
        self.size += len(ids)
        if self.size > self._limit:
            self._parts = []
        elif len(ids):
            self._parts.append(ids.copy())  # not the whole group with it

    def ids(self) -> NDArray[Any] | None:
        """Return the ids, None if there are too many."""
        if self.size > self._limit:
            return None
        return np.concatenate(self._parts) if self._parts else np.empty(0, np.uint16)


def _by_sample(piece: Piece, source: Source) -> Iterator[tuple[NDArray[Any] | None, int]]:
    groups = _groups(piece.path, source, piece.max_record_bytes)
    rows = (row for ids, lengths in groups for row in np.split(ids, np.cumsum(lengths)[:-1]))
    for at, row in enumerate(rows, start=1):
        for document in np.split(row, np.flatnonzero(row == source.tokenizer.eos_id) + 1):
            rest = document[document != source.tokenizer.eos_id]
            yield (rest if len(rest) <= _most_tokens(piece) else None), at


def _most_tokens(piece: Piece) -> int:
    """Return how many tokens a text of ``max_record_bytes`` can have: one each, and a space put before it."""
    return piece.max_record_bytes + 16


def _joined(piece: Piece, source: Source) -> Iterator[tuple[NDArray[Any] | None, int]]:
    eos, (folder, name) = source.tokenizer.eos_id, _folder(piece)
    number = source.shards.index(name)
    # What comes before the first end of text may belong to a document that began before.
    is_ours = not number or _ends_with(f"{folder}/{source.shards[number - 1]}", source, piece.max_record_bytes)
    document, before = _Collected(_most_tokens(piece)), 0
    for ids, lengths in _groups(piece.path, source, piece.max_record_bytes):
        firsts, start = np.cumsum(lengths), 0
        for end in np.flatnonzero(ids == eos).tolist():
            document.add(ids[start:end])
            if is_ours:
                yield document.ids(), document.at
            start, is_ours = end + 1, True
            document = _Collected(_most_tokens(piece), before + int(firsts.searchsorted(start, "right")) + 1)
        if not document.size:
            document.at = before + int(firsts.searchsorted(start, "right")) + 1
        document.add(ids[start:])
        before += len(lengths)
    if is_ours and document.size:
        _continue(document, folder, source, number + 1, piece.max_record_bytes)
        yield document.ids(), document.at


def _ends_with(path: str, source: Source, limit: int) -> bool:
    """Return whether a shard ends with an end of text; it is read if it was not just before."""
    known = _last_id(path, _version(path))
    if not known:
        for _ in _groups(path, source, limit):
            pass
    return known[-1] == source.tokenizer.eos_id


@functools.lru_cache(maxsize=8)
def _last_id(path: str, version: str) -> list[int | None]:
    """Return a list that holds the last id of a shard once that is known."""
    return []


def _continue(document: _Collected, folder: str, source: Source, number: int, limit: int) -> None:
    """Add to a document those of its ids that lie in the shards from ``number`` on."""
    for name in source.shards[number:]:
        if document.size > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{folder}: no end of text (id {source.tokenizer.eos_id}) in {MAX_DOCUMENT_TOKENS:,} tokens before"
                f" {name}. Was it another tokenizer that made the ids (--tokens-from, --eos)?"
            )
        for ids, _ in _groups(f"{folder}/{name}", source, limit):
            ends = np.flatnonzero(ids == source.tokenizer.eos_id)
            document.add(ids[: ends[0]] if len(ends) else ids)
            if len(ends):
                return
