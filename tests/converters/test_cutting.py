"""A long text has the ids that it has as a whole, wherever it is cut, or by Unigram such as are just as likely; a
tokenizer without such places is not cut."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from converters.cutting import SideBySide, find_cuts
from converters.tiktoken_ranks import NAMES
from converters.tokenizers import HuggingFaceEncoder, SentencePieceEncoder, describe
from converters.training import train_bpe
from tests.converters.corpora import documents

pytestmark = pytest.mark.once

CORPUS = [*documents("web", 60), "a b  ab ba   e\u0301 aa bb two words 00 01 10 <tool>", "漢字 字漢\nab\n\na b\t漢字ab"]
ODD = ["a", "b", "ab", " ", "  ", "▁", "\n", "\t", "\r\n", "漢", "字", "é", "e\u0301", "\u0301", "\u00a0", "ﬁ", "😀"]
ODD += [
    ",",
    ")",
    '"',
    "，",
    "。",
    "。\n",
    "、",
    "！",
    "²",
    "<tool>",
    "<s>",
    "two",
    "words",
    "0",
    "1",
    ".",
    "'s",
    "Ж",
    "x",
    "<",
]
ADVERSARIAL = st.lists(st.sampled_from(ODD), min_size=1, max_size=40).map("".join)

MARK = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
WHOLE = {"pre_tokenizer": pre_tokenizers.Metaspace(split=False)}
FORMS: dict[str, dict[str, Any]] = {
    "metaspace": WHOLE,
    "metaspace, first": {"pre_tokenizer": pre_tokenizers.Metaspace(split=False, prepend_scheme="first")},
    "metaspace, never": {"pre_tokenizer": pre_tokenizers.Metaspace(split=False, prepend_scheme="never")},
    "metaspace, words": {"pre_tokenizer": pre_tokenizers.Metaspace(split=True)},
    "metaspace, first words": {"pre_tokenizer": pre_tokenizers.Metaspace(split=True, prepend_scheme="first")},
    "prepended": {"normalizer": normalizers.Sequence(MARK)},
    "prepended, NFC": {"normalizer": normalizers.Sequence([normalizers.NFC(), *MARK])},
    "replaced": {"normalizer": MARK[1]},
    "as it is": {},
    "byte level, prefixed": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "byte level": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False)},
}


def trained(form: str, across: bool, fallback: bool, added: list[AddedToken]) -> Tokenizer:
    """Return a tokenizer of a form, its merges learned within words or ``across`` them."""
    parts = FORMS[form]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    if "byte level" in form:
        tokenizer.pre_tokenizer = parts["pre_tokenizer"]
    elif across:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    alphabet = [*"ab▁ <", *pre_tokenizers.ByteLevel.alphabet()] if "byte level" in form else list("ab▁ 漢01<tolwrdsx.")
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False,
        limit_alphabet=len(alphabet),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    facts = json.loads(tokenizer.to_str())
    facts["normalizer"] = facts["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_tokens(added)
    return tokenizer


def split_by(patterns: tuple[str, ...]) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


ADDED = {"none": [], "added": [AddedToken("<tool>", normalized=False), AddedToken("two words", normalized=True)]}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    made: dict[tuple, HuggingFaceEncoder] = {}

    def encoder(form: str, across: bool, fallback: bool, added: str, special_tokens: str) -> HuggingFaceEncoder:
        key = (form, across, fallback, added, special_tokens)
        if key not in made:
            file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
            trained(form, across, fallback, ADDED[added]).save(str(file))
            made[key] = HuggingFaceEncoder(str(file), special_tokens)
        return made[key]

    return encoder


def ids_of_pieces(encoder: Any, text: str, size: int) -> tuple[list[int], int]:
    pieces = list(encoder.cuts(text, size)) if encoder.cuts else [(text, 0)]
    ids = [encoder._encode([piece])[0][drop:] for piece, drop in pieces]
    return np.concatenate(ids).tolist(), len(pieces)


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("across", [False, True], ids=["words", "across"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ADVERSARIAL, size=st.integers(1, 6), fallback=st.booleans())
@example(text="ab ab  a b <tool>ab two words ab 漢字 ab", size=1, fallback=True)
@example(text="xЖ漢ЖЖ Жa Ж", size=1, fallback=False)
def test_pieces_have_the_ids_of_the_whole(encoders, form, across, added, special_tokens, text, size, fallback):
    encoder = encoders(form, across, fallback, added, special_tokens)
    assert ids_of_pieces(encoder, text, size)[0] == encoder._encode([text])[0].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_ordinary_text_is_cut_into_pieces_of_about_the_size_asked(encoders, form):
    encoder = encoders(form, False, True, "none", "text")
    text = "ab ba the domain weights 漢字 loss. " * 200
    ids, pieces = ids_of_pieces(encoder, text, 100)
    assert ids == encoder._encode([text])[0].tolist()
    assert pieces > len(text) / 200
    if "byte level" not in form and "words" not in form and "NFC" not in form:  # nor does it need spaces
        ids, pieces = ids_of_pieces(encoder, "漢字。" * 1000, 100)
        assert ids == encoder._encode(["漢字。" * 1000])[0].tolist()
        assert pieces > 10


UNCUT = {
    "words as they are": (models.WordLevel({"<unk>": 0, "▁": 1, "a": 2}, unk_token="<unk>"), WHOLE),
    "dropout": (models.BPE(dropout=0.1), WHOLE),
    "whole words first": (models.BPE(ignore_merges=True), WHOLE),
    "suffixes": (models.BPE(end_of_word_suffix="</w>"), WHOLE),
    "strips texts": (models.BPE(), {"normalizer": normalizers.Sequence([normalizers.Strip(), *MARK])}),
    "prefix without replacement": (models.BPE(), {"normalizer": normalizers.Prepend("_")}),
    "bytes as a whole": (models.BPE(), {"pre_tokenizer": pre_tokenizers.ByteLevel(use_regex=False)}),
}


@pytest.mark.parametrize("name", UNCUT)
def test_tokenizer_that_cannot_be_shown_to_have_cuts_is_given_texts_whole(name):
    model, parts = UNCUT[name]
    tokenizer = Tokenizer(model)
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    assert find_cuts(json.loads(tokenizer.to_str())) is None


def test_token_that_takes_the_spaces_around_it_forbids_cuts_side_by_side():
    tokenizer = trained("prepended", False, True, [AddedToken("<tool>", lstrip=True)])
    assert find_cuts(json.loads(tokenizer.to_str())) is None


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ADVERSARIAL, size=st.integers(1, 6))
def test_tokenizers_of_words_are_cut_between_them(text, size, kind, word_tokenizers):
    encoder = word_tokenizers[kind]
    text = f"{text} a b {text}"
    assert ids_of_pieces(encoder, text, size)[0] == encoder._encode([text])[0].tolist()


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)  # fmt: skip
PATTERNS = {name: (pattern,) for name, (pattern, _) in NAMES.items()} | {"qwen2": (QWEN,), "deepseek_v3": DEEPSEEK}
CHINESE = "一段很长的文字，没有空格。下一句也是如此！" * 50
SPLITTERS: dict[str, tuple[Any, Any, int]] = {  # normalizer, pre-tokenizer, pieces of a long Chinese text at least
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), 20),
    "gpt2, NFKC": (normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False), 20),
    "gpt2, prefixed": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), 1),
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), 20),
    "whitespace": (None, pre_tokenizers.Whitespace(), 20),
    "whitespace, lowercase": (normalizers.Lowercase(), pre_tokenizers.Whitespace(), 1),
    "words": (None, pre_tokenizers.Metaspace(), 1),
    **{name: (None, split_by(patterns), 20) for name, patterns in PATTERNS.items()},
}


@functools.cache
def cuts_of(name: str) -> Any:
    normalizer, splitter, _ = SPLITTERS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return find_cuts(json.loads(tokenizer.to_str()))


@pytest.mark.parametrize("name", SPLITTERS)
@settings(max_examples=200, deadline=None)
@given(text=ADVERSARIAL, size=st.integers(1, 6))
@example(text="字，字。\n字 a，b", size=1)
def test_words_of_pieces_are_those_of_the_whole(name, text, size):
    normalizer, splitter, fewest = SPLITTERS[name]
    cuts = cuts_of(name)

    def words(text: str) -> list[str]:
        normal = normalizer.normalize_str(text) if normalizer is not None else text
        return [word for word, _ in splitter.pre_tokenize_str(normal)]

    assert [word for piece, drop in cuts(text, size) for word in words(piece)[drop:]] == words(text)
    assert len(list(cuts(CHINESE, 10))) >= fewest


@pytest.mark.parametrize("token", ["字，", "a ", " a b", "b\nc", "tool"])
def test_tokens_looked_for_in_the_text_are_never_cut(token):
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken(token, normalized=False, rstrip=token == "tool")])
    cuts = find_cuts(json.loads(tokenizer.to_str()))
    text = f"x{token}字，字 y{token}字 a tool b"
    pieces = [text] if cuts is None else [piece for piece, _ in cuts(text, 1)]
    ids = [number for piece in pieces for number in tokenizer.encode(piece).ids]
    assert ids == tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def word_tokenizers(tmp_path_factory):
    made = {}
    for kind, model in (("unigram", models.Unigram()), ("wordpiece", models.WordPiece(unk_token="<unk>"))):
        tokenizer = Tokenizer(model)
        if kind == "unigram":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
            )
            trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
        else:
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"])
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train_from_iterator(CORPUS, trainer)
        file = tmp_path_factory.mktemp(kind) / "tokenizer.json"
        tokenizer.save(str(file))
        made[kind] = HuggingFaceEncoder(str(file))
    return made


SENTENCEPIECE = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "usual": {},
    "without prefix": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": 0},
    "stripped": {"add_dummy_prefix": False},
    "symbols": {"normalization_rule_name": "identity", "user_defined_symbols": ["<tool>", "two▁words"]},
    "unknown": {"byte_fallback": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "across": {"split_by_whitespace": False, "normalization_rule_name": "identity"},
}


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "lines.txt").write_text("\n".join(" ".join(text.split()) for text in CORPUS * 3))
    made = {}
    for name, options in SENTENCEPIECE.items():
        given = {"vocab_size": 420, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2, **options}
        given |= {} if given["byte_fallback"] else {"vocab_size": 160, "character_coverage": 0.98}
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "lines.txt"), model_prefix=str(folder / name), **given
        )
        made[name] = SentencePieceEncoder(str(folder / f"{name}.model"))
    return made


@pytest.mark.parametrize("name", SENTENCEPIECE)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ADVERSARIAL, size=st.integers(1, 6))
def test_pieces_have_the_ids_of_the_whole_by_sentencepiece(sentencepieces, name, text, size):
    encoder = sentencepieces[name]
    assert ids_of_pieces(encoder, text, size)[0] == encoder._encode([text])[0].tolist()


def test_sentencepiece_texts_are_cut(sentencepieces):
    text = "the domain weights of a loss " * 100
    pieces = {name: ids_of_pieces(sentencepieces[name], text, 50)[1] for name in SENTENCEPIECE}
    assert pieces.pop("stripped") == 1  # a piece that began with a space would lose it
    assert pieces.pop("across") >= 1  # many of its tokens hold spaces
    assert min(pieces.values()) > 20


# --- Unigram, whose sums are rounded -------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A Unigram tokenizer, the score of each of its ids, and the ids that spell what it has no token for."""

    encoder: Any
    scores: NDArray[np.float64]
    unknown: frozenset[int]

    def likelihood(self, ids: list[int]) -> float:
        return float(sum(self.scores[number] for number in ids if number not in self.unknown))

    def unknowns(self, ids: list[int]) -> list[int]:
        return [number for number in ids if number in self.unknown]


