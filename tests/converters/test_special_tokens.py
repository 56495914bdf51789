"""Whatever the model behind a tokenizer, a special token that is spelled out in a text is text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from converters import convert
from converters.inspecting import read_samples
from converters.special_tokens import without_special_tokens
from converters.tokenizers import describe, load_encoder
from converters.training import train_bpe

tokenizers = pytest.importorskip("tokenizers")
LINES = ["the cat sat on the mat </s> <s> [SEP] and said <eot> </s> hello"] * 40
TEXT = "the cat</s>sat </s> [SEP] on <eot> <s> the mat</s>"


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    specials = ["<unk>", "</s>", "<s>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([*LINES, "</s>[SEP]<eot>"], trainer)
    return made


def of_words(model: object, trainer: object) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(LINES, trainer)
    return made


def word_level() -> tokenizers.Tokenizer:
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False)
    return of_words(tokenizers.models.WordLevel(unk_token="[UNK]"), trainer)


def word_piece() -> tokenizers.Tokenizer:
    trainer = tokenizers.trainers.WordPieceTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False)
    return of_words(tokenizers.models.WordPiece(unk_token="[UNK]"), trainer)


def merges(**options: bool) -> tokenizers.Tokenizer:
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], vocab_size=90, show_progress=False)
    return of_words(tokenizers.models.BPE(unk_token="<unk>", **options), trainer)


def not_called_special() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(train_bpe(LINES, 300))
    made.add_tokens([tokenizers.AddedToken("</s>", special=False), tokenizers.AddedToken("<eot>", special=False)])
    return made


CASES = {
    "Unigram": unigram,
    "WordLevel": word_level,
    "WordPiece": word_piece,
    "merges": merges,
    "whole words": lambda: merges(ignore_merges=True),
    "not called special": not_called_special,
}


@pytest.mark.parametrize("name", CASES)
def test_end_of_text_that_is_spelled_out_is_text_for_every_model(tmp_path, name):
    made, file = CASES[name](), tmp_path / "tokenizer.json"
    made.save(str(file))
    info = describe(file, eos="</s>")
    as_text, parsed = (load_encoder("hf", info.file, "hf", how, info.eos_id) for how in ("text", "parse"))
    ids = as_text.encode([TEXT])[0].tolist()
    assert info.eos_id not in ids
    assert parsed.encode([TEXT])[0].tolist().count(info.eos_id) == 3
    plain = "the cat sat on the mat"
    assert as_text.encode([plain])[0].tolist() == parsed.encode([plain])[0].tolist() == made.encode(plain).ids
    if name in ("Unigram", "not called special"):  # the others know no such characters
        assert as_text.decode(ids) == TEXT
    assert as_text.decode([info.eos_id]) == "</s>"
    if name == "not called special":
        assert made.token_to_id("<eot>") in ids  # as other tokens that were added, which are no end of text


def test_documents_end_where_the_converter_says_by_a_unigram_model(tmp_path):
    unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in" / "web").mkdir(parents=True)
    (tmp_path / "in" / "web" / "a.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(9)))
    given: dict = {"tokenizer": tmp_path / "tokenizer.json", "seq_len": 100, "held_out": 0, "packing": "none"}
    manifest = convert([tmp_path / "in"], tmp_path / "out", eos="</s>", **given)
    rows = read_samples(tmp_path / "out" / "web" / "train", "tokens", 1 << 30)
    assert [np.flatnonzero(row == manifest.tokenizer.eos_id).tolist() for row in rows] == [
        [len(row) - 1] for row in rows
    ]


def test_tokenizer_that_makes_no_special_token_of_text_is_left_as_it_is():
    facts = json.loads(train_bpe(LINES, 300))
    assert without_special_tokens(facts, facts["added_tokens"][0]["id"]) is None


def test_gigatoken_gives_the_same_ids_where_the_end_of_text_is_not_called_special(tmp_path):
    pytest.importorskip("gigatoken")
    not_called_special().save(str(tmp_path / "tokenizer.json"))
    info = describe(tmp_path, eos="</s>")
    exact, fast = (load_encoder("hf", info.file, backend, "text", info.eos_id) for backend in ("hf", "gigatoken"))
    assert fast.encode([TEXT])[0].tolist() == exact.encode([TEXT])[0].tolist()


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_symbol_that_users_defined_is_text_where_it_ends_texts(tmp_path, model):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("\n".join(["the cat sat on the mat hello world"] * 100))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=310, byte_fallback=True,
        model_type=model, user_defined_symbols=["<sep>", "<eot>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    info = describe(tmp_path / "spm.model", eos="<eot>")
    as_text, parsed = (load_encoder(info.kind, info.file, "hf", how, info.eos_id) for how in ("text", "parse"))
    text = "the cat<eot> sat <sep> on<eot>"
    ids = as_text.encode([text])[0].tolist()
    assert (ids.count(info.eos_id), ids.count(info.eos_id - 1)) == (0, 1)  # other symbols stay what they are
    assert as_text.decode(ids) == text
    assert parsed.encode([text])[0].tolist().count(info.eos_id) == 2
    assert (
        as_text.decode([*ids[:2], info.eos_id, *ids[:2]]) == f"{as_text.decode(ids[:2])}<eot>{as_text.decode(ids[:2])}"
    )
