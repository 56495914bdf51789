"""Every way in which input can be bad ends in a count or in one sentence that names the place; never in silence."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from converters import convert
from mixer.errors import DataError, InputError
from mixer.manifest import Manifest
from tests.converters.corpora import documents, tree_hash, write_jsonl

LINES = [json.dumps({"text": text}).encode() for text in documents("web", 100)]
BAD_LINES = {
    "json": (b'{"text": "no end', r"line 31: not valid JSON"),
    "utf8": (b'{"text": "caf\xe9"}', r"line 31: not valid UTF-8"),
    "no_text": (b'{"body": "x"}', r"line 31: no text field 'text'; it has \['body'\]"),
    "no_text ": (b'{"text": 7}', r"line 31: field 'text' holds int, not text"),
    "json ": (b'["text"]', r"line 31: a JSON list, not an object"),
}


def corpus_with(tmp_path: Path, line: bytes) -> Path:
    (tmp_path / "corpus" / "web").mkdir(parents=True)
    (tmp_path / "corpus" / "web" / "a.jsonl").write_bytes(b"\n".join([*LINES[:30], line, *LINES[30:]]) + b"\n")
    return tmp_path / "corpus"


def shards_of(tmp_path: Path, **options: object) -> Manifest:
    given: dict = {"tokenizer": "bytes", "seq_len": 64, **options}
    return convert([tmp_path / "corpus"], tmp_path / "shards", **given)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("reason", BAD_LINES)
def test_bad_record_stops_the_conversion_and_is_named(tmp_path, reason, workers):
    line, message = BAD_LINES[reason]
    corpus_with(tmp_path, line)
    with pytest.raises(DataError, match="a.jsonl, " + message + ".*--on-bad-record skip"):
        shards_of(tmp_path, workers=workers, unit_size=4000)
    assert not list((tmp_path / "shards").rglob("index.json"))
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.parametrize("reason", BAD_LINES)
def test_skipped_record_is_counted_and_named_and_the_rest_converted(tmp_path, reason):
    corpus_with(tmp_path, BAD_LINES[reason][0])
    manifest = shards_of(tmp_path, on_bad_record="skip", unit_size=4000)
    assert manifest.converter["documents_read"] == 101
    assert manifest.converter["skipped"] == {reason.strip(): 1}
    (record,) = manifest.converter["bad_records"]
    assert record["place"] == "corpus/web/a.jsonl, line 31"
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 100


def test_conversion_that_failed_goes_on_with_skip(tmp_path):
    corpus_with(tmp_path, b"{")
    with pytest.raises(DataError):
        shards_of(tmp_path, unit_size=4000)
    resumed = shards_of(tmp_path, unit_size=4000, on_bad_record="skip")
    assert resumed.converter["skipped"] == {"json": 1}


def test_more_bad_records_than_allowed_stop_the_conversion(tmp_path):
    corpus_with(tmp_path, b"\n".join([b"{"] * 3))
    with pytest.raises(DataError, match=r"3 of 103 records are bad.*share of 0.02.*line 31.*--max-bad"):
        shards_of(tmp_path, on_bad_record="skip", max_bad=0.02)
    assert shards_of(tmp_path, on_bad_record="skip", max_bad=0.03).converter["skipped"] == {"json": 3}


def test_places_of_skipped_records_do_not_depend_on_units(tmp_path):
    corpus_with(tmp_path, b"{\n\n{")
    options: dict = {"tokenizer": "bytes", "seq_len": 64, "on_bad_record": "skip", "max_bad": 1}
    one = convert([tmp_path / "corpus"], tmp_path / "one", **options)
    convert([tmp_path / "corpus"], tmp_path / "two", unit_size=500, **options)
    assert [record["place"].split()[-1] for record in one.converter["bad_records"]] == ["31", "33"]
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")


def test_blank_lines_are_no_records_and_empty_texts_are_counted(tmp_path):
    corpus_with(tmp_path, b'\n  \n{"text": ""}')
    manifest = shards_of(tmp_path)
    assert manifest.converter["skipped"] == {"empty": 1}
    assert manifest.domains["web"].skipped == {"empty": 1}
    assert manifest.converter["documents_read"] == 101


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_archive_fails_and_is_named_whatever_the_policy(tmp_path, suffix, damage):
    import bz2
    import lzma

    import zstandard

    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}[suffix]
    data = bytearray(compress(b"\n".join(LINES)))
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
    path = tmp_path / "corpus" / "web" / f"a.jsonl.{suffix}"
    path.parent.mkdir(parents=True)
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(DataError, match=rf"a.jsonl.{suffix}.*(truncated or damaged|not valid)"):
        shards_of(tmp_path, on_bad_record="fail" if damage == "flip" else "skip")
    assert not list(tmp_path.rglob("index.json"))


@pytest.mark.parametrize("keep", [0, 30, 2000])
def test_damaged_parquet_fails_and_is_named(tmp_path, keep):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "corpus" / "web" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": documents("web", 300)}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a.parquet is truncated or damaged"):
        shards_of(tmp_path, on_bad_record="skip")


def test_file_that_is_no_parquet_is_said_to_be_none(tmp_path):
    corpus_with(tmp_path, LINES[0])
    with pytest.raises(DataError, match=r"a.jsonl is truncated or damaged \(Parquet magic bytes not found"):
        shards_of(tmp_path, format="parquet")


def test_null_and_invalid_text_in_parquet_are_bad_records(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "corpus" / "web" / "a.parquet"
    path.parent.mkdir(parents=True)
    texts = pa.array([None, b"caf\xe9", *(text.encode() for text in documents("web", 300))], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())}), path)
    manifest = shards_of(tmp_path, on_bad_record="skip")
    assert manifest.converter["skipped"] == {"no_text": 1, "utf8": 1}
    assert [record["place"] for record in manifest.converter["bad_records"]] == [
        "corpus/web/a.parquet, row 1",
        "corpus/web/a.parquet, row 2",
    ]


def test_binary_and_undecodable_files_in_a_source_tree_are_bad_records(tmp_path):
    tree = tmp_path / "corpus" / "code"
    tree.mkdir(parents=True)
    for number in range(60):
        (tree / f"{number}.py").write_text("print('hello')\n" * 20)
    (tree / "logo.png").write_bytes(b"\x89PNG\0\0")
    (tree / "latin.txt").write_bytes(b"caf\xe9" * 9)
    with pytest.raises(DataError, match=r"(logo.png|latin.txt), line 1: (holds a NUL byte|not valid UTF-8)"):
        shards_of(tmp_path)
    manifest = shards_of(tmp_path, on_bad_record="skip", max_bad=0.1)
    assert manifest.converter["skipped"] == {"binary": 1, "utf8": 1}


def test_byte_order_mark_is_not_text(tmp_path):
    corpus_with(tmp_path, b'{"text": "x"}')
    path = tmp_path / "corpus" / "web" / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert shards_of(tmp_path).converter["skipped"] == {}


def test_record_too_large_for_memory_is_a_bad_record(tmp_path):
    corpus_with(tmp_path, json.dumps({"text": "x" * 20_000}).encode())
    with pytest.raises(DataError, match=r"line 31: longer than 5,000 bytes \(--max-record"):
        shards_of(tmp_path, max_record=5000)
    manifest = shards_of(tmp_path, max_record=5000, on_bad_record="skip")
    assert manifest.converter["skipped"] == {"oversized": 1}
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 100


def test_word_that_a_tokenizer_takes_only_whole_is_oversized_beyond_an_eighth_of_the_limit(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "x" * 3000}), json.dumps({"text": "a b " * 750})]
    corpus_with(tmp_path, "\n".join(lines).encode())
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("converters.tokenizers.LONG_TEXT", 100)
    monkeypatch.setattr("converters.tokenizers.PIECE", 100)
    given = {"tokenizer": tmp_path / "tokenizer.json", "max_record": 20_000, "seq_len": 8}
    with pytest.raises(DataError, match=r"line 31: 3,000 characters that this tokenizer cannot be given in pieces"):
        shards_of(tmp_path, **given)
    manifest = shards_of(tmp_path, on_bad_record="skip", max_bad=0.1, **given)
    assert manifest.converter["skipped"] == {"oversized": 1}
    assert shards_of(tmp_path, fresh=True, **{**given, "max_record": 24_000}).converter["skipped"] == {}


def test_text_that_is_not_long_is_no_word_of_megabytes(tmp_path):
    corpus_with(tmp_path, json.dumps({"text": "x" * 3000}).encode())
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[SEP]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    manifest = shards_of(tmp_path, tokenizer=tmp_path / "tokenizer.json", max_record=4000, seq_len=8)
    assert manifest.converter["skipped"] == {}


def test_record_without_a_domain_is_a_bad_record(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", documents("web", 80), meta={"set": "web"})
    write_jsonl(tmp_path / "corpus" / "b.jsonl", ["lost"])
    with pytest.raises(DataError, match=r"b.jsonl, line 1: no domain by the rule 'field:meta.set'"):
        shards_of(tmp_path, domain="field:meta.set")


@pytest.mark.parametrize("name", [".pack", "manifest.json", "x" * 300])
def test_domain_that_cannot_be_a_folder_is_refused(tmp_path, name):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", documents("web", 80), set=name)
    with pytest.raises(InputError, match="a domain cannot be called"):
        shards_of(tmp_path, domain="field:set")


def test_missing_input_and_dangling_link_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no input at .*corpus"):
        shards_of(tmp_path)
    corpus_with(tmp_path, LINES[0])
    (tmp_path / "corpus" / "web" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"gone.jsonl: it is a link to nothing"):
        shards_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(tmp_path):
    corpus_with(tmp_path, LINES[0])
    (tmp_path / "corpus" / "web" / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*a.jsonl: Permission denied"):
        shards_of(tmp_path)


def test_read_error_in_the_middle_of_a_file_is_named(tmp_path, monkeypatch):
    import errno

    corpus_with(tmp_path, LINES[0])

    class Failing:
        def readline(self, limit: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("converters.readers.open_bytes", lambda path: Failing())
    with pytest.raises(DataError, match=r"cannot read .*a.jsonl: Input/output error"):
        shards_of(tmp_path)


def test_full_disk_is_reported_and_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    import errno

    corpus_with(tmp_path, LINES[0])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("converters.packing.os.fsync", full)
    with pytest.raises(DataError, match=r"no space left while converting into .*shards.*run the same command again"):
        shards_of(tmp_path)
    assert not list(tmp_path.rglob("index.json"))
    monkeypatch.undo()
    assert shards_of(tmp_path).names == ("web",)


def test_file_changed_during_the_conversion_is_noticed(tmp_path, monkeypatch):
    corpus_with(tmp_path, LINES[0])
    path = tmp_path / "corpus" / "web" / "a.jsonl"
    from converters import stage

    original = stage.domain_rule

    def change_then(rule: str):
        os.utime(path, ns=(1, 1))
        return original(rule)

    monkeypatch.setattr("converters.stage.domain_rule", change_then)
    with pytest.raises(DataError, match=r"a.jsonl was changed while it was being converted"):
        shards_of(tmp_path)


def test_quarantined_records_keep_place_reason_and_raw_bytes(tmp_path):
    import base64

    corpus_with(tmp_path, b'{"text": "caf\xe9"}\n{')
    options: dict = {"tokenizer": "bytes", "seq_len": 64, "on_bad_record": "quarantine", "max_bad": 1}
    manifest = convert([tmp_path / "corpus"], tmp_path / "one", **options)
    convert([tmp_path / "corpus"], tmp_path / "two", unit_size=500, workers=2, **options)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")
    assert manifest.converter["quarantine"] == "quarantine.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "one" / "quarantine.jsonl").read_bytes().splitlines()]
    assert [(row["reason"], row["place"]) for row in rows] == [
        ("utf8", "corpus/web/a.jsonl, line 31"),
        ("json", "corpus/web/a.jsonl, line 32"),
    ]
    assert [base64.b64decode(row["raw_base64"]) for row in rows] == [b'{"text": "caf\xe9"}\n', b"{\n"]
    lines = (tmp_path / "corpus" / "web" / "a.jsonl").read_bytes()
    assert lines[rows[1]["offset"] :].startswith(b"{\n")
    assert manifest.domains["web"].skipped == {"json": 1, "utf8": 1}


# --- the defects that other converters were tried with: 100 documents, one defect at the 31st, two processes ---------

TABLE = {
    "malformed JSON": (b'{"text": "no end', "json"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "utf8"),
    "no text": (b'{"id": 7}', "no_text"),
    "NUL in JSON": (b'{"text": "\0"}', "json"),
}


@pytest.mark.parametrize("policy", ["fail", "skip", "quarantine"])
@pytest.mark.parametrize("defect", TABLE)
def test_one_defect_among_100_documents_costs_that_document_or_stops_all(tmp_path, defect, policy):
    line, reason = TABLE[defect]
    (tmp_path / "corpus" / "web").mkdir(parents=True)
    lines = [*LINES[:30], line, *LINES[31:]]
    (tmp_path / "corpus" / "web" / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    given: dict = {"on_bad_record": policy, "workers": 2, "unit_size": 3000, "held_out": 0, "tail": "pad"}
    if policy == "fail":
        with pytest.raises(DataError, match=r"web/a.jsonl, line 31: "):
            shards_of(tmp_path, **given)
        assert not list((tmp_path / "shards").rglob("index.json"))
        return
    manifest = shards_of(tmp_path, **given)
    texts = [text for number, text in enumerate(documents("web", 100)) if number != 30]
    assert manifest.domains["web"].tokens_in == {"train": sum(len(text.encode()) + 1 for text in texts)}
    assert manifest.converter["skipped"] == {reason: 1}
    assert (tmp_path / "shards" / "quarantine.jsonl").exists() == (policy == "quarantine")


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_truncated_archive_stops_all_but_finished_units_are_kept(tmp_path, policy):
    for name in ("code", "web"):
        write_jsonl(tmp_path / "corpus" / name / "a.jsonl", documents(name, 100))
    data = gzip.compress(b"\n".join(LINES))
    (tmp_path / "corpus" / "web" / "b.jsonl.gz").write_bytes(data[: len(data) * 2 // 3])
    given: dict = {"on_bad_record": policy, "max_bad": 1, "workers": 2, "unit_size": 6000}  # larger ones come first
    with pytest.raises(DataError, match=r"web/b.jsonl.gz is truncated or damaged"):
        shards_of(tmp_path, **given)
    assert not list((tmp_path / "shards").rglob("index.json"))
    assert list((tmp_path / "shards" / ".stage" / "units").glob("*/unit.json"))


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_every_record_is_kept_held_out_or_left_out_for_a_counted_reason(tmp_path, policy):
    web, texts = tmp_path / "corpus" / "web", documents("web", 120)
    web.mkdir(parents=True)
    bad = [b"{", b'{"text": "\xff"}', b"[]", b'{"text": null}', b'{"text": ""}', b'{"text": "' + b"x" * 60_000 + b'"}']
    lines = [json.dumps({"text": text}).encode() for text in [*texts, *texts[:7]]]
    (web / "a.jsonl").write_bytes(b"\n".join([*lines[:50], *bad, *lines[50:]]) + b"\n\n \n")
    (web / "b.csv").write_bytes(b"text,n\nfrom csv,1\ntoo,many,2\n")
    (web / "c.txt").write_bytes(b"binary\0")
    (web / "d.warc").write_bytes(
        b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: 1\r\n\r\nx\r\n\r\n"
    )
    write_jsonl(tmp_path / "corpus" / "spam" / "a.jsonl", documents("spam", 9))
    manifest = shards_of(
        tmp_path, on_bad_record=policy, max_bad=1, max_record=50_000, dedupe=True, held_out=0.2, unit_size=3000,
        domain_map={"spam": None},
    )  # fmt: skip
    expected = {
        "binary": 1, "csv": 1, "dropped": 9, "duplicate": 7, "empty": 1, "json": 2, "no_text": 1, "not_text": 1,
        "oversized": 1, "utf8": 1,
    }  # fmt: skip
    assert manifest.converter["skipped"] == expected
    kept = sum(split.num_documents for split in manifest.domains["web"].splits.values())
    assert kept == 121
    assert manifest.domains["web"].splits["validation"].num_documents > 8
    assert manifest.converter["documents_read"] == kept + sum(expected.values())
    intended = ("dropped", "duplicate", "empty")
    named = sum(count for reason, count in expected.items() if reason not in intended)
    assert len(manifest.converter["bad_records"]) == named
    if policy == "quarantine":
        rows = [json.loads(line) for line in (tmp_path / "shards" / "quarantine.jsonl").read_bytes().splitlines()]
        assert sorted(row["reason"] for row in rows) == sorted(
            reason for reason, count in expected.items() if reason not in intended for _ in range(count)
        )
        assert all({"place", "offset", "reason", "detail", "raw_base64"} == row.keys() for row in rows)


def test_file_that_nobody_can_read_is_named(tmp_path):
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("no /proc/self/mem to stand for a file that gives an error when it is read")
    corpus_with(tmp_path, LINES[0])
    (tmp_path / "corpus" / "web" / "b.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"cannot read .*b.jsonl: Input/output error"):
        shards_of(tmp_path, on_bad_record="skip")


def test_input_that_is_no_file_is_named_and_not_waited_for(tmp_path):
    corpus_with(tmp_path, LINES[0])
    os.mkfifo(tmp_path / "corpus" / "web" / "pipe.jsonl")
    with pytest.raises(InputError, match=r"web/pipe.jsonl: a pipe, socket or device is no file.*--exclude"):
        shards_of(tmp_path)
    assert shards_of(tmp_path, exclude=["pipe*"]).converter["documents_read"] == 101
