"""Look at finished shards: sizes per domain, and samples as text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from converters.locations import Location, load_manifest, local_file, location
from converters.tokenizers import Encoder, load_encoder
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest, Split
from mixer.mds import column_spans, decode_value, encoded_size, parse_header

__all__ = [
    "DomainRow",
    "decoded_documents",
    "decoded_samples",
    "domain_rows",
    "manifest_digest",
    "read_index",
    "read_samples",
    "require_split",
]


class DomainRow(NamedTuple):
    """One line of the table of domains; ``share`` is of all training tokens."""

    domain: str
    documents: int
    train_samples: int
    validation_samples: int
    train_tokens: int
    share: float
    size_bytes: int
    bytes_per_token: float
    held_out: str


def domain_rows(manifest: Manifest) -> list[DomainRow]:
    """Return one row per domain, in the order of domain ids."""
    train = {name: domain.splits.get("train") for name, domain in manifest.domains.items()}
    total = sum(split.num_tokens for split in train.values() if split) or 1
    rows = []
    for name in manifest.names:
        domain, splits = manifest.domains[name], list(manifest.domains[name].splits.values())
        tokens = sum(split.num_tokens for split in splits) + sum(domain.dropped_tokens.values())
        rows.append(
            DomainRow(
                domain=name,
                documents=sum(split.num_documents for split in splits),
                train_samples=_samples(domain.splits.get("train")),
                validation_samples=_samples(domain.splits.get("validation")),
                train_tokens=_tokens(train[name]),
                share=_tokens(train[name]) / total,
                size_bytes=sum(split.size_bytes for split in splits),
                bytes_per_token=domain.text_bytes / tokens if tokens else 0.0,
                held_out=_held_out(domain.held_out),
            )
        )
    return rows


def _samples(split: Split | None) -> int:
    return split.num_samples if split else 0


def _tokens(split: Split | None) -> int:
    return split.num_tokens if split else 0


_SHORT = {"documents": "docs", "samples": "samples", "given": "given"}


def _held_out(facts: Any) -> str:
    return f"{facts['share']:.1%} {_SHORT[facts['by']]}" if facts else "none"


def require_split(manifest: Manifest, split: str) -> None:
    """Raise InputError unless a domain has the split."""
    if not any(split in domain.splits for domain in manifest.domains.values()):
        found = sorted({name for domain in manifest.domains.values() for name in domain.splits})
        raise InputError(f"no domain has a split {split!r}; there are {found}.")


def manifest_digest(manifest: Manifest) -> str:
    """Return the digest of a manifest without its ``converter.digest``, which holds it."""
    facts = {name: value for name, value in manifest.converter.items() if name != "digest"}
    whole = dataclasses.replace(manifest, converter=facts)
    return "sha256:" + hashlib.sha256(whole.to_json().encode("utf-8")).hexdigest()


def read_index(folder: str | os.PathLike[str] | Location) -> list[dict[str, Any]]:
    """Return the shard entries of one MDS directory.

    Raises: DataError: if its index is missing or damaged.
    """
    try:
        return list(json.loads((location(folder) / "index.json").read_bytes())["shards"])
    except FileNotFoundError as error:
        raise DataError(f"{folder}/index.json is missing. Restore it, or convert again.") from error
    except OSError as error:
        raise DataError(f"{folder}/index.json cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/index.json is damaged: no list of shards. Restore it, or convert again.") from error


def read_samples(folder: str | os.PathLike[str] | Location, column: str, count: int) -> list[NDArray[Any]]:
    """Return the first ``count`` token rows of one MDS directory.

    Raises: DataError: naming the shard, if it is missing or damaged.
    """
    rows: list[NDArray[Any]] = []
    for entry in read_index(folder):
        if len(rows) < count:
            rows += shard_rows(location(folder), entry, column)[: count - len(rows)]
    return rows


def shard_rows(folder: Location, entry: dict[str, Any], column: str) -> list[NDArray[Any]]:
    """Return all token rows of one shard."""
    raw = raw_shard(folder, entry)
    header = parse_header(raw, f"{folder}/{entry['raw_data']['basename']}")
    columns = dict(zip(header.config["column_names"], header.config["column_encodings"]))
    encoding = columns.get(column, "")
    if not encoding.startswith("ndarray:"):
        raise DataError(f"{folder} has columns {columns}; a column {column!r} of token ids was expected.")
    starts, sizes = column_spans(np.frombuffer(raw, np.uint8), header, columns, column)
    spans = zip(starts.tolist(), sizes.tolist())
    if encoded_size(encoding) is None:
        return [decode_value(encoding, raw[start : start + size]) for start, size in spans]
    dtype = np.dtype(encoding.split(":")[1])
    return [np.frombuffer(raw, dtype, size // dtype.itemsize, start) for start, size in spans]


def raw_shard(folder: Location, entry: dict[str, Any]) -> bytes:
    """Return a shard's bytes, decompressed."""
    path = folder / (entry["zip_data"] or entry["raw_data"])["basename"]
    try:
        data = path.read_bytes()
        if not entry["zip_data"]:
            return data
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data, max_output_size=entry["raw_data"]["bytes"])
    except Exception as error:
        raise DataError(f"shard {path} is missing or damaged ({error}). Restore it, or convert again.") from error


def shards_encoder(folder: str | os.PathLike[str], manifest: Manifest) -> Encoder:
    """Return the tokenizer that made the shards."""
    file = manifest.tokenizer.file
    return load_encoder(manifest.tokenizer.kind, None if file is None else local_file(str(location(folder) / file)))


def decoded_samples(folder: str | os.PathLike[str], *, domain: str, split: str = "train", count: int = 1) -> list[str]:
    """Return the first samples of a domain as text, end-of-text tokens spelled out."""
    manifest = load_manifest(location(folder))
    encoder = shards_encoder(folder, manifest)
    where = location(folder) / manifest.split(domain, split).path
    return [encoder.decode(row.tolist()) for row in read_samples(where, manifest.column, count)]


def decoded_documents(
    folder: str | os.PathLike[str], *, domain: str, split: str = "train", count: int = 1
) -> list[tuple[list[tuple[str, bool]], int]]:
    """Return the first samples of a domain as the documents in them, and how many tokens of each are padding.

    A document is its text and whether it ends in the sample; its end-of-text token is not part of the text.
    """
    manifest = load_manifest(location(folder))
    encoder, eos = shards_encoder(folder, manifest), manifest.tokenizer.eos_id
    where = location(folder) / manifest.split(domain, split).path
    samples = []
    for row in read_samples(where, manifest.column, count):
        pieces = np.split(row, np.flatnonzero(row == eos) + 1)
        documents = [piece for piece in pieces if len(piece) > 1 or (len(piece) == 1 and piece[0] != eos)]
        ended = [piece[-1] == eos for piece in documents]
        texts = [encoder.decode(piece[: len(piece) - end].tolist()) for piece, end in zip(documents, ended)]
        samples.append((list(zip(texts, map(bool, ended))), len(row) - sum(map(len, documents))))
    return samples
