"""Every shard is compared with its hash once by all processes of a run; what is replaced later is compared again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from mixer import DataError, MixtureLoader
from mixer.checked import Checked
from tests.helpers import write_shards
from tests.mixer.hash_counting import unchanged

ROOT = Path(__file__).parents[2]
SHARDS = 10  # of 64 samples: code has 3, web 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return settled(write_shards(tmp_path_factory.mktemp("shards"), {"code": 150, "web": 400}))


def settled(root):
    time.sleep(0.05)  # files that were written a moment ago are not remembered
    return root


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Return a function that says how many files have been compared so far."""
    log = tmp_path / "hashes"
    log.touch()
    monkeypatch.setenv("COUNT_HASHES", str(log))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return lambda: len(log.read_text().split())


def read_all(shards, **options):
    loader = MixtureLoader(
        shards, mixture="proportional", global_batch_size=10, on_exhausted="drop", transform=unchanged, **options
    )
    return sum(1 for _ in loader)


LOADER = """
import sys
from tests.mixer.test_checked import read_all
for _ in range(int(sys.argv[2])):
    assert read_all(sys.argv[1], num_workers=int(sys.argv[3])) == 55
"""


def run(shards, loaders, workers):
    done = subprocess.run([sys.executable, "-c", LOADER, shards, str(loaders), str(workers)], cwd=ROOT)
    assert done.returncode == 0


def left_behind(tmp_path):
    return [path for path in tmp_path.glob("domain-mixer-*/*") if path.is_dir()]


@pytest.mark.parametrize("workers", [0, 3])
def test_loaders_and_worker_processes_of_a_run_check_each_shard_once(shards, count, tmp_path, workers):
    run(shards, 2, workers)
    assert count() == SHARDS
    assert not left_behind(tmp_path)
    run(shards, 1, workers)  # another run looks for itself
    assert count() == 2 * SHARDS


def rank_main(rank, world, shards, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    import torch.distributed

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    assert read_all(shards) == 55
    torch.distributed.barrier()
    assert read_all(shards, num_workers=1) == 55
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_gloo_ranks_and_their_workers_check_each_shard_once(shards, count, tmp_path):
    mp.spawn(rank_main, args=(2, shards, 28_000 + os.getpid() % 1000), nprocs=2)
    assert count() == SHARDS
    Checked(tmp_path / f"domain-mixer-{os.getuid()}" / "next").note("anything")  # whoever comes next clears up
    assert [path.name for path in left_behind(tmp_path)] == ["next"]


def test_never_checks_nothing_and_shares_nothing(shards, count, tmp_path):
    read_all(shards, verify="never")
    assert count() == 0 and not left_behind(tmp_path)


def test_file_that_is_replaced_or_written_to_later_is_checked_again(count, tmp_path):
    root = settled(write_shards(tmp_path / "shards", {"web": 100}))
    written = count()
    assert read_all(root) == 10 and count() == written + 2
    path = root / "web" / "train" / "shard.00001.mds"
    shutil.copy2(path, path.with_suffix(".copy"))
    os.replace(path.with_suffix(".copy"), path)
    settled(root)
    assert read_all(root) == 10 and count() == written + 3
    assert read_all(root) == 10 and count() == written + 3
    times = os.stat(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copying programs do
    with pytest.raises(DataError, match=r"shard\.00001\.mds: has xxh64"):
        read_all(root)


def test_what_failed_is_not_taken_for_checked_and_threads_check_once(tmp_path):
    checked, calls = Checked(tmp_path / "base" / "run"), []

    def fails():
        calls.append("fails")
        raise DataError("damaged")

    for _ in range(2):
        with pytest.raises(DataError):
            checked.once("file", fails)
    assert calls == ["fails", "fails"]
    checked.once("file", lambda: calls.append("sound"))
    Checked(tmp_path / "base" / "run").once("file", lambda: calls.append("again"))
    assert calls == ["fails", "fails", "sound"]


KILLED = """
import sys, time
from pathlib import Path
from mixer.checked import Checked
def check():
    print("checking", flush=True)
    time.sleep(60)
checked = Checked(Path(sys.argv[1]))
checked.once("whole", lambda: None)
checked.once("file", check)
"""


def test_process_killed_while_it_checks_blocks_nobody_and_its_run_is_cleared_away(tmp_path):
    folder = tmp_path / "base" / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"checking\n"
    other, calls = Checked(folder), []
    other.once("whole", lambda: calls.append("whole"))
    assert calls == []  # it lives, and has checked that
    process.send_signal(signal.SIGKILL)
    process.wait()
    other.once("file", lambda: calls.append("file"))
    assert calls == ["file"]
    Checked(tmp_path / "base" / "later").note("anything")
    assert folder.is_dir()  # `other` is still there


def test_run_whose_folder_is_not_ours_alone_or_cannot_be_made_is_checked_by_each_process(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o777)
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "shared" / "run", tmp_path / "file" / "run"):
        calls: list[str] = []
        for checked in (Checked(folder), Checked(folder)):
            for _ in range(2):
                checked.once("file", partial(calls.append, "file"))
        assert calls == ["file", "file"]
    assert list((tmp_path / "shared").iterdir()) == []
