"""Tokenise one unit, once: input records -> token ids and one row per document.

    units/00012/tokens.bin      ids of all documents, each with its end-of-text id, in blocks of one domain
    units/00012/documents.bin   per document: tokens, bytes of text, hash of the text
    units/00012/quarantine.jsonl  records that were left out, with place, reason and raw bytes
    units/00012/unit.json       its parts and their blocks, and what was read, kept and left out

A unit's folder appears by one rename, so it is there whole or not at all. Nothing in it depends on the sequence
length: another packing reads the same stage. It reads a part at a time, so that no file has too many documents.
"""

from __future__ import annotations

import base64
import functools
import os
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from converters.domains import check_domain_name, domain_rule, field_value, mapped, rule_columns
from converters.files import status
from converters.locations import Location, UrlPath, local_file, location, read_range, write_file, write_whole
from converters.options import StageOptions
from converters.plan import Unit
from converters.readers import FORMATS, Bad, Piece, Row, oversized, place
from converters.texts import text_columns, text_rule
from converters.token_shards import check_same_tokenizer, holds_tokens, token_documents
from converters.token_shards import is_held_out as is_held_out_before
from converters.tokenizers import Encoder, id_dtype, load_encoder
from mixer.errors import DataError
from mixer.manifest import TokenizerInfo

__all__ = [
    "DOCUMENT",
    "GIVEN",
    "INTENDED",
    "Document",
    "Part",
    "StageTask",
    "documents_of",
    "load_table",
    "parts_of",
    "read_unit",
    "stage_unit",
    "unit_folder",
]

DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("hash", "<u8")])
_BATCH_CHARACTERS = 1 << 18
_BUFFER_BYTES = 8 << 20  # of memory: characters take one to four
_NAMED_BAD_RECORDS = 20
PART_DOCUMENTS, PART_TOKENS = 1 << 17, 1 << 24  # about: a part ends with the block that reaches them
# Behind the name of a domain: its documents that a split made before the conversion holds out.
GIVEN = "\0validation"
INTENDED = ("dropped", "empty")  # left out by rule: counted, never a failure


class Document(NamedTuple):
    """One text and the domain it belongs to."""

    text: str
    domain: str
    ids: NDArray[Any] | None = None  # where they are known already
    is_held_out: bool = False  # on the validation side of a split that was made before


class StageTask(NamedTuple):
    """What a process needs to tokenise a unit."""

    unit: Unit
    folder: str
    options: StageOptions
    tokenizer: TokenizerInfo
    tokenizer_file: str | None
    backend: str = "hf"

    @property
    def label(self) -> str:
        """What it is called in messages."""
        first, *others = [piece.path for piece in self.unit.pieces]
        return f"unit {self.unit.number} ({first}{f' and {len(others)} more' if others else ''})"

    @property
    def size(self) -> int:
        """How much work it is, compared with others: bytes of its input."""
        return self.unit.size_bytes


def unit_folder(stage: str | Location, number: int) -> Location:
    """Return where a unit's stage files lie."""
    return location(stage) / "units" / f"{number:06d}"


def read_unit(folder: Location) -> dict[str, Any] | None:
    """Return a finished unit's summary, or None."""
    try:
        return orjson.loads((folder / "unit.json").read_bytes())
    except FileNotFoundError:
        return None


# --- records -> documents ------------------------------------------------------------------------------------------


