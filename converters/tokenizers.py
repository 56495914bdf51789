"""Where token ids come from: one class per kind of tokenizer, one row in ``KINDS``.

    hf      a Hugging Face ``tokenizer.json``, through the ``tokenizers`` library
    bytes   the bytes of UTF-8 themselves, 0 to 255, and 256 as end of text

An encoder is made once per process from a ``TokenizerInfo`` and the file. A special token that is spelled out in a text
is text: only the converter writes the end-of-text id.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixer.errors import InputError
from mixer.manifest import TokenizerInfo

__all__ = ["KINDS", "Encoder", "describe", "id_dtype", "load_encoder"]

# Names that end-of-text tokens go by, most usual first.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")


class Encoder(Protocol):
    """What a tokenizer does for the converter and for ``inspect``."""

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the ids of each text, without any special token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, special tokens spelled out."""


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id.

    >>> id_dtype(65_536).name, id_dtype(65_537).name
    ('uint16', 'uint32')
    """
    return np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")


class HuggingFaceEncoder:
    """A ``tokenizer.json``."""

    def __init__(self, file: str) -> None:
        # One thread per worker process: the processes are the parallelism.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = load_tokenizer_json(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class BytesEncoder:
    """The bytes of UTF-8."""

    def __init__(self, file: str | None = None) -> None:
        pass

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]  # type: ignore[misc]

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(bytes([token]) if token < 256 else b"<|endoftext|>" for token in ids)
        return raw.decode("utf-8", errors="replace")


KINDS: dict[str, Any] = {"hf": HuggingFaceEncoder, "bytes": BytesEncoder}
BYTES = TokenizerInfo("bytes", "sha256:" + hashlib.sha256(b"utf-8 bytes, end of text 256").hexdigest(), 257, 256)


def load_tokenizer_json(file: str | os.PathLike[str]) -> Any:
    """Read a ``tokenizer.json``, or say why it cannot be used."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"the installed tokenizers library cannot read {file}: {error}.") from error


def describe(tokenizer: str | os.PathLike[str], eos: str | None = None) -> TokenizerInfo:
    """Return the facts of a tokenizer: ``"bytes"``, a ``tokenizer.json``, or a folder that holds one.

    Args:
        eos: the end-of-text token; by default what ``tokenizer_config.json`` beside the file says, else a usual name.
    Raises: InputError: if there is no such file, or no end-of-text token in it.
    """
    if os.fspath(tokenizer) == "bytes":
        return BYTES
    file = Path(tokenizer)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"no tokenizer at {file}: give a tokenizer.json, a folder that holds one, or 'bytes'.")
    loaded = load_tokenizer_json(file)
    vocabulary = loaded.get_vocab(with_added_tokens=True)
    fingerprint = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    return TokenizerInfo("hf", fingerprint, max(vocabulary.values()) + 1, _eos_id(file, loaded, eos), str(file))


def _eos_id(file: Path, loaded: Any, eos: str | None) -> int:
    special = {token.content: number for number, token in loaded.get_added_tokens_decoder().items() if token.special}
    if eos is not None:
        found = loaded.token_to_id(eos)
        if found is None:
            raise InputError(f"{file} has no token {eos!r}; its special tokens are {sorted(special)}.")
        return found
    names = (*_configured_eos(file), *_EOS_NAMES)
    for name in names:
        if name in special:
            return special[name]
    raise InputError(
        f"{file}: no end-of-text token found among its special tokens {sorted(special)}. Name it with --eos TOKEN."
    )


def _configured_eos(file: Path) -> tuple[str, ...]:
    try:
        value = json.loads(file.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ()
    value = value.get("content") if isinstance(value, dict) else value
    return (value,) if isinstance(value, str) else ()


@functools.lru_cache(maxsize=2)
def load_encoder(kind: str, file: str | None) -> Encoder:
    """Return the encoder, made once per process."""
    return KINDS[kind](file)
