"""Shards and stage files on an S3 server: the bytes of a local conversion, through broken connections and kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters import convert, decoded_samples, locks, urls
from converters.locations import location, write_whole
from converters.statistics import domain_statistics
from converters.verifying import verify
from mixer.errors import DataError, InputError
from tests.converters.corpora import documents, write_corpus, write_jsonl
from tests.converters.servers import assert_same_files, local_files, lock_of_another, objects

pytestmark = pytest.mark.once

OPTIONS: dict = {"tokenizer": "bytes", "seq_len": 64, "shard_size": 20_000, "unit_size": 20_000}


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def out(request, s3) -> str:
    """Return the prefix of a folder of this test alone."""
    return f"{request.node.name.replace('[', '-').replace(']', '').replace(' ', '-')}/shards"


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"packing": "best_fit", "shuffle_seed": 5, "sample_ids": True},
        {"packing": "none", "dedupe": True, "doc_starts": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_shards_on_s3_are_those_on_disk(corpus, tmp_path, s3, wire, out, options):
    write_jsonl(corpus / "web" / "copies.jsonl", documents("web", 40))
    convert([corpus], tmp_path / "local", **OPTIONS, **options)
    manifest = convert([corpus], f"s3://corpus/{out}", **OPTIONS, **options)
    assert_same_files(objects(s3[0], out), local_files(tmp_path / "local"))
    assert convert([corpus], f"s3://corpus/{out}", **OPTIONS, **options) == manifest  # finished: returned as it is
    shard = next(f"{out}/{name}" for name in sorted(objects(s3[0], out)) if "/train/shard." in name)
    s3[0].delete_object(Bucket="corpus", Key=shard)
    with pytest.raises(DataError, match=f"^s3://corpus/{shard} is missing. The conversion was finished"):
        convert([corpus], f"s3://corpus/{out}", **OPTIONS, **options)


def test_stage_on_s3_is_packed_again_without_tokenising(corpus, tmp_path, s3, wire, out, monkeypatch):
    stage = f"s3://corpus/{out}-stage"
    convert([corpus], tmp_path / "first", stage=stage, **OPTIONS)
    convert([corpus], tmp_path / "direct", **{**OPTIONS, "seq_len": 32})
    monkeypatch.setattr("converters.stage.load_encoder", lambda *_: pytest.fail("tokenised again"))
    convert([corpus], tmp_path / "again", stage=stage, **{**OPTIONS, "seq_len": 32})
    assert_same_files(local_files(tmp_path / "again"), local_files(tmp_path / "direct"))
    assert "lock" not in objects(s3[0], f"{out}-stage")


def test_trained_tokenizer_lies_beside_the_shards(corpus, tmp_path, s3, wire, out):
    options = {**OPTIONS, "tokenizer": None, "train_tokenizer": 300}
    convert([corpus], tmp_path / "local", **options)
    convert([corpus], f"s3://corpus/{out}", stage=f"s3://corpus/{out}-stage", **options)
    assert_same_files(objects(s3[0], out), local_files(tmp_path / "local"))


def test_broken_connections_change_nothing(corpus, tmp_path, s3, wire, out, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    convert([corpus], tmp_path / "local", **OPTIONS)
    wire.cut = lambda number: 900 if number % 3 == 0 else None
    convert([corpus], f"s3://corpus/{out}", **OPTIONS)
    assert wire.cuts > 3
    assert_same_files(objects(s3[0], out), local_files(tmp_path / "local"))


def test_shards_on_s3_are_inspected_verified_and_measured_there(corpus, tmp_path, s3, wire, out):
    convert([corpus], tmp_path / "local", **OPTIONS)
    url = f"s3://corpus/{out}"
    convert([corpus], url, **OPTIONS)
    assert decoded_samples(url, domain="web") == decoded_samples(tmp_path / "local", domain="web")
    assert [row.h2 for row in domain_statistics(url)] == [row.h2 for row in domain_statistics(tmp_path / "local")]
    assert verify(url, deep=True) == []
    name = "web/train/shard.00001.mds.zstd"
    s3[0].put_object(Bucket="corpus", Key=f"{out}/{name}", Body=b"x" * len(objects(s3[0], out)[name]))
    (finding,) = verify(url, deep=True)
    assert finding.path == f"{url}/{name}" and "xxh64" in finding.what
    s3[0].delete_object(Bucket="corpus", Key=f"{out}/{name}")
    (finding,) = verify(url)
    assert finding.what == "is missing"


def test_mixer_reads_what_was_written_to_s3(corpus, tmp_path, wire, out):
    pytest.importorskip("streaming", reason="needs mosaicml-streaming", exc_type=ImportError)
    from mixer import MixtureLoader

    options = {"mixture": "uniform", "global_batch_size": 8, "seed": 3}
    convert([corpus], tmp_path / "local", **OPTIONS)
    convert([corpus], f"s3://corpus/{out}", **OPTIONS)
    here = MixtureLoader(tmp_path / "local", **options)
    there = MixtureLoader(tmp_path / "cache", remote=f"s3://corpus/{out}", **options)
    for _, mine, theirs in zip(range(10), here, there):
        assert (mine["input_ids"] == theirs["input_ids"]).all()


def test_extension_on_s3_adds_shards_and_leaves_the_others(corpus, tmp_path, s3, wire, out):
    for place in (tmp_path / "local", f"s3://corpus/{out}"):
        convert([corpus], place, **OPTIONS)
    before = objects(s3[0], out)
    write_jsonl(corpus / "wiki" / "new.jsonl", documents("wiki", 100))
    for place in (tmp_path / "local", f"s3://corpus/{out}"):
        convert([corpus], place, extend=True, **OPTIONS)
    after = objects(s3[0], out)
    assert_same_files(after, local_files(tmp_path / "local"))
    assert {name: after[name] for name in before if ".mds" in name} == {n: d for n, d in before.items() if ".mds" in n}


def test_other_options_are_refused_and_fresh_starts_over(corpus, s3, wire, out):
    url = f"s3://corpus/{out}"
    s3[0].put_object(Bucket="corpus", Key=f"{out}/notes.txt", Body=b"mine")
    with pytest.raises(InputError, match="neither empty nor a conversion"):
        convert([corpus], url, **OPTIONS)
    s3[0].delete_object(Bucket="corpus", Key=f"{out}/notes.txt")
    convert([corpus], url, **OPTIONS)
    s3[0].put_object(Bucket="corpus", Key=f"{out}/notes.txt", Body=b"mine")
    with pytest.raises(InputError, match=r"seq_len: 64 -> 32.*--fresh"):
        convert([corpus], url, **{**OPTIONS, "seq_len": 32})
    assert convert([corpus], url, fresh=True, **{**OPTIONS, "seq_len": 32}).seq_len == 32
    assert objects(s3[0], out)["notes.txt"] == b"mine"
    assert verify(url, deep=True) == []


def test_missing_bucket_and_read_only_web_are_one_line(corpus, wire):
    with pytest.raises(InputError, match=r"cannot write into s3://no-such-bucket/shards.*bucket does not exist"):
        convert([corpus], "s3://no-such-bucket/shards", **OPTIONS)
    with pytest.raises(InputError, match=r"cannot write into http://127.0.0.1:9/shards"):
        convert([corpus], "http://127.0.0.1:9/shards", **OPTIONS)


def test_kills_at_any_time_resume_to_the_same_bytes(corpus, tmp_path, s3, wire, out):
    convert([corpus], tmp_path / "local", **OPTIONS)
    command = [
        *(sys.executable, "-c", "from mixer.cli import main; main()", "convert", str(corpus)),
        *("--out", f"s3://corpus/{out}", "--tokenizer", "bytes", "--seq-len", "64", "--workers", "2"),
        *("--shard-size", "20000", "--unit-size", "20000"),
    ]
    kills = 0
    for wanted in (4, 20):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len(names(s3[0], out)) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode != 0:
            assert "manifest.json" not in names(s3[0], out)
    assert kills == 2
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_files(objects(s3[0], out), local_files(tmp_path / "local"))


def names(client, prefix: str) -> list[str]:
    listing = client.list_objects_v2(Bucket="corpus", Prefix=f"{prefix}/")
    return [row["Key"].removeprefix(f"{prefix}/") for row in listing.get("Contents", [])]


# --- the lease -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fresh", [False, True], ids=["", "fresh"])
def test_second_writer_is_refused_and_told_who_works(corpus, wire, out, is_fresh):
    def second(event):
        convert([corpus], f"s3://corpus/{out}", fresh=is_fresh, **OPTIONS)

    with pytest.raises(InputError, match=rf"another conversion \(process {os.getpid()} on .*\) works in s3://corpus/"):
        convert([corpus], f"s3://corpus/{out}", progress=second, **OPTIONS)
    convert([corpus], f"s3://corpus/{out}", **OPTIONS)


def test_lock_of_a_dead_process_of_this_machine_is_taken_over(wire, out):
    folder = location(f"s3://corpus/{out}")
    write_whole(folder / "lock", lock_of_another(started="0"))
    with locks.lock(folder) as lock:
        lock.check()
    assert not (folder / "lock").exists()


def test_lock_of_another_machine_holds_until_it_is_not_renewed(wire, out, monkeypatch):
    folder = location(f"s3://corpus/{out}")
    write_whole(folder / "lock", lock_of_another(machine="elsewhere", host="node7"))
    with (
        pytest.raises(InputError, match=r"on node7\).*if it was killed, try again in [56]\d seconds"),
        locks.lock(folder),
    ):
        pass
    monkeypatch.setattr(locks, "LEASE_SECONDS", -1)
    with locks.lock(folder) as lock:
        lock.check()


def test_owner_that_lost_its_lock_does_not_commit(corpus, s3, wire, out):
    def take_over(event):
        if event.phase == "pack":
            write_whole(location(f"s3://corpus/{out}/.pack/lock"), lock_of_another(machine="elsewhere"))

    with pytest.raises(DataError, match="another conversion has taken over"):
        convert([corpus], f"s3://corpus/{out}", progress=take_over, **OPTIONS)
    assert not [name for name in names(s3[0], out) if name.endswith(("index.json", "manifest.json"))]


def test_lock_is_renewed_while_it_is_held(s3, wire, out, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    folder = location(f"s3://corpus/{out}")
    with locks.lock(folder):
        s3[0].put_object(Bucket="corpus", Key=f"{out}/lock", Body=(folder / "lock").read_bytes() + b" ")
        end = time.monotonic() + 20
        while (folder / "lock").read_bytes().endswith(b" ") and time.monotonic() < end:
            time.sleep(0.02)
        assert not (folder / "lock").read_bytes().endswith(b" ")