def documents_of(
    piece: Piece, options: StageOptions, used: set[str] | None = None, encoder: Encoder | None = None
) -> Iterator[Document | Bad]:
    """Read one piece: a document or a verdict for every record in it, also on what this encoder would take too much
    memory for.

    Names of the mapping of domains that records have are added to ``used``.
    """
    if piece.format == "mds" and holds_tokens(piece, options):
        yield from _from_tokens(piece, options, used, encoder)
        return
    row_format = FORMATS[piece.format]
    text_field = "text" if row_format.is_text else options.text_field
    text_of, domain_of = text_rule(text_field), domain_rule(options.domain)
    columns = text_columns(text_field) | rule_columns(options.domain)
    for row in row_format.read(piece, columns):
        if isinstance(row, Bad):
            yield row
            continue
        text, domain = text_of(row.fields), domain_of(piece, row.fields)
        if domain is None:
            yield Bad("domain", _no_domain(piece, options, row.fields), row.at, row.offset, _raw(row))
        elif (name := mapped(domain, options.domain_map, used)) is None:
            yield Bad("dropped", f"domain {domain!r} is dropped", row.at)
        elif not isinstance(text, str):
            yield Bad("no_text", _no_text(piece, row.fields, *text), row.at, row.offset, _raw(row))
        elif _is_too_long(text, piece.max_record_bytes):
            yield oversized(piece.max_record_bytes, row.at, row.offset, row.raw or text[:4096].encode())
        elif why := _is_one_piece(text, piece.max_record_bytes, encoder):
            yield Bad("oversized", why, row.at, row.offset, text[:1024].encode())
        elif not text:
            yield Bad("empty", "empty text", row.at)
        else:
            yield Document(text, name)
        del row, text  # before the next one is read: two large texts are too many
    _check_unchanged(piece)


def _from_tokens(
    piece: Piece, options: StageOptions, used: set[str] | None, encoder: Encoder | None
) -> Iterator[Document | Bad]:
    domain = domain_rule(options.domain)(piece, {})
    name = mapped(domain, options.domain_map, used) if domain is not None else None
    is_held_out = is_held_out_before(piece)
    for document in token_documents(piece, options):
        if isinstance(document, Bad):
            yield document
            continue
        ids, text, at = document
        if domain is None:
            yield Bad("domain", f"no domain by the rule {options.domain!r}", at)
        elif name is None:
            yield Bad("dropped", f"domain {domain!r} is dropped", at)
        elif _is_too_long(text, piece.max_record_bytes):
            yield oversized(piece.max_record_bytes, at, 0, b"")
        elif options.retokenize and (why := _is_one_piece(text, piece.max_record_bytes, encoder)):
            yield Bad("oversized", why, at, 0, text[:1024].encode())
        else:
            yield Document(text, name, None if options.retokenize else ids, is_held_out)
        del document, ids, text
    _check_unchanged(piece)


def _is_too_long(text: str, limit: int) -> bool:
    """Return whether a text takes more bytes than that as UTF-8."""
    return len(text) > limit or (4 * len(text) > limit and _size_and_hash(text)[0] > limit)


def _is_one_piece(text: str, limit: int, encoder: Encoder | None) -> str:
    """Return why a text is too long for a tokenizer that takes it whole; nothing if it is not."""
    most = limit // _WHOLE
    longest = encoder.longest_piece(text) if encoder is not None and len(text) > most else 0
    if longest <= most:
        return ""
    return f"{longest:,} characters that this tokenizer cannot be given in pieces, more than 1/{_WHOLE} of --max-record"


_WHOLE = 8  # libraries take about this many times what a reader does
_CHUNK = 1 << 16  # characters


def _size_and_hash(text: str) -> tuple[int, int]:
    """Return how many bytes a text takes as UTF-8, and their hash, without making all those of a long one at once."""
    size, made = 0, xxhash.xxh3_64()
    for start in range(0, len(text), _CHUNK):
        raw = text[start : start + _CHUNK].encode("utf-8")
        size += len(raw)
        made.update(raw)
    return size, made.intdigest()


def _raw(row: Row) -> bytes:
    """Return the bytes of a record; of one that has none of its own, what was read of it."""
    return row.raw or repr(dict(row.fields)).encode()


def _no_text(piece: Piece, fields: Mapping[str, Any], name: str, value: Any) -> str:
    what = _what_is_there(piece, fields, name, value)
    return f"no text field {what}: name it with --text-field" if what else f"field {name!r} {_holds(value)}, not text"


def _no_domain(piece: Piece, options: StageOptions, fields: Mapping[str, Any]) -> str:
    kind, _, argument = options.domain.partition(":")
    if kind != "field":
        return f"no domain by the rule {options.domain!r} in {piece.name!r}"
    value = field_value(fields, argument)
    what = _what_is_there(piece, fields, argument, value)
    found = f"no field {what}: name one with --domain field:NAME" if what else f"it {_holds(value)}"
    return f"no domain by the rule {options.domain!r}: {found}"


