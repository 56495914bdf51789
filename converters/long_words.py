"""Encode a word of any length a piece at a time: a genome without line breaks, a page of one letter.

A sequence of tokens is what byte-pair encoding makes of a text if any two neighbours in it are what it makes of their
text: of all merges it always takes the first by rank and place, so it could merge across a border only what it would
also merge there if nothing but the two tokens beside it were given. So two pieces that overlap may be joined before a
token that both have at the same place: left of it stand tokens of one piece, from it on those of the other, and any two
neighbours are neighbours in one of the two. (Property and proof: https://github.com/github/rust-gems, crates/bpe.)

    runs = find_runs(splits, starts)             # stretches in which a tokenizer never begins another word
    rows = encode_long_word(text, 1 << 16, runs, encode, spell)   # the ids, in some arrays; None: give it the whole
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

__all__ = ["OVERLAP", "Runs", "encode_long_word", "find_runs"]

OVERLAP = 1 << 10  # characters: more than any token has
_TRIED_BEGINS = 8
_AT_ENDS = 8  # characters of a run that what stands beside it may take into its word


class Runs(NamedTuple):
    """Where a word may be cut.

    Args:
        characters: regular expressions, each of one character; many of one of them in a row lie in one word.
        prefix: whether a tokenizer puts a space before a text that does not begin with one.
    """

    characters: Sequence[str]
    prefix: bool = False

    def first_stop(self, text: str, at: int) -> int | None:
        """Return the first place from ``at`` on that ``OVERLAP`` characters of a run stand before."""
        pattern = "|".join(f"(?:{one}){{1,{OVERLAP}}}" for one in self.characters)
        found = re.compile(pattern).finditer(text, max(at - OVERLAP, 0))
        return next((run.end() for run in found if run.end() - run.start() == OVERLAP and run.end() >= at), None)


def encode_long_word(
    text: str, size: int, runs: Runs, encode: Callable[[str], NDArray[Any]], spell: Callable[[int], bytes]
) -> list[NDArray[Any]] | None:
    """Return the ids of a text, or None where some pieces have no token in common.

    Args:
        size: characters of a piece, about.
        encode: returns the ids of a piece.
        spell: returns the UTF-8 of a token, a space for a space.
    """
    stop = runs.first_stop(text, size)
    ids = encode(text[:stop])
    rows = []
    while stop is not None:
        shared = text[stop - OVERLAP : stop]
        places = dict(_last_places(ids, shared.encode(), len(shared[:_AT_ENDS].encode()), spell))
        following = runs.first_stop(text, stop + size)
        for begin in _begins(shared, places):
            more = encode(text[stop - OVERLAP + begin : following])
            prefix = b" " if runs.prefix and shared[begin] != " " else b""
            start = len(shared[:begin].encode()) - len(prefix)
            others = _first_places(more, prefix + shared[begin:].encode(), start, spell)
            joint = next(((places[place], number) for place, number in others if place in places), None)
            if joint is not None:
                break
        else:
            return None
        rows.append(ids[: joint[0]])
        ids, stop = more[joint[1] :], following
    return [*rows, ids]


_Place = tuple[int, int]  # where a token starts in what two pieces share, in bytes, and its id


def _begins(shared: str, places: Iterable[_Place]) -> range:
    """Return where the next piece may begin, in characters: best before a token; but a space put there shifts what
    follows, where that is one character again and again."""
    starts = {start for start, _ in places}
    at = 0
    for begin, character in enumerate(shared):
        if at in starts:
            return range(begin, min(begin + _TRIED_BEGINS, len(shared)))
        at += len(character.encode())
    return range(0)


def _last_places(
    ids: NDArray[Any], shared: bytes, first: int, spell: Callable[[int], bytes]
) -> Iterator[tuple[_Place, int]]:
    """Yield place and number of the last tokens, back to ``first``, as far as they spell the end of ``shared``."""
    start = len(shared)
    for number in range(len(ids) - 1, -1, -1):
        token = spell(int(ids[number]))
        start -= len(token)
        if not token or start < first or not shared.startswith(token, start):
            return
        yield (start, int(ids[number])), number


def _first_places(
    ids: NDArray[Any], text: bytes, start: int, spell: Callable[[int], bytes]
) -> Iterator[tuple[_Place, int]]:
    """Yield place and number of the first tokens, the first at ``start``, as far as they spell ``text``."""
    at = 0
    for number, each in enumerate(ids):
        token = spell(int(each))
        if not token or at >= len(text) or not text.startswith(token, at):
            return
        yield (start + at, int(each)), number
        at += len(token)


# --- runs ----------------------------------------------------------------------------------------------------------

_CLASSES = ("[A-Za-z]", "[A-Z]", "[a-z]", "[0-9]", " ", "\n", "[!-/:-@\\[-`{-~]", "[ぁ-ゖァ-ヺー一-龥]", "[一-龥]")
_AROUND = ("", " ", "\n", "a", "A", "'", "'s", "1", ".", "_", "漢", "é", "\t ")
_TRIED = 300  # characters


def find_runs(split: Callable[[str], Sequence[tuple[int, int]]], starts: Sequence[str], prefix: bool) -> Runs | None:
    """Return the runs of a tokenizer that splits text into words, None if it has none.

    Args:
        split: returns start and end of each word.
        starts: what tokens that are looked for in the text begin with; none begins in a run.
    """
    found = []
    for one in _CLASSES:
        pattern = re.compile(one)
        if not any(pattern.match(start) for start in starts) and all(_is_one_word(split, run) for run in _tries(one)):
            found.append(one)
    return Runs(found, prefix) if found else None


def _tries(one: str) -> Iterator[str]:
    """Yield runs of a class: of one character, and of many by chance."""
    every = [chr(number) for number in range(0x10000) if re.match(one, chr(number))]
    chance = random.Random(0)
    yield from (character * _TRIED for character in chance.sample(every, min(len(every), 4)))
    yield from ("".join(chance.choices(every, k=_TRIED)) for _ in range(2))


def _is_one_word(split: Callable[[str], Sequence[tuple[int, int]]], run: str) -> bool:
    """Return whether nearly all of a run is in one word, whatever stands around it."""
    for before, behind in [*((one, "") for one in _AROUND), *(("", one) for one in _AROUND), ("a", "a"), (" ", " ")]:
        first, last = len(before) + _AT_ENDS, len(before) + len(run) - _AT_ENDS
        if not any(start <= first and last <= stop for start, stop in split(before + run + behind)):
            return False
    return True