@pytest.fixture(scope="module")
def unigrams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unigram")
    made = {name: scored_tokenizer(folder / f"{name}.json", name) for name in UNIGRAMS}
    if importlib.util.find_spec("sentencepiece"):
        lines = "\n".join(" ".join(text.split()) for text in CORPUS * 3)
        made |= {f"sentencepiece, {name}": scored_sentencepiece(folder, name, lines) for name in SENTENCEPIECE}
    return made


UNIGRAMS = [name for name in FORMS if "byte level" not in name and "words" not in name and "NFC" not in name]


def scored_tokenizer(file: Path, form: str) -> Scored:
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    given = {"vocab_size": 200, "special_tokens": ["<unk>"], "unk_token": "<unk>", "show_progress": False}
    learned.train_from_iterator(CORPUS, trainers.UnigramTrainer(**given))
    vocabulary = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["vocab"]]
    vocabulary += [] if "▁" in dict(vocabulary) else [("▁", -5.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0))
    for part, value in FORMS[form].items():
        setattr(tokenizer, part, value)
    tokenizer.save(str(file))
    return Scored(HuggingFaceEncoder(str(file)), np.array([score for _, score in vocabulary]), frozenset([0]))


def scored_sentencepiece(folder: Path, name: str, lines: str) -> Scored:
    import sentencepiece

    (folder / "lines.txt").write_text(lines)
    given = {"byte_fallback": True, "vocab_size": 330, "minloglevel": 2, **SENTENCEPIECE[name]}
    given |= {"hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "lines.txt"), model_prefix=str(folder / name), **given)
    encoder = SentencePieceEncoder(str(folder / f"{name}.model"))
    processor = encoder.processor
    numbers = range(processor.get_piece_size())
    unknown = frozenset(number for number in numbers if processor.is_unknown(number) or processor.is_byte(number))
    return Scored(encoder, np.array([processor.get_score(number) for number in numbers]), unknown)


@pytest.mark.parametrize("name", [*UNIGRAMS, *(f"sentencepiece, {name}" for name in SENTENCEPIECE)])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ADVERSARIAL, size=st.integers(1, 6))
@example(text="aaab aa a bab ab 漢字 Ж <tool> two words " * 20, size=50)
def test_pieces_are_as_likely_as_the_whole_by_unigram(unigrams, name, text, size):
    if name not in unigrams:
        pytest.skip("sentencepiece is not installed")
    tokenizer = unigrams[name]
    ids, _ = ids_of_pieces(tokenizer.encoder, text, size)
    whole = tokenizer.encoder._encode([text])[0].tolist()
    assert tokenizer.encoder.decode(ids) == tokenizer.encoder.decode(whole)
    assert tokenizer.unknowns(ids) == tokenizer.unknowns(whole)
    assert tokenizer.likelihood(ids) == pytest.approx(tokenizer.likelihood(whole), rel=1e-5)


