"""Tokenise one unit, once: input records -> token ids and one row per document.

    units/00012/tokens.bin      ids of all documents, each with its end-of-text id, in blocks of one domain
    units/00012/documents.bin   per document: tokens, bytes of text, hash of the text
    units/00012/unit.json       the blocks, and what was read, kept and left out

A unit's folder appears by one rename, so it is there whole or not at all. Nothing in it depends on the sequence
length: another packing reads the same stage.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from converters.domains import check_domain_name, domain_rule, field_value, rule_columns
from converters.options import StageOptions
from converters.plan import Unit
from converters.readers import FORMATS, MAX_RECORD_BYTES, Bad, Piece, Row, oversized, place
from converters.tokenizers import id_dtype, load_encoder
from mixer.errors import DataError
from mixer.manifest import TokenizerInfo

__all__ = ["DOCUMENT", "Document", "StageTask", "documents_of", "read_unit", "stage_unit", "unit_folder"]

DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("hash", "<u8")])
_BATCH_CHARACTERS = 1 << 20
_BUFFER_CHARACTERS = 8 << 20
_NAMED_BAD_RECORDS = 20


class Document(NamedTuple):
    """One text and the domain it belongs to."""

    text: str
    domain: str


class StageTask(NamedTuple):
    """What a process needs to tokenise a unit."""

    unit: Unit
    folder: str
    options: StageOptions
    tokenizer: TokenizerInfo
    tokenizer_file: str | None


def unit_folder(stage: str | os.PathLike[str], number: int) -> Path:
    """Return where a unit's stage files lie."""
    return Path(stage) / "units" / f"{number:06d}"


def read_unit(folder: Path) -> dict[str, Any] | None:
    """Return a finished unit's summary, or None."""
    try:
        return orjson.loads((folder / "unit.json").read_bytes())
    except FileNotFoundError:
        return None


# --- records -> documents ------------------------------------------------------------------------------------------


def documents_of(piece: Piece, options: StageOptions) -> Iterator[Document | Bad]:
    """Read one piece: a document or a verdict for every record in it."""
    rule = domain_rule(options.domain)
    text_field = "text" if piece.format == "text" else options.text_field
    columns = frozenset([text_field, text_field.split(".")[0]]) | rule_columns(options.domain)
    for row in FORMATS[piece.format].read(piece, columns):
        if isinstance(row, Bad):
            yield row
            continue
        text, domain = field_value(row.fields, text_field), rule(piece, row.fields)
        if not isinstance(text, str):
            yield _no_text(row, text_field, text)
        elif domain is None:
            yield Bad("domain", f"no domain by the rule {options.domain!r}", row.at, row.offset, row.raw)
        elif len(text) > MAX_RECORD_BYTES:
            yield oversized(row.at, row.offset, row.raw)
        else:
            yield Document(text, domain)
    _check_unchanged(piece)


def _no_text(row: Row, text_field: str, value: Any) -> Bad:
    if value is None:
        what = f"no text field {text_field!r}; it has {sorted(row.fields)[:12]}"
    else:
        what = f"field {text_field!r} holds {type(value).__name__}, not text"
    return Bad("no_text", what, row.at, row.offset, row.raw)


def _check_unchanged(piece: Piece) -> None:
    if os.stat(piece.path).st_mtime_ns != piece.modified_ns:
        raise DataError(f"{piece.path} was changed while it was being converted. Run again with --fresh.")


# --- documents -> stage files --------------------------------------------------------------------------------------


def stage_unit(task: StageTask) -> dict[str, Any]:
    """Tokenise a unit into its folder and return its summary. A finished unit is left as it is."""
    folder = unit_folder(task.folder, task.unit.number)
    if (done := read_unit(folder)) is not None:
        return done
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _UnitWriter(partial, task) as writer:
        for piece in task.unit.pieces:
            for document in documents_of(piece, task.options):
                writer.add(piece, document)
        summary = writer.finish()
    (partial / "unit.json").write_bytes(orjson.dumps(summary))
    os.replace(partial, folder)
    return summary


