"""Worker processes run a transform; they change no sample, and new weights hold after a stated number of batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mixer import DataError, ExhaustedError, InputError, MixtureLoader
from tests.helpers import assert_same, row_of, write_shards

ROOT = Path(__file__).parents[2]
SIZES = {"book": 3, "code": 150, "web": 400}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


def double(batch):
    return {**batch, "labels": batch["input_ids"] * 2}


def make(shards, **options):
    defaults = {"mixture": "uniform", "global_batch_size": 12, "seed": 3, "transform": double, "read_ahead": 4}
    return MixtureLoader(shards, **{**defaults, **options})


def moving(loader, count):
    """Collect batches while the weights change at every one of them."""
    found = []
    for batch in loader:
        found.append(batch)
        if len(found) == count:
            return found
        loader.set_weights([1, 1, loader.step])
    return found


def test_any_number_of_workers_gives_the_same_batches_while_weights_move(shards):
    expected = moving(make(shards), 12)
    assert torch.equal(expected[0]["labels"], expected[0]["input_ids"] * 2)
    for workers in (1, 3):
        assert_same(moving(make(shards, num_workers=workers), 12), expected)


def test_changed_weights_hold_after_read_ahead_batches(shards):
    loader, seen = make(shards, num_workers=2), []
    for batch in loader:
        seen.append(set(batch["domain_ids"].tolist()))
        if loader.step == 3:
            loader.set_weights([0, 1, 0])
            assert loader.read_ahead == 4
        if loader.step == 10:
            break
    assert all(len(domains) == 3 for domains in seen[:7]) and seen[7:] == [{1}] * 3


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_state_is_that_of_the_last_delivered_batch_and_holds_what_is_scheduled(shards, before, after):
    whole = moving(make(shards), 14)
    loader = make(shards, num_workers=before)
    assert_same(moving(loader, 6), whole[:6])
    loader.set_weights([1, 1, loader.step])  # `moving` stops before it changes the weights a last time
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["step"] == loader.step == 6
    other = make(shards, num_workers=after)
    other.load_state_dict(state)
    rest = []
    for batch in other:
        rest.append(batch)
        if len(rest) == 8:
            break
        other.set_weights([1, 1, other.step])
    assert_same(rest, whole[6:])


def test_iterating_again_and_loading_into_a_running_loader_take_back_what_was_planned_ahead(shards):
    whole = moving(make(shards, num_workers=1), 9)
    loader = make(shards, num_workers=1)
    first = moving(loader, 3)
    loader.set_weights([1, 1, loader.step])
    state = loader.state_dict()
    iterator = iter(loader)
    second = []
    for _ in range(2):
        second.append(next(iterator))
        loader.set_weights([1, 1, loader.step])
    assert_same([*first, *second], whole[:5])
    loader.load_state_dict(state)
    for expected in whole[3:9]:
        assert_same(next(iterator), expected)
        loader.set_weights([1, 1, loader.step])


def test_end_of_the_run_comes_after_what_was_planned(shards):
    expected = sum(1 for _ in make(shards, on_exhausted="drop"))
    loader = make(shards, on_exhausted="drop", num_workers=2)
    assert sum(1 for _ in loader) == expected == loader.step
    with pytest.raises(ExhaustedError, match="this loader has ended"):
        iter(loader)


def test_limit_with_repeat_is_raised_after_what_was_planned(shards):
    counts = []
    for workers in (0, 2):
        loader = make(shards, max_epochs=2, num_workers=workers)
        with pytest.raises(ExhaustedError, match="'book' after 2 epochs"):
            for _ in loader:
                pass
        counts.append(loader.step)
    assert counts[0] == counts[1] > 0


def test_damaged_shard_is_one_sentence_in_the_training_process(tmp_path):
    root = write_shards(tmp_path, SIZES)
    path = root / "web" / "train" / "shard.00003.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"^domain 'web', shard .*shard\.00003\.mds: has xxh64 [^\n]*$"):
        for _ in make(root, num_workers=2):
            pass


def test_killed_worker_is_an_error_within_seconds_and_not_a_hang(shards):
    loader = make(shards, num_workers=1, transform=kill_after_some)
    with pytest.raises(DataError, match=r"a worker process of the loader died: .*Go on from the last state"):
        for _ in loader:
            pass
    other = make(shards)
    other.load_state_dict(loader.state_dict())
    assert_same(next(iter(other)), moving_once(shards, loader.step))


def moving_once(shards, step):
    for number, batch in enumerate(make(shards)):
        if number == step:
            return batch


def kill_after_some(batch):
    if torch.utils.data.get_worker_info() is not None and batch["sample_ids"].sum() % 5 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(batch)


def test_worker_keeps_what_a_batch_needs_however_uneven_its_shards(tmp_path, monkeypatch):
    """After many small extensions one window has a few large shards, another hundreds of small ones."""
    monkeypatch.setattr("mixer.dataset.get_worker_info", lambda: True)
    root, wanted = write_shards(tmp_path, {"web": 40}, samples_per_shard=1), np.arange(40)
    for read in ("read", "read_lists"):
        reader = make(root).reader
        reader.orders[0].window_samples = 2
        for samples in (wanted[:20], wanted):
            rows = getattr(reader, read)(np.zeros_like(samples), samples)
            np.testing.assert_array_equal(np.stack(rows), [row_of("web", i, 16) for i in samples])


def test_workers_that_cannot_begin_say_what_the_program_lacks(shards, monkeypatch):
    with pytest.raises(InputError, match=r"cannot be sent to worker processes: .*top level of a module"):
        next(iter(make(shards, transform=lambda batch: batch, num_workers=1)))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", died)
    with pytest.raises(DataError, match=r"exited unexpectedly\. Go on .*below `if __name__ =="):
        next(iter(make(shards, num_workers=1)))


def died(_):
    raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")


def test_without_a_transform_no_process_is_started_and_nothing_is_planned_ahead(shards):
    loader = make(shards, transform=None, num_workers=4, read_ahead=None)
    assert loader.num_workers == 0 and loader.read_ahead == 0


def test_scheduling_what_may_be_planned_already_is_refused(shards):
    loader = make(shards, num_workers=2)
    with pytest.raises(InputError, match="batch 3 may be planned already; schedule from 4 on"):
        loader.schedule(3, [1, 1, 1])
    with pytest.raises(InputError, match="would begin before batch 4"):
        loader.schedule(6, [1, 1, 1], ramp=4)
    with pytest.raises(InputError, match="read_ahead 1 must be at least num_workers 2"):
        make(shards, num_workers=2, read_ahead=1)


TRAIN = """
import sys
from mixer import MixtureLoader
from tests.mixer.test_workers import double
for batch in MixtureLoader(sys.argv[1], mixture="uniform", global_batch_size=12, transform=double, num_workers=2):
    print("batch", flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm to look into")
def test_killed_training_process_leaves_no_shared_memory_and_no_worker_behind(shards):
    command = [sys.executable, "-c", TRAIN, shards]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        for _ in range(5):
            assert process.stdout.readline() == b"batch\n"
        shared = {path for one in session(process.pid) for path in shared_memory(one)}
        assert any(path.exists() for path in shared)
        process.kill()
        process.wait()
        for _ in range(600):  # workers notice within seconds that nobody reads
            if not session(process.pid):
                break
            time.sleep(0.1)
    assert not session(process.pid)
    assert not [path for path in shared if path.exists()]


def shared_memory(process):
    """Return the files of shared memory, semaphores among them, that a process has mapped."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}


def session(leader):
    """Return the processes that still run in a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(path.parent.name)
    return found


def test_worker_that_stops_with_an_error_of_its_own_code_is_that_error(shards):
    loader = make(shards, num_workers=2, transform=divide)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))


