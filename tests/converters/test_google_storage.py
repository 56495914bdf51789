"""Inputs, shards and stage files on a Google Storage server: the bytes of a local conversion, also after kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from converters import convert, decoded_samples, locks
from converters.locations import location, write_file, write_whole
from converters.verifying import verify
from mixer.errors import DataError, InputError
from tests.converters.corpora import documents, write_corpus, write_jsonl
from tests.converters.servers import assert_same_files, local_files, lock_of_another
from tests.gs import gs_server

pytestmark = pytest.mark.once

OPTIONS: dict = {"tokenizer": "bytes", "seq_len": 64, "shard_size": 20_000, "unit_size": 20_000}


@pytest.fixture(scope="module")
def storage() -> Iterator[Any]:
    """The emulator's storage of one bucket, which conversions reach by ``STORAGE_EMULATOR_HOST``."""
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator")
    with gs_server() as storage:
        yield storage


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def out(request, storage) -> str:
    """Return the prefix of a folder of this test alone."""
    return f"{request.node.name}/shards"


def names(storage: Any, prefix: str) -> list[str]:
    below = f"{prefix}/"
    return [name.removeprefix(below) for name in list(storage.objects["corpus"]) if name.startswith(below)]


def objects(storage: Any, prefix: str) -> dict[str, bytes]:
    """Return what lies below a prefix, by name."""
    return {name: storage.get_file("corpus", f"{prefix}/{name}") for name in names(storage, prefix)}


def put(name: str, data: bytes) -> None:
    write_whole(location(f"gs://corpus/{name}"), data)


def upload(folder: Path, prefix: str) -> str:
    for path in sorted(folder.rglob("*.jsonl")):
        write_whole(location(f"gs://corpus/{prefix}") / str(path.relative_to(folder)), path.read_bytes())
    return f"gs://corpus/{prefix}"


def test_text_and_shards_on_google_storage_give_the_bytes_on_disk(corpus, tmp_path, storage, out):
    options = {"packing": "best_fit", "shuffle_seed": 5, "dedupe": True, **OPTIONS}
    convert([corpus], tmp_path / "local", **options)
    url = upload(corpus, f"{out}-corpus/corpus")
    manifest = convert([url], f"gs://corpus/{out}", stage=f"gs://corpus/{out}-stage", workers=2, **options)
    assert_same_files(objects(storage, out), local_files(tmp_path / "local"))
    assert convert([url], f"gs://corpus/{out}", stage=f"gs://corpus/{out}-stage", **options) == manifest
    assert "lock" not in names(storage, f"{out}-stage")


def test_object_that_ends_with_a_carriage_return_arrives_whole(storage, out, tmp_path):
    (tmp_path / "file").write_bytes(b"two\r")
    folder = location(f"gs://corpus/{out}")
    write_whole(folder / "one", b"one\n\r")
    write_file(folder / "two", tmp_path / "file")
    assert objects(storage, out) == {"one": b"one\n\r", "two": b"two\r"}


def test_glob_takes_what_matches(corpus, tmp_path, out):
    url = upload(corpus, f"{out}-corpus")
    manifest = convert([f"web={url}/web/*.jsonl"], tmp_path / "out", **OPTIONS)
    assert sum(split.num_documents for split in manifest.domains["web"].splits.values()) == 300


def test_missing_object_and_bucket_are_named(corpus, tmp_path, storage):
    for url in ("gs://corpus/nothing/here", "gs://no-such-bucket/corpus"):
        with pytest.raises(InputError, match=f"no input at {url}"):
            convert([url], tmp_path / "out", **OPTIONS)
    with pytest.raises(InputError, match=r"cannot write into gs://no-such-bucket/shards"):
        convert([corpus], "gs://no-such-bucket/shards", **OPTIONS)


def test_object_that_changes_while_it_is_converted_is_noticed(corpus, tmp_path, storage, out):
    url = upload(corpus, f"{out}-corpus")

    def change(event):
        if event.phase == "tokenize" and not event.documents:
            put(f"{out}-corpus/web/a.jsonl", b'{"text": "new"}\n' * 3000)

    with pytest.raises(DataError, match="was changed while it was being converted"):
        convert([url], tmp_path / "out", progress=change, **OPTIONS)


def test_shards_are_looked_at_extended_and_refused_there(corpus, tmp_path, storage, out):
    url = f"gs://corpus/{out}"
    for place in (tmp_path / "local", url):
        convert([corpus], place, **OPTIONS)
    assert decoded_samples(url, domain="web") == decoded_samples(tmp_path / "local", domain="web")
    assert verify(url, deep=True) == []
    with pytest.raises(InputError, match=r"seq_len: 64 -> 32.*--fresh"):
        convert([corpus], url, **{**OPTIONS, "seq_len": 32})
    write_jsonl(corpus / "wiki" / "new.jsonl", documents("wiki", 100))
    for place in (tmp_path / "local", url):
        convert([corpus], place, extend=True, **OPTIONS)
    assert_same_files(objects(storage, out), local_files(tmp_path / "local"))
    name = "web/train/shard.00001.mds.zstd"
    put(f"{out}/{name}", b"x" * len(objects(storage, out)[name]))
    (finding,) = verify(url, deep=True)
    assert finding.path == f"{url}/{name}" and "xxh64" in finding.what
    convert([corpus], url, fresh=True, **{**OPTIONS, "seq_len": 32})
    assert verify(url, deep=True) == []


def test_kill_at_any_time_resumes_to_the_same_bytes(corpus, tmp_path, storage, out):
    convert([corpus], tmp_path / "local", **OPTIONS)
    command = [
        *(sys.executable, "-c", "from mixer.cli import main; main()", "convert", str(corpus)),
        *("--out", f"gs://corpus/{out}", "--tokenizer", "bytes", "--seq-len", "64", "--workers", "2"),
        *("--shard-size", "20000", "--unit-size", "20000"),
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not [name for name in names(storage, out) if name.endswith("unit.json")]:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "manifest.json" not in names(storage, out) and ".pack/lock" in names(storage, out)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_files(objects(storage, out), local_files(tmp_path / "local"))


# --- the lease -----------------------------------------------------------------------------------------------------


def test_of_two_that_take_a_free_lock_one_gets_it(storage, out, monkeypatch):
    """As when both found no lock: the server's own condition decides."""
    folder = location(f"gs://corpus/{out}")
    taken = locks._Lease._holder
    with locks.lock(folder):
        answers = iter([None])
        monkeypatch.setattr(locks._Lease, "_holder", lambda self: next(answers, None) or taken(self))
        with pytest.raises(InputError, match=rf"another conversion \(process {os.getpid()} on"), locks.lock(folder):
            pass


def test_lock_of_a_dead_process_is_taken_over_and_that_of_another_machine_holds(storage, out, monkeypatch):
    folder = location(f"gs://corpus/{out}")
    write_whole(folder / "lock", lock_of_another(started="0"))
    with locks.lock(folder) as lock:
        lock.check()
    assert not (folder / "lock").exists()
    write_whole(folder / "lock", lock_of_another(machine="elsewhere", host="node7"))
    with pytest.raises(InputError, match=r"on node7\).*if it was killed, try again in"), locks.lock(folder):
        pass
    monkeypatch.setattr(locks, "LEASE_SECONDS", -1)
    with locks.lock(folder) as lock:
        write_whole(folder / "lock", orjson.dumps({"owner": "another"}))
        with pytest.raises(DataError, match="another conversion has taken over"):
            lock.check()
