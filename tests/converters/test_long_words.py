"""A word of any length has the ids that it has as a whole, though it is encoded a piece at a time."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from converters import cutting, long_words, word_starts
from converters.cutting import find_cuts, flat_parts
from converters.long_words import Runs, encode_long_word, find_runs
from converters.tokenizers import GigatokenEncoder, HuggingFaceEncoder, SentencePieceEncoder, describe
from converters.word_starts import find_word_starts
from mixer.errors import DataError
from tests.converters.test_cutting import FORMS, PATTERNS, split_by, trained

pytestmark = pytest.mark.once

ALPHABETS = [
    "1,",
    "12 =",
    "กิ่",
    "e\u0301",
    "a\n",
    "ab",
    "AB",
    "a",
    "aB",
    "01",
    " ",
    "=",
    "=-",
    "漢字",
    "漢字かナ",
    "ab0",
    "a=",
    "re",
    "\n",
    "ab漢",
]
AROUND = ["", " ", "'", "a", "A", "1", ".", "\n", "漢", "é", "'r", "_", " a ", "a b", ". A"]


@st.composite
def long_texts(draw) -> str:
    """Texts of some runs: by chance, of one character, or of a pattern again and again."""
    parts = [draw(st.sampled_from(AROUND))]
    for _ in range(draw(st.integers(1, 3))):
        alphabet, length = draw(st.sampled_from(ALPHABETS)), draw(st.integers(1, 300))
        pattern = draw(st.text(alphabet, min_size=1, max_size=30))
        parts += [(pattern * length)[:length], draw(st.sampled_from(AROUND))]
    return "".join(parts)


def by_pieces(encoder: Any, text: str, size: int) -> tuple[list[int], int]:
    """Return the ids of a text by its pieces, and how many of them were not cut between words."""
    ids: list[int] = []
    joined = 0
    for piece, drop in encoder.cuts(text, size):
        rows = [encoder._encode([piece])[0]]
        if encoder.cuts.runs is not None:
            runs, encode = encoder.cuts.runs, lambda piece: encoder._encode([piece])[0]
            rows = list(encode_long_word(piece, size, runs, encode, encoder.spell))
        joined += len(rows) - 1
        ids += np.concatenate(rows)[drop:].tolist()
    return ids, joined


@pytest.fixture(autouse=True)
def short_overlap(monkeypatch):
    monkeypatch.setattr(long_words, "OVERLAP", 40)
    monkeypatch.setattr(cutting, "OVERLAP", 40)
    monkeypatch.setattr(word_starts, "_SETTLED", 40)


CORPUS = [
    *(" ".join(f"ab{'ab' * n} {'a' * n} {'AB' * n} {'B' * n} re{'a' * n}" for n in range(1, 12)) for _ in range(3)),
    *("".join(random.Random(seed).choices("ab", k=200)) for seed in range(20)),
    *("".join(random.Random(seed).choices("AB01=- 漢字かナ", k=200)) for seed in range(20)),
    "=" * 40, " " * 40, "-=" * 20, "0" * 40, "01" * 20, "漢字" * 20, "字か" * 20, "\n" * 20, "a漢" * 20,
]  # fmt: skip
SPLITTERS: dict[str, tuple[Any, Any]] = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, NFKC": (normalizers.NFKC(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, NFD": (normalizers.NFD(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, prefixed": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    **{name: (None, split_by(patterns)) for name, patterns in PATTERNS.items()},
}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    made = {}
    for name, (normalizer, splitter) in SPLITTERS.items():
        for ignore_merges in (False, True):
            tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
            tokenizer.pre_tokenizer = splitter
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator(CORPUS, trainer)
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            file = folder / f"{name}, {ignore_merges}.json"
            tokenizer.save(str(file))
            made[name, ignore_merges] = HuggingFaceEncoder(str(file))
    return made


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("near", [0, 4])
@pytest.mark.parametrize("name", SPLITTERS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=long_texts(), size=st.integers(1, 100))
@example(text="12<tool>" * 50 + "漢1漢" * 50, size=20)
@example(text="'" + "re" * 100 + "'s" + "s" * 200, size=1)
@example(text="a" + " " * 200 + "b" + "\n" * 99 + "c", size=50)
def test_long_words_have_the_ids_of_the_whole(byte_level, monkeypatch, name, near, ignore_merges, text, size):
    monkeypatch.setattr(cutting, "_NEAR", near)
    encoder = byte_level[name, ignore_merges]
    assert by_pieces(encoder, text, size)[0] == encoder._encode([text])[0].tolist()


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize("run", ["A" * 3000, "ab" * 1500, "=" * 3000, "漢字" * 1500, "by chance"])
def test_long_words_are_cut(byte_level, name, run):
    encoder = byte_level[name, False]
    text = "".join(random.Random(0).choices("ab", k=3000)) if run == "by chance" else run
    ids, joined = by_pieces(encoder, text, 200)
    assert ids == encoder._encode([text])[0].tolist()
    is_cut_anyway = "漢" in run and len(list(encoder.cuts(text, 200))) > 1
    assert joined >= 10 or is_cut_anyway


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    made: dict[tuple, HuggingFaceEncoder] = {}

    def encoder(*key: Any) -> HuggingFaceEncoder:
        if key not in made:
            form, across, fallback, added = key
            tokens = [AddedToken("<tool>", normalized=False), AddedToken("ba漢", normalized=True)] if added else []
            file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
            trained(form, across, fallback, tokens).save(str(file))
            made[key] = HuggingFaceEncoder(str(file))
        return made[key]

    return encoder


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("across", [False, True], ids=["words", "across"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=long_texts(), size=st.integers(1, 100), fallback=st.booleans())
@example(text="ab<tool>" + "ab" * 50 + "<to" + "ba漢" * 50 + "ab" * 50, size=50, fallback=True)
def test_long_words_have_the_ids_of_the_whole_by_every_form(forms, form, across, added, text, size, fallback):
    encoder = forms(form, across, fallback, added)
    assert by_pieces(encoder, text, size)[0] == encoder._encode([text])[0].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_long_words_are_cut_by_every_form(forms, form):
    encoder = forms(form, False, True, False)
    text = "".join(random.Random(0).choices("ab", weights=(3, 1), k=3000))
    ids, joined = by_pieces(encoder, text, 200)
    assert ids == encoder._encode([text])[0].tolist()
    assert joined >= 10


REAL = ["gpt-neox", "cl100k_base", "o200k_base"]


def real_file(name: str, request: Any) -> str:
    if name == "gpt-neox":
        return str(request.getfixturevalue("sample_data") / "tokenizers" / "gpt-neox" / "tokenizer.json")
    pytest.importorskip("bpe_openai")
    return str(describe(f"tiktoken:{name}").file)


@pytest.mark.parametrize("backend", ["hf", "gigatoken"])
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_give_long_words_the_ids_of_the_whole(request, monkeypatch, name, backend):
    monkeypatch.setattr(long_words, "OVERLAP", 300)
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    make = GigatokenEncoder if backend == "gigatoken" else HuggingFaceEncoder
    encoder = make(real_file(name, request))
    chance = random.Random(0)
    words = {
        "dna": "".join(chance.choices("ACGT", k=12_000)),
        "lower": "".join(chance.choices("acdeghinorst", k=12_000)),
        "hex": "".join(chance.choices("abcdef", k=12_000)),
        "letter": "a" * 12_000,
        "ten": "abcdefghij" * 1_200,
        "line": "=" * 12_000,
        "rulers": "-=+" * 4_000,
        "chinese": "".join(chance.choices([chr(number) for number in range(0x4E00, 0x5200)], k=12_000)),
        "kana": "".join(chance.choices("あいうえおかきくけこアイウエオ漢字", k=12_000)),
    }
    for word in words:
        text = f"Here is one: {words[word]}\nand {words[word][:3000]}. The end"
        ids, joined = by_pieces(encoder, text, 2000)
        assert ids == encoder._encode([text])[0].tolist(), word
        assert joined >= 5, word


def test_gigatoken_gives_long_words_the_ids_of_the_whole_where_spaces_are_marked(tmp_path):
    pytest.importorskip("gigatoken")
    tokenizer = trained("prepended", True, True, [])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    exact, fast = (make(str(tmp_path / "tokenizer.json")) for make in (HuggingFaceEncoder, GigatokenEncoder))
    text = "".join(random.Random(0).choices(["ab", "a", "b"], k=2000))
    ids, joined = by_pieces(fast, text, 200)
    assert ids == exact._encode([text])[0].tolist()
    assert joined >= 10


def test_sentencepiece_gives_long_words_the_ids_of_the_whole(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("\n".join(" ".join(text.split())[:900] for text in CORPUS))
    for number, options in enumerate([{}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
                                      {"user_defined_symbols": ["abb"], "normalization_rule_name": "identity"},
                                      {"normalization_rule_name": "identity", "add_dummy_prefix": False,
                                       "remove_extra_whitespaces": False}]):  # fmt: skip
        given = {"vocab_size": 400, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2, **options}
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / f"{number}"), **given
        )
        encoder = SentencePieceEncoder(str(tmp_path / f"{number}.model"))
        for seed in range(50):
            chance = random.Random(seed)
            text = "".join(
                chance.choice(["ab", "a", "b", "ba ", "abb", "漢", "AB"]) * chance.randrange(40) for _ in range(99)
            )
            assert by_pieces(encoder, text, 100)[0] == encoder._encode([text])[0].tolist(), (options, seed)
        text = "".join(random.Random(0).choices("ab", k=3000))
        ids, joined = by_pieces(encoder, text, 200)
        assert ids == encoder._encode([text])[0].tolist()
        assert joined >= 10 or "user_defined_symbols" in options


def test_no_runs_where_the_whole_of_a_word_matters():
    for model in (models.WordPiece(unk_token="a"), models.Unigram(), models.BPE(dropout=0.1)):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        assert find_cuts(json.loads(tokenizer.to_str())).runs is None


def test_runs_are_what_a_tokenizer_never_splits():
    splitter = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
    runs = find_runs(lambda text: [place for _, place in splitter.pre_tokenize_str(text)], ["<tool>", "="], False)
    assert runs is not None
    found = {character for character in "1A 漢ก=<\n" if any(re.fullmatch(one, character) for one in runs.characters)}
    assert found == set("A 漢ก\n")


def test_characters_that_a_normalizer_rewrites_are_in_no_run():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kept = find_cuts(json.loads(tokenizer.to_str())).runs
    tokenizer.normalizer = None
    plain = find_cuts(json.loads(tokenizer.to_str())).runs
    found = [
        {one for one in "aA漢" if any(re.fullmatch(each, one) for each in runs.characters)} for runs in (kept, plain)
    ]
    assert found == [{"a", "漢"}, {"a", "A", "漢"}]


LOOKS_BACK = {
    "lookbehind": pre_tokenizers.Split(Regex("(?<=a)b"), "isolated"),
    "border": pre_tokenizers.Split(Regex(r"\bone"), "isolated"),
    "start": pre_tokenizers.Split(Regex("^one|[^a]+"), "isolated"),
    "merged": pre_tokenizers.Split(" ", "merged_with_previous"),
    "prefixed": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "scripts": pre_tokenizers.UnicodeScripts(),
}


@pytest.mark.parametrize("name", LOOKS_BACK)
def test_no_starts_of_words_where_what_stands_before_counts(name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([LOOKS_BACK[name], pre_tokenizers.Digits()])
    facts = json.loads(tokenizer.to_str())
    parts = flat_parts(facts["pre_tokenizer"], "pretokenizers")
    assert find_word_starts(facts, [], parts[1:], True) is not None
    assert find_word_starts(facts, [], parts, True) is None
    assert find_word_starts(facts, [{"content": "one", "single_word": True}], parts[1:], True) is None


NUMBERS = {
    "json": ",".join(f"[{number},{number * 7919 % 1000}]" for number in range(400)),
    "digits": "".join(str(number) for number in range(900)),
    "symbols": "".join(random.Random(0).choices("=-+*/ ", k=3000)),
    "spaces": " " * 3000 + "x",
    "thai": "".join(random.Random(0).choices("กขคงจฉิ่ชซ", k=3000)),
    "mixed": "ACGT" * 300 + "|" + "TTAG" * 200 + "|" + "1;2;" * 300,
}


@pytest.mark.parametrize("added", [[], [AddedToken(" " * 24, normalized=True), AddedToken("<tool>", rstrip=True)]])
@pytest.mark.parametrize("name", SPLITTERS)
def test_numbers_and_symbols_are_cut(byte_level, tmp_path, monkeypatch, name, added):
    monkeypatch.setattr(word_starts, "_SETTLED", 30)
    tokenizer = Tokenizer.from_str(byte_level[name, False]._tokenizer.to_str())
    tokenizer.add_tokens(added)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = HuggingFaceEncoder(str(tmp_path / "tokenizer.json"))
    for kind, numbers in NUMBERS.items():
        text = f"<tool> {numbers}<tool>  12 {numbers}"
        ids, joined = by_pieces(encoder, text, 200)
        assert ids == encoder._encode([text])[0].tolist(), kind
        if "prefixed" not in name and not added:
            assert joined + len(list(encoder.cuts(text, 200))) > 10, kind


def by_length(text: str) -> Any:
    """Return ids that no two pieces have in common, unless they are of the same length."""
    return np.full(len(text), len(text), dtype=np.uint32)


def test_text_is_encoded_whole_from_where_pieces_have_no_token_in_common():
    found = list(encode_long_word("a" * 500, 100, Runs(["a"]), by_length, lambda number: b"a"))
    assert [ids.tolist() for ids in found] == [[500] * 500]
    found = list(encode_long_word("a" * 500, 100, Runs(["b"]), by_length, lambda number: b"a"))
    assert [ids.tolist() for ids in found] == [[500] * 500]


def test_tokens_that_do_not_spell_the_text_are_not_joined():
    found = list(encode_long_word("a" * 500, 100, Runs(["a"]), by_length, lambda number: b"x"))
    assert [ids.tolist() for ids in found] == [[500] * 500]


def test_other_ids_than_those_of_the_pieces_before_are_an_error():
    calls = []

    def encode(text: str) -> Any:
        """The first pieces agree, the third with none, and all of the text has other ids."""
        calls.append(text)
        return np.full(len(text), 1 if len(calls) < 3 else len(calls), dtype=np.uint32)

    with pytest.raises(DataError, match="other tokens as a whole"):
        list(encode_long_word("a" * 500, 100, Runs(["a"]), encode, lambda number: b"a"))
