"""Kill it anywhere: nothing looks finished, the same command continues, and the bytes come out the same."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import committing, convert, tokenizing
from mixer.errors import DataError, InputError
from tests.converters.corpora import tree_hash, write_corpus, write_jsonl

OPTIONS = {"tokenizer": None, "train_tokenizer": 300, "seq_len": 32, "unit_size": 1500, "shard_size": 4000}


def command(tmp_path: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, "-c", "from mixer.cli import main; main()", "convert"),
        *(str(tmp_path / "corpus"), "--out", str(tmp_path / "shards")),
        *("--train-tokenizer", "300", "--seq-len", "32", "--unit-size", "1500", "--shard-size", "4000"),
        *("--workers", str(workers)),
    ]


def start(tmp_path: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(tmp_path, workers),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell starts what it puts in the background deaf to Ctrl-C, and so are the children of tests run that way.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(process: subprocess.Popen[str], condition, seconds: float = 60) -> bool:
    """Return True once the condition holds, False if the process ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("neither the condition nor the end came")


def finished_units(shards: Path) -> int:
    return len(list(shards.glob(".stage/units/*/unit.json")))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("expected")
    convert([write_corpus(folder / "corpus")], folder / "shards", **OPTIONS)
    return tree_hash(folder / "shards")


def test_interruptions_at_any_step_resume_to_the_same_bytes(tmp_path, monkeypatch, expected):
    """Stop in process at every kind of write in turn, each time a little further, without any clean-up."""
    write_corpus(tmp_path / "corpus")
    real = os.replace
    allowed = 0
    stops = 0

    class Stopped(BaseException):
        pass

    while True:
        left = allowed

        def stopping(source, target):
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            real(source, target)

        monkeypatch.setattr("os.replace", stopping)
        try:
            convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
        except Stopped:
            stops += 1
            assert not (tmp_path / "shards" / "manifest.json").exists()
            allowed = 1 + stops % 11  # the commit writes 8 files anew each time
            continue
        break
    assert stops > 15
    assert tree_hash(tmp_path / "shards") == expected


def test_killed_worker_is_replaced_and_its_unit_done_again(tmp_path, expected):
    write_corpus(tmp_path / "corpus")
    process = start(tmp_path, workers=2)
    assert wait_until(process, lambda: finished_units(tmp_path / "shards") >= 2)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"a worker process died at unit \d+ \(.*/corpus/\w+/.*\); that is done again", errors)
    assert "Traceback" not in errors
    assert tree_hash(tmp_path / "shards") == expected


