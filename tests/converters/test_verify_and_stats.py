"""Damage is found and named; statistics are those of the text that went in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

from converters import cli, convert
from converters.locations import write_whole
from converters.statistics import domain_statistics
from converters.training import train_tokenizer
from converters.verifying import verify
from mixer.errors import InputError
from mixer.manifest import Manifest
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl


@pytest.fixture
def shards(tmp_path):
    write_corpus(tmp_path / "corpus")
    options: dict = {"train_tokenizer": 300, "seq_len": 64, "shard_size": 8000}
    convert([tmp_path / "corpus"], tmp_path / "shards", **options)
    return tmp_path / "shards"


def first_shard(shards):
    return sorted((shards / "web" / "train").glob("*.zstd"))[0]


def test_good_shards_have_no_findings(shards):
    assert verify(shards) == []
    assert verify(shards, deep=True, workers=2) == []


@pytest.mark.parametrize(
    "damage, is_deep, message",
    [
        (lambda s: first_shard(s).unlink(), False, "is missing"),
        (lambda s: next(s.glob("inputs.*")).write_text("{}"), False, "is not the list that the manifest names"),
        (lambda s: next(s.glob("inputs.*")).unlink(), False, "is missing"),
        (lambda s: first_shard(s).write_bytes(first_shard(s).read_bytes()[:-1]), False, "its index says"),
        (lambda s: flip(first_shard(s)), True, "has xxh64"),
        (lambda s: (s / "web" / "train" / "index.json").unlink(), False, "is missing"),
        (lambda s: (s / "web" / "train" / "index.json").write_text("{}"), False, "is damaged: no list of shards"),
        (lambda s: edit_index(s), False, "is not the index that the manifest names"),
        (lambda s: flip(s / "tokenizer" / "tokenizer.json"), False, "has sha256"),
        (lambda s: (s / "tokenizer" / "tokenizer.json").unlink(), False, "is missing"),
        (lambda s: edit_manifest(s), False, "tokens came in, but"),
        (lambda s: edit_manifest(s, "text_bytes"), False, "was changed: it does not have the digest"),
        (lambda s: (s / "web" / "train" / "shard.00099.mds").touch(), False, "is a shard that its index does not list"),
    ],
)
def test_every_damage_is_found_and_names_its_file(shards, damage, is_deep, message):
    damage(shards)
    if is_deep:
        assert verify(shards) == []
    findings = verify(shards, deep=is_deep)
    assert findings
    assert any(message in finding.what for finding in findings)
    result = CliRunner().invoke(cli.verify, [str(shards), *(["--deep"] if is_deep else [])], standalone_mode=False)
    assert result.return_value == 1
    assert "To repair:" in result.output


@pytest.mark.parametrize(
    "damage", [lambda s: first_shard(s).unlink(), lambda s: flip(first_shard(s)), lambda s: edit_index(s)]
)
def test_repair_that_is_named_repairs(shards, tmp_path, damage):
    import shutil
    from pathlib import Path

    whole = tree_hash(shards)
    damage(shards)
    findings = verify(shards, deep=True)
    assert all("convert elsewhere by the same options and copy this file" in finding.repair for finding in findings)
    options: dict = {"train_tokenizer": 300, "seq_len": 64, "shard_size": 8000}
    convert([tmp_path / "corpus"], tmp_path / "elsewhere", **options)
    for finding in findings:
        shutil.copy(tmp_path / "elsewhere" / Path(finding.path).relative_to(shards), finding.path)
    assert verify(shards, deep=True) == []
    assert tree_hash(shards) == whole


def test_extension_that_was_killed_while_it_committed_is_to_be_continued(shards, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus" / "web" / "new.jsonl", documents("more web", 100))
    options: dict = {"train_tokenizer": 300, "seq_len": 64, "shard_size": 8000, "extend": True}

    def killed(file, data):
        if file.name == "manifest.json":
            raise KeyboardInterrupt
        write_whole(file, data)

    with monkeypatch.context() as patch:
        patch.setattr("converters.committing.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            convert([tmp_path / "corpus"], tmp_path / "shards", **options)
    assert {finding.repair.partition(":")[0] for finding in verify(shards)} == {"run the same `mixer convert` again"}
    convert([tmp_path / "corpus"], tmp_path / "shards", **options)
    assert verify(shards, deep=True) == []


def test_shards_unpacked_beside_their_own_are_no_finding_unless_they_are_damaged(shards):
    for packed in shards.rglob("*.mds.zstd"):
        packed.with_suffix("").write_bytes(zstandard.decompress(packed.read_bytes()))
    assert verify(shards, deep=True) == []
    copy = first_shard(shards).with_suffix("")
    flip(copy)
    (found,) = verify(shards, deep=True)
    assert (found.path, found.repair) == (str(copy), "remove it; readers unpack shard.00000.mds.zstd again")
    copy.write_bytes(b"short")
    assert [each.path for each in verify(shards)] == [str(copy)]
    copy.unlink()
    assert verify(shards, deep=True) == []


def test_findings_are_counted_and_end_with_one_dot(shards):
    assert "No findings (" in CliRunner().invoke(cli.verify, [str(shards)]).output
    (shards / "web" / "train" / "index.json").unlink()
    output = CliRunner().invoke(cli.verify, [str(shards)], standalone_mode=False).output
    assert "\n1 finding (" in output
    assert "index.json: is missing. To repair:" in output
    (shards / "code" / "train" / "index.json").unlink()
    assert "\n2 findings (" in CliRunner().invoke(cli.verify, [str(shards)], standalone_mode=False).output


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_index(shards):
    path = shards / "web" / "train" / "index.json"
    index = json.loads(path.read_text())
    index["shards"] = index["shards"][1:]
    path.write_text(json.dumps(index))


def edit_manifest(shards, what="dropped_tokens"):
    raw = json.loads((shards / "manifest.json").read_text())
    web = raw["domains"]["web"]
    web[what] = web[what] + 1 if isinstance(web[what], int) else {**web[what], "train": web[what]["train"] + 1}
    (shards / "manifest.json").write_text(json.dumps(raw))


def test_tokens_that_do_not_add_up_are_found(tmp_path):
    write_corpus(tmp_path / "corpus")
    folder = convert_to(tmp_path, "shards", seq_len=64, packing="none", shard_size=4000)
    assert verify(folder, deep=True) == []
    raw = json.loads((folder / "manifest.json").read_text())
    domain = raw["domains"]["web"]
    domain["splits"]["train"]["num_tokens"] += 1
    domain["tokens_in"]["train"] += 1  # so that the manifest agrees with itself
    del raw["converter"]["digest"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert verify(folder) == []
    (finding,) = verify(folder, deep=True)
    assert (finding.path, "its shards hold" in finding.what) == ("manifest.json, domain 'web', train", True)


def test_ids_beyond_the_vocabulary_are_found(shards):
    raw = json.loads((shards / "manifest.json").read_text())
    raw["tokenizer"]["vocab_size"] = 10
    (shards / "manifest.json").write_text(json.dumps(raw))
    assert any("the vocabulary has 10" in finding.what for finding in verify(shards, deep=True))


def test_statistics_are_those_of_the_documents(tmp_path):
    texts = documents("web", 40)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", [*texts, *texts[:20], "x" * 64])
    convert([tmp_path / "corpus"], tmp_path / "out", tokenizer="bytes", seq_len=16, held_out=0)
    (row,) = domain_statistics(tmp_path / "out")
    expected = [len(text.encode()) + 1 for text in [*texts, *texts[:20]]]
    assert row.lengths.tolist()[:60] == expected
    assert math.isclose(row.duplicates, 20 / row.documents)
    assert math.isclose(row.bytes_per_token, 1 - 61 / (sum(expected) + 65))
    assert 0 < row.h2 < row.h1 < 8


@pytest.mark.parametrize("options", [{"packing": "best_fit"}, {"packing": "none"}, {"tail": "pad"}], ids=str)
def test_padding_is_no_text_and_no_document(tmp_path, options):
    texts = documents("web", 40)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", texts)
    (plain,), (padded,) = (
        domain_statistics(convert_to(tmp_path, name, seq_len=2000, held_out=0, **given), max_tokens=10**9)
        for name, given in (("plain", {"packing": "none"}), ("padded", options))
    )
    assert sorted(padded.lengths.tolist()) == sorted(len(text.encode()) + 1 for text in texts)
    assert (padded.documents, padded.tokens, padded.h1) == (40, plain.tokens, pytest.approx(plain.h1))


def convert_to(tmp_path, name, **options):
    convert([tmp_path / "corpus"], tmp_path / name, tokenizer="bytes", **options)
    return tmp_path / name


def test_entropy_of_uniform_bytes_is_eight_bits(tmp_path):
    from converters.statistics import entropies

    h1, h2, distinct = entropies(np.random.default_rng(0).integers(0, 256, 2_000_000).astype(np.uint16))
    assert abs(h1 - 8) < 0.001
    assert abs(h2 - 8) < 0.03
    assert distinct == 256


def test_stats_command_draws_and_prints_json(shards, tmp_path):
    arguments = [str(shards), "--plot", str(tmp_path / "stats.png"), "--json"]
    result = CliRunner().invoke(cli.stats, arguments, catch_exceptions=False)
    assert {row["domain"] for row in json.loads(result.output)} == {"book", "code", "web"}
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert "H2" in CliRunner().invoke(cli.stats, [str(shards)], catch_exceptions=False).output


def test_domain_that_is_one_document_has_no_lengths(tmp_path):
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", ["word " * 50])
    shards = str(convert_to(tmp_path, "out", seq_len=100, held_out=0))
    assert "nan" not in CliRunner().invoke(cli.stats, [shards], catch_exceptions=False).output
    (row,) = json.loads(CliRunner().invoke(cli.stats, [shards, "--json"], catch_exceptions=False).output)
    assert (row["documents"], row["quantiles"], row["tokens"]) == (0, None, 200)


@pytest.mark.parametrize(
    "command, message",
    [
        (["stats", "--split", "test"], r"no domain has a split 'test'; there are \['train', 'validation'\]"),
        (["inspect", "--sample", "1", "--split", "test"], "no domain has a split 'test'"),
        (["stats", "--plot", "stats.doc"], "its name must end in one of .*png"),
        (["stats", "--plot", "nowhere/stats.png"], "there is no such folder"),
    ],
)
def test_what_cannot_be_shown_is_refused_first(shards, command, message):
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(getattr(cli, command[0]), [str(shards), *command[1:]], catch_exceptions=False)


def test_smaller_trained_tokenizer_than_asked_is_told(tmp_path):
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", ["one two three " * 9] * 9)
    manifest = convert([tmp_path / "corpus"], tmp_path / "out", train_tokenizer=400, seq_len=8, held_out=0)
    (warning,) = manifest.converter["warnings"]
    assert warning.startswith(f"the text gave a tokenizer of {manifest.tokenizer.vocab_size} ids, not 400")


def test_a_tokenizer_that_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(InputError, match="it is a folder"):
        train_tokenizer([tmp_path / "nothing"], tmp_path, vocab_size=300)


def test_verify_says_in_a_log_how_far_it_is(shards):
    result = CliRunner().invoke(cli.verify, [str(shards)], catch_exceptions=False)
    assert "100%" in result.stderr and result.stdout.startswith("No findings")


def test_trained_tokenizer_is_the_one_that_convert_trains(tmp_path, shards):
    path = train_tokenizer([tmp_path / "corpus"], tmp_path / "tokenizer.json", vocab_size=300)
    assert path.read_bytes() == (shards / "tokenizer" / "tokenizer.json").read_bytes()
    manifest = convert([tmp_path / "corpus"], tmp_path / "other", tokenizer=path, seq_len=64, shard_size=8000)
    assert manifest.tokenizer == Manifest.load(shards).tokenizer
    assert tree_hash(tmp_path / "other" / "web") == tree_hash(shards / "web")


def test_tokenizer_sample_gives_rare_domains_their_share(tmp_path):
    from converters.options import StageOptions
    from converters.plan import make_plan
    from converters.training import sample_documents

    write_jsonl(tmp_path / "corpus" / "big" / "a.jsonl", [f"b{n:05d}" * 10 for n in range(2000)])
    write_jsonl(tmp_path / "corpus" / "rare" / "a.jsonl", [f"r{n:05d}" * 10 for n in range(20)])
    options = StageOptions()
    texts = sample_documents(make_plan([tmp_path / "corpus"], options, {}).units, options, 4000)
    sizes = {kind: sum(len(text) for text in texts if text[0] == kind) for kind in "br"}
    assert sizes["r"] == 1200  # all it has
    assert 2740 <= sizes["b"] <= 2800


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 257 ids"):
        train_tokenizer([tmp_path], tmp_path / "t.json", vocab_size=256)
