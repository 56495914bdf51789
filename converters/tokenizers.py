"""Where token ids come from: one class per kind of tokenizer, one row in ``KINDS``.

    hf              a Hugging Face ``tokenizer.json``, through the ``tokenizers`` library, or faster through gigatoken
    sentencepiece   a ``.model`` of SentencePiece (extra package)
    bytes           the bytes of UTF-8 themselves, 0 to 255, and 256 as end of text

``tiktoken:cl100k_base`` and ``tiktoken:o200k_base`` become a ``tokenizer.json``, see ``converters.tiktoken_ranks``.
An encoder is made once per process from the kind and the file. A special token that is spelled out in a text is text,
and only the converter writes the end-of-text id, unless special tokens are to be parsed: then ``<|endoftext|>`` in a
text becomes its id, and ends a document for all that find documents by that id.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from converters.cutting import SPACE, Cuts, find_cuts, flat_parts, sentencepiece_cuts
from converters.long_words import encode_long_word
from converters.memory import resident_bytes, return_large_blocks, return_memory
from converters.special_tokens import without_special_tokens, without_symbol
from converters.tiktoken_ranks import byte_characters
from converters.unknown import with_unknown_token
from mixer.errors import InputError
from mixer.manifest import TokenizerInfo

__all__ = [
    "BACKENDS",
    "KINDS",
    "SPECIAL_TOKENS",
    "Encoder",
    "check_gigatoken",
    "decode_long",
    "describe",
    "forget_encoders",
    "id_dtype",
    "load_encoder",
]

LONG_TEXT, PIECE = 1 << 18, 1 << 16  # characters: texts beyond this are cut, into pieces of that
SPECIAL_TOKENS = ("text", "parse")

# Names that end-of-text tokens go by, most usual first.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")


class Encoder(Protocol):
    """What a tokenizer does for the converter and for ``inspect``."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the ids of all texts one after another, and how many each has; no special tokens."""

    def encode_long(self, text: str) -> Iterator[NDArray[Any]]:
        """Yield the ids of a text, some at a time, so that those of a long one never lie in memory all at once."""

    def longest_piece(self, text: str) -> int:
        """Return how many characters of a long text must be encoded at once; 0 if it can be cut, or is not long."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, special tokens spelled out."""