def killed_once_before_a_rename(note: str, function: Callable[[Any], Any], task: Any) -> Any:
    """Die the first time that a file, written under another name, is to get its own; work without heavy libraries."""
    assert not {"torch", "streaming", "transformers"} & sys.modules.keys()
    real = os.replace

    def replace(source, target):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(note, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace
    try:
        return function(task)
    finally:
        os.replace = real


def test_worker_killed_in_the_middle_of_a_file_leaves_nothing_of_it(tmp_path, monkeypatch, expected):
    for module, name in ((tokenizing, "stage_unit"), (committing, "pack_shard")):
        killed = functools.partial(killed_once_before_a_rename, str(tmp_path / name), getattr(module, name))
        monkeypatch.setattr(module, name, killed)
    write_corpus(tmp_path / "corpus")
    convert([tmp_path / "corpus"], tmp_path / "shards", stage=tmp_path / "stage", workers=2, **OPTIONS)
    assert (tmp_path / "stage_unit").exists()
    assert (tmp_path / "pack_shard").exists()
    assert not list((tmp_path / "stage").rglob("*.tmp"))
    assert tree_hash(tmp_path / "shards") == expected


def test_ctrl_c_while_workers_start_is_one_line(tmp_path):
    write_corpus(tmp_path / "corpus")
    process = start(tmp_path, workers=2)
    assert wait_until(process, lambda: len(children(process.pid)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    write_corpus(tmp_path / "corpus", scale=4)
    process = start(tmp_path, workers=2)
    assert wait_until(process, lambda: finished_units(tmp_path / "shards") >= 2)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "continues where it stopped" in errors
    assert "leaked" not in errors


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    write_corpus(tmp_path / "corpus", scale=4)
    process = start(tmp_path, workers=2)
    assert wait_until(process, lambda: finished_units(tmp_path / "shards") >= 2)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in workers if is_running(pid)]


def test_ctrl_c_exits_with_130_and_the_same_command_continues(tmp_path, expected):
    write_corpus(tmp_path / "corpus")
    for _ in range(5):
        process = start(tmp_path, workers=2)
        reached = wait_until(process, lambda: finished_units(tmp_path / "shards") >= 2)
        if reached:
            os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "shards")  # it was done before the signal came: a busy machine
    assert process.returncode == 130
    assert "continues where it stopped" in errors
    assert "Traceback" not in errors
    done = finished_units(tmp_path / "shards")
    assert done >= 2
    assert subprocess.run(command(tmp_path, 1), capture_output=True).returncode == 0
    assert tree_hash(tmp_path / "shards") == expected


def test_finished_units_are_not_tokenised_again(tmp_path, monkeypatch, expected):
    from converters import tokenizing

    write_corpus(tmp_path / "corpus")
    seen: list[int] = []

    def stop_after_five(event):
        seen.append(event.done)
        if event.phase == "tokenize" and len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([tmp_path / "corpus"], tmp_path / "shards", progress=stop_after_five, **OPTIONS)
    done = finished_units(tmp_path / "shards")
    staged: list[int] = []
    original = tokenizing.stage_unit

    def counting(task):
        staged.append(task.unit.number)
        return original(task)

    monkeypatch.setattr("converters.tokenizing.stage_unit", counting)
    convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
    assert done >= 5
    assert min(staged) == done
    assert tree_hash(tmp_path / "shards") == expected


def test_unfinished_conversion_refuses_other_options_and_inputs(tmp_path):
    write_corpus(tmp_path / "corpus")

    def stop(event):
        if event.phase == "pack" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([tmp_path / "corpus"], tmp_path / "shards", progress=stop, **OPTIONS)
    for change, message in [
        ({"domain": "file"}, "domain: folder -> file"),
        ({"unit_size": 1000}, "unit_bytes: 1500 -> 1000"),
        ({"held_out": 0.5}, "held_out: 0.01 -> 0.5"),
        ({"seed": 1}, "seed: 0 -> 1"),
    ]:
        with pytest.raises(InputError, match=f"{message}.*--fresh"):
            convert([tmp_path / "corpus"], tmp_path / "shards", **{**OPTIONS, **change})
    (tmp_path / "corpus" / "web" / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"inputs: corpus/web/b.jsonl is gone"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)


@pytest.mark.parametrize("extend", [False, True])
def test_finished_conversion_that_lost_shards_is_no_success(tmp_path, extend):
    write_corpus(tmp_path / "corpus")
    given = {**OPTIONS, "extend": extend}
    convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
    expected = tree_hash(tmp_path / "shards")
    convert([tmp_path / "corpus"], tmp_path / "shards", **given)
    first, second = sorted((tmp_path / "shards" / "web" / "train").glob("shard.*"))[:2]
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{second} has .* bytes, its index says .*start over with --fresh"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **given)
    first.unlink()
    with pytest.raises(DataError, match=rf"{first} is missing \(and 1 more: `mixer verify {first.parents[2]}`"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **given)
    (first.parent / "index.json").unlink()
    with pytest.raises(DataError, match=r"web/train/index.json is missing. The conversion was finished"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **given)
    convert([tmp_path / "corpus"], tmp_path / "shards", fresh=True, **OPTIONS)
    assert tree_hash(tmp_path / "shards") == expected


def test_full_fingerprint_notices_every_byte_and_no_time(tmp_path):
    file = tmp_path / "corpus" / "web" / "a.jsonl"
    write_jsonl(file, [f"{number} {'x' * 1000}" for number in range(3000)])
    options = {"tokenizer": "bytes", "seq_len": 512, "fingerprint": "full"}

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([tmp_path / "corpus"], tmp_path / "shards", progress=stop, **options)
    os.utime(file, (1, 1))
    convert([tmp_path / "corpus"], tmp_path / "shards", **options)
    with open(file, "r+b") as changed:
        changed.seek(1_500_000)
        changed.write(b"y")
    with pytest.raises(InputError, match=r"inputs: corpus/web/a.jsonl has other content\. Repeat"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **options)


def test_file_that_was_written_anew_is_refused_while_it_is_being_converted(tmp_path):
    write_corpus(tmp_path / "corpus")

    def stop(event):
        if event.phase == "tokenize" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert([tmp_path / "corpus"], tmp_path / "shards", progress=stop, **OPTIONS)
    os.utime(tmp_path / "corpus" / "web" / "a.jsonl", (1, 1))
    with pytest.raises(InputError, match=r"a.jsonl has the same size and ends, but was written anew\. Repeat"):
        convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)