def _what_is_there(piece: Piece, fields: Mapping[str, Any], name: str, value: Any) -> str:
    """Return the name of a field and those that there are instead; nothing if it is there."""
    if value is not None or name in fields:
        return ""
    above = name.rpartition(".")[0]
    inner = field_value(fields, above) if above else None
    there = [f"{above}.{each}" for each in inner] if isinstance(inner, Mapping) else _columns(piece) or fields
    return f"{name!r}; it has {sorted(there)[:12]}"


@functools.lru_cache(maxsize=1)
def _columns(piece: Piece) -> tuple[str, ...]:
    columns = FORMATS[piece.format].columns
    return tuple(columns(piece.path)) if columns else ()


def _holds(value: Any) -> str:
    return "is null" if value is None else f"holds {'nothing' if value == '' else type(value).__name__}"


def _check_unchanged(piece: Piece) -> None:
    if status(piece.path).version != piece.version:
        raise DataError(f"{piece.path} was changed while it was being converted. Run again with --fresh.")


# --- documents -> stage files --------------------------------------------------------------------------------------


def stage_unit(task: StageTask) -> dict[str, Any]:
    """Tokenise a unit into its folder and return its summary. A finished unit is left as it is."""
    folder = unit_folder(task.folder, task.unit.number)
    if (done := read_unit(folder)) is not None:
        return done
    if isinstance(folder, UrlPath):
        return _stage_on_server(task, folder)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
    partial.mkdir(parents=True)
    summary = _tokenized(task, partial)
    write_whole(partial / "unit.json", orjson.dumps(summary))
    try:
        os.replace(partial, folder)
    except OSError:
        # A retried task may find that the first try, thought dead, was only slow; both wrote the same bytes.
        shutil.rmtree(partial, ignore_errors=True)
        if read_unit(folder) is None:
            raise
    return summary


def _stage_on_server(task: StageTask, folder: UrlPath) -> dict[str, Any]:
    """Tokenise to this machine's disk, then put the files there, last the one that says that they are whole."""
    with tempfile.TemporaryDirectory(prefix="mixer-") as scratch:
        summary = _tokenized(task, Path(scratch))
        for file in sorted(Path(scratch).iterdir()):
            write_file(folder / file.name, file)
    write_whole(folder / "unit.json", orjson.dumps(summary))
    return summary


def _tokenized(task: StageTask, folder: Path) -> dict[str, Any]:
    with _UnitWriter(folder, task) as writer:
        for piece in task.unit.pieces:
            if piece.format == "mds" and not task.options.retokenize and holds_tokens(piece, task.options):
                check_same_tokenizer(piece, task.options, task.tokenizer)
            for document in documents_of(piece, task.options, writer.used, writer.encoder):
                writer.add(piece, document)
                del document
        return writer.finish()


