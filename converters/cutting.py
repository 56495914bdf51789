"""Where a long text may be cut so that its pieces have the ids of the whole: libraries take many times what they are
given at once.

Between words, where a tokenizer splits text into words first and looks at each alone: after words of usual forms, and
where there is none, at any (``word_starts``). Elsewhere between two characters that stand side by side in no token, so
that none reaches across: what is on either side does not depend on the other. By a byte-pair encoding the ids are the
very same, and even a word may be cut (``long_words``). Unigram takes the likeliest tokens, whose scores libraries add
up from the start of a text, rounding: where two ways are equally likely but for that, a piece may go the other way.

    cuts = find_cuts(facts)                      # of a tokenizer.json
    for piece, drop in cuts(text, 1 << 18):      # leave out the first ``drop`` ids of the piece
    cuts.runs                                    # where a byte-pair encoding may be cut besides
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from converters.long_words import OVERLAP, Runs, find_runs
from converters.special_tokens import read_varint
from converters.word_starts import WordStarts, find_word_starts

__all__ = [
    "SPACE",
    "BetweenWords",
    "Cuts",
    "SideBySide",
    "find_cuts",
    "flat_parts",
    "sentencepiece_cuts",
]


class Cuts(Protocol):
    """Where the texts of a tokenizer may be cut."""

    @property
    def runs(self) -> Runs | None:
        """Where words may be cut by ``encode_long_word``; None if nowhere."""

    def __call__(self, text: str, size: int) -> Iterator[tuple[str, int]]:
        """Yield pieces of about ``size`` characters or more, and how many ids of each are to be left out."""


SPACE = "▁"  # how a space is written in the vocabularies of SentencePiece


def find_cuts(
    facts: Mapping[str, Any],
    specials_are_text: bool = True,
    read: Callable[[], Mapping[str, Any]] | None = None,
) -> Cuts | None:
    """Return the cuts of a tokenizer, None if there are none.

    Args:
        facts: the content of its ``tokenizer.json``; with ``read``, which returns that, it needs no tokens.
        specials_are_text: whether special tokens are not looked for in the text.
    """
    if cuts := _between_words(facts, specials_are_text):
        return cuts
    return _side_by_side(facts if read is None else read(), specials_are_text)


def _added_tokens(facts: Mapping[str, Any], specials_are_text: bool) -> list[Mapping[str, Any]]:
    """Return the tokens that are looked for in the text itself."""
    return [token for token in facts.get("added_tokens") or [] if not (specials_are_text and token.get("special"))]


def flat_parts(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Return the normalizers or pre-tokenizers that a part of a ``tokenizer.json`` consists of, in order."""
    if part is None:
        return []
    return [one for each in part[inner] for one in flat_parts(each, inner)] if part["type"] == "Sequence" else [part]


# --- between words -------------------------------------------------------------------------------------------------

# After a word that a line break, or a space and another word, follows; wider ones also before Chinese and Japanese
# punctuation and after a line break, before digits, and before symbols that end something.
_AFTER_WORD = r"[^\W_](?=\n)|[^\W\d_](?= [^\W\d_])"
_LETTER = "[A-Za-zぁ-ゖァ-ヺ一-鿿]"
_AFTER_PHRASE = rf"{_AFTER_WORD}|{_LETTER}(?=[、。，！？：；]{_LETTER})|(?<=\S)\n(?={_LETTER})"
_AFTER_LETTERS = _AFTER_PHRASE + "|[A-Za-z](?=[0-9])"
_BEFORE_SYMBOL = _AFTER_LETTERS + r"|[A-Za-z0-9](?=[\"),:;\]}])"
_BEFORE_SPACE = r"[^\W\d_](?= [^\W\d_])"
# The same where characters may be rewritten, which those of ASCII and Chinese ones are not by those next to them.
_KEPT = "A-Za-z一-鿿"
_BEFORE_ASCII = "[A-Za-z](?= [A-Za-z])"
_BEFORE_KEPT = f"[{_KEPT}。！？](?=[ \n][{_KEPT}])"
_AFTER_CHARACTER = f"[{_KEPT}](?= [{_KEPT}])|[一-鿿](?=[一-鿿])"  # where each is a word
_WIDEST_FIRST = (_BEFORE_SYMBOL, _AFTER_LETTERS, _AFTER_PHRASE, _AFTER_WORD, _BEFORE_SPACE)
_WIDEST_KEPT_FIRST = (_AFTER_CHARACTER, _BEFORE_KEPT, _BEFORE_ASCII)

_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # change nothing across a line break or space
_LOCAL = {"BertNormalizer", "Lowercase", "Nmt", "Precompiled", "StripAccents"}  # nothing across ASCII