def divide(batch):
    return batch["sample_ids"].numel() / 0


def test_order_survives_restarts_on_other_ranks_workers_and_batch_sizes(shards):
    """A run on one rank without processes, and the same run in legs; the weights move at every batch."""
    whole, plain, states = [], make(shards), []
    legs = [(1, 0, 12, 3), (2, 1, 12, 3), (1, 2, 24, 2), (3, 0, 24, 2), (2, 1, 6, 3)]
    for _, _, size, count in legs:
        states.append(json.loads(json.dumps(plain.state_dict())))
        plain = make(shards, global_batch_size=size)
        plain.load_state_dict(states[-1])
        whole.append(moved(plain, count))
    for leg, (world, workers, size, count) in enumerate(legs):
        for rank in range(world):
            loader = make(shards, rank=rank, world_size=world, num_workers=workers, global_batch_size=size)
            loader.load_state_dict(states[leg])
            for batch, expected in zip(moved(loader, count), whole[leg], strict=True):
                assert_same(batch, {name: value[rank::world] for name, value in expected.items()})
            if leg + 1 < len(legs):
                assert json.loads(json.dumps(loader.state_dict())) == states[leg + 1]


def moved(loader, count):
    found = []
    for batch in loader:
        found.append(batch)
        loader.set_weights([1, 1, loader.step])
        if len(found) == count:
            return found
    return found


def test_loader_that_is_taken_apart_says_so_instead_of_delivering_something_else(shards):
    for workers in (0, 1):
        loader = make(shards, num_workers=workers)
        apart = torch.utils.data.DataLoader(loader.dataset, sampler=loader.sampler, batch_size=4)
        with pytest.raises(InputError, match=r"took this MixtureLoader apart .* hand it over as it is"):
            next(iter(apart))
        assert loader.step == 0 and len(next(iter(loader))["sample_ids"]) == 12


def test_accelerate_is_told_to_leave_the_loader_as_it_is(shards):
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(InputError, match="accelerate's prepare"):
        next(iter(accelerate.Accelerator(cpu=True).prepare(make(shards, transform=None, read_ahead=None))))
