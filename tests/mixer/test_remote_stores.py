"""Shards from servers: S3 (moto) behind a proxy that delays, refuses, cuts, truncates and stalls; SFTP; others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mixer import DataError, InputError, MixtureLoader
from tests.helpers import assert_same, write_domain, write_shards
from tests.s3 import s3_server, upload

pytest.importorskip("streaming", reason="needs mosaicml-streaming", exc_type=ImportError)
stores = pytest.importorskip("tests.mixer.stores", reason="needs paramiko", exc_type=ImportError)

SIZES, REMOTE = {"code": 300, "web": 900}, "s3://corpus/shards"
SHARD = "web/train/shard.00003.mds.zstd"


def make(shards, **options):
    return MixtureLoader(shards, **{"mixture": "uniform", "global_batch_size": 12, "seed": 3, **options})


def batches(loader, count=60):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("zipped"), SIZES, compression="zstd")


@pytest.fixture(scope="module")
def expected(zipped, tmp_path_factory):
    return batches(make(shutil.copytree(zipped, tmp_path_factory.mktemp("local") / "shards")))


@pytest.fixture(scope="module")
def s3(zipped):
    pytest.importorskip("moto.server", reason="needs moto[server]")
    with s3_server() as (client, port):
        upload(client, zipped, "shards", chosen=lambda path: path.suffix != ".mds")
        yield client, port


@pytest.fixture
def proxy(s3, monkeypatch):
    proxy = stores.Proxy(s3[1])
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


def downloads(proxy):
    """Return how often each shard was asked for, the manifest and indexes aside."""
    return {path: count for (method, path), count in proxy.requests.items() if method == "GET" and "shard." in path}


def test_shards_come_from_s3_each_asked_for_once(proxy, expected, tmp_path):
    loader = make(tmp_path, remote=REMOTE)
    assert_same(batches(loader), expected)
    stats = loader.stats()["cache"]
    assert stats["fetched_files"] == 23 and stats["retries"] == 0 and stats["fetched_bytes"] > 10_000
    assert len(downloads(proxy)) == 20 and set(downloads(proxy).values()) == {1}


def spoil(answer, part, first, *, methods=("HEAD", "GET")):
    """Return a fault: ``answer`` to the ``first`` requests of each path with ``part`` in it."""
    return lambda method, path, number: answer if part in path and number <= first and method in methods else None


FAULTS = {
    "50 ms before every answer": spoil(("delay", 0.05), "", 10**9),
    "503 twice for some shards": spoil(("status", 503), "2.mds", 2),
    "500 for the manifest and indexes": spoil(("status", 500), "json", 1),
    "cut in the body": spoil(("cut", 200), "3.mds", 2, methods=("GET",)),
    "cut before the body": spoil(("cut", 0), "4.mds", 1),
    "truncated as if whole": spoil(("short", 200), "1.mds", 1, methods=("GET",)),
    "one that never answers": spoil(("stall", 60), "00002.mds", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_end_in_the_right_samples(proxy, expected, tmp_path, fault):
    proxy.fault = FAULTS[fault]
    loader = make(tmp_path, remote=REMOTE, download_timeout=1.0)
    assert_same(batches(loader), expected)
    assert loader.stats()["waited_seconds"] > 0
    assert not [path for path in tmp_path.rglob("claim*") if path.is_dir()], "nothing half-made is left"


LASTING = {
    "stalled": (("stall", 60), 0.5, "TimeoutError: only 0 bytes came in"),
    "refusing": (("status", 500), 20, "ClientError"),
    "cutting": (("cut", 100), 20, "Error"),
    "truncating": (("short", 100), 20, "the index was written for"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_faults_are_one_error_in_the_stated_time(proxy, tmp_path, fault):
    answer, timeout, says = LASTING[fault]
    proxy.fault = spoil(answer, SHARD, 10**9, methods=("HEAD", "GET") if fault == "stalled" else ("GET",))
    loader = make(tmp_path, remote=REMOTE, download_timeout=timeout, download_retry=1)
    remedy = "restore it" if fault == "truncating" else "Check the network"
    says = rf"domain 'web', shard .*shard\.00003.*{REMOTE}/{SHARD} .*2 attempts.*{says}.*{remedy}"
    with pytest.raises(DataError, match=says) as error:
        batches(loader)
    assert "attempt-" not in str(error.value), "no path of a file that is gone"
    assert not list((tmp_path / "web").rglob("*00003*")), "nothing of it is in the cache"


def test_server_that_never_answers_is_an_error_at_the_start_and_the_process_ends(proxy, tmp_path):
    proxy.fault = lambda *_: ("stall", 600)
    code = (
        "import sys; from tests.conftest import _let_streaming_import; _let_streaming_import()\n"
        "from mixer import MixtureLoader\n"
        "MixtureLoader(sys.argv[1], remote=sys.argv[2], global_batch_size=4, download_timeout=0.3, download_retry=1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), REMOTE]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "manifest.json (2 attempts): TimeoutError" in done.stderr.splitlines()[-1]


def test_trickle_below_a_mib_per_timeout_is_given_up(tmp_path, monkeypatch):
    from mixer import downloading

    def trickle(url, target, timeout, clients, connected):
        connected()
        with open(target, "ab") as file:
            for _ in range(50):
                file.write(b"x" * 1000)
                file.flush()
                time.sleep(0.02)

    monkeypatch.setattr(downloading.streaming_door, "download", trickle)
    with pytest.raises(TimeoutError, match=r"only [\d,]+ bytes came in 0\.\d+ s"):
        downloading.download("s3://a/b", tmp_path / "b", 0.3)
    monkeypatch.setattr(downloading, "ENOUGH", 5_000)
    (tmp_path / "enough").mkdir()
    downloading.download("s3://a/b", tmp_path / "enough" / "b", 0.5)


def test_object_missing_from_s3_is_named_at_once(proxy, s3, expected, tmp_path):
    client, _ = s3
    data = client.get_object(Bucket="corpus", Key=f"shards/{SHARD}")["Body"].read()
    client.delete_object(Bucket="corpus", Key=f"shards/{SHARD}")
    try:
        with pytest.raises(DataError, match=rf"domain 'web', shard .*{REMOTE}/{SHARD} does not exist"):
            batches(make(tmp_path, remote=REMOTE))
    finally:
        client.put_object(Bucket="corpus", Key=f"shards/{SHARD}", Body=data)
    assert_same(batches(make(tmp_path, remote=REMOTE)), expected)


def test_refused_credentials_are_named_at_once(proxy, tmp_path):
    proxy.fault = lambda *_: ("status", 403)
    with pytest.raises(DataError, match=r"manifest\.json may not be read: ClientError: .*Check the credentials"):
        make(tmp_path, remote=REMOTE)
    assert sum(proxy.requests.values()) == 1


RANK = """
import sys
from tests.conftest import _let_streaming_import
_let_streaming_import()
from mixer import MixtureLoader
def as_is(batch): return batch
if __name__ == "__main__":
    loader = MixtureLoader(sys.argv[1], remote=sys.argv[2], mixture="uniform", global_batch_size=12, seed=3,
                           rank=int(sys.argv[3]), world_size=2, num_workers=int(sys.argv[3]), transform=as_is)
    for step, batch in zip(range(100), loader):
        pass
    print(loader.stats()["cache"]["hits"], loader.stats()["waited_seconds"])