def _joined(rows: Iterable[list[int]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    ids, lengths = array("I"), array("q")  # six times as fast as any way through NumPy
    for row in rows:
        ids.fromlist(row)
        lengths.append(len(row))
    return np.frombuffer(ids, np.uint32), np.frombuffer(lengths, np.int64)


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id.

    >>> id_dtype(65_536).name, id_dtype(65_537).name
    ('uint16', 'uint32')
    """
    return np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")


def _spelled(token: str) -> bytes:
    """Return the UTF-8 of a token.

    >>> _spelled("▁one"), _spelled("<0x0A>")
    (b' one', b'\\n')
    """
    if _BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _spelled_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level tokenizer, nothing for any other."""
    return bytes(_BYTES_BY_CHARACTER.get(character, 0) for character in token)


_BYTES_BY_CHARACTER = {character: byte for byte, character in byte_characters().items()}


def _split(ids: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def decode_long(encoder: Encoder, ids: NDArray[Any], size: int = 1 << 16) -> str:
    """Return the text of many ids, decoded in pieces: as Python numbers, all at once would take forty times the memory.

    A piece is what the ids add to the text of a few before them, so that decoders may look at their neighbours; it ends
    where that is known, which is not inside a character.
    """
    pieces, start = [], 0
    while start < len(ids):
        before = max(start - _DECODED_BEFORE, 0)
        known = encoder.decode(ids[before:start].tolist()) if start else ""
        for stop in range(min(start + size, len(ids)), min(start + size + _DECODED_BEFORE, len(ids)) + 1):
            text = encoder.decode(ids[before:stop].tolist())
            if not text.endswith("\ufffd"):
                break
        if not text.startswith(known):
            return encoder.decode(ids.tolist())
        pieces.append(text[len(known) :])
        start = stop
    return "".join(pieces)


_DECODED_BEFORE = 16


_Encoded = tuple[NDArray[Any], NDArray[np.int64]]


class _InPieces(ABC):
    """Gives a library long texts a piece at a time, as far as there are places to cut."""

    _resident = 0  # what this process had when it last gave memory back
    _slack = 8 << 20  # bytes by which that may grow before what was freed is given back again

    @functools.cached_property
    @abstractmethod
    def cuts(self) -> Cuts | None:
        """Where long texts may be cut; looked for when the first is met."""

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> _Encoded:
        """Return what ``encode`` does, by the library as it is."""

    def encode(self, texts: Sequence[str]) -> _Encoded:
        if max(map(len, texts), default=0) <= LONG_TEXT:
            return self._encode(texts)
        rows = [np.concatenate([*self.encode_long(text)]) for text in texts]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    @abstractmethod
    def spell(self, number: int) -> bytes:
        """Return the UTF-8 of a token, a space for each space."""

    def encode_long(self, text: str) -> Iterator[NDArray[Any]]:
        cuts = self.cuts if len(text) > LONG_TEXT else None
        for piece, drop in [(text, 0)] if cuts is None else cuts(text, PIECE):
            if cuts is not None and resident_bytes() > self._resident + self._slack:
                return_memory()
                self._resident = resident_bytes()
            for ids in self._rows(piece):
                yield ids[drop:]
                drop = 0

    def longest_piece(self, text: str) -> int:
        if len(text) <= LONG_TEXT:
            return 0
        if self.cuts is None:
            return len(text)
        runs = self.cuts.runs
        whole = (piece for piece, _ in self.cuts(text, PIECE) if not (runs and runs.first_stop(piece, PIECE)))
        return max((len(piece) for piece in whole if len(piece) > LONG_TEXT), default=0)

    def _rows(self, text: str) -> Iterator[NDArray[Any]]:
        """Yield the ids of a text that is not cut between words."""
        if len(text) > LONG_TEXT and self.cuts is not None and self.cuts.runs is not None:
            return encode_long_word(text, PIECE, self.cuts.runs, lambda piece: self._encode([piece])[0], self.spell)
        return iter(self._encode([text])[:1])


class _TokenizerJson(_InPieces):
    """What is the same for both libraries that read a ``tokenizer.json``."""

    _file: str
    _special_tokens: str
    _outline: Mapping[str, Any]  # all of the file but its tokens

    @functools.cached_property
    def cuts(self) -> Cuts | None:
        return find_cuts(self._outline, self._special_tokens == "text", lambda: _facts(self._file))


class HuggingFaceEncoder(_TokenizerJson):
    """A ``tokenizer.json``."""

    _slack = 16 << 20  # what a piece takes and frees; with less, every page of it is asked for again and again

    def __init__(self, file: str, special_tokens: str = "text", eos_id: int | None = None) -> None:
        # One thread per worker process: the processes are the parallelism.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        content = _content_to_encode_by(file, special_tokens, eos_id)
        return_memory()  # as Python numbers and strings, several times what the tables take
        self._tokenizer = load_tokenizer_json(file, content.json)
        self._unknown, self._is_changed, self._outline = content.unknown, content.is_changed, content.outline
        del content
        return_memory()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = special_tokens == "text"
        self._file, self._special_tokens = file, special_tokens

    def _encode(self, texts: Sequence[str]) -> _Encoded:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # the library raises no others
                raise self._refusal(texts, error) from error
            raise
        ids, lengths = _joined(each.ids for each in encodings)
        if self._unknown is not None and (ids == self._unknown).any():
            raise self._lost_character(texts)
        return ids, lengths

    def _lost_character(self, texts: Sequence[str]) -> InputError:
        """Return the error for texts of which the library would leave out a character, with the first of them."""
        found = ((text, self._tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        text, encoding = next(pair for pair in found if self._unknown in pair[1].ids)
        start, stop = encoding.offsets[encoding.ids.index(self._unknown)]
        around = text[max(start - 30, 0) : stop + 30]
        return InputError(
            f"the tokenizer {self._file} has no token for {text[start:stop]!r} in {around!r} and would leave it out."
            " Give its model a token for what is unknown (unk_token) or all bytes (byte_fallback), or train a tokenizer"
            " with --train-tokenizer."
        )

    def spell(self, number: int) -> bytes:
        return self._spell(self._tokenizer.id_to_token(number))

    @functools.cached_property
    def _spell(self) -> Callable[[str], bytes]:
        types = {part["type"] for part in flat_parts(self._outline.get("pre_tokenizer"), "pretokenizers")}
        return _spelled_bytes if "ByteLevel" in types else _spelled

    def _refusal(self, texts: Sequence[str], error: BaseException) -> InputError:
        """Return the error for texts that the library cannot encode, with the first of them."""
        if len(texts) > 1:
            for text in texts:
                self._encode([text])
        what = " Its model must know a token for what is unknown, or all bytes." if "unk" in str(error).lower() else ""
        return InputError(f"the tokenizer {self._file} cannot encode the text {texts[0][:60]!r}…: {error}.{what}")

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def _decoder(self) -> Any:
        return load_tokenizer_json(self._file) if self._is_changed else self._tokenizer


class _Content(NamedTuple):
    """A ``tokenizer.json`` to encode by.

    Args:
        json: None if it is the file as it is.
        is_changed: whether some token has another name, so that it is not to decode by.
        unknown: an id for what the file's would leave out.
        outline: all of the file but its tokens.
    """

    json: bytes | None = None
    is_changed: bool = False
    unknown: int | None = None
    outline: Mapping[str, Any] = MappingProxyType({})


def _facts(file: str) -> dict[str, Any]:
    return orjson.loads(Path(file).read_bytes())


def _content_to_encode_by(file: str, special_tokens: str, eos_id: int | None) -> _Content:
    try:
        facts = _facts(file)
        is_shorter = _shorten_merges(facts["model"])
        changed, unknown = with_unknown_token(facts) or (None, None)
        if special_tokens == "text":
            changed = without_special_tokens(changed or facts, eos_id) or changed
        outline = _outline(facts)
    except (ValueError, KeyError, TypeError):  # the library will say what is wrong with it
        return _Content()
    is_changed = changed is not None
    content = orjson.dumps(changed or facts) if is_changed or is_shorter else None
    return _Content(content, is_changed, unknown, outline)


def _outline(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**facts, "model": {key: each for key, each in facts["model"].items() if key not in ("vocab", "merges")}}


def _shorten_merges(model: dict[str, Any]) -> bool:
    """Write merges as the library used to, "a b" for ["a", "b"], which it reads in half the memory; return whether
    they are changed, which they are if that says the same."""
    merges = model.get("merges")
    if not merges or any(isinstance(merge, str) for merge in merges):
        return False
    if any(" " in left or " " in right or left.startswith("#version") for left, right in merges):
        return False
    for number, (left, right) in enumerate(merges):  # in place: there may be half a million
        merges[number] = f"{left} {right}"
    return True


def require_gigatoken() -> Any:
    """Return the library. Raises: InputError: if it is not installed."""
    try:
        import gigatoken
    except ImportError as error:
        raise InputError("the backend gigatoken is not installed: pip install gigatoken, or use 'hf'.") from error
    return gigatoken


class GigatokenEncoder(_TokenizerJson):
    """The same ``tokenizer.json`` through gigatoken, which is about twenty times as fast; decodes by ``tokenizers``.

    It remembers every word it has seen, without end; it is loaded anew when that has taken 24 MiB.
    """

    def __init__(self, file: str, special_tokens: str = "text", eos_id: int | None = None) -> None:
        self._file, self._special_tokens, self._eos_id = file, special_tokens, eos_id
        self._new = require_gigatoken().Tokenizer.from_json
        content, self._outline = self._content()
        self._packed = zlib.compress(content, 1)  # a third of it, kept to load it anew
        del content
        self._load()

    def _content(self) -> tuple[bytes, dict[str, Any]]:
        """Return what to encode by, and all of the file but its tokens."""
        with open(self._file, "rb") as file:
            facts = json.load(file)  # orjson keeps some of what it reads, between which memory is not given back
        _shorten_merges(facts["model"])
        outline = _outline(facts)
        if self._special_tokens == "text":  # gigatoken has no switch for it, so it is not told of special tokens
            facts = without_special_tokens(facts, self._eos_id) or facts
            facts["added_tokens"] = [token for token in facts.get("added_tokens", []) if not token.get("special")]
        return orjson.dumps(facts), outline

    def _load(self) -> None:
        self._fast: Any = None  # free the one before
        return_memory()
        try:
            self._fast = self._new(zlib.decompress(self._packed))
        except Exception as error:  # the library raises what Rust does
            why = str(error).partition("\n")[0].removesuffix(".")
            raise InputError(f"gigatoken cannot use {self._file}: {why}. Use --backend hf.") from error
        self._fast.encode(b"")  # makes its tables
        return_memory()
        self._growth = 0

    def spell(self, number: int) -> bytes:
        first = self._fast.decode([number])  # the first of a text may leave out its space
        return self._fast.decode([number, number])[len(first) :]

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids)

    @functools.cached_property
    def _decoder(self) -> HuggingFaceEncoder:
        return HuggingFaceEncoder(self._file, self._special_tokens, self._eos_id)

    def _encode(self, texts: Sequence[str]) -> _Encoded:
        if self._growth > _MAX_GROWTH:
            self._load()
        before = resident_bytes()
        # One by one: its batches are no faster, and need the package awkward and all that this imports. As bytes: of a
        # text it would leave the UTF-8 in it.
        rows = [self._fast.encode(text.encode("utf-8")) for text in texts]
        self._growth += resident_bytes() - before
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.concatenate(rows) if rows else np.empty(0, np.uint32), lengths


def check_gigatoken(
    file: str, special_tokens: str = "text", eos_id: int | None = None, texts: Sequence[str] = ()
) -> None:
    """Raise InputError unless gigatoken gives the ids of the ``tokenizers`` library for these texts."""
    texts = [text[:LONG_TEXT] for text in texts]
    exact = load_encoder("hf", file, "hf", special_tokens, eos_id)
    # One by one: the library takes a hundred times what it is given at once.
    expected = [exact.encode([text])[0] for text in texts]
    del exact
    forget_encoders()  # the tables of two are too many
    fast = load_encoder("hf", file, "gigatoken", special_tokens, eos_id)
    for text, one, other in zip(texts, _split(*fast.encode(texts)), expected):
        if not np.array_equal(one, other):
            raise InputError(
                f"gigatoken does not give the ids of the tokenizers library for the text {text[:60]!r}…"
                f" ({len(one):,} and {len(other):,} tokens). Use --backend hf."
            )


_MAX_GROWTH = 24 << 20


class SentencePieceEncoder(_InPieces):
    """A SentencePiece model. ``special_tokens`` is about its control symbols and the end of text; other symbols that
    users defined are always parsed."""

    def __init__(self, file: str, special_tokens: str = "text", eos_id: int | None = None) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(f"{file} needs the package sentencepiece: pip install sentencepiece.") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=file)
            self._eos_id = self.processor.eos_id() if eos_id is None else eos_id
            if special_tokens == "text" and eos_id is not None and not self.processor.is_control(eos_id):
                changed = without_symbol(self.processor.serialized_model_proto(), eos_id)
                self.processor = sentencepiece.SentencePieceProcessor(model_proto=changed)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file} is not a SentencePiece model: {error}.") from error
        size = self.processor.get_piece_size() if special_tokens == "parse" else 0
        controls = [number for number in range(size) if self.processor.is_control(number)]
        self._specials = {self.processor.id_to_piece(number): number for number in controls}

    @functools.cached_property
    def cuts(self) -> Cuts | None:
        return None if self._specials else sentencepiece_cuts(self.processor)

    def spell(self, number: int) -> bytes:
        return _spelled(self.processor.id_to_piece(number))

    def _encode(self, texts: Sequence[str]) -> _Encoded:
        if not self._specials:
            return _joined(self.processor.encode(list(texts), num_threads=1))
        return _joined([self._parsed(text) for text in texts])

    def _parsed(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _parts(text, self._specials):
            ids += [self._specials[part]] if part in self._specials else self.processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        eos = self._eos_id
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == eos:
                parts.append([])
            else:
                parts[-1].append(int(token))
        return self.processor.id_to_piece(eos).join(map(self.processor.decode, parts))


def _parts(text: str, specials: Iterable[str]) -> list[str]:
    """Return what ``text`` is made of: special tokens, and the texts around them.

    >>> _parts("one</s>two</s></s>", ["</s>"])
    ['one', '</s>', 'two', '</s>', '</s>']
    """
    longest_first = sorted(specials, key=len, reverse=True)
    return [part for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if part]


_END_OF_BYTES = "<|endoftext|>"


class BytesEncoder:
    """The bytes of UTF-8."""

    def __init__(self, file: str | None = None, special_tokens: str = "text", eos_id: int | None = None) -> None:
        self._parse = special_tokens == "parse"

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if self._parse:
            return _joined([self._parsed(text) for text in texts])
        raw = [text.encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(raw), np.uint8), np.fromiter(map(len, raw), np.int64, len(raw))

    def encode_long(self, text: str) -> Iterator[NDArray[Any]]:
        if self._parse:
            yield self.encode([text])[0]
        for start in range(0, 0 if self._parse else len(text), PIECE):
            yield self.encode([text[start : start + PIECE]])[0]

    def longest_piece(self, text: str) -> int:
        return 0

    def _parsed(self, text: str) -> list[int]:
        parts = _parts(text, [_END_OF_BYTES])
        return [id for part in parts for id in ([BYTES.eos_id] if part == _END_OF_BYTES else part.encode("utf-8"))]

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(bytes([token]) if token < 256 else _END_OF_BYTES.encode() for token in ids)
        return raw.decode("utf-8", errors="replace")


KINDS: dict[str, Any] = {"hf": HuggingFaceEncoder, "sentencepiece": SentencePieceEncoder, "bytes": BytesEncoder}
BACKENDS = ("hf", "gigatoken")
BYTES = TokenizerInfo("bytes", "sha256:" + hashlib.sha256(b"utf-8 bytes, end of text 256").hexdigest(), 257, 256)


def load_tokenizer_json(file: str | os.PathLike[str], changed: bytes | None = None) -> Any:
    """Read a ``tokenizer.json``, or its changed content, or say why it cannot be used."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(os.fspath(file)) if changed is None else Tokenizer.from_buffer(changed)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"the installed tokenizers library cannot read {file}: {error}.") from error


_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # in a folder, the first that is there


def describe(tokenizer: str | os.PathLike[str], eos: str | None = None) -> TokenizerInfo:
    """Return the facts of a tokenizer: ``"bytes"``, ``"tiktoken:…"``, a file, or a folder that holds one.

    Args:
        eos: the end-of-text token; by default what ``tokenizer_config.json`` beside the file says, else a usual name.
    Raises: InputError: if there is no such file, or no end-of-text token in it.
    """
    if os.fspath(tokenizer) == "bytes":
        return BYTES
    if os.fspath(tokenizer).startswith("tiktoken:"):
        from converters.tiktoken_ranks import tokenizer_file

        tokenizer = tokenizer_file(os.fspath(tokenizer).removeprefix("tiktoken:"))
    file = Path(tokenizer)
    if file.is_dir():
        names = (name for name in _FILES if (file / name).is_file())
        file = file / next(names, _FILES[0])
    if not file.is_file():
        raise InputError(
            f"no tokenizer at {file}: give a tokenizer.json, a .model of SentencePiece, a folder that holds one,"
            " 'tiktoken:cl100k_base', 'tiktoken:o200k_base' or 'bytes'. That of a model on the Hugging Face Hub must be"
            " downloaded first."
        )
    fingerprint = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    if file.suffix == ".model":
        return _describe_sentencepiece(file, fingerprint, eos)
    vocabulary, added = _vocabulary(file)
    return TokenizerInfo(
        "hf", fingerprint, max(vocabulary.values()) + 1, _eos_id(file, vocabulary, added, eos), str(file)
    )


def _vocabulary(file: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return all tokens with their ids, and the added ones as they stand in the file.

    Read from the JSON, in a tenth of the time that the library takes; by that, where the JSON is not of the usual form.
    """
    try:
        facts = orjson.loads(file.read_bytes())
        added, vocabulary = facts["added_tokens"], facts["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        every = {**vocabulary, **{token["content"]: token["id"] for token in added}}
        if every and all(type(number) is int for number in every.values()):
            return every, added
    except (ValueError, KeyError, TypeError):
        pass
    loaded = load_tokenizer_json(file)
    decoder = loaded.get_added_tokens_decoder().items()
    added = [{"content": token.content, "id": number, "special": token.special} for number, token in decoder]
    return loaded.get_vocab(with_added_tokens=True), added


def _describe_sentencepiece(file: Path, fingerprint: str, eos: str | None) -> TokenizerInfo:
    processor = SentencePieceEncoder(str(file)).processor
    eos_id = processor.eos_id() if eos is None else processor.piece_to_id(eos)
    if eos_id < 0 or (eos is not None and eos_id == processor.unk_id()):
        raise InputError(f"{file} has no end-of-text piece{f' {eos!r}' if eos else ''}; name one of its with --eos.")
    return TokenizerInfo("sentencepiece", fingerprint, processor.get_piece_size(), eos_id, str(file))


def _eos_id(file: Path, vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], eos: str | None) -> int:
    special = {token["content"]: token["id"] for token in added if token["special"]}
    if eos is not None:
        found = vocabulary.get(eos)
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


_HEAP_TOP = {"hf": 16 << 20, "gigatoken": 4 << 20}  # bytes that a batch takes and frees; gigatoken gains by no more


def load_encoder(
    kind: str, file: str | None, backend: str = "hf", special_tokens: str = "text", eos_id: int | None = None
) -> Encoder:
    """Return the encoder, made once per process as long as its file stays the same.

    Args:
        eos_id: the end of text, which is no text either where the tokenizer does not call it special.
    """
    return_large_blocks(_HEAP_TOP[backend])
    version = "" if file is None else str(os.stat(file).st_mtime_ns)
    return _loaded(kind, file, backend, special_tokens, eos_id, version)


def forget_encoders() -> None:
    """Free the memory of this process's encoders."""
    return_large_blocks()
    if _loaded.cache_info().currsize:
        _loaded.cache_clear()
        return_memory()


@functools.lru_cache(maxsize=2)
def _loaded(
    kind: str, file: str | None, backend: str, special_tokens: str, eos_id: int | None, version: str
) -> Encoder:
    if backend == "gigatoken":
        if kind != "hf":
            raise InputError(f"the backend gigatoken reads a tokenizer.json; this tokenizer is of kind {kind!r}.")
        return GigatokenEncoder(str(file), special_tokens, eos_id)
    return KINDS[kind](file, special_tokens, eos_id)