class _UnitWriter:
    """Collects documents by domain, tokenises them in batches and appends the blocks."""

    def __init__(self, folder: Path, task: StageTask) -> None:
        self._task = task
        file = task.tokenizer_file and local_file(task.tokenizer_file)
        made_by = task.tokenizer
        self.encoder = load_encoder(made_by.kind, file, task.backend, task.options.special_tokens, made_by.eos_id)
        self._dtype = id_dtype(task.tokenizer.vocab_size)
        self._waiting: dict[str, list[Document]] = {}
        self._characters, self._bytes = Counter[str](), Counter[str]()  # of those that wait
        self._parts: list[dict[str, Any]] = []
        self._blocks: list[tuple[str, int, int]] = []  # of the part at hand
        self._part_documents = self._part_tokens = 0
        self._domains: dict[str, dict[str, int]] = {}
        self._skipped: dict[str, Counter[str]] = {}
        self._domain_of = domain_rule(task.options.domain)
        self._named: list[dict[str, Any]] = []
        self.used: set[str] = set()  # of the mapping of domains
        self._read = 0
        self._documents_hash = xxhash.xxh3_64()
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._documents = open(folder / "documents.bin", "wb")  # noqa: SIM115
        self._quarantine = open(folder / "quarantine.jsonl", "wb")  # noqa: SIM115

    def __enter__(self) -> _UnitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._documents.close()
        self._quarantine.close()

    def add(self, piece: Piece, document: Document | Bad) -> None:
        self._read += 1
        if isinstance(document, Bad):
            self._leave_out(piece, document)
        else:
            name = document.domain + (GIVEN if document.is_held_out else "")
            if name not in self._waiting:
                check_domain_name(document.domain, known=len(self._domains))
            self._waiting.setdefault(name, []).append(document)
            self._characters[name] += len(document.text)
            self._bytes[name] += sys.getsizeof(document.text)
            if self._characters[name] >= _BATCH_CHARACTERS:
                self._flush(name)
            elif self._bytes.total() >= _BUFFER_BYTES:
                self._flush_all()

    def _leave_out(self, piece: Piece, bad: Bad) -> None:
        # The record's own fields may be unreadable, so only rules that go by the path can tell its domain.
        name = self._domain_of(piece, {}) or ""
        self._skipped.setdefault(mapped(name, self._task.options.domain_map) or "", Counter())[bad.reason] += 1
        if bad.reason in INTENDED:
            return
        if self._task.options.on_bad_record == "fail":
            raise DataError(
                f"{piece.path}, {place(piece, bad.at)}: {bad.detail}. Repair the record, or leave such records out"
                " with --on-bad-record skip."
            )
        where = f"{piece.root.removeprefix('=')}/{piece.name}, {place(piece, bad.at)}"
        record = {"place": where, "offset": bad.offset, "reason": bad.reason, "detail": bad.detail}
        if len(self._named) < _NAMED_BAD_RECORDS:
            self._named.append(record)
        raw = base64.b64encode(bad.raw).decode()
        self._quarantine.write(orjson.dumps({**record, "raw_base64": raw}, option=orjson.OPT_APPEND_NEWLINE))

    def _flush_all(self) -> None:
        for domain in list(self._waiting):
            self._flush(domain)

    def _flush(self, domain: str) -> None:
        waiting = self._waiting.pop(domain)
        del self._characters[domain], self._bytes[domain]
        documents = np.empty(len(waiting), DOCUMENT)
        for number, document in enumerate(waiting):
            documents[number] = 0, *_size_and_hash(document.text)
        is_one = len(waiting) == 1 and waiting[0].ids is None
        lengths = self._write_long(waiting[0].text) if is_one else self._write(waiting)
        documents["tokens"] = lengths + 1
        table = documents.tobytes()
        self._documents.write(table)
        self._documents_hash.update(table)
        tokens = int(lengths.sum()) + len(documents)
        self._add_block(domain, len(documents), tokens)
        sums = self._domains.setdefault(domain, {"documents": 0, "tokens": 0, "bytes": 0})
        sums["documents"] += len(documents)
        sums["tokens"] += tokens
        sums["bytes"] += int(documents["bytes"].sum())

    def _write(self, documents: Sequence[Document]) -> NDArray[np.int64]:
        """Write the ids of documents, each with an end of text; return how many there are without."""
        ids, lengths = self._encode(documents)
        eos = self._task.tokenizer.eos_id
        self._tokens.write(np.insert(ids.astype(self._dtype, copy=False), np.cumsum(lengths), eos).data)
        return lengths

    def _write_long(self, text: str) -> NDArray[np.int64]:
        """Do the same with a single text, a piece at a time."""
        length = 0
        for ids in self.encoder.encode_long(text):
            self._tokens.write(ids.astype(self._dtype, copy=False).data)
            length += len(ids)
        self._tokens.write(self._dtype.type(self._task.tokenizer.eos_id).data)
        return np.array([length])

    def _add_block(self, domain: str, documents: int, tokens: int) -> None:
        self._part_documents += documents
        self._part_tokens += tokens
        if self._blocks and self._blocks[-1][0] == domain:
            _, documents_before, tokens_before = self._blocks.pop()
            documents, tokens = documents + documents_before, tokens + tokens_before
        self._blocks.append((domain, documents, tokens))
        if self._part_documents >= PART_DOCUMENTS or self._part_tokens >= PART_TOKENS:
            self._end_part()

    def _end_part(self) -> None:
        self._parts.append({"blocks": self._blocks, "hash": self._documents_hash.hexdigest()})
        self._blocks, self._documents_hash = [], xxhash.xxh3_64()
        self._part_documents = self._part_tokens = 0

    def _encode(self, documents: Sequence[Document]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the ids of all documents one after another, and how many each has."""
        if all(document.ids is None for document in documents):
            return self.encoder.encode([document.text for document in documents])
        rows = [
            self.encoder.encode([document.text])[0] if document.ids is None else document.ids for document in documents
        ]
        largest = max(int(row.max(initial=0)) for row in rows)
        if largest >= self._task.tokenizer.vocab_size:
            files = [piece.path for piece in self._task.unit.pieces]
            raise DataError(
                f"{files[0]} (or another of {len(files)} shards read with it) holds token id {largest:,}, the tokenizer"
                f" has {self._task.tokenizer.vocab_size:,}. Is it the one that made them?"
            )
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

    def finish(self) -> dict[str, Any]:
        """Write what is waiting and return the unit's summary."""
        self._flush_all()
        if self._blocks:
            self._end_part()
        for file in (self._tokens, self._documents, self._quarantine):
            file.flush()
            os.fsync(file.fileno())
        kept = sum(sums["documents"] for sums in self._domains.values())
        skipped = sum(counts.total() for counts in self._skipped.values())
        if self._read != kept + skipped:
            raise AssertionError(f"{self._read} records read, but {kept} kept and {skipped} left out")
        return {
            "parts": self._parts,
            "domains": self._domains,
            "read": self._read,
            "skipped": {name: dict(counts) for name, counts in self._skipped.items()},
            "bad_records": self._named,
            "used": sorted(self.used),
            "size_bytes": self._task.unit.size_bytes,
        }


# --- stage files -> streams ----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a unit's stage files."""

    unit: int
    number: int


class UnitTable(NamedTuple):
    """The documents of a part of a unit: rows of ``DOCUMENT``, the domain of each (index into ``names``) and where its
    ids start in the unit's file; ``first`` is the number of the first of them in the unit."""

    names: list[str]
    documents: NDArray[Any]
    domains: NDArray[np.int32]
    starts: NDArray[np.int64]
    first: int = 0


def parts_of(stage: str | Location, units: Sequence[int]) -> Iterator[Part]:
    """Yield the parts of units, in order."""
    for unit in units:
        for number in range(len(_summary(unit_folder(stage, unit))["parts"])):
            yield Part(unit, number)


def load_table(folder: Location, number: int = 0) -> UnitTable:
    """Read which documents a part of a finished unit holds."""
    summary = _summary(folder)
    parts = summary["parts"]
    before: list[tuple[str, int, int]] = [block for part in parts[:number] for block in part["blocks"]]
    first, first_token = sum(count for _, count, _ in before), sum(tokens for _, _, tokens in before)
    blocks: list[tuple[str, int, int]] = parts[number]["blocks"]
    documents = _documents(folder, first, sum(count for _, count, _ in blocks), parts[number]["hash"])
    names = sorted(summary["domains"])
    index = {name: at for at, name in enumerate(names)}
    domains = np.repeat([index[name] for name, _, _ in blocks], [count for _, count, _ in blocks]).astype(np.int32)
    starts = np.full(len(documents) + 1, first_token, np.int64)
    starts[1:] += np.cumsum(documents["tokens"], dtype=np.int64)
    return UnitTable(names, documents, domains, starts, first)


def _summary(folder: Location) -> dict[str, Any]:
    try:
        return _read_summary(folder, status(str(folder / "unit.json")).version)
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a finished unit. Run the same command again.") from error


@functools.lru_cache(maxsize=2)
def _read_summary(folder: Location, version: str) -> dict[str, Any]:
    summary = orjson.loads((folder / "unit.json").read_bytes())
    if "parts" not in summary:
        raise DataError(f"{folder} was written by another version of this package. Run with --fresh.")
    return summary


@functools.lru_cache(maxsize=4)
def _documents(folder: Location, first: int, count: int, digest: str) -> NDArray[Any]:
    size = DOCUMENT.itemsize
    data = read_range(folder / "documents.bin", first * size, (first + count) * size) if count else b""
    if xxhash.xxh3_64_hexdigest(data) != digest:
        raise DataError(f"{folder}/documents.bin is damaged: its hash is not the one noted. Run with --fresh.")
    return np.frombuffer(data, DOCUMENT)
