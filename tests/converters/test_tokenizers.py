"""Ids come back as text; the end of text comes from the converter alone; other backends give the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters import convert, decoded_samples
from converters.tokenizers import (
    decode_long,
    describe,
    load_encoder,
)
from converters.training import train_bpe
from converters.unknown import with_unknown_token
from mixer.errors import InputError
from tests.converters.corpora import documents, tree_hash, write_corpus

ODD = ["a<|endoftext|>b </s>", "cafe\u0301 \u212b", "  \n\n\t x", "0123456789 12 345", "don't I'LL"]
TEXTS = [*documents("web", 60), *ODD]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe(TEXTS, 500), encoding="utf-8")
    return path


def split(ids, lengths) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("kind", ["hf", "bytes"])
def test_texts_come_back_from_their_ids(tokenizer_json, kind):
    info = describe(tokenizer_json if kind == "hf" else kind)
    encoder = load_encoder(info.kind, info.file)
    rows = split(*encoder.encode(TEXTS))
    assert [encoder.decode(row) for row in rows] == TEXTS
    assert all(info.eos_id not in row and max(row, default=0) < info.vocab_size for row in rows)


def test_special_token_in_the_text_is_text(tokenizer_json):
    encoder = load_encoder("hf", str(tokenizer_json))
    assert 0 not in encoder.encode(["<|endoftext|>"])[0]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "lines.txt").write_text("\n".join(" ".join(text.split()) for text in documents("web", 300)))
    options = {"vocab_size": 400, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "spm"), **options
    )
    return folder / "spm.model"


SPECIAL_CASES = ["hf", "gigatoken", "sentencepiece", "bytes", "tiktoken"]


def special_case(name: str, request) -> tuple[tuple, int, str]:
    """Return what to load, the id of the end of text, and how that is spelled."""
    if name == "bytes":
        return ("bytes", None, "hf"), 256, "<|endoftext|>"
    if name == "sentencepiece":
        info = describe(request.getfixturevalue("sentencepiece_model"))
        return (info.kind, info.file, "hf"), info.eos_id, "</s>"
    if name == "tiktoken":
        pytest.importorskip("bpe_openai")
        info = describe("tiktoken:cl100k_base")
        return ("hf", info.file, "hf"), info.eos_id, "<|endoftext|>"
    if name == "gigatoken":
        pytest.importorskip("gigatoken")
    return ("hf", str(request.getfixturevalue("tokenizer_json")), name), 0, "<|endoftext|>"


@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_special_token_in_the_text_becomes_its_id_only_where_asked(name, request):
    source, eos, spelled = special_case(name, request)
    as_text, parsed = load_encoder(*source), load_encoder(*source, "parse")
    text = f"one{spelled}two {spelled}{spelled}"
    assert eos not in as_text.encode([text])[0]
    ids = parsed.encode([text])[0].tolist()
    assert ids.count(eos) == 3
    assert ids[-2:] == [eos, eos]
    assert as_text.decode(as_text.encode([text])[0].tolist()).replace(" ", "") == text.replace(" ", "")
    assert parsed.encode(["plain text"])[0].tolist() == as_text.encode(["plain text"])[0].tolist()


def test_special_tokens_are_part_of_what_is_asked(tmp_path):
    write_corpus(tmp_path / "corpus")
    given: dict = {"tokenizer": "bytes", "seq_len": 64, "held_out": 0}
    text = convert([tmp_path / "corpus"], tmp_path / "text", **given)
    parsed = convert([tmp_path / "corpus"], tmp_path / "parsed", special_tokens="parse", **given)
    assert (text.converter["request"]["special_tokens"], parsed.converter["request"]["special_tokens"]) == (
        "text",
        "parse",
    )
    spelled = sum(text.count("<|endoftext|>") for text in documents("web", 300))
    saved = text.domains["web"].tokens_in["train"] - parsed.domains["web"].tokens_in["train"]
    assert saved == spelled * (len("<|endoftext|>") - 1) > 0
    with pytest.raises(InputError, match="special_tokens: parse -> text"):
        convert([tmp_path / "corpus"], tmp_path / "parsed", **given)
    with pytest.raises(InputError, match=r"special_tokens 'allow' is not one of \['text', 'parse'\]"):
        convert([tmp_path / "corpus"], tmp_path / "x", special_tokens="allow", **given)


def test_gigatoken_writes_the_same_bytes_where_special_tokens_are_parsed(tmp_path, tokenizer_json):
    pytest.importorskip("gigatoken")
    write_corpus(tmp_path / "corpus")
    given: dict = {"tokenizer": tokenizer_json, "seq_len": 64, "special_tokens": "parse"}
    for backend in ("hf", "gigatoken"):
        convert([tmp_path / "corpus"], tmp_path / backend, backend=backend, **given)
    assert tree_hash(tmp_path / "hf") == tree_hash(tmp_path / "gigatoken")


def letters_only() -> dict:
    """Return a tokenizer of the letters a and b, which knows neither bytes nor a token for what is unknown."""
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{**token, "id": id, "content": text, "special": id == 4} for id, text in ((4, "<eos>"), (5, "[b]"))]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "merges": [["a", "b"], ["b", "a"]]}
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_character_that_the_library_would_leave_out_is_refused(tmp_path, special_tokens):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(letters_only()))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.encode("ab aéb").ids == [2, 2]  # without a word, and as if a and b had been neighbours
    encoder = load_encoder("hf", str(path), "hf", special_tokens, 4)
    for text in ("ab ba", "a[b]b", "abba" * 9):
        assert encoder.encode([text])[0].tolist() == theirs.encode(text).ids
    with pytest.raises(InputError, match=r"has no token for 'é' in 'ab aéb' and would leave it out\. Give"):
        encoder.encode(["ab", "ab aéb"])


def test_tokenizer_that_gigatoken_cannot_use_is_refused_in_one_line(tmp_path):
    pytest.importorskip("gigatoken")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(letters_only()))
    with pytest.raises(InputError, match=r"^gigatoken cannot use .*tokenizer\.json: [^\n]+\. Use --backend hf\.$"):
        load_encoder("hf", str(path), "gigatoken", eos_id=4)


def test_byte_level_tokenizer_leaves_nothing_out_unless_it_lacks_a_byte(tokenizer_json):
    facts = json.loads(tokenizer_json.read_text())
    assert with_unknown_token(facts) is None
    del facts["model"]["vocab"]["\u0100"]  # how byte 0 is written
    assert with_unknown_token(facts) is not None


def test_fingerprint_is_of_the_content(tokenizer_json, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(tokenizer_json.read_bytes())
    assert describe(copy).fingerprint == describe(tokenizer_json).fingerprint
    copy.write_bytes(tokenizer_json.read_bytes() + b"\n")
    assert describe(copy).fingerprint != describe(tokenizer_json).fingerprint


def test_end_of_text_is_found_by_configuration_name_or_option(tokenizer_json, tmp_path):
    raw = json.loads(tokenizer_json.read_text())
    raw["added_tokens"][0]["content"] = "<fin>"
    raw["model"]["vocab"]["<fin>"] = raw["model"]["vocab"].pop("<|endoftext|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"no end-of-text token found among its special tokens \['<fin>'\].*--eos"):
        describe(path)
    assert describe(path, eos="<fin>").eos_id == 0
    with pytest.raises(InputError, match="has no token '<end>'"):
        describe(path, eos="<end>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<fin>"}}')
    assert describe(tmp_path).eos_id == 0  # a folder that holds it


def test_folder_may_hold_a_sentencepiece_model(sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    assert describe(tmp_path).fingerprint == describe(sentencepiece_model).fingerprint
    with pytest.raises(InputError, match=r"no tokenizer at .*tokenizer.json: give a tokenizer.json, a .model"):
        describe(tmp_path.parent)


def test_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(InputError, match=r"cannot read .*tokenizer.json"):
        describe(tmp_path)


def test_vocabulary_beyond_uint16_is_stored_as_uint32(tmp_path, tokenizer_json):
    raw = json.loads(tokenizer_json.read_text())
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] |= {f"extra-{n}": n for n in range(len(vocab), 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    write_corpus(tmp_path / "corpus")
    wide = convert([tmp_path / "corpus"], tmp_path / "wide", tokenizer=tmp_path / "tokenizer.json", seq_len=64)
    narrow = convert([tmp_path / "corpus"], tmp_path / "narrow", tokenizer=tokenizer_json, seq_len=64)
    assert (wide.dtype, narrow.dtype) == ("uint32", "uint16")
    samples = [decoded_samples(tmp_path / name, domain="web", count=3) for name in ("wide", "narrow")]
    assert samples[0] == samples[1]


def test_gigatoken_writes_the_same_bytes(tmp_path, tokenizer_json):
    pytest.importorskip("gigatoken")
    write_corpus(tmp_path / "corpus")
    for backend in ("hf", "gigatoken"):
        convert([tmp_path / "corpus"], tmp_path / backend, tokenizer=tokenizer_json, seq_len=64, backend=backend)
    assert tree_hash(tmp_path / "hf") == tree_hash(tmp_path / "gigatoken")


def test_gigatoken_is_refused_where_its_ids_differ(tokenizer_json, monkeypatch):
    pytest.importorskip("gigatoken")
    from converters.tokenizers import GigatokenEncoder, check_gigatoken

    check_gigatoken(str(tokenizer_json), texts=TEXTS)
    monkeypatch.setattr(GigatokenEncoder, "encode", lambda self, texts: (np.array([1, 2]), np.array([2])))
    with pytest.raises(InputError, match=r"gigatoken does not give the ids.*--backend hf"):
        check_gigatoken(str(tokenizer_json), texts=TEXTS)


def test_text_that_a_tokenizer_has_no_token_for_is_shown(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    encoder = load_encoder("hf", str(tmp_path / "tokenizer.json"))
    assert encoder.encode(["a b", "b"])[0].tolist() == [0, 1, 1]
    with pytest.raises(
        InputError, match=r"tokenizer.json cannot encode the text 'a zebra'….*Missing \[UNK\].*must know"
    ):
        encoder.encode(["a b", "a zebra"])


def test_missing_backend_and_unknown_backend_are_refused(tmp_path, tokenizer_json, monkeypatch):
    import sys

    write_corpus(tmp_path / "corpus")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    options: dict = {"tokenizer": tokenizer_json, "seq_len": 64}
    with pytest.raises(InputError, match="pip install gigatoken"):
        convert([tmp_path / "corpus"], tmp_path / "out", backend="gigatoken", **options)
    with pytest.raises(InputError, match="backend 'abacus' is not one of"):
        convert([tmp_path / "corpus"], tmp_path / "out", backend="abacus", **options)


def test_sentencepiece_model_gives_back_the_text(tmp_path, sentencepiece_model):
    write_corpus(tmp_path / "corpus")
    given: dict = {"tokenizer": sentencepiece_model, "seq_len": 64, "held_out": 0}
    manifest = convert([tmp_path / "corpus"], tmp_path / "out", **given)
    assert manifest.tokenizer.kind == "sentencepiece"
    assert manifest.tokenizer.file == "tokenizer/tokenizer.model"
    first = " ".join(documents("web", 1)[0].split())
    shown = decoded_samples(tmp_path / "out", domain="web", count=3)
    assert "".join(shown).replace(" ", "").startswith(first.replace(" ", "")[:100])


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_ranks_become_a_tokenizer_with_the_ids_of_tiktoken(name, tmp_path, monkeypatch):
    pytest.importorskip("bpe_openai")
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken_ext import openai_public

    from converters import tiktoken_ranks

    monkeypatch.setattr(tiktoken_ranks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: tiktoken_ranks.load_ranks(name))
    theirs = tiktoken.Encoding(**getattr(openai_public, name)())
    info = describe(f"tiktoken:{name}")
    assert info.eos_id == theirs.eot_token
    encoder = load_encoder("hf", info.file)
    texts = [*TEXTS, Path(__file__).read_text(), "\r\n \r\n a/b//\n\n  9999 ÀÉñ ǅ test's"]
    assert split(*encoder.encode(texts)) == [theirs.encode_ordinary(text) for text in texts]


def test_unknown_tiktoken_name_is_refused():
    with pytest.raises(InputError, match="no tokenizer 'tiktoken:gpt-9'"):
        describe("tiktoken:gpt-9")


@pytest.mark.parametrize("kind", ["hf", "bytes", "sentencepiece"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("a b漢\ufffd😀\n"), max_size=60), cut=st.integers(0, 9), size=st.integers(1, 9))
def test_many_ids_are_decoded_in_pieces_as_they_are_as_a_whole(tokenizer_json, request, kind, text, cut, size):
    file = str(request.getfixturevalue("sentencepiece_model") if kind == "sentencepiece" else tokenizer_json)
    encoder = load_encoder(kind, file)
    ids = encoder.encode([text])[0][cut:]  # from the middle of a character, too
    assert decode_long(encoder, ids, size) == encoder.decode(ids.tolist())
