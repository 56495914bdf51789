"""OpenAI's tokenizers as a ``tokenizer.json``, from ranks that ship inside the package ``bpe-openai``.

tiktoken itself downloads its ranks; this needs no network. A byte-pair encoding is fixed by the ranks: each token
longer than a byte was made by one merge, the one that byte-pair encoding its bytes with the lower ranks ends before.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mixer.errors import InputError

__all__ = ["NAMES", "byte_characters", "tokenizer_file"]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# name: (pattern that splits text into words, id of <|endoftext|>)
NAMES = {
    "cl100k_base": (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        100_257,
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        199_999,
    ),
}


def load_ranks(name: str) -> dict[bytes, int]:
    """Return token bytes -> id."""
    if name not in NAMES:
        raise InputError(f"no tokenizer 'tiktoken:{name}'; there are {[f'tiktoken:{known}' for known in NAMES]}.")
    package = importlib.util.find_spec("bpe_openai")
    if package is None or package.origin is None:
        raise InputError(f"'tiktoken:{name}' needs ranks from the package bpe-openai: pip install bpe-openai.")
    raw = gzip.decompress((Path(package.origin).parent / "data" / f"{name}.tiktoken.gz").read_bytes())
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines() if line)}


def tokenizer_file(name: str) -> Path:
    """Return a ``tokenizer.json`` for ``cl100k_base`` or ``o200k_base``, made once per machine."""
    ranks = load_ranks(name)
    digest = hashlib.sha256(repr((sorted(ranks.items()), NAMES[name])).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"domain-mixer-tokenizers-{os.getuid()}" / f"{name}-{digest}"
    path = folder / "tokenizer.json"
    if not path.exists():
        content = json.dumps(as_tokenizer_json(name, ranks), ensure_ascii=False)  # takes seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.tmp")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    return path


def as_tokenizer_json(name: str, ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` with these ranks."""
    pattern, eos = NAMES[name]
    characters = byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = [_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end: dict[str, Any] = {"id": eos, "content": "<|endoftext|>", "special": True}
    end |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            # In the vocabulary too, because an added token that is not there gets the next free id instead of its own.
            "vocab": {**{spelled[token]: rank for token, rank in ranks.items()}, end["content"]: eos},
            "merges": [[spelled[left], spelled[right]] for left, right in merges],
        },
    }  # fmt: skip


def _merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens from which a token is merged: byte-pair encode it with the ranks below its own."""
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, 1 << 62) for left, right in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            raise InputError(f"the ranks are not those of a byte-pair encoding: {token!r} cannot be merged.")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def byte_characters() -> dict[int, str]:
    """Return the printable character by which byte-level tokenizers write each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}