"""


def test_ranks_and_their_workers_share_a_cache_and_ask_for_no_shard_twice(proxy, zipped, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "cache", REMOTE, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len(downloads(proxy)) == 20 and set(downloads(proxy).values()) == {1}
    assert sum(int(hits) for hits, _ in said) > 0 and all(float(waited) > 0 for _, waited in said)


# --- domains without a manifest, domains that are here --------------------------------------------------------------


def test_domains_without_a_manifest_are_named_with_their_addresses(proxy, expected, tmp_path):
    addresses = {"web": f"{REMOTE}/web", "code": f"{REMOTE}/code/train"}  # a folder of splits, and one MDS folder
    loader = make(tmp_path, remote=addresses)
    assert_same(batches(loader), expected)
    assert loader.num_samples == SIZES
    state = loader.state_dict()
    again = make(tmp_path, remote=addresses)
    again.load_state_dict(state)
    with pytest.raises(DataError, match=r"domain 'web': neither .*nowhere/train/index.json nor .* exists"):
        make(tmp_path / "other", remote={"web": "s3://corpus/nowhere"})


def test_remote_and_local_domains_mix(proxy, zipped, expected, tmp_path):
    shutil.copytree(zipped / "code", tmp_path / "code")  # no manifest at all
    loader = make(tmp_path, remote={"web": f"{REMOTE}/web"})
    assert_same(batches(loader), expected)
    assert all("/web/" in path for path in downloads(proxy))
    shutil.copytree(zipped, tmp_path / "b")  # a manifest of its own for what is here
    assert_same(batches(make(tmp_path / "b", remote={"web": f"{REMOTE}/web"})), expected)
    with pytest.raises(InputError, match="`remote` is empty"):
        make(tmp_path / "c", remote={})


def test_folder_without_a_manifest_on_a_mounted_disk_needs_no_addresses(tmp_path):
    source = write_shards(tmp_path / "source", SIZES, manifest=False)
    assert_same(batches(make(tmp_path / "cache", remote=str(source))), batches(make(source)))


def test_cached_domain_is_not_taken_for_a_local_one(zipped, tmp_path):
    make(tmp_path, remote={name: str(zipped / name) for name in SIZES})
    assert make(tmp_path, remote={"web": str(zipped / "web")}).domains == ("web",)


def test_index_that_changed_at_its_address_is_refused(tmp_path):
    rows = np.arange(64, dtype=np.uint16).reshape(8, 8)
    write_domain(tmp_path / "web", rows)
    make(tmp_path / "cache", remote={"web": str(tmp_path / "web")})
    write_domain(tmp_path / "web", rows[::-1])
    with pytest.raises(DataError, match=r"holds shards of another corpus than .*web/index\.json"):
        make(tmp_path / "cache", remote={"web": str(tmp_path / "web")})


# --- other schemes --------------------------------------------------------------------------------------------------


def test_shards_come_by_sftp_also_after_the_line_went_dead(zipped, expected, tmp_path, monkeypatch):
    server = stores.Sftp(zipped, tmp_path / "known_hosts")
    monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(tmp_path / "known_hosts"))
    try:
        loader = make(tmp_path / "cache", remote=f"{server.url}/")
        server.hang_up()
        assert_same(batches(loader), expected)
        with pytest.raises(DataError, match=r"sftp://corpus:…@.*nowhere/manifest\.json does not exist"):
            make(tmp_path / "other", remote=f"{server.url}/nowhere", download_retry=0)
    finally:
        server.close()


def test_file_addresses_are_paths(zipped, expected, tmp_path):
    assert_same(batches(make(tmp_path, remote=f"file://{zipped}")), expected)


def test_every_scheme_of_streaming_is_known():
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS

    from mixer.streaming_door import _PACKAGES

    assert {name.removesuffix("-uc") for name in DOWNLOADER_MAPPINGS if name} == set(_PACKAGES)


@pytest.mark.parametrize("address, package", [("dbfs:/Volumes/a/b", "databricks-sdk"), ("alipan:///a", "AliPCS-py")])
def test_missing_package_of_a_scheme_is_named(tmp_path, monkeypatch, address, package):
    for module in ("databricks.sdk", "alipcs_py", "alipcs_py.alipcs"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("ALIPAN_WEB_REFRESH_TOKEN", "none")
    with pytest.raises(InputError, match=rf"addresses need the package {package}.* pip install {package}"):
        make(tmp_path, remote=address)


def test_unknown_scheme_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(InputError, match=r"unknown scheme 'carrier-pigeon': expected a path, file, or one of .*'s3'"):
        make(tmp_path, remote="carrier-pigeon://corpus/shards")
