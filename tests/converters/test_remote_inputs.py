"""Text behind URLs: the same shards as from disk, also over a wire that breaks; one clear line where it is no use."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from converters import convert, files, urls
from converters.files import can_seek, open_raw
from mixer.errors import DataError, InputError
from tests.converters.corpora import documents, tree_hash, write_corpus, write_jsonl
from tests.converters.servers import OddHandler, Wire, web_server
from tests.s3 import upload

pytestmark = pytest.mark.once

OPTIONS: dict = {"tokenizer": "bytes", "seq_len": 64, "shard_size": 20_000, "unit_size": 20_000}


@pytest.fixture
def wire(wire, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    return wire


@pytest.fixture
def corpus(tmp_path) -> Path:
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "expected", **OPTIONS)
    return tmp_path / "corpus"


def test_folder_on_s3_gives_the_same_shards_as_on_disk(corpus, tmp_path, s3, wire):
    url = upload(s3[0], corpus, "same/corpus")
    convert([url], tmp_path / "out", workers=2, **OPTIONS)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "expected")


def test_broken_connections_change_nothing(corpus, tmp_path, s3, wire, monkeypatch):
    url = upload(s3[0], corpus, "broken/corpus")
    monkeypatch.setattr(files, "open_raw", functools.partial(open_raw, block_bytes=8192))
    wire.cut = lambda number: 3000 if number % 3 == 1 else None
    convert([url], tmp_path / "out", **OPTIONS)
    assert wire.cuts > 3
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "expected")


def test_glob_on_s3_takes_what_matches(corpus, tmp_path, s3, wire):
    url = upload(s3[0], corpus, "globbed/corpus")
    manifest = convert([f"web={url}/web/*.jsonl"], tmp_path / "out", **OPTIONS)
    assert manifest.names == ("web",)
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 300


@pytest.mark.parametrize("ranges", [True, False], ids=["byte ranges", "no byte ranges"])
def test_file_on_a_web_server_gives_the_same_shards_as_on_disk(tmp_path, ranges):
    write_jsonl(tmp_path / "files" / "a.jsonl", documents("web", 300))
    convert([f"web={tmp_path / 'files' / 'a.jsonl'}"], tmp_path / "expected", **OPTIONS)
    with web_server(tmp_path / "files", ranges) as port:
        url = f"http://127.0.0.1:{port}/a.jsonl"
        assert can_seek(url) == ranges
        convert([f"web={url}"], tmp_path / "out", **OPTIONS)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "expected")


@pytest.mark.parametrize("ranges", [True, False], ids=["byte ranges", "no byte ranges"])
def test_web_server_that_breaks_off_is_asked_again(tmp_path, ranges, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    (tmp_path / "files").mkdir()
    data = bytes(range(256)) * 400
    (tmp_path / "files" / "a.bin").write_bytes(data)
    with web_server(tmp_path / "files", ranges) as port:
        wire = Wire(port)
        wire.cut = lambda number: 20_000 if number in (2, 4, 8) else None
        with open_raw(f"http://127.0.0.1:{wire.port}/a.bin", 50_000) as file:
            found = file.read(1000) + file.read()
            assert file.seek(70_000) == 70_000
            assert file.read(5) == data[70_000:70_005]
        wire.close()
    assert found == data
    assert wire.cuts > 0


@pytest.mark.parametrize("how", ["plain", "moved", "gzip", "busy"])
def test_ways_of_web_servers_change_nothing(tmp_path, how, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    write_jsonl(tmp_path / "files" / "a.jsonl", documents("web", 300))
    convert([f"web={tmp_path / 'files' / 'a.jsonl'}"], tmp_path / "expected", **OPTIONS)
    with web_server(tmp_path / "files", True, OddHandler) as port:
        convert([f"web=http://127.0.0.1:{port}/{how}/a.jsonl"], tmp_path / "out", **OPTIONS)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "expected")


@pytest.mark.parametrize(
    "how, message", [("forbidden", r"in 1 attempt \(403.*Forbidden"), ("loop", r"in 5 attempts \(TooManyRedirects\)")]
)
def test_web_server_that_will_not_is_one_line(tmp_path, how, message, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    write_jsonl(tmp_path / "files" / "a.jsonl", documents("web", 3))
    with web_server(tmp_path / "files", True, OddHandler) as port, pytest.raises(DataError, match=message):
        convert([f"web=http://127.0.0.1:{port}/{how}/a.jsonl"], tmp_path / "out", **OPTIONS)


def test_server_that_is_gone_is_one_line_that_says_how_to_go_on(tmp_path, s3, wire, corpus, monkeypatch):
    url = upload(s3[0], corpus, "gone/corpus")
    wire.cut = lambda number: 0
    monkeypatch.setattr(urls, "ATTEMPTS", 2)
    with pytest.raises(DataError, match=r"cannot .* s3://corpus/gone/corpus.* in 2 attempts .*run the same"):
        convert([url], tmp_path / "out", **OPTIONS)


def test_missing_object_and_missing_bucket_are_named(tmp_path, wire):
    for url in ("s3://corpus/nothing/here", "s3://no-such-bucket/corpus"):
        with pytest.raises(InputError, match=f"no input at {url}"):
            convert([url], tmp_path / "out", **OPTIONS)


def test_object_that_changes_while_it_is_converted_is_noticed(corpus, tmp_path, s3, wire):
    url = upload(s3[0], corpus, "changing/corpus")

    def change(event):
        if event.phase == "tokenize" and not event.documents:
            s3[0].put_object(Bucket="corpus", Key="changing/corpus/web/a.jsonl", Body=b'{"text": "new"}\n' * 3000)

    with pytest.raises(DataError, match="was changed while it was being converted"):
        convert([url], tmp_path / "out", progress=change, **OPTIONS)


@pytest.mark.parametrize("url, package", [("s3://bucket/a.jsonl", "s3fs"), ("gs://bucket/a.jsonl", "gcsfs")])
def test_missing_package_is_named(url, package, tmp_path, monkeypatch):
    import fsspec.registry  # noqa: F401

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(InputError, match=rf"pip install {package} \(or 'domain-mixer\[remote\]'\)"):
        convert([url], tmp_path / "out", **OPTIONS)


def test_unknown_protocol_is_refused(tmp_path):
    with pytest.raises(InputError, match="carrier-pigeon://a has no protocol that fsspec knows"):
        convert(["carrier-pigeon://a"], tmp_path / "out", **OPTIONS)
