"""Special tokens that are spelled out in a text, as text: what a tokenizer must not know for that.

Libraries that are told to leave special tokens alone no longer look for them, but the model behind may still make them
of text: Unigram, WordPiece and WordLevel look for all of their vocabulary, a byte-pair encoding may have a merge that
ends in ``</s>``, and symbols that users defined are always looked for. Those get a name that no text spells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["without_special_tokens", "without_symbol"]


def without_special_tokens(facts: Mapping[str, Any], eos_id: int | None = None) -> dict[str, Any] | None:
    """Return the content of a ``tokenizer.json`` that makes no special token of text, ids unchanged; None if ``facts``
    is one already. The end of text is a special token, whether the file says so or not."""
    model, added = dict(facts["model"]), [dict(token) for token in facts.get("added_tokens") or []]
    is_changed = False
    for token in added:
        if token["id"] == eos_id and not token["special"]:
            token["special"] = is_changed = True
    names = {token["content"] for token in added if token["special"]}
    vocabulary = model["vocab"]
    numbers = {piece: number for number, (piece, _) in enumerate(vocabulary)} if _is_list(vocabulary) else vocabulary
    if eos_id not in {token["id"] for token in added}:
        names |= {piece for piece, number in numbers.items() if number == eos_id}
    made = {name: _unspelled(numbers[name]) for name in names if len(name) > 1 and name in numbers}
    if made and _may_make(model, made):
        model["vocab"] = (
            [[made.get(piece, piece), score] for piece, score in vocabulary]
            if _is_list(vocabulary)
            else {made.get(piece, piece): number for piece, number in vocabulary.items()}
        )
        model["unk_token"] = made.get(model.get("unk_token"), model.get("unk_token"))
        if model.get("merges"):
            model["merges"] = [each for each in model["merges"] if made.keys().isdisjoint(_tokens(each))]
        for token in added:
            token["content"] = made.get(token["content"], token["content"])
        is_changed = True
    return {**facts, "model": model, "added_tokens": added, "post_processor": None} if is_changed else None


def _is_list(vocabulary: Any) -> bool:
    return isinstance(vocabulary, list)  # Unigram: pairs of piece and score


def _unspelled(number: int) -> str:
    return f"\ufdd0special token {number}\ufdd1"  # code points that are no characters, and never will be


def _may_make(model: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether a model may make any of these tokens, which are in its vocabulary."""
    if model.get("merges") is None or model.get("ignore_merges"):
        return True
    return any(_tokens(merge)[2] in names for merge in model["merges"])


def _tokens(merge: Any) -> tuple[str, str, str]:
    """Return the two tokens that are merged, and what they make."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


# --- SentencePiece -------------------------------------------------------------------------------------------------

_CONTROL_TYPE = b"\x18\x03"  # field 3 of a piece; what comes last counts


def without_symbol(proto: bytes, number: int) -> bytes:
    """Return a SentencePiece model whose piece of this number is a control symbol, which no text spells."""
    at = pieces = 0
    while at < len(proto):
        start, kind = at, proto[at]
        head, at = read_varint(proto, at)
        if head & 7 == 2:
            length, at = read_varint(proto, at)
        else:
            length = {1: 8, 5: 4}.get(head & 7, 0) or read_varint(proto, at)[1] - at
        if kind == _PIECE:
            if pieces == number:
                piece = proto[at : at + length] + _CONTROL_TYPE
                return proto[:start] + bytes([_PIECE]) + _varint(len(piece)) + piece + proto[at + length :]
            pieces += 1
        at += length
    raise ValueError(f"no piece {number}")


_PIECE = 0x0A  # field 1, of some length


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return an integer of a protocol buffer, and where it ends."""
    value = shift = 0
    while message[at] & 128:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
