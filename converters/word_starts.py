"""Where words start, as the tokenizer itself splits them: a text may be cut there, if what splits it looks at nothing
that stands before.

Most tokenizers do so by a regular expression that is matched again and again from where the last match ended. What
comes later counts for the last words alone: those of a window are left out, and before a cut they must stay the same.

    starts = find_word_starts(facts, added)      # of a tokenizer.json, None if it may look back
    starts.last(text, 0, 1 << 16)                # in that window of the text, None if there is but one word
"""

from __future__ import annotations

import bisect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["WordStarts", "find_word_starts"]

_SETTLED = 1 << 10  # characters at the end of a window that are left out


class WordStarts:
    """Starts of words.

    Args:
        splitter: a tokenizer that makes one token of each word.
        may_be_cut: whether two characters that stand side by side are never rewritten as one.
    """

    def __init__(self, splitter: Any, may_be_cut: Callable[[str, str], bool]) -> None:
        self._splitter, self._may_be_cut = splitter, may_be_cut

    def last(self, text: str, start: int, size: int) -> int | None:
        """Return the last place to cut in the next ``size`` characters, None if there is none.

        ``start`` must be the start of a word, or lie in a word whose rest is a word, too.
        """
        window = text[start : start + size + _SETTLED]
        words = self._words(window)
        settled = bisect.bisect_right(words, (len(window) - _SETTLED, 0))
        for number in range(settled - 1, max(settled - _TRIED, 0), -1):
            at = words[number][0]
            if self._may_be_cut(window[at - 1], window[at]) and self._ends_at(window, words[:number], at):
                return start + at
        return None

    def _ends_at(self, window: str, words: Sequence[tuple[int, int]], at: int) -> bool:
        """Return whether the last words before ``at`` are the same if the text ends there; spaces may not be."""
        begin = words[-_COMPARED:][0][0]
        return [(begin + first, begin + last) for first, last in self._words(window[begin:at])] == words[-_COMPARED:]

    def _words(self, text: str) -> list[tuple[int, int]]:
        return self._splitter.encode(text, add_special_tokens=False).offsets


_TRIED, _COMPARED = 100, 8  # words
_SPLITTERS = {"ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Split"}
_WHOLE_WORDS = {"Isolated", "Removed"}  # behaviours of ``Split`` and ``Punctuation``
_IN_BRACKETS = re.compile(r"\[(?:\\.|\[:\w+:\]|[^\]\\])*\]")
_LOOKS_BACK = re.compile(r"\(\?<|\\[bBGAK1-9]|\^")


def find_word_starts(
    facts: Mapping[str, Any], added: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]], is_plain: bool
) -> WordStarts | None:
    """Return the starts of words of a tokenizer, None if what stands before them may count.

    Args:
        facts: the content of its ``tokenizer.json``.
        added: the tokens that are looked for in the text itself.
        parts: all that its pre-tokenizer consists of.
        is_plain: whether its normalizers are those of Unicode, if it has any.
    """
    from tokenizers import AddedToken, Tokenizer

    if not all(map(_looks_ahead_only, parts)) or any(token.get("single_word") for token in added):
        return None
    model = {"type": "WordLevel", "vocab": {"word": 0}, "unk_token": "word"}
    same = {key: facts.get(key) for key in ("normalizer", "pre_tokenizer")}
    splitter = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **same}))
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for token in added:
        splitter.add_tokens([AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})])
    return WordStarts(splitter, _is_apart if is_plain else _are_ascii)


def _is_apart(before: str, behind: str) -> bool:
    """Return whether no form of Unicode composes or reorders the two."""
    return unicodedata.category(behind) not in ("Mn", "Mc", "Me", "Lm") and not "\u1160" <= behind <= "\u11ff"


def _are_ascii(before: str, behind: str) -> bool:
    return " " < before < "\x7f" and " " < behind < "\x7f"


def _looks_ahead_only(part: Mapping[str, Any]) -> bool:
    """Return whether the words that a pre-tokenizer makes from the start of a word on are the same without what stands
    before it."""
    if part["type"] not in _SPLITTERS or part.get("add_prefix_space"):
        return False
    if part.get("behavior", "Isolated") not in _WHOLE_WORDS:
        return False
    pattern = part.get("pattern", {}).get("Regex", "")
    return not _LOOKS_BACK.search(_IN_BRACKETS.sub("", pattern))