def archives(folder: Path, damaged: str) -> Path:
    """Write archives of which several make a unit; the damaged one is the second half of its unit."""
    for number in range(6):
        write_jsonl(folder / "web" / f"{number}.jsonl", [f"{number} {line} {'xyz' * 20}" for line in range(40)])
    for path in sorted((folder / "web").iterdir()):
        data = gzip.compress(path.read_bytes(), mtime=0)
        path.with_name(f"{path.name}.gz").write_bytes(data[: len(data) // 3] if path.name == damaged else data)
        path.unlink()
    return folder


@pytest.mark.parametrize("way", ["mended", "left out"])
def test_damaged_file_can_be_mended_or_left_out_and_finished_units_stay(tmp_path, monkeypatch, caplog, way):
    corpus = archives(tmp_path / "corpus", damaged="3.jsonl")
    size = (corpus / "web" / "0.jsonl.gz").stat().st_size
    options: dict = {"tokenizer": "bytes", "seq_len": 32, "unit_size": int(size * 1.5), "held_out": 0.1}
    with pytest.raises(DataError, match=r"3.jsonl.gz is truncated or damaged .* leave it out with --exclude"):
        convert([corpus], tmp_path / "shards", **options)
    assert finished_units(tmp_path / "shards") >= 2
    if way == "mended":
        shutil.copy(archives(tmp_path / "good", damaged="") / "web" / "3.jsonl.gz", corpus / "web")
    else:
        options["exclude"] = ["3.jsonl.gz"]
    staged: list[str] = []
    original = tokenizing.stage_unit

    def recording(task):
        staged.extend(piece.name for piece in task.unit.pieces)
        return original(task)

    monkeypatch.setattr("converters.tokenizing.stage_unit", recording)
    convert([corpus], tmp_path / "shards", **options)
    assert "web/0.jsonl.gz" not in staged
    assert "None of this is in a finished unit" in caplog.text
    convert([corpus], tmp_path / "direct", **options)
    assert tree_hash(tmp_path / "shards") == tree_hash(tmp_path / "direct")


@pytest.mark.parametrize("is_fresh", [False, True], ids=["", "fresh"])
def test_two_conversions_into_one_folder_do_not_mix(tmp_path, is_fresh):
    write_corpus(tmp_path / "corpus")

    def second(event):
        convert([tmp_path / "corpus"], tmp_path / "shards", fresh=is_fresh, **OPTIONS)

    with pytest.raises(InputError, match="another conversion works in"):
        convert([tmp_path / "corpus"], tmp_path / "shards", progress=second, **OPTIONS)


def test_kill_between_manifest_and_clean_up_is_tidied_by_the_next_call(tmp_path, monkeypatch, expected):
    write_corpus(tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr("converters.workplace.clean_up", lambda *_: None)
        convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
    assert (tmp_path / "shards" / ".stage").exists()
    convert([tmp_path / "corpus"], tmp_path / "shards", **OPTIONS)
    assert tree_hash(tmp_path / "shards") == expected
