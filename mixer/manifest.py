"""What lies in a folder of shards: domains, splits, sizes, tokenizer and fingerprints.

    shards/manifest.json                     this file's dataclasses, as JSON
    shards/tokenizer/tokenizer.json          the tokenizer that made the ids
    shards/<domain>/<split>/index.json       a plain MDS directory, readable by mosaicml-streaming

The manifest is the contract between the converters, which write it last, and the mixer, which reads it first. A folder
without one is not a finished conversion. Names of domains may hold any character; folders are percent-encoded.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mixer.errors import InputError

__all__ = ["Domain", "Manifest", "Split", "TokenizerInfo", "domain_folder"]

SCHEMA = 1
FILE_NAME = "manifest.json"


def domain_folder(name: str) -> str:
    """Return the folder name for a domain: letters, digits and ``-_.`` stay, everything else is percent-encoded.

    >>> domain_folder("USPTO Backgrounds"), domain_folder("web")
    ('USPTO%20Backgrounds', 'web')
    """
    if not name or name in (".", ".."):
        raise InputError(f"a domain cannot be called {name!r}; give it a name of letters, digits, '-', '_' or '.'.")
    return quote(name, safe="")


@dataclass(frozen=True)
class Split:
    """One MDS directory: all samples of one domain that serve one purpose (``train`` or ``validation``).

    ``fingerprint`` is ``sha256:`` + the digest of its ``index.json``, which holds the hash of every shard.
    """

    path: str
    num_samples: int
    num_tokens: int
    num_documents: int
    num_shards: int
    size_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Domain:
    """The splits of one domain, and what became of its documents.

    ``held_out`` says how the validation split was cut: ``{"by": "documents" | "samples" | "given", "share": 0.01}``,
    ``given`` by the input that was split already.
    ``skipped`` counts documents that were left out, by reason; ``dropped_tokens`` is the tail that filled no sample.
    In every split, ``tokens_in`` = ``num_tokens`` - ``padding_tokens`` + ``dropped_tokens``.
    """

    splits: Mapping[str, Split]
    text_bytes: int = 0
    held_out: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    dropped_tokens: Mapping[str, int] = field(default_factory=dict)
    tokens_in: Mapping[str, int] = field(default_factory=dict)
    padding_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids. ``fingerprint`` is ``sha256:`` + the digest of its file (or of its definition)."""

    kind: str
    fingerprint: str
    vocab_size: int
    eos_id: int
    file: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``. ``domains`` is sorted by name; that order is the order of domain ids.

    With ``variable_length`` a sample is one document of 1 to ``seq_len`` tokens (a longer one is several samples), and
    the token column has the encoding ``ndarray:<dtype>`` without a shape; ``Split.num_tokens`` counts real tokens.
    """

    domains: Mapping[str, Domain]
    seq_len: int
    dtype: str
    tokenizer: TokenizerInfo
    column: str = "tokens"
    converter: Mapping[str, Any] = field(default_factory=dict)
    variable_length: bool = False
    schema: int = SCHEMA

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.domains))

    def split(self, domain: str, split: str) -> Split:
        """Return one split, or say which domain lacks it."""
        try:
            return self.domains[domain].splits[split]
        except KeyError:
            have = sorted(self.domains[domain].splits) if domain in self.domains else None
            what = f"has only {have}" if have is not None else f"is not among {list(self.names)}"
            raise InputError(
                f"domain {domain!r} has no split {split!r}: it {what}. Convert it with a held-out share."
            ) from None

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, two spaces, one newline at the end."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``manifest.json`` atomically into ``folder`` and return its path."""
        path = Path(folder) / FILE_NAME
        partial = path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read ``folder/manifest.json``.

        Raises: InputError: if the folder or the file is missing, is not JSON, or has another schema.
        """
        path = Path(folder) / FILE_NAME
        if not Path(folder).is_dir():
            raise InputError(f"no folder of shards at {folder}: give the folder that `mixer convert --out` wrote.")
        if not path.is_file():
            raise InputError(
                f"{folder} has no {FILE_NAME}: the conversion did not finish, or this is another folder. "
                "Run `mixer convert` again with the same options; it continues."
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged ({error}). Run `mixer convert` again, or restore the file.") from error
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = FILE_NAME) -> Manifest:
        """Build a manifest from parsed JSON; ``where`` names the source in errors."""
        if not isinstance(raw, Mapping):
            raise InputError(
                f"{where} holds a JSON {type(raw).__name__}, not the object that a manifest is. Run `mixer convert`"
                " again, or restore the file."
            )
        if raw.get("schema") != SCHEMA:
            raise InputError(
                f"{where} has schema {raw.get('schema')!r}, this version of domain-mixer reads {SCHEMA}. "
                "Install the matching version or convert again."
            )
        try:
            domains = {
                name: Domain(**{**domain, "splits": {key: Split(**split) for key, split in domain["splits"].items()}})
                for name, domain in sorted(raw["domains"].items())
            }
            return cls(**{**raw, "domains": domains, "tokenizer": TokenizerInfo(**raw["tokenizer"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{where} is not a manifest of schema {SCHEMA}: {error!r}. Convert again, or restore the file."
            ) from error
