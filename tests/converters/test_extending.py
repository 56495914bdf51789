"""New inputs add shards; what was there stays, byte for byte, and nothing is counted twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.inspecting import read_samples
from converters.verifying import verify
from mixer.errors import InputError
from mixer.manifest import Manifest
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl

OPTIONS: dict = {"tokenizer": "bytes", "seq_len": 64, "shard_size": 20_000, "held_out": 0.05}


def shard_bytes(shards: Path) -> dict[str, bytes]:
    return {str(path.relative_to(shards)): path.read_bytes() for path in sorted(shards.rglob("*.mds*"))}


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
    return tmp_path / "corpus"


def grow(corpus: Path) -> None:
    write_jsonl(corpus / "web" / "new.jsonl", documents("more web", 200))
    write_jsonl(corpus / "book" / "new.jsonl", documents("more books", 3, words=900))
    write_jsonl(corpus / "wiki" / "new.jsonl", documents("wiki", 100))


def extend(corpus: Path, **options: object) -> Manifest:
    return convert([corpus], corpus.parent / "shards", extend=True, **{**OPTIONS, **options})


def test_finished_shards_stay_and_only_new_inputs_are_added(corpus, tmp_path):
    before, old = shard_bytes(tmp_path / "shards"), Manifest.load(tmp_path / "shards")
    grow(corpus)
    manifest = extend(corpus)
    after = shard_bytes(tmp_path / "shards")
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert manifest.names == ("book", "code", "web", "wiki")
    assert manifest.domains["code"] == old.domains["code"]
    assert verify(tmp_path / "shards", deep=True) == []
    for name, count in {"web": 500, "book": 5, "wiki": 100}.items():
        assert sum(split.num_documents for split in manifest.domains[name].splits.values()) == count
    assert not list((tmp_path / "shards").glob(".*"))
    assert len(list((tmp_path / "shards").glob("inputs.*.jsonl"))) == 1


def test_held_out_documents_are_chosen_as_before(corpus, tmp_path):
    old = Manifest.load(tmp_path / "shards")
    grow(corpus)
    manifest = extend(corpus)
    direct = convert([corpus], tmp_path / "direct", **OPTIONS)
    assert manifest.domains["web"].held_out == old.domains["web"].held_out
    assert manifest.split("web", "validation").num_documents == direct.split("web", "validation").num_documents
    assert manifest.split("book", "validation") == old.split("book", "validation")  # split by samples: new ones train


def test_new_samples_are_the_new_documents(corpus, tmp_path):
    old = Manifest.load(tmp_path / "shards").split("book", "train").num_samples
    grow(corpus)
    manifest = extend(corpus)
    rows = read_samples(tmp_path / "shards" / manifest.split("book", "train").path, "tokens", 1 << 30)
    added = np.concatenate(rows[old:])
    expected = b"\0".join(text.encode() for text in documents("more books", 3, words=900))
    assert bytes(np.where(added == 256, 0, added).astype(np.uint8)) == expected[: len(added)]


def test_extending_again_with_nothing_new_changes_nothing(corpus, tmp_path):
    grow(corpus)
    extend(corpus)
    before = tree_hash(tmp_path / "shards")
    extend(corpus)
    assert tree_hash(tmp_path / "shards") == before


@pytest.mark.parametrize("stop_at", range(2, 14, 2))
def test_interrupted_extension_leaves_the_old_shards_readable_and_goes_on(corpus, tmp_path, monkeypatch, stop_at):
    import os

    grow(corpus)
    convert([corpus], tmp_path / "twin", **OPTIONS)  # only so that both corpora exist before the kill
    real, left = os.replace, stop_at

    class Stopped(BaseException):
        pass

    def stopping(source, target):
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopping)
        with pytest.raises(Stopped):
            extend(corpus)
    assert Manifest.load(tmp_path / "shards").names == ("book", "code", "web")
    extend(corpus, workers=2)
    assert verify(tmp_path / "shards", deep=True) == []
    resumed = tree_hash(tmp_path / "shards")
    for name in ("web/new.jsonl", "book/new.jsonl", "wiki/new.jsonl"):
        (corpus / name).rename(tmp_path / name.replace("/", "-"))
    convert([corpus], tmp_path / "shards", fresh=True, **OPTIONS)
    for name in ("web/new.jsonl", "book/new.jsonl", "wiki/new.jsonl"):
        (tmp_path / name.replace("/", "-")).rename(corpus / name)
    extend(corpus)
    assert tree_hash(tmp_path / "shards") == resumed


def stopped_extension(corpus: Path, phase: str, **options: object) -> None:
    """Extend until there is a unit, or a shard."""

    def stop(event):
        if event.phase == phase and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(corpus, progress=stop, **options)


@pytest.mark.parametrize("stop_at", ["tokenize", "pack", "commit"])
def test_fresh_extension_starts_over_and_leaves_finished_shards_alone(corpus, tmp_path, monkeypatch, stop_at):
    shutil.copytree(tmp_path / "shards", tmp_path / "before")
    grow(corpus)
    extend(corpus)
    wanted = tree_hash(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    (tmp_path / "before").rename(tmp_path / "shards")
    for name in ("code", "law"):
        write_jsonl(corpus / name / "wrong.jsonl", documents(f"wrong {name}", 90))
    if stop_at == "commit":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("converters.committing._commit", raise_interrupt)
            extend(corpus)
    else:
        stopped_extension(corpus, stop_at)
    for name in ("code", "law"):
        (corpus / name / "wrong.jsonl").unlink()
    with pytest.raises(InputError, match=r"wrong.jsonl is gone.*--extend --fresh, which leaves finished shards alone"):
        extend(corpus)
    extend(corpus, fresh=True)
    assert verify(tmp_path / "shards", deep=True) == []
    (corpus / "law").rmdir()
    assert tree_hash(tmp_path / "shards") == wanted


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_stage_that_is_kept_serves_extensions_too_and_packs_all_of_it_again(corpus, tmp_path, monkeypatch):
    first = [corpus / "web", corpus / "code"]
    stage, web = {"stage": tmp_path / "stage"}, corpus / "web" / "new.jsonl"
    convert(first, tmp_path / "long", **stage, **OPTIONS)
    write_jsonl(web, documents("more web", 200))
    convert(first, tmp_path / "long", extend=True, **stage, **OPTIONS)
    convert([*first, corpus / "book"], tmp_path / "long", extend=True, **stage, **OPTIONS)
    assert sum(split.num_documents for split in Manifest.load(tmp_path / "long").domains["web"].splits.values()) == 500
    assert verify(tmp_path / "long", deep=True) == []
    monkeypatch.setattr("converters.tokenizing.stage_unit", None)  # nothing is tokenised from here on
    late = web.rename(tmp_path / "new.jsonl")
    short = {**OPTIONS, "seq_len": 32}
    convert(first, tmp_path / "short", **stage, **short)
    late.rename(web)
    convert(first, tmp_path / "short", extend=True, **stage, **short)
    manifest = convert([*first, corpus / "book"], tmp_path / "short", extend=True, **stage, **short)
    assert manifest.names == ("book", "code", "web")


def test_stage_kept_inside_does_not_hinder_an_extension_and_stays(corpus, tmp_path):
    convert([corpus / "web"], tmp_path / "kept", keep_stage=True, **OPTIONS)
    convert([corpus / "web", corpus / "code"], tmp_path / "kept", extend=True, **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "kept" / ".stage").iterdir()) == ["lock", "plan.json", "units"]


def test_extension_does_not_take_units_of_another_trained_tokenizer(corpus, tmp_path):
    options: dict = {**OPTIONS, "tokenizer": None, "train_tokenizer": 300, "stage": tmp_path / "stage"}
    convert([corpus / "web"], tmp_path / "one", **options)
    convert([corpus / "web", corpus / "book"], tmp_path / "one", extend=True, **options)
    shutil.rmtree(tmp_path / "stage" / "units")
    convert([corpus / "code"], tmp_path / "two", **options)
    with pytest.raises(InputError, match="tokenizer fingerprint: sha256:"):
        convert([corpus / "code", corpus / "book"], tmp_path / "two", extend=True, **options)


def test_files_may_be_chosen_otherwise_in_an_extension(corpus, tmp_path):
    grow(corpus)
    assert extend(corpus, exclude=["wiki/*"]).names == ("book", "code", "web")
    assert extend(corpus, include=["wiki/*"]).names == ("book", "code", "web", "wiki")
    with pytest.raises(InputError, match=r"seed: 0 -> 1\. An extension has the options of before"):
        extend(corpus, seed=1)


def test_extension_goes_on_where_the_first_conversion_was_killed_before_it_tidied_up(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("converters.workplace.clean_up", lambda *_: None)
        convert([corpus / "web"], tmp_path / "killed", **OPTIONS)
    convert([corpus / "web", corpus / "code"], tmp_path / "killed", extend=True, **OPTIONS)
    assert verify(tmp_path / "killed", deep=True) == []


def test_changed_input_or_option_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="seq_len: 64 -> 32"):
        extend(corpus, seq_len=32)
    with (corpus / "web" / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(InputError, match=r"corpus/web/a.jsonl was converted before and has changed since"):
        extend(corpus)
    with pytest.raises(InputError, match="no folder of shards"):
        convert([corpus], tmp_path / "nowhere", extend=True, **OPTIONS)


def test_text_put_into_the_middle_of_a_large_file_is_a_change(tmp_path):
    large = {"seq_len": 4096, "shard_size": "64MiB"}
    lines = [f'{{"text": "{number} {"x" * 1000}"}}\n' for number in range(3000)]
    file = tmp_path / "corpus" / "web" / "a.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(lines))
    convert([tmp_path / "corpus"], tmp_path / "shards", **{**OPTIONS, **large})
    file.write_text("".join([*lines[:1500], lines[1500] * 2, *lines[1501:]]))  # equal first and last MiB
    with pytest.raises(InputError, match=r"a.jsonl was converted before and has changed since \(3,[\d,]+ -> 3,"):
        extend(tmp_path / "corpus", **large)


def test_files_that_were_converted_under_another_name_are_no_extension(corpus, tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 new files have .* web/a.jsonl, as corpus/web/a.jsonl\. There"):
        convert([corpus / "web"], tmp_path / "shards", extend=True, **OPTIONS)
    write_jsonl(corpus / "web" / "new.jsonl", documents("more web", 200))
    (corpus / "web" / "empty.jsonl").touch()
    manifest = convert([corpus / "web"], tmp_path / "shards", extend=True, **OPTIONS)
    (warning,) = manifest.converter["extensions"][0]["warnings"]
    assert warning.startswith("2 of 4 new files have the content of files that were converted before")


def test_extension_uses_the_tokenizer_that_was_trained_before(tmp_path):
    write_corpus(tmp_path / "corpus")
    options: dict = {**OPTIONS, "tokenizer": None, "train_tokenizer": 300}
    before = convert([tmp_path / "corpus"], tmp_path / "shards", **options)
    grow(tmp_path / "corpus")
    after = convert([tmp_path / "corpus"], tmp_path / "shards", extend=True, **options)
    assert after.tokenizer == before.tokenizer
    assert after.domains["web"].splits["train"].num_samples > before.domains["web"].splits["train"].num_samples


def test_mixer_goes_on_with_extended_shards_where_it_stopped(corpus, tmp_path):
    """Domains that did not grow give the very samples that they would have given; the new ones join."""
    from mixer import MixtureLoader

    options: dict = {"mixture": "uniform", "global_batch_size": 12, "seed": 3}
    before = MixtureLoader(tmp_path / "shards", **options)
    for _ in zip(range(5), before):
        pass
    state = before.state_dict()
    expected = rows_of("code", before, 15)  # 4 of 12 in a batch
    grow(corpus)
    extend(corpus)
    after = MixtureLoader(tmp_path / "shards", **options)
    with pytest.raises(InputError, match="remap"):
        after.load_state_dict(state)
    after.load_state_dict(state, remap=True)
    found = rows_of("code", after, 20)  # 3 of 12: a fourth domain takes its share
    assert len(expected) == len(found) == 60
    assert sorted(map(bytes, found)) == sorted(map(bytes, expected))
    assert len(rows_of("wiki", after, 10)) == 30


def rows_of(domain: str, loader, batches: int) -> np.ndarray:
    """Return the samples of one domain in the next batches."""
    taken = [batch for _, batch in zip(range(batches), loader)]
    number = list(loader.mixer.names).index(domain)
    return np.concatenate([batch["input_ids"][batch["domain_ids"] == number] for batch in taken])


def test_files_of_the_same_name_are_told_apart(tmp_path):
    for number, place in enumerate(("one", "two", "three")):
        write_jsonl(tmp_path / place / "web" / "a.jsonl", documents("web", 40 + number))
    inputs = [tmp_path / place / "web" / "a.jsonl" for place in ("one", "two", "three")]
    given: dict = {"tokenizer": "bytes", "seq_len": 64}
    convert(inputs[:2], tmp_path / "out", **given)
    manifest = convert(inputs, tmp_path / "out", extend=True, **given)
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 40 + 41 + 42