def test_texts_are_cut_by_unigram(unigrams):
    text = "the domain weights of a loss " * 100
    pieces = {name: ids_of_pieces(each.encoder, text, 50)[1] for name, each in unigrams.items()}
    if "sentencepiece, stripped" in pieces:
        assert pieces.pop("sentencepiece, stripped") == 1
        assert pieces.pop("sentencepiece, across") >= 1
    assert min(pieces.values()) > 20


@pytest.mark.parametrize("source", ["trained", "gpt-neox", "cl100k_base"])
def test_long_texts_are_encoded_as_they_are_as_a_whole(request, monkeypatch, tmp_path, source):
    if source == "cl100k_base":
        pytest.importorskip("bpe_openai")
        file = str(describe("tiktoken:cl100k_base").file)
    elif source == "gpt-neox":
        file = str(request.getfixturevalue("sample_data") / "tokenizers" / "gpt-neox" / "tokenizer.json")
    else:
        file = str(tmp_path / "tokenizer.json")
        Path(file).write_text(train_bpe(CORPUS, 500), encoding="utf-8")
    encoder = HuggingFaceEncoder(file)
    code = Path(__file__).read_text()
    texts = ["\n".join(CORPUS), code, "word\n" * 999 + "\r\n\n\n  end", "no line break " * 99, "short"]
    ids, lengths = encoder._encode(texts)
    monkeypatch.setattr("converters.tokenizers.LONG_TEXT", 50)
    monkeypatch.setattr("converters.tokenizers.PIECE", 50)
    assert ids_of_pieces(encoder, code, 50)[1] > 10
    found, how_many = encoder.encode(texts)
    assert (found.tolist(), how_many.tolist()) == (ids.tolist(), lengths.tolist())


def test_a_stretch_without_a_place_to_cut_stays_whole():
    cuts = SideBySide(["aa", "▁a"], lambda character: True, prefix="always")
    assert list(cuts("a" * 50 + " ", 3)) == [("a" * 50 + " ", 0)]
    assert list(cuts("a" * 50 + " bcd", 3)) == [("a" * 50, 0), ("bcd", 0)]
