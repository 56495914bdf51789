"""Documents come back out of the shards, and nothing but the request decides the bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.inspecting import read_samples, shards_encoder
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl

EOS = "<|endoftext|>"


def converted(tmp_path: Path, name: str = "shards", **options: object) -> Path:
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    given: dict = {"tokenizer": "bytes", "seq_len": 64, **options}
    convert([corpus], tmp_path / name, **given)
    return tmp_path / name


def stream_of(shards: Path, domain: str, split: str) -> np.ndarray:
    manifest = Manifest.load(shards)
    rows = read_samples(shards / manifest.split(domain, split).path, "tokens", 1 << 30)
    return np.concatenate(rows)


def test_training_stream_is_the_documents_in_order_each_ended_by_end_of_text(tmp_path):
    shards = converted(tmp_path, held_out=0)
    expected = np.concatenate(
        [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), 256) for text in documents("web", 300)]
    )
    stream = stream_of(shards, "web", "train")
    assert len(stream) == len(expected) // 64 * 64
    assert (stream == expected[: len(stream)]).all()
    assert Manifest.load(shards).domains["web"].dropped_tokens == {"train": len(expected) % 64}


def test_text_comes_back_through_a_trained_tokenizer(tmp_path):
    shards = converted(tmp_path, tokenizer=None, train_tokenizer=400, held_out=0)
    manifest = Manifest.load(shards)
    encoder = shards_encoder(shards, manifest)
    stream = stream_of(shards, "code", "train").tolist()
    assert stream.count(manifest.tokenizer.eos_id) >= 80
    ends = [n for n, token in enumerate(stream) if token == manifest.tokenizer.eos_id]
    pieces = [encoder.decode(stream[a + 1 : b]) for a, b in zip([-1, *ends], ends)]
    assert pieces == documents("code", 90)[: len(pieces)]  # the texts hold a spelled-out <|endoftext|>


def test_held_out_documents_are_those_of_smallest_hash_and_in_no_other_split(tmp_path):
    shards = converted(tmp_path, held_out=0.1)
    manifest = Manifest.load(shards)
    assert manifest.domains["web"].held_out == {"by": "documents", "share": 0.1, "below": f"{int(0.1 * 2**64):x}"}
    encoder = shards_encoder(shards, manifest)
    texts = {split: encoder.decode(stream_of(shards, "web", split).tolist()) for split in ("train", "validation")}
    held = [text for text in documents("web", 300) if text in texts["validation"]]
    assert 10 <= len(held) <= 60
    assert not [text for text in held if len(text) > 30 and text in texts["train"]]
    counts = {split: manifest.split("web", split).num_documents for split in ("train", "validation")}
    assert sum(counts.values()) == 300


def test_domain_of_two_documents_gives_a_share_of_its_samples(tmp_path):
    manifest = Manifest.load(converted(tmp_path, held_out=0.02))
    book = manifest.domains["book"]
    total = sum(split.num_samples for split in book.splits.values())
    held = book.splits["validation"].num_samples
    assert book.held_out == {"by": "samples", "share": held / total}
    assert 1 <= held <= max(8, 0.1 * total)
    assert sum(split.num_documents for split in book.splits.values()) == 2


def test_duplicated_documents_land_in_one_split(tmp_path):
    texts = documents("web", 200, words=20)
    write_jsonl(tmp_path / "corpus" / "web" / "a.jsonl", texts + texts)
    shards = converted(tmp_path, held_out=0.2, seq_len=16)
    manifest = Manifest.load(shards)
    assert all(manifest.split("web", split).num_documents % 2 == 0 for split in ("train", "validation"))


@pytest.mark.parametrize("options", [{"workers": 2}, {"unit_size": 3000}, {"unit_size": 3000, "workers": 3}])
def test_workers_and_unit_size_do_not_change_a_byte(tmp_path, options):
    one = converted(tmp_path, "one", shard_size=8000)
    other = converted(tmp_path, "other", shard_size=8000, **options)
    assert len(list(one.rglob("*.mds.zstd"))) > 6
    assert tree_hash(one) == tree_hash(other)


def test_trained_tokenizer_does_not_depend_on_workers_or_units(tmp_path):
    one = converted(tmp_path, "one", tokenizer=None, train_tokenizer=400)
    other = converted(tmp_path, "other", tokenizer=None, train_tokenizer=400, workers=2, unit_size=5000)
    assert tree_hash(one) == tree_hash(other)


def test_compressed_copies_and_parquet_give_the_same_shards_as_plain_lines(tmp_path):
    import bz2
    import gzip
    import lzma

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    texts = documents("web", 120)
    write_jsonl(tmp_path / "plain" / "web" / "a.jsonl", texts)
    raw = (tmp_path / "plain" / "web" / "a.jsonl").read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    frames = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    packed = {"gz": gzip.compress(raw), "bz2": bz2.compress(raw), "xz": lzma.compress(raw), "zst": frames}
    for suffix, data in packed.items():
        (tmp_path / suffix / "web").mkdir(parents=True)
        (tmp_path / suffix / "web" / f"a.jsonl.{suffix}").write_bytes(data)
    (tmp_path / "parquet" / "web").mkdir(parents=True)
    table = pa.table({"other": list(range(120)), "text": texts})
    pq.write_table(table, tmp_path / "parquet" / "web" / "a.parquet", row_group_size=17)
    hashes = set()
    for kind in ("plain", *packed, "parquet"):
        convert([tmp_path / kind], tmp_path / f"{kind}-shards", tokenizer="bytes", seq_len=32, unit_size=2000)
        hashes.add(tree_hash(tmp_path / f"{kind}-shards" / "web"))
    assert len(hashes) == 1


def test_source_tree_is_one_document_per_file_and_globs_choose_them(tmp_path):
    tree = tmp_path / "tree"
    files = {"lib/a.py": "import os\n", "lib/b.txt": "not this", ".git/x.py": "nor this", "c.py": "x = 1"}
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text * 40)
    options: dict = {"tokenizer": "bytes", "seq_len": 16, "include": ["*.py"], "held_out": 0}
    manifest = convert([f"python={tree}"], tmp_path / "out", **options)
    assert manifest.names == ("python",)
    stream = stream_of(tmp_path / "out", "python", "train")
    assert bytes(stream[stream < 256].astype(np.uint8)).startswith(b"x = 1" * 40 + b"import os\n")


def test_domains_come_from_file_names_fields_and_patterns(tmp_path):
    write_jsonl(tmp_path / "in" / "x" / "news.en.jsonl", documents("a", 20), meta={"pile_set_name": "Pile-CC"})
    write_jsonl(tmp_path / "in" / "x" / "blog.jsonl", documents("b", 20), meta={"pile_set_name": "USPTO Backgrounds"})
    names = {
        rule: convert([tmp_path / "in"], tmp_path / f"out{n}", tokenizer="bytes", seq_len=32, domain=rule).names
        for n, rule in enumerate(["folder", "file", "field:meta.pile_set_name", r"path:/(\w)"])
    }
    assert names == {
        "folder": ("x",),
        "file": ("blog", "news"),
        "field:meta.pile_set_name": ("Pile-CC", "USPTO Backgrounds"),
        r"path:/(\w)": ("b", "n"),
    }


def test_streaming_reads_every_split_with_hash_validation(tmp_path):
    streaming = pytest.importorskip("streaming")
    shards = converted(tmp_path, shard_size=8000)
    manifest = Manifest.load(shards)
    for name in manifest.names:
        for key, split in manifest.domains[name].splits.items():
            local = str(shards / split.path)
            dataset = streaming.StreamingDataset(local=local, batch_size=1, validate_hash="xxh64", shuffle=False)
            assert len(dataset) == split.num_samples
            rows = np.stack([dataset[n]["tokens"] for n in range(len(dataset))])
            assert rows.dtype == np.uint16
            assert (rows.reshape(-1) == stream_of(shards, name, key)).all()


def test_accounting_holds_for_every_domain_and_split(tmp_path):
    shards = converted(tmp_path, keep_stage=True, held_out=0.05)
    manifest = Manifest.load(shards)
    units = [json.loads(path.read_bytes()) for path in shards.glob(".stage/units/*/unit.json")]
    for name, domain in manifest.domains.items():
        tokens_in = sum(unit["domains"].get(name, {}).get("tokens", 0) for unit in units)
        tokens_out = sum(split.num_samples * 64 for split in domain.splits.values())
        assert tokens_in == tokens_out + sum(domain.dropped_tokens.values())
        assert 0 <= sum(domain.dropped_tokens.values()) < 64 * len(domain.splits)


def test_same_command_on_finished_shards_changes_nothing(tmp_path):
    shards = converted(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    converted(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before


def test_another_request_for_the_same_folder_is_refused_with_the_difference(tmp_path):
    converted(tmp_path)
    with pytest.raises(InputError, match=r"seq_len: 64 -> 128"):
        converted(tmp_path, seq_len=128)
    with pytest.raises(InputError, match=r"tokenizer kind: bytes -> None.*tokenizer trained: None -> 300"):
        converted(tmp_path, tokenizer=None, train_tokenizer=300)
    with (tmp_path / "corpus" / "web" / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(InputError, match=r"a.jsonl has [\d,]+ bytes instead of [\d,]+ and other content\."):
        converted(tmp_path)
    assert Manifest.load(converted(tmp_path, seq_len=128, fresh=True)).seq_len == 128


def test_new_inputs_are_named_and_may_be_added(tmp_path):
    converted(tmp_path)
    write_jsonl(tmp_path / "corpus" / "web" / "new.jsonl", documents("new", 40))
    with pytest.raises(InputError, match=r"options: inputs: corpus/web/new.jsonl is new\..* new with --extend,"):
        converted(tmp_path)
    converted(tmp_path, extend=True)
    with pytest.raises(InputError, match=r"options: extensions: 1 -> 0\. Repeat those, .* with --extend, choose"):
        converted(tmp_path)


def test_request_that_led_to_nothing_gives_way_to_another(tmp_path):
    with pytest.raises(DataError, match="no text field 'body'"):
        converted(tmp_path, text_field="body")
    with pytest.raises(InputError, match=r"Lower --seq-len"):
        converted(tmp_path, seq_len=10_000)
    assert Manifest.load(converted(tmp_path, seq_len=32)).seq_len == 32
    assert tree_hash(tmp_path / "shards") == tree_hash(converted(tmp_path, "anew", seq_len=32))


def test_tokenizer_that_another_request_trained_is_not_used(tmp_path):
    def stop(event):
        if event.phase == "tokenize":
            raise KeyboardInterrupt

    options = {"tokenizer": None, "held_out": 0}
    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, train_tokenizer=300, progress=stop, **options)
    assert (tmp_path / "shards" / ".stage" / "tokenizer.json").exists()
    assert Manifest.load(converted(tmp_path, train_tokenizer=320, **options)).tokenizer.vocab_size == 320


@pytest.mark.parametrize("wrong", [{"engine": "slurm"}, {"workers": 0}, {"backend": "rust"}])
def test_fresh_with_a_wrong_option_deletes_nothing(tmp_path, wrong):
    before = tree_hash(converted(tmp_path))
    with pytest.raises(InputError):
        converted(tmp_path, fresh=True, **wrong)
    assert tree_hash(tmp_path / "shards") == before


def test_kept_stage_packs_again_without_tokenising(tmp_path, monkeypatch):
    first = converted(tmp_path, "first", stage=tmp_path / "stage")
    direct = converted(tmp_path, "direct", seq_len=32)
    monkeypatch.setattr("converters.stage.load_encoder", lambda *_: pytest.fail("tokenised again"))
    second = converted(tmp_path, "second", seq_len=32, stage=tmp_path / "stage")
    assert tree_hash(second) == tree_hash(direct) != tree_hash(first)
    with pytest.raises(InputError, match=r"/stage holds a conversion with .*domain: folder -> file.* another --stage"):
        converted(tmp_path, "third", domain="file", stage=tmp_path / "stage")


def test_fresh_removes_only_what_a_conversion_left(tmp_path):
    shards = converted(tmp_path)
    (shards / "notes.txt").write_text("mine")
    converted(tmp_path, fresh=True, seq_len=32)
    assert (shards / "notes.txt").read_text() == "mine"


def test_what_is_written_is_never_an_input(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "corpus" / "shards"
    given: dict = {"tokenizer": "bytes", "seq_len": 64, "stage": tmp_path / "corpus" / "stage"}
    first = convert([corpus], out, **given)
    assert convert([corpus], out, **given) == first
    assert convert([corpus], out, extend=True, **given) == first
    assert first.names == ("book", "code", "web")
    with pytest.raises(InputError, match=r"shards/web lies where shards or stage files are written to"):
        convert([out / "web"], out, **given)


def test_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="neither empty nor a conversion"):
        converted(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": None}, "give either a tokenizer .* or the vocabulary of one to train"),
        ({"tokenizer": "nowhere.json"}, "no tokenizer at nowhere.json"),
        ({"eos": "</s>"}, "the end of text '</s>' is none of a tokenizer that is trained"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"held_out": 1.0}, "held_out is a share"),
        ({"domain": "field:"}, "no domain rule 'field:'"),
        ({"domain": "path:[a-z]+"}, "has no group"),
        ({"compression": "lzma"}, "cannot compress by 'lzma'"),
        ({"hashes": ["crc"]}, "no hash algorithm 'crc'"),
        ({"shard_size": "many"}, "shard_size 'many' is not a size"),
        ({"shard_size": "4GiB"}, "shard_size must be below 4 GiB"),
        ({"shard_size": 10}, r"10 bytes is less than one sample of 64 tokens, which takes \d{3} with"),
        ({"shard_size": 10, "packing": "none"}, "shard_size 10 bytes is less than one sample of 64 tokens"),
        ({"tail": "drop", "packing": "none"}, "--tail drop would be ignored: with --packing none"),
        ({"tail": "pad", "packing": "best_fit"}, "--tail pad would be ignored: with --packing best_fit"),
        ({"retokenize": True}, r"--retokenize would be ignored: .* the first is .*\.jsonl\. Leave it out"),
        ({"tokens_from": "bytes"}, "--tokens-from would be ignored"),
        ({"include": ["*.parquet"]}, "nothing to convert"),
        ({"engine": "carrier-pigeon"}, "no engine 'carrier-pigeon'"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        converted(tmp_path, **options)
    assert not list(tmp_path.rglob("*.mds*"))


def test_domain_too_small_for_a_sample_is_named_with_remedies(tmp_path):
    write_corpus(tmp_path / "corpus")
    write_jsonl(tmp_path / "corpus" / "tiny" / "a.jsonl", ["short"])
    with pytest.raises(InputError, match=r"domain 'tiny' has no train .*6 tokens.*64.*--seq-len.*--allow-empty"):
        converted(tmp_path)
    manifest = Manifest.load(converted(tmp_path, allow_empty=True, fresh=True))
    assert "tiny" not in manifest.domains
    assert "tiny" in manifest.converter["warnings"][0]


@pytest.mark.parametrize("rule", ["folder", "file", "path:^(.*)/"])
@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_domain_without_a_document_is_named_with_its_file(tmp_path, rule, content):
    write_jsonl(tmp_path / "corpus" / "a" / "a.jsonl", documents("a", 40))
    (tmp_path / "corpus" / "b").mkdir()
    (tmp_path / "corpus" / "b" / "b.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"domain 'b' has no document: .*b\.jsonl of \d bytes.*--allow-empty"):
        converted(tmp_path, domain=rule)
    manifest = Manifest.load(converted(tmp_path, domain=rule, allow_empty=True, fresh=True))
    assert list(manifest.domains) == ["a"]
    (warning,) = manifest.converter["warnings"]
    assert "domain 'b' has no document" in warning


def test_named_input_without_a_document_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", documents("a", 40))
    (tmp_path / "empty.txt").touch()
    inputs = [f"one={tmp_path / 'a.jsonl'}", f"two={tmp_path / 'empty.txt'}"]
    with pytest.raises(InputError, match="domain 'two' has no document"):
        convert(inputs, tmp_path / "out", tokenizer="bytes", seq_len=64)


def test_empty_file_is_no_matter_where_its_domain_has_others_or_is_mapped_away(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a" / "a.jsonl", documents("a", 40))
    for name in ("a", "b", "c"):
        (tmp_path / "corpus" / name).mkdir(exist_ok=True)
        (tmp_path / "corpus" / name / "empty.jsonl").touch()
    manifest = Manifest.load(converted(tmp_path, domain_map={"b": None, "c": "a"}))
    assert list(manifest.domains) == ["a"]
    assert manifest.converter["warnings"] == []


def test_domain_of_one_sample_can_be_accepted_without_validation(tmp_path):
    write_corpus(tmp_path / "corpus")
    write_jsonl(tmp_path / "corpus" / "tiny" / "a.jsonl", ["x" * 70])
    with pytest.raises(InputError, match="domain 'tiny' has no validation sample"):
        converted(tmp_path)
    manifest = Manifest.load(converted(tmp_path, allow_empty=True, fresh=True))
    assert list(manifest.domains["tiny"].splits) == ["train"]


def test_damaged_shard_is_named_by_inspect(tmp_path):
    shards = converted(tmp_path)
    shard = next((shards / "web" / "train").glob("*.zstd"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{shard.name} is missing or damaged"):
        stream_of(shards, "web", "train")


def test_moved_corpus_gives_the_same_bytes(tmp_path):
    one = converted(tmp_path, "one")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "corpus", tmp_path / "elsewhere" / "corpus")
    convert([tmp_path / "elsewhere" / "corpus"], tmp_path / "two", tokenizer="bytes", seq_len=64)
    assert tree_hash(one) == tree_hash(tmp_path / "two")


def test_shards_of_the_sample_corpora_hold_all_domains(tmp_path, sample_data):
    tokenizer = sample_data / "tokenizers" / "gpt-neox" / "tokenizer.json"
    inputs = [sample_data / "redpajama-sample" / name for name in ("arxiv", "cc")]
    manifest = convert(inputs, tmp_path / "out", tokenizer=tokenizer, seq_len=512)
    assert manifest.names == ("arxiv", "cc")
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.eos_id == 0
    assert manifest.domains["cc"].held_out["by"] == "samples"
