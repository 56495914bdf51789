"""Remote shards: fetched whole or not at all, once per node, within the limit. Stores are in test_remote_stores.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mixer import DataError, InputError, MixtureLoader, mds
from mixer.cache_space import CacheSpace
from tests.helpers import assert_same, write_shards

SIZES = {"code": 300, "web": 900}
SHARD_BYTES = 64 * (16 * 2 + 4) + 300


@pytest.fixture(scope="module", params=[None, "zstd"], ids=["raw", "zstd"])
def source(request, tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("source"), SIZES, compression=request.param)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("zipped"), SIZES, compression="zstd")


def make(shards, **options):
    return MixtureLoader(shards, **{"mixture": "uniform", "global_batch_size": 12, "seed": 3, **options})


def batches(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".mixer" not in p.parts)


def taken(folder):
    """Return the bytes of whole shards in a folder that others write to at this moment."""
    total = 0
    for path in folder.glob("shard.*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def test_remote_shards_give_the_same_batches_as_local_ones_and_stay_cached(source, tmp_path):
    expected = batches(make(source), 60)
    loader = make(tmp_path / "cache", remote=str(source))
    assert_same(batches(loader, 60), expected)
    stats = loader.stats()["cache"]
    assert stats["fetched_files"] == 23 and stats["evicted_files"] == 0  # manifest, 2 indexes, 5 + 15 shards
    assert all(name.endswith((".json", ".mds")) for name in files(tmp_path / "cache"))
    again = make(tmp_path / "cache", remote=str(source))
    assert_same(batches(again, 60), expected)
    assert again.stats()["cache"]["fetched_files"] == 1 and again.stats()["cache"]["hits"] == 20


def test_cache_limit_is_kept_and_changes_no_sample(source, tmp_path, monkeypatch):
    import mixer.dataset
    from mixer.order import Order

    monkeypatch.setattr(mixer.dataset, "Order", lambda *args: Order(*args, window_samples=128))
    expected = batches(make(source), 200)
    limit = 9 * SHARD_BYTES
    loader, worst = make(tmp_path, remote=str(source), cache_limit=limit), 0
    for batch, known in zip(loader, expected):
        assert_same(batch, known)
        worst = max(worst, taken(tmp_path / "web" / "train") + taken(tmp_path / "code" / "train"))
    stats = loader.stats()["cache"]
    # One may go and another come while they are counted.
    assert worst <= limit + SHARD_BYTES and stats["evicted_files"] > 5 and stats["fetched_files"] > 25
    assert len(list(source.rglob("shard.*"))) >= 20, "the source is untouched"


def test_limit_below_what_is_read_at_a_time_is_refused_with_the_arithmetic(source, tmp_path):
    with pytest.raises(InputError, match=r"cache_limit 10,240 bytes cannot hold the windows .* over 2 domains \(web"):
        make(tmp_path, remote=str(source), cache_limit="10kb")
    with pytest.raises(InputError, match="local ones are never deleted"):
        make(source, cache_limit="1GB")


def test_cache_of_another_corpus_is_refused(source, tmp_path):
    make(tmp_path / "cache", remote=str(source))
    other = write_shards(tmp_path / "other", {"web": 10})
    with pytest.raises(DataError, match="holds shards of another corpus"):
        make(tmp_path / "cache", remote=str(other))


def test_missing_remote_and_missing_shard_are_named(source, tmp_path):
    with pytest.raises(DataError, match=r"nowhere/manifest\.json does not exist"):
        make(tmp_path / "a", remote=str(tmp_path / "nowhere"))
    copy = shutil.copytree(source, tmp_path / "copy")
    for path in (copy / "web" / "train").glob("shard.00003.mds*"):
        path.unlink()
    with pytest.raises(DataError, match=r"domain 'web', shard .*shard\.00003\.mds: .*does not exist"):
        batches(make(tmp_path / "b", remote=str(copy)), 60)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_damaged_remote_shard_is_an_error_and_leaves_nothing_in_the_cache(source, tmp_path, damage, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    copy = shutil.copytree(source, tmp_path / "copy")
    path = max((copy / "web" / "train").glob("shard.00003.mds*"))  # the compressed one, where there are both
    data = path.read_bytes()
    path.write_bytes({"flipped": data[:-1] + bytes([data[-1] ^ 1]), "truncated": data[:50], "empty": b""}[damage])
    loader = make(tmp_path / "cache", remote=str(copy))
    with pytest.raises(DataError, match=r"domain 'web', shard .*shard\.00003\.mds: cannot fetch .*4 attempts"):
        batches(loader, 60)
    assert not list((tmp_path / "cache" / "web").rglob("*shard.00003*")), "no file, no part of one"
    path.write_bytes(data)
    batches(loader, 60)


def test_damaged_or_cut_file_in_the_cache_is_fetched_again(source, tmp_path):
    expected = batches(make(source), 60)
    batches(make(tmp_path, remote=str(source)), 60)
    flipped, cut = tmp_path / "web" / "train" / "shard.00002.mds", tmp_path / "web" / "train" / "shard.00004.mds"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, 100)
    loader = make(tmp_path, remote=str(source))
    assert_same(batches(loader, 60), expected)
    assert loader.stats()["cache"]["fetched_files"] == 3


def test_error_in_a_download_is_tried_again(source, tmp_path, monkeypatch):
    import mixer.cache

    real, failures = mixer.cache.download, {}

    def flaky(url, target, timeout):
        failures[url] = failures.get(url, 0) + 1
        if failures[url] == 1:
            target.write_bytes(b"half")
            raise ConnectionResetError("connection reset by peer")
        real(url, target, timeout)

    monkeypatch.setattr(mixer.cache, "download", flaky)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert_same(batches(make(tmp_path, remote=str(source)), 30), batches(make(source), 30))
    assert set(failures.values()) == {2}


READ = """
import sys
from mixer import MixtureLoader
loader = MixtureLoader(sys.argv[1], remote=sys.argv[2], mixture="uniform", global_batch_size=12, seed=3,
                       rank=int(sys.argv[3]), world_size=4)