class BetweenWords:
    """Cuts after a word: at such as have a usual form, or, where a text is full of numbers or symbols, at any.

    >>> [piece for piece, _ in BetweenWords(re.compile(_AFTER_WORD))("one two\\nthree.\\nfour five", 5)]
    ['one two', '\\nthree.\\nfour', ' five']

    Args:
        after: what matches the last character of a word of a usual form.
        find_starts: finds where words start, when that is needed.
        find_runs: finds the runs, when they are needed.
    """

    def __init__(
        self,
        after: re.Pattern[str],
        find_starts: Callable[[], WordStarts | None] = lambda: None,
        find_runs: Callable[[], Runs | None] = lambda: None,
    ) -> None:
        self._after, self._find_starts, self._find_runs = after, find_starts, find_runs

    @functools.cached_property
    def starts(self) -> WordStarts | None:
        """Where words start."""
        return self._find_starts()

    @functools.cached_property
    def runs(self) -> Runs | None:
        return self._find_runs()

    def __call__(self, text: str, size: int) -> Iterator[tuple[str, int]]:
        start = searched = 0
        while (at := start + size - 1) < len(text) - 1:
            found = self._after.search(text, max(at, searched), near := at + _NEAR * size)
            cut = found.end() if found else self._next_start(text, start, size)
            if found is None:
                searched = max(searched, near - 2)  # of two characters the first may be there
            if cut is None and (found := self._after.search(text, at)):
                cut = found.end()
            if cut is None:
                break
            yield text[start:cut], 0
            start = cut
        yield text[start:], 0

    def _next_start(self, text: str, start: int, size: int) -> int | None:
        """Return the start of a word about ``size`` behind ``start``, or behind the very long word that is there."""
        while self.starts is not None and start < len(text):
            cut = self.starts.last(text, start, size // _PARTS) or self.starts.last(text, start, size)
            if cut is not None or self.runs is None:
                return cut
            stop = self.runs.first_stop(text, start + size)
            if stop is None:
                return None
            start = max(self.runs.last_stop(text, stop) - OVERLAP, start + 1)
        return None


_NEAR = 4  # times the size of a piece
_PARTS = 4  # of a piece: where it is enough, a part takes less memory to look at


def _between_words(facts: Mapping[str, Any], specials_are_text: bool = True) -> Cuts | None:
    """Return cuts between words if the tokenizer splits text there, whatever stands around.

    So do byte-level tokenizers by their patterns (GPT-2's, cl100k's, Llama 3's), BERT's, and Metaspace with ``split``.
    """
    from tokenizers import Tokenizer

    added, normalizers = _added_tokens(facts, specials_are_text), flat_parts(facts.get("normalizer"), "normalizers")
    before = flat_parts(facts.get("pre_tokenizer"), "pretokenizers")
    if not before:
        return None
    parts = {key: facts.get(key) for key in ("normalizer", "pre_tokenizer")}
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        probe = Tokenizer.from_str(json.dumps({**empty, **parts}))
    except Exception:  # the library raises bare Exception, and will when it reads all of it
        return None
    plain = {each["type"] for each in normalizers} <= _UNICODE_FORMS
    if not plain and not all(map(_is_local, normalizers)):
        return None
    for after in map(re.compile, _WIDEST_FIRST if plain else _WIDEST_KEPT_FIRST):
        if not any(_may_be_cut(token, after) for token in added) and _splits(probe, after):
            find_starts = functools.partial(find_word_starts, facts, added, before, plain)
            return BetweenWords(after, find_starts, functools.partial(_runs_of_words, facts, probe, added))
    return None


def _runs_of_words(facts: Mapping[str, Any], probe: Any, added: Sequence[Mapping[str, Any]]) -> Runs | None:
    model = facts.get("model") or {}
    if model.get("type", "BPE") != "BPE" or any(model.get(name) for name in _NOT_BY_PAIRS):
        return None
    parts = flat_parts(facts.get("pre_tokenizer"), "pretokenizers")
    puts_space = {"ByteLevel": lambda part: part.get("add_prefix_space", True), "Metaspace": _puts_space}
    has_prefix = any(part["type"] in puts_space and puts_space[part["type"]](part) for part in parts)
    starts = [token["content"] for token in added]
    if any(token.get(name) for token in added for name in ("lstrip", "rstrip")):
        starts += [" ", "\n"]

    def split(text: str) -> list[tuple[int, int]]:
        return [place for _, place in probe.pre_tokenizer.pre_tokenize_str(text)]

    def is_kept(text: str) -> bool:
        return probe.normalizer is None or probe.normalizer.normalize_str(text) == text

    return find_runs(split, starts, has_prefix, is_kept)


_NOT_BY_PAIRS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _may_be_cut(token: Mapping[str, Any], after: re.Pattern[str]) -> bool:
    """Return whether a cut may fall inside a token that is looked for in the text, or change what it takes with it."""
    content = token["content"]
    takes_more = token.get("rstrip") and content[-1:].isalnum()
    looks_around = token.get("single_word") and after.pattern == _AFTER_CHARACTER
    is_inside = any(cut.end() < len(content) for cut in after.finditer(content + "a"))
    return bool("\n" in content or takes_more or looks_around or is_inside)


def _is_local(normalizer: Mapping[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        return normalizer["pattern"] == {"Regex": " {2,}"}
    if normalizer["type"] == "Strip":
        return not normalizer["strip_left"]
    return normalizer["type"] in _LOCAL | _UNICODE_FORMS


_PROBE = (
    "one two\nthree 45\n\n6x\n\t7 été ü x2 y a b\nDon't STOP a\n一二，三四、五！六：七 八。\n九\n十 ten\n"
    '1,2;a:(b)c[3]{d}"e"\n'
)


def _splits(tokenizer: Any, after: re.Pattern[str]) -> bool:
    """Return whether the words of a text are those of its pieces."""

    def words(text: str) -> list[str]:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    return [word for piece, _ in BetweenWords(after)(_PROBE, 1) for word in words(piece)] == words(_PROBE)


# --- side by side --------------------------------------------------------------------------------------------------


class SideBySide:
    """Cuts between characters that are neighbours in no token.

    A tokenizer may write ``▁`` for a space, and put one before every text it is given. Before a cut at a space that is
    this very space; before another character it is a token of its own, unless it is part of one with that character,
    and is left out.

    Args:
        tokens: all that text is made into.
        known: characters that have a token, so that none of them is part of a run of unknown ones.
        space: how a space is written.
        prefix: what is put before a text: nothing (""), a space where there is none ("missing"), or always ("always").
        added: tokens that are looked for in the text itself.
        kept_only: cut only at letters and digits of ASCII, Chinese characters and spaces: others may be rewritten.
        by_pairs: whether tokens are those of a byte-pair encoding.
        symbols: tokens that are looked for before any merge.
    """

    def __init__(
        self,
        tokens: Iterable[str],
        known: Callable[[str], bool],
        *,
        space: str = SPACE,
        prefix: str = "",
        added: Sequence[str] = (),
        kept_only: bool = False,
        by_pairs: bool = False,
        symbols: Sequence[str] = (),
    ) -> None:
        written = [*tokens, *(content.replace(" ", space) for content in added)]
        self._pairs = {token[n : n + 2] for token in written for n in range(len(token) - 1)}
        self._known, self._space, self._prefix = known, space, prefix
        self._firsts, self._lasts = {content[:1] for content in added}, {content[-1:] for content in added}
        usual = f"[{_KEPT}0-9]" if kept_only else r"[^\s▁]"
        self._is_usual = re.compile(usual).fullmatch
        firsts = "".join(re.escape(content[0]) for content in (*added, *symbols))
        self.runs = Runs([f"(?![{firsts}]){usual}" if firsts else usual], bool(prefix)) if by_pairs else None
        self._may_follow = re.compile(f"[{_KEPT}0-9]" if kept_only else "(?s:.)").fullmatch

    def __call__(self, text: str, size: int) -> Iterator[tuple[str, int]]:
        start = drop = 0
        while (cut := self._next(text, start + size)) is not None:
            yield text[start:cut], drop
            is_space = text[cut] == " "
            start = cut + (is_space and self._prefix == "always")  # which puts it there again
            drop = int(bool(self._prefix) and not is_space)
        yield text[start:], drop

    def _next(self, text: str, at: int) -> int | None:
        """Return the first place from ``at`` on that may be cut, if enough follows."""
        at = max(at, 1)
        while at < len(text) - 1:
            if self._is_cut(text[at - 1], text[at], text[at + 1]):
                return at
            at += 1
        return None

    def _is_cut(self, before: str, behind: str, second: str) -> bool:
        if not self._is_usual(before) or before in self._lasts:  # what follows a token found in the text is a new text
            return False
        if behind == " ":
            is_apart = before + self._space not in self._pairs and not self._firsts & {behind, second}
            return is_apart and self._known(self._space) and bool(self._is_usual(second))
        alone = not self._prefix or self._space + behind not in self._pairs
        is_apart = before + behind not in self._pairs and behind not in self._firsts
        is_alone = is_apart and alone and bool(self._is_usual(behind) and self._may_follow(second))
        return is_alone and self._known(behind)


def _side_by_side(facts: Mapping[str, Any], specials_are_text: bool = True) -> Cuts | None:
    """Return cuts by what stands side by side in the vocabulary, for a model that is given no words.

    So are Llama 2's and Mistral's (Metaspace without ``split``, or ``▁`` put there by normalizers) and Gemma's.
    """
    added, normalizers = _added_tokens(facts, specials_are_text), flat_parts(facts.get("normalizer"), "normalizers")
    model, before = facts.get("model") or {}, flat_parts(facts.get("pre_tokenizer"), "pretokenizers")
    marks = [part for part in normalizers if part["type"] not in _UNICODE_FORMS]
    is_plain = model.get("type", "BPE") in ("BPE", "Unigram") and not any(model.get(name) for name in _NOT_PLAIN)
    # A token that takes spaces or the end of a word into account looks at what a cut takes away.
    is_plain &= not any(token.get(name) for token in added for name in ("lstrip", "rstrip", "single_word"))
    metaspaces = [part for part in before if part["type"] == "Metaspace" and part.get("replacement") == SPACE]
    prepends = [part for part in marks if part == {"type": "Prepend", "prepend": SPACE}]
    replaces = [part for part in marks if part == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    is_known_form = len(before) == len(metaspaces) <= 1 and len(marks) == len(prepends) + len(replaces)
    if not is_plain or not is_known_form or max(len(prepends), len(replaces)) > 1 or (metaspaces and marks):
        return None
    if prepends and not replaces:
        return None
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        vocabulary = {piece for piece, _ in vocabulary}
    fallback = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    prefix = "always" if prepends else "missing" if metaspaces and _puts_space(metaspaces[0]) else ""
    if prefix and SPACE not in vocabulary:
        return None
    return SideBySide(
        vocabulary,
        lambda character: bool(fallback) or character in vocabulary,
        space=SPACE if metaspaces or replaces else " ",
        prefix=prefix,
        added=[token["content"] for token in added],
        kept_only=len(marks) < len(normalizers),
        by_pairs=model.get("type", "BPE") == "BPE",
    )


_NOT_PLAIN = (*_NOT_BY_PAIRS, "ignore_merges")


def _puts_space(metaspace: Mapping[str, Any]) -> bool:
    return metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never") != "never"


# --- SentencePiece -------------------------------------------------------------------------------------------------


def sentencepiece_cuts(processor: Any) -> Cuts | None:
    """Return the cuts of a SentencePiece model, all by what stands side by side in its vocabulary."""
    model = _fields(processor.serialized_model_proto())
    trainer, normalizer = _fields(model.get(2, [b""])[0]), _fields(model.get(3, [b""])[0])
    is_plain = (
        trainer.get(3, [_UNIGRAM])[-1] in (_UNIGRAM, _BPE) and not trainer.get(24, [0])[-1]
    )  # treat_whitespace_as_suffix
    if not is_plain or not normalizer.get(5, [1])[-1]:  # escape_whitespaces
        return None
    size = processor.get_piece_size()
    numbers = [n for n in range(size) if not processor.is_control(n) and not processor.is_byte(n)]
    vocabulary = {processor.id_to_piece(n) for n in numbers if not processor.is_unknown(n)}
    has_prefix, strips = (bool(normalizer.get(number, [1])[-1]) for number in (3, 4))  # add_dummy_prefix
    if SPACE not in vocabulary or (strips and not has_prefix):  # remove_extra_whitespaces: of every piece
        return None
    has_bytes = bool(trainer.get(35, [0])[-1])  # byte_fallback
    return SideBySide(
        vocabulary,
        lambda character: has_bytes or character in vocabulary,
        prefix="always" if has_prefix else "",
        kept_only=strips or bool(normalizer.get(2, [b""])[-1]),  # precompiled_charsmap: rewrites characters
        by_pairs=trainer.get(3, [_UNIGRAM])[-1] == _BPE,
        symbols=[str(_fields(piece)[1][-1], "utf-8") for piece in model.get(1, []) if piece.endswith(_USER_DEFINED)],
    )


_UNIGRAM, _BPE = 1, 2
_USER_DEFINED = b"\x18\x04"  # how a piece of this type ends


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Return the fields of a protocol buffer by number: integers, and bytes."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        head, at = read_varint(message, at)
        value: int | bytes
        if head & 7 == 0:
            value, at = read_varint(message, at)
        else:
            length, at = read_varint(message, at) if head & 7 == 2 else ({1: 8, 5: 4}[head & 7], at)
            value = message[at : at + length]
            at += length
        found.setdefault(head >> 3, []).append(value)
    return found
