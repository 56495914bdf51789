"""What a conversion is asked to do, checked where it enters.

The options fall into those that decide what the stage files hold and those that decide how they are packed, because
another packing does not need another tokenisation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.domains import domain_rule
from converters.readers import FORMATS, MAX_RECORD_BYTES
from converters.texts import text_rule
from converters.tokenizers import SPECIAL_TOKENS
from mixer.errors import InputError
from mixer.manifest import TokenizerInfo

__all__ = ["DEFAULT_EXCLUDE", "ON_BAD_RECORD", "PackOptions", "StageOptions", "size_in_bytes"]

DEFAULT_EXCLUDE = (".*", "__pycache__")
ON_BAD_RECORD = ("fail", "skip", "quarantine")
FINGERPRINTS = ("ends", "full")
PACKINGS = ("concat", "best_fit", "none")
TAILS = ("drop", "pad")


def size_in_bytes(size: str | int, what: str = "size") -> int:
    """Return a size given as a number or as text.

    >>> size_in_bytes("64MiB"), size_in_bytes("1kb"), size_in_bytes(512)
    (67108864, 1000, 512)
    """
    if isinstance(size, int):
        value = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
        if not match:
            raise InputError(f"{what} {size!r} is not a size; write for example 67108864, '64MiB' or '64MB'.")
        base = 1024 if match[3] else 1000
        exponent = " kmgt".index(match[2].lower()) if match[2] else 0
        value = int(float(match[1]) * base**exponent)
    if value <= 0:
        raise InputError(f"{what} must be positive, got {size!r}.")
    return value


@dataclass(frozen=True)
class StageOptions:
    """What decides the contents of the stage: how records are found, read, routed and tokenised."""

    format: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    domain: str = "folder"
    domain_map: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    text_field: str = "text"
    on_bad_record: str = "fail"
    max_bad: float = 0.01
    max_record_bytes: int = MAX_RECORD_BYTES
    unit_bytes: int | None = None
    train_tokenizer: int | None = None
    seed: int = 0
    special_tokens: str = "text"
    tokens_from: TokenizerInfo | None = None
    retokenize: bool = False
    fingerprint: str = "ends"

    def __post_init__(self) -> None:
        domain_rule(self.domain)
        text_rule(self.text_field)
        _one_of("format", self.format, ("auto", *FORMATS))
        _one_of("special_tokens", self.special_tokens, SPECIAL_TOKENS)
        _one_of("fingerprint", self.fingerprint, FINGERPRINTS)
        _one_of("on_bad_record", self.on_bad_record, ON_BAD_RECORD)
        if not 0 <= self.max_bad <= 1:
            raise InputError(f"max_bad is a share of the documents, 0 to 1; got {self.max_bad}.")
        if self.train_tokenizer is not None and self.train_tokenizer < 257:
            raise InputError(
                f"train_tokenizer must be at least 257 ids (256 bytes and end of text), got {self.train_tokenizer}."
            )

    def facts(self) -> dict[str, Any]:
        """Return what must not change between runs. What to do with bad records may: a run that failed can go on."""
        facts = _plain(self, without=("on_bad_record", "max_bad"))
        if self.tokens_from is not None:
            facts["tokens_from"] = self.tokens_from.fingerprint  # not where it lies
        return facts


@dataclass(frozen=True)
class PackOptions:
    """What decides the shards once the stage is there."""

    seq_len: int
    held_out: float = 0.01
    min_held_out: int = 8
    shard_bytes: int = 64 << 20
    compression: str | None = "zstd:3"
    hashes: tuple[str, ...] = ("xxh64",)
    allow_empty: bool = False
    packing: str = "concat"
    tail: str = "drop"
    doc_starts: bool = False
    sample_ids: bool = False
    shuffle_seed: int | None = None
    dedupe: bool = False

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise InputError(f"seq_len must be at least 1 token, got {self.seq_len}.")
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out is a share of each domain, 0 to below 1; got {self.held_out}.")
        if self.min_held_out < 1:
            raise InputError(f"min_held_out must be at least 1, got {self.min_held_out}.")
        if self.shard_bytes >= 1 << 32:
            raise InputError(f"shard_size must be below 4 GiB, got {self.shard_bytes:,}: MDS counts bytes in 32 bits.")
        _one_of("packing", self.packing, PACKINGS)
        _one_of("tail", self.tail, TAILS)
        from mixer.mds import compress, hash_hex

        if self.compression is not None:
            compress(self.compression, b"")
        for name in self.hashes:
            hash_hex(name, b"")

    def facts(self) -> dict[str, Any]:
        """Return what must not change between runs."""
        return _plain(self)

    def shard_facts(self) -> dict[str, Any]:
        """Return what ``mixer.mds`` records in every shard."""
        return {"compression": self.compression, "hashes": self.hashes, "size_limit": self.shard_bytes}


def _plain(options: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    facts = {key: value for key, value in dataclasses.asdict(options).items() if key not in without}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{what} {value!r} is not one of {list(allowed)}.")