import mixer.cache
for step, batch in zip(range(60), loader):
    pass
print(loader.stats()["cache"]["fetched_files"])
"""


def test_ranks_of_a_node_share_the_cache_without_fetching_twice(zipped, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, tmp_path / "cache", zipped, str(rank)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    fetched = [int(process.communicate(timeout=200)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert 20 <= sum(fetched) <= 20 + 2 + 4  # every shard and index at most once; each rank compares the manifest


SLOW = """
import sys, time, mixer.cache
def slowly(url, target, timeout):
    data = open(url, "rb").read()
    with open(target, "wb") as out:
        for i in range(0, len(data), 200):
            out.write(data[i:i + 200]); out.flush(); time.sleep(0.005)
mixer.cache.download = slowly
from mixer import MixtureLoader
print("go", flush=True)
for batch in zip(range(500), MixtureLoader(sys.argv[1], remote=sys.argv[2], mixture="uniform", global_batch_size=12,
seed=3)):
    pass
"""


def test_kill_9_while_downloading_leaves_nothing_that_looks_whole(source, tmp_path):
    for wait in (0.1, 0.4):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, tmp_path, source], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.glob("*/train/shard.*.mds"):
            entry = json.loads((path.parent / "index.json").read_text())["shards"][int(path.name.split(".")[1])]
            assert mds.hash_hex("xxh64", path.read_bytes()) == entry["raw_data"]["hashes"]["xxh64"]
    assert_same(batches(make(tmp_path, remote=str(source)), 60), batches(make(source), 60))


def test_what_a_dead_process_left_is_swept_away_at_once_and_a_living_one_s_is_not(source, tmp_path):
    living = make(tmp_path, remote=str(source))
    dead = tmp_path / ".mixer" / "process.dead"
    (dead / "claim.1").mkdir(parents=True)
    (dead / "claim.1" / "shard.00001.mds").write_bytes(b"part")
    make(tmp_path, remote=str(source))
    assert not dead.exists() and living.reader.cache.space.own().exists()


def test_full_disk_while_fetching_is_one_sentence(source, tmp_path, monkeypatch):
    import mixer.cache

    def full(url, target, timeout):
        raise OSError(28, "No space left on device")

    make(tmp_path, remote=str(source))
    loader = make(tmp_path, remote=str(source))
    monkeypatch.setattr(mixer.cache, "download", full)
    with pytest.raises(DataError, match=r"domain '.*no space left for .*Free space, or set a cache_limit"):
        batches(loader, 5)


def shelf(folder, limit, names):
    space = CacheSpace(folder, limit)
    space.register(dict.fromkeys("abcd", 10))
    for i, name in enumerate(names):
        (folder / name).write_bytes(b"x" * 10)
        os.utime(folder / name, (i, i))
    space.start_counting()
    return space


def test_evictions_prefer_what_nobody_wants_and_what_was_fetched_first(tmp_path):
    space = shelf(tmp_path, 35, "abc")
    (tmp_path / "other").write_bytes(b"x" * 100)
    space.want("web", {"a"})
    with space.claim("d", 10):
        assert files(tmp_path) == ["a", "c", "other"]
        with space.claim("b", 5):
            assert files(tmp_path) == ["a", "c", "other"]
    with space.claim("d", 25):
        assert files(tmp_path) == ["a", "other"]
    assert space.stats()["evicted_files"] == 2


def test_what_is_fetched_ahead_evicts_nothing_that_any_process_wants(tmp_path):
    space, other = shelf(tmp_path, 30, "abc"), shelf(tmp_path, 30, "")
    space.want("web", {"a"})
    other.want("web", {"b", "c"})
    with space.claim("d", 10, ahead=True) as folder:
        assert folder is None and files(tmp_path) == ["a", "b", "c"]
    with space.claim("d", 10) as folder:
        assert folder is not None and files(tmp_path) == ["b", "c"]


def test_what_is_wanted_is_written_when_it_changes(tmp_path, monkeypatch):
    """A domain smaller than a batch begins anew in each of them."""
    space, replace, written = CacheSpace(tmp_path, 10), os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: written.append(replace(*paths)))
    for domain, names in (("tiny", ["a"]), ("tiny", ["a"]), ("web", ["a"]), ("tiny", ["a", "b"])):
        space.want(domain, names)
    assert len(written) == 3
    assert json.loads((space.own() / "wanted").read_text()) == {"tiny": ["a", "b"], "web": ["a"]}


def test_claims_of_all_processes_count_and_those_who_find_no_room_wait_for_it(tmp_path):
    space, other, order = shelf(tmp_path, 30, "a"), shelf(tmp_path, 30, ""), []

    def fetch_too():
        with other.claim("c", 15):
            order.append("second")

    with space.claim("b", 20) as folder:
        thread = threading.Thread(target=fetch_too)
        thread.start()
        time.sleep(0.2)
        assert files(tmp_path) == ["a"] and folder.is_dir(), "nothing goes while that would not be enough"
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"]
    with pytest.raises(DataError, match="d takes 31 bytes while it is fetched, more than the cache_limit 30"):
        space.claim("d", 31).__enter__()
