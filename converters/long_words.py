"""Encode a word of any length a piece at a time: a genome without line breaks, a page of one letter.

A sequence of tokens is what byte-pair encoding makes of a text if any two neighbours in it are what it makes of their
text: of all merges it always takes the first by rank and place, so it could merge across a border only what it would
also merge there if nothing but the two tokens beside it were given. So two pieces that overlap may be joined before a
token that both have at the same place: left of it stand tokens of one piece, from it on those of the other, and any two
neighbours are neighbours in one of the two. (Property and proof: https://github.com/github/rust-gems, crates/bpe.)

    runs = find_runs(splits, starts)             # stretches in which a tokenizer never begins another word
    for ids in encode_long_word(text, 1 << 16, runs, encode, spell): ...
"""

from __future__ import annotations

import functools
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash
from numpy.typing import NDArray

from mixer.errors import DataError

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

    def last_stop(self, text: str, stop: int) -> int:
        """Return the end of the run that ``stop`` is in."""
        patterns = (re.compile(f"(?:{one})*") for one in self.characters)
        return max(match.end() for pattern in patterns if (match := pattern.match(text, stop - OVERLAP)))


def encode_long_word(
    text: str, size: int, runs: Runs, encode: Callable[[str], NDArray[Any]], spell: Callable[[int], bytes]
) -> Iterator[NDArray[Any]]:
    """Yield the ids of a text, those of about a piece at a time; of all that is left where pieces have none in common.

    Args:
        size: characters of a piece, about.
        encode: returns the ids of a piece.
        spell: returns the UTF-8 of a token, a space for a space.
    Raises: DataError: if all of the text has other ids than its pieces, which only then turns out.
    """
    stop = runs.first_stop(text, size)
    ids = encode(text[:stop])
    done, digest = 0, xxhash.xxh3_128()
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
            yield _rest(encode(text), done, digest.digest())
            return
        yield ids[: joint[0]]
        done += joint[0]
        digest.update(ids[: joint[0]].tobytes())
        ids, stop = more[joint[1] :], following
    yield ids


def _rest(ids: NDArray[Any], done: int, digest: bytes) -> NDArray[Any]:
    """Return the ids behind the first ``done``, which must be those with this digest."""
    if xxhash.xxh3_128_digest(ids[:done].tobytes()) != digest:
        raise DataError(
            "a word of megabytes has other tokens as a whole than in pieces. Please report this with the text and the"
            " tokenizer; until then, leave such texts out with --max-record."
        )
    return ids[done:]


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

# Characters by what Unicode calls them, in all scripts but some: letters, with their accents or without, letters of
# scripts that have no capitals, and symbols.
_LETTERS, _ACCENTS, _HAN_AND_KANA = ("Lu", "Ll", "Lt", "Lm", "Lo"), ("Mn", "Mc", "Me"), "[一-龥\u3040-ヿ]"
_OF_UNICODE = (
    (_LETTERS + _ACCENTS, ""),
    (_LETTERS, ""),
    (_LETTERS + _ACCENTS, _HAN_AND_KANA),
    (("Lm", "Lo", *_ACCENTS), ""),
    (("Pc", "Pd", "Po", "Sc", "Sk", "Sm", "So"), ""),
)
_CLASSES = ("[A-Za-z]", "[A-Z]", "[a-z]", "[0-9]", " ", "\n", "[!-/:-@\\[-`{-~]", "[ぁ-ゖァ-ヺー一-龥]", "[一-龥]")
_AROUND = ("", " ", "\n", "a", "A", "'", "'s", "1", ".", "_", "漢", "é", "\t ")
_TRIED = 300  # characters


def find_runs(
    split: Callable[[str], Sequence[tuple[int, int]]],
    starts: Sequence[str],
    prefix: bool,
    is_kept: Callable[[str], bool] = lambda text: True,
) -> Runs | None:
    """Return the runs of a tokenizer that splits text into words, None if it has none.

    Args:
        split: returns start and end of each word.
        starts: what tokens that are looked for in the text begin with; none begins in a run.
        is_kept: whether no character of a text is rewritten, so that its tokens spell it.
    """
    found: list[str] = []
    covered: set[str] = set()
    for one in (*(_of_unicode(*given) for given in _OF_UNICODE), *_CLASSES):
        characters = re.findall(one, _plane())
        if covered.issuperset(characters) or any(start[:1] in characters for start in starts):
            continue
        if all(is_kept(run) and _is_one_word(split, run) for run in _tries(characters)):
            found.append(one)
            covered.update(characters)
    return Runs(found, prefix) if found else None


@functools.cache
def _plane() -> str:
    """Return all characters that take two bytes in UTF-16."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))


@functools.cache
def _of_unicode(categories: tuple[str, ...], without: str) -> str:
    """Return what matches the characters of some categories, as far as all versions of Unicode agree."""
    versions = unicodedata, unicodedata.ucd_3_2_0
    plane = re.sub(without, " ", _plane()) if without else _plane()
    found = "".join(one if all(each.category(one) in categories for each in versions) else " " for one in plane)
    runs = [(ord(run[0]), ord(run[-1])) for run in re.split(" +", found) if run]
    return "[" + "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in runs) + "]"


def _tries(characters: Sequence[str]) -> Iterator[str]:
    """Yield runs of one character, and of many by chance."""
    chance = random.Random(0)
    yield from (one * _TRIED for one in chance.sample(characters, min(len(characters), 4)))
    yield from ("".join(chance.choices(characters, k=_TRIED)) for _ in range(2))


def _is_one_word(split: Callable[[str], Sequence[tuple[int, int]]], run: str) -> bool:
    """Return whether nearly all of a run is in one word, whatever stands around it."""
    for before, behind in [*((one, "") for one in _AROUND), *(("", one) for one in _AROUND), ("a", "a"), (" ", " ")]:
        first, last = len(before) + _AT_ENDS, len(before) + len(run) - _AT_ENDS
        if not any(start <= first and last <= stop for start, stop in split(before + run + behind)):
            return False
    return True