class _UnitWriter:
    """Collects documents by domain, tokenises them in batches and appends the blocks."""

    def __init__(self, folder: Path, task: StageTask) -> None:
        self._task = task
        self._encoder = load_encoder(task.tokenizer.kind, task.tokenizer_file)
        self._dtype = id_dtype(task.tokenizer.vocab_size)
        self._waiting: dict[str, list[str]] = {}
        self._characters: Counter[str] = Counter()
        self._blocks: list[tuple[str, int, int]] = []
        self._domains: dict[str, dict[str, int]] = {}
        self._skipped: dict[str, Counter[str]] = {}
        self._named: list[dict[str, Any]] = []
        self._read = 0
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._documents = open(folder / "documents.bin", "wb")  # noqa: SIM115

    def __enter__(self) -> _UnitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._documents.close()

    def add(self, piece: Piece, document: Document | Bad) -> None:
        self._read += 1
        if isinstance(document, Bad):
            self._leave_out(piece, document)
        elif not document.text:
            self._skipped.setdefault(document.domain, Counter())["empty"] += 1
        else:
            if document.domain not in self._waiting:
                check_domain_name(document.domain, known=len(self._domains))
            self._waiting.setdefault(document.domain, []).append(document.text)
            self._characters[document.domain] += len(document.text)
            if self._characters[document.domain] >= _BATCH_CHARACTERS:
                self._flush(document.domain)
            elif self._characters.total() >= _BUFFER_CHARACTERS:
                self._flush_all()

    def _leave_out(self, piece: Piece, bad: Bad) -> None:
        if self._task.options.on_bad_record == "fail":
            raise DataError(
                f"{piece.path}, {place(piece, bad.at)}: {bad.detail}. Repair the record, or leave such records out"
                " with --on-bad-record skip."
            )
        self._skipped.setdefault("", Counter())[bad.reason] += 1
        if len(self._named) < _NAMED_BAD_RECORDS:
            where = f"{piece.root.removeprefix('=')}/{piece.name}, {place(piece, bad.at)}"
            self._named.append({"reason": bad.reason, "detail": bad.detail, "place": where})

    def _flush_all(self) -> None:
        for domain in list(self._waiting):
            self._flush(domain)

    def _flush(self, domain: str) -> None:
        texts = self._waiting.pop(domain)
        del self._characters[domain]
        ids = self._encoder.encode(texts)
        documents = np.empty(len(texts), DOCUMENT)
        documents["tokens"] = [len(row) + 1 for row in ids]
        raw = [text.encode("utf-8") for text in texts]
        documents["bytes"] = [len(text) for text in raw]
        documents["hash"] = [xxhash.xxh3_64_intdigest(text) for text in raw]
        tokens = self._joined(ids, int(documents["tokens"].sum()))
        self._tokens.write(tokens.data)
        self._documents.write(documents.tobytes())
        self._blocks.append((domain, len(texts), len(tokens)))
        sums = self._domains.setdefault(domain, {"documents": 0, "tokens": 0, "bytes": 0})
        sums["documents"] += len(texts)
        sums["tokens"] += len(tokens)
        sums["bytes"] += int(documents["bytes"].sum())

    def _joined(self, ids: list[Any], num_tokens: int) -> NDArray[Any]:
        tokens = np.empty(num_tokens, self._dtype)
        at = 0
        for row in ids:
            tokens[at : at + len(row)] = row
            tokens[at + len(row)] = self._task.tokenizer.eos_id
            at += len(row) + 1
        return tokens

    def finish(self) -> dict[str, Any]:
        """Write what is waiting and return the unit's summary."""
        self._flush_all()
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())
        kept = sum(sums["documents"] for sums in self._domains.values())
        skipped = sum(counts.total() for counts in self._skipped.values())
        if self._read != kept + skipped:
            raise AssertionError(f"{self._read} records read, but {kept} kept and {skipped} left out")
        return {
            "blocks": self._blocks,
            "domains": self._domains,
            "read": self._read,
            "skipped": {domain: dict(sorted(counts.items())) for domain, counts in sorted(self._skipped.items())},
            "bad_records": self._named,
            "size_bytes": self._task.unit.size_bytes,
        }


# --- stage files -> streams ----------------------------------------------------------------------------------------


class UnitTable(NamedTuple):
    """A unit's documents: rows of ``DOCUMENT``, the domain of each (index into ``names``) and where its ids start."""

    names: list[str]
    documents: NDArray[Any]
    domains: NDArray[np.int32]
    starts: NDArray[np.int64]


def load_table(folder: Path) -> UnitTable:
    """Read which documents a finished unit holds."""
    summary = read_unit(folder)
    if summary is None:
        raise DataError(f"{folder} is not a finished unit. Run the same command again.")
    documents = np.fromfile(folder / "documents.bin", DOCUMENT)
    names = sorted(summary["domains"])
    index = {name: number for number, name in enumerate(names)}
    blocks: list[tuple[str, int, int]] = summary["blocks"]
    domains = np.repeat([index[name] for name, _, _ in blocks], [count for _, count, _ in blocks]).astype(np.int32)
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents["tokens"], out=starts[1:])
    if len(documents) != len(domains):
        raise DataError(f"{folder} holds {len(documents)} documents, expected {len(domains)}. Run with --fresh.")
    return UnitTable(names, documents, domains, starts)


def summed(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return counts by reason over all domains."""
    total: Counter[str] = Counter()
    for reasons in counts.values():
        total.update(reasons)
    return dict(sorted(total.items()))
