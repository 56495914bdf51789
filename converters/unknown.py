"""Characters that a byte-pair encoding has no token for.

Without a token for what is unknown and without all bytes, the library leaves such characters out and says nothing, and
merges what stood on either side of them. With a token of ours in that place they are seen, and ids are the same for all
texts that have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.cutting import flat_parts

__all__ = ["with_unknown_token"]

UNKNOWN = "\ufdd0unknown\ufdd1"  # code points that are no characters, and never will be


def with_unknown_token(facts: Mapping[str, Any]) -> tuple[dict[str, Any], int] | None:
    """Return the content of a ``tokenizer.json`` that makes a token of what ``facts`` would leave out, and its id; None
    if that leaves nothing out."""
    model = facts["model"]
    if "merges" not in model or model.get("unk_token") is not None or _knows_all_bytes(facts):
        return None
    # Added tokens that are not in the vocabulary take the ids behind it, which must stay theirs.
    added = {token["content"]: token["id"] for token in facts.get("added_tokens") or []}
    vocabulary = {**model["vocab"], **added}
    number = max(vocabulary.values(), default=-1) + 1
    return {**facts, "model": {**model, "vocab": {**vocabulary, UNKNOWN: number}, "unk_token": UNKNOWN}}, number


def _knows_all_bytes(facts: Mapping[str, Any]) -> bool:
    model = facts["model"]
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        return True
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False  # a letter is another token by where it stands
    parts = flat_parts(facts.get("pre_tokenizer"), "pretokenizers") + flat_parts(facts.get("normalizer"), "normalizers")
    if not any(part["type"] == "ByteLevel" for part in parts):
        return False
    from tokenizers.pre_tokenizers import ByteLevel

    return all(letter in model["vocab"] for letter in ByteLevel.alphabet())
