"""Every format gives back the documents that were written, and says so when it cannot."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters import convert
from converters.options import StageOptions
from converters.plan import make_plan
from converters.readers import FORMATS, Bad
from converters.stage import Document, documents_of
from mixer.errors import DataError, InputError
from tests.converters.corpora import documents, write_jsonl
from tests.converters.formats import MUST_BE_NAMED, WRITERS, arrow_stream


def one_line(texts: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in texts]


def read(inputs, **options) -> list[Document | Bad]:
    plan = make_plan([inputs] if isinstance(inputs, str | os.PathLike) else inputs, StageOptions(**options), {})
    return [row for unit in plan.units for piece in unit.pieces for row in documents_of(piece, StageOptions(**options))]


def texts_of(rows: list[Document | Bad]) -> list[str]:
    assert not [row for row in rows if isinstance(row, Bad)]
    return [row.text for row in rows if isinstance(row, Document)]


def written(tmp_path: Path, kind: str, texts: list[str]) -> tuple[Path, dict]:
    name, write = WRITERS[kind]
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, texts)
    return path, {"format": kind} if kind in MUST_BE_NAMED else {}


def test_every_format_has_a_writer_here():
    assert {*WRITERS, "text"} == set(FORMATS)


@pytest.mark.parametrize("unit_bytes", [None, 300])
@pytest.mark.parametrize("kind", WRITERS)
def test_documents_come_back_as_written(tmp_path, kind, unit_bytes):
    texts = one_line(documents("web", 50))
    path, options = written(tmp_path, kind, texts)
    assert texts_of(read(path, unit_bytes=unit_bytes, **options)) == texts


@pytest.mark.parametrize("kind", ["jsonl", "csv", "warc", "text-lines", "text-blocks", "mds", "arrow"])
def test_documents_come_back_from_gzip(tmp_path, kind):
    texts = one_line(documents("web", 20))
    path, options = written(tmp_path, kind, texts)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert texts_of(read(packed.parent, **options)) == texts


def test_line_breaks_and_quotes_survive_csv(tmp_path):
    texts = ['say "hello",\nthen go', "tab\there", "  spaces  "]
    path, _ = written(tmp_path, "csv", texts)
    assert texts_of(read(path)) == texts


def test_bad_rows_of_csv_are_named_and_the_rest_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2,too,many\n3,caf\xe9\n4,"never closed\n')
    rows = read(path)
    assert [row.text for row in rows if isinstance(row, Document)] == ["good"]
    assert [(row.reason, row.at) for row in rows if isinstance(row, Bad)] == [("csv", 3), ("utf8", 4), ("csv", 5)]


def test_saved_hugging_face_dataset_is_read_without_its_side_files(tmp_path):
    texts = documents("web", 30)
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    arrow_stream(folder / "data-00000-of-00001.arrow", texts)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts_of(read(tmp_path / "set")) == texts


SAVED = Path(__file__).parent / "saved_dataset"  # written by DatasetDict.save_to_disk of datasets 4.8.5


def test_files_that_the_datasets_library_wrote_are_read_in_order(tmp_path):
    import shutil

    shutil.copytree(SAVED, tmp_path / "set")
    cached = tmp_path / "set" / "train" / "cache-1b1d0c.arrow"
    shutil.copy(tmp_path / "set" / "train" / "data-00000-of-00002.arrow", cached)  # as its map() leaves one behind
    rows = read(tmp_path / "set", domain="field:meta.set")
    names = [*(f"train document {n}" for n in range(12)), *(f"validation document {n}" for n in range(4))]
    assert [text.split(" ü")[0] for text in texts_of(rows)] == names
    assert texts_of(rows)[0] == "train document 0 ünïcödé 漢字\nsecond line"
    assert [row.domain for row in rows[:3]] == ["news", "web", "news"]
    assert [row.text for row in read(tmp_path / "set", text_field="{meta.year}", unit_bytes=10)][:2] == ["1990", "1991"]


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_come_back_from_every_compression(tmp_path, suffix):
    compress = COMPRESS[suffix]
    texts = documents("web", 30)
    write_jsonl(tmp_path / "a.jsonl", texts)
    raw = (tmp_path / "a.jsonl").read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    # Archives are often put together: several members or frames in one file are one text.
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl.{suffix}").write_bytes(compress(raw[:half]) + compress(raw[half:]))
    assert texts_of(read(tmp_path / "in")) == texts


@pytest.mark.parametrize("suffix", COMPRESS)
def test_archive_that_goes_on_with_something_else_is_damaged(tmp_path, suffix):
    packed = COMPRESS[suffix](b'{"text": "one"}\n')
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed + bytes(8) + packed)  # zeros are padding
    assert texts_of(read(path)) == ["one", "one"]
    broken = bytearray(packed)
    broken[0] ^= 1  # the libraries for bz2 and xz take that for the end
    for content in (packed + broken, packed + b"rubbish", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a.jsonl.{suffix} is truncated or damaged"):
            read(path)


@pytest.mark.parametrize("kind, group", [("parquet", 7), ("arrow", 7)])
def test_row_groups_are_units_that_give_each_row_once(tmp_path, kind, group):
    texts = one_line(documents("web", 50))
    path, _ = written(tmp_path, kind, texts)
    plan = make_plan([path], StageOptions(unit_bytes=100), {})
    assert len(plan.units) == -(-len(texts) // group)
    each = [[row.text for row in documents_of(piece, StageOptions())] for unit in plan.units for piece in unit.pieces]
    assert [len(rows) for rows in each] == [group] * (len(texts) // group) + [len(texts) % group]
    assert [text for texts in each for text in texts] == texts


def test_dataset_saved_by_the_datasets_library_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = documents("web", 30)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(tmp_path / "set"))
    assert texts_of(read(tmp_path / "set")) == texts


def test_text_written_by_mdswriter_is_read_again(tmp_path):
    streaming = pytest.importorskip("streaming")
    texts = documents("web", 60)
    columns = {"text": "str", "meta": "json"}
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns=columns, compression="zstd", size_limit=4000) as writer:
        for text in texts:
            writer.write({"text": text, "meta": {"set": "news"}})
    rows = read(tmp_path / "mds", domain="field:meta.set")
    assert texts_of(rows) == texts
    assert {row.domain for row in rows} == {"news"}


def test_raw_web_responses_are_bad_records_not_silence(tmp_path):
    path = tmp_path / "a.warc"
    path.write_bytes(
        b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: 6\r\n\r\n<html>\r\n\r\n"
    )
    (row,) = read(path)
    assert isinstance(row, Bad)
    assert (row.reason, row.detail.startswith("a response of application/http")) == ("not_text", True)


@pytest.mark.parametrize("length", ["-1", "-5", "1_0", "x", ""])
def test_record_of_a_web_archive_without_a_length_is_damage(tmp_path, length):
    head = f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
    (tmp_path / "a.wet").write_text(head + "a text of some length\r\n\r\n", newline="")
    with pytest.raises(DataError, match=r"a.wet is truncated or damaged \(a record without a valid Content-Length"):
        read(tmp_path / "a.wet")


def test_json_files_with_one_object_per_line_are_lines_and_others_text(tmp_path):
    write_jsonl(tmp_path / "in" / "c4.00000.json", ["one", "two"])
    (tmp_path / "in" / "package.json").write_text('{\n  "name": "x"\n}')
    assert texts_of(read(tmp_path / "in")) == ["one", "two", '{\n  "name": "x"\n}']


def test_json_that_holds_records_is_never_taken_for_one_text(tmp_path):
    (tmp_path / "lines.json").write_text('{"body": "one"}\n{"body": "two"}\n')
    rows = read(tmp_path / "lines.json")
    assert [row.reason for row in rows if isinstance(row, Bad)] == ["no_text", "no_text"]
    for indent in (None, 2):
        (tmp_path / "array.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=indent))
        with pytest.raises(InputError, match=r"array.json is one JSON array, .*one object per line"):
            read(tmp_path / "array.json")


def test_text_is_joined_from_fields_or_made_by_a_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"title": "T", "body": "B", "meta": {"year": 1999}}) + "\n" + '{"title": "T"}\n')
    rows = read(path, text_field="title,body")
    assert isinstance(rows[0], Document)
    assert rows[0].text == "T\n\nB"
    assert isinstance(rows[1], Bad)
    assert rows[1].detail.startswith("no text field 'body'")
    assert read(path, text_field="# {title} ({meta.year})\n{body}")[0] == Document("# T (1999)\nB", rows[0].domain)


@pytest.mark.parametrize("spec", ["", "a,,b", "{", "{}", "no field {{}}", "{a!r}"])
def test_wrong_text_rule_is_refused(spec):
    with pytest.raises(InputError, match=r"text (field|template)"):
        StageOptions(text_field=spec)


def test_mapping_renames_merges_and_drops_domains(tmp_path):
    for name in ("cc", "c4", "spam", "wiki"):
        write_jsonl(tmp_path / "in" / name / "a.jsonl", documents(name, 40))
    (tmp_path / "map.json").write_text('{"cc": "web", "c4": "web", "spam": null}')
    manifest = convert(
        [tmp_path / "in"], tmp_path / "out", tokenizer="bytes", seq_len=32, domain_map=tmp_path / "map.json"
    )
    assert manifest.names == ("web", "wiki")
    assert manifest.converter["skipped"] == {"dropped": 40}
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 80
    assert manifest.converter["warnings"] == []
    (tmp_path / "map.json").write_text('["web"]')
    with pytest.raises(InputError, match="a domain mapping is a JSON object"):
        convert([tmp_path / "in"], tmp_path / "x", tokenizer="bytes", seq_len=32, domain_map=tmp_path / "map.json")


@pytest.mark.parametrize("rule", ["folder", "field:set"])
def test_names_of_a_mapping_that_no_record_has_are_told(tmp_path, rule):
    for name in ("spam", "wiki"):
        write_jsonl(tmp_path / "in" / name / "a.jsonl", documents(name, 40), set=name)
    mapping = {"spam": None, "wikii": "encyclopedia", "books": "prose", "*": "web"}
    given: dict = {"tokenizer": "bytes", "seq_len": 32, "domain": rule, "unit_size": 2000}
    (warning,) = convert([tmp_path / "in"], tmp_path / "out", domain_map=mapping, **given).converter["warnings"]
    assert warning.startswith("--domain-map names ['books', 'wikii'], which no record has as its domain;")
    assert "after it there are ['web']. Is a name misspelt?" in warning


def test_globs_lists_and_named_inputs_are_found(tmp_path, monkeypatch):
    for name in ("a/x.jsonl", "a/y.txt", "b/z.jsonl"):
        write_jsonl(tmp_path / name, [name])
    monkeypatch.chdir(tmp_path)
    assert texts_of(read("*/*.jsonl")) == ["a/x.jsonl", "b/z.jsonl"]
    assert [row.domain for row in read("*/*.jsonl")] == ["a", "b"]
    assert [row.domain for row in read("a/**/x*")] == ["a"]
    (tmp_path / "list.txt").write_text("# corpora\nnews=b/z.jsonl\n\na/x.jsonl\n")
    assert [row.domain for row in read("@list.txt")] == ["news", "a"]
    with pytest.raises(InputError, match=r"no input at c/\*"):
        read("c/*")
    for again in ("a/x.jsonl", "./a", str(tmp_path / "a" / "x.jsonl")):
        with pytest.raises(InputError, match="comes in twice"):
            read(["a", again])


def test_globs_mean_what_they_mean_elsewhere(tmp_path, monkeypatch):
    for name in ("top.py", "build/made.py", "src/deep/er.py", "lang=en/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(read(tmp_path, include=("**/*.py",), exclude=("build/",))) == ["src/deep/er.py", "top.py"]
    monkeypatch.chdir(tmp_path)
    assert texts_of(read("./lang=*/a.txt")) == ["lang=en/a.txt"]  # no domain of that name
    with pytest.raises(InputError, match=r"no input at src/x=1\."):
        read("src/x=1")


def test_list_of_inputs_may_come_from_another_system(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "ü" / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes("\ufeffü\r\n".encode())
    assert texts_of(read("@list.txt")) == ["one"]


def test_links_that_lead_round_in_a_circle_are_named(tmp_path):
    write_jsonl(tmp_path / "in" / "a" / "x.jsonl", ["one"])
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "a")
    assert texts_of(read(tmp_path / "in")) == ["one", "one"]
    (tmp_path / "in" / "a" / "round").symlink_to(tmp_path / "in")
    with pytest.raises(InputError, match=r"in/(a|again)/round is a link to a folder that it lies in.*--exclude"):
        read(tmp_path / "in")
    assert texts_of(read(tmp_path / "in", exclude=("round",))) == ["one", "one"]
    (tmp_path / "in" / "a" / "more").symlink_to(tmp_path / "in")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "b.jsonl").write_text("hidden")
    for pattern in ("in/**/*.jsonl", "in/**", "**/x.jsonl"):  # two circles would take for ever
        assert texts_of(read(tmp_path / pattern)) == ["one"]


def test_file_name_that_is_no_text_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"text": "one"}\n')
    with pytest.raises(InputError, match=r"the name of b'.*caf.xe9.jsonl' is not UTF-8"):
        read(tmp_path)


def test_integers_are_domains_and_what_else_is_there_is_said(tmp_path):
    rows = [{"text": "a", "meta": {"cluster": 7}}, {"text": "b", "meta": {"cluster": 0.5}}, {"text": "c"}]
    rows.append({"text": "d", "meta": {"set": 1}})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three, four = read(tmp_path / "a.jsonl", domain="field:meta.cluster")
    assert isinstance(one, Document)
    assert one.domain == "7"
    assert isinstance(two, Bad)
    assert two.detail == "no domain by the rule 'field:meta.cluster': it holds float"
    assert isinstance(three, Bad)
    assert three.detail == (
        "no domain by the rule 'field:meta.cluster': no field 'meta.cluster'; it has ['text']:"
        " name one with --domain field:NAME"
    )
    assert isinstance(four, Bad)
    assert "no field 'meta.cluster'; it has ['meta.set']" in four.detail
    (lost, *_) = read(tmp_path / "a.jsonl", domain="path:^(x)")
    assert isinstance(lost, Bad)
    assert lost.detail == "no domain by the rule 'path:^(x)' in 'a.jsonl'"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_are_there_are_named_where_the_text_is_not(tmp_path, kind):
    path, _ = written(tmp_path, kind, ["one"])
    (row,) = read(path, text_field="body")
    assert isinstance(row, Bad)
    assert row.detail == "no text field 'body'; it has ['id', 'text']: name it with --text-field"


def test_inputs_behind_a_url_give_the_same_documents(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    texts = documents("web", 50)
    write_jsonl(tmp_path / "in" / "web" / "a.jsonl", texts)
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/web/a.jsonl", (tmp_path / "in" / "web" / "a.jsonl").read_bytes())
    memory.pipe("/corpus/web/b.jsonl.gz", gzip.compress(b'{"text": "last"}\n'))
    rows = read("memory://corpus", unit_bytes=500)
    assert texts_of(rows) == [*texts, "last"]
    assert {row.domain for row in rows} == {"web"}
    assert read("memory://corpus/web/*.gz") == read("memory://corpus/web/b.jsonl.gz") == [Document("last", "web")]
    with pytest.raises(InputError, match="no input at memory://nothing"):
        read("memory://nothing")


def test_inputs_behind_http_are_read(tmp_path):
    pytest.importorskip("aiohttp")
    import functools
    import http.server
    import threading

    write_jsonl(tmp_path / "web" / "a.jsonl", documents("web", 20))
    (tmp_path / "web" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/web/a.jsonl"
        assert texts_of(read(f"other={url}")) == documents("web", 20)
        rows = read(f"{url}.gz?signature=a/b.txt")  # what comes behind the name is none of it
        assert texts_of(rows) == ["one"]
        assert {row.domain for row in rows} == {"web"}
        server.shutdown()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_verdicts_or_one_named_error_but_never_another_crash(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(WRITERS)))
    tmp_path = tmp_path_factory.mktemp("fuzz")
    path, _ = written(tmp_path, kind, one_line(documents("web", 12)))
    zipped = data.draw(st.sampled_from(["", "", *COMPRESS])) if kind != "parquet" else ""
    if zipped:
        packed = path.with_name(f"{path.name}.{zipped}")
        packed.write_bytes(COMPRESS[zipped](path.read_bytes()))
        path = packed
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw) - 1)))
    path.write_bytes(raw[:cut])
    try:
        rows = read(path, format=kind)
    except (DataError, InputError) as error:
        assert path.name in str(error), (kind, zipped)
    else:
        assert all(isinstance(row, Document | Bad) for row in rows)


def test_archive_that_takes_too_much_memory_to_unpack_is_refused_by_name(tmp_path):
    write_jsonl(tmp_path / "plain" / "a.jsonl", documents("web", 3))
    content = (tmp_path / "plain" / "a.jsonl").read_bytes()
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packed.compress(content) + packed.flush())
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 512 << 20}]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content, filters=filters))
    for name in ("a.jsonl.zst", "a.jsonl.xz"):
        with pytest.raises(DataError, match=rf"{name} takes more than 128 MiB of memory to unpack\. Pack it again"):
            read(tmp_path / name)


def test_frames_of_zstd_follow_one_another_wherever_they_end(tmp_path):
    texts = documents("web", 40)
    for number in (1, 7, 40):  # small frames within what is unpacked at a time, and large ones
        rows = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
        frames = [zstandard.compress(b"".join(rows[n : n + number])) for n in range(0, len(rows), number)]
        (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
        assert texts_of(read(tmp_path / "a.jsonl.zst")) == texts
