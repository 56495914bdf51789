"""What a person types and sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from converters import convert as conversion
from converters.cli import convert, inspect, stats
from mixer.manifest import Manifest
from tests.converters.corpora import write_corpus, write_jsonl


@pytest.fixture
def shards(tmp_path):
    write_corpus(tmp_path / "corpus")
    arguments = [str(tmp_path / "corpus"), "--out", str(tmp_path / "shards"), "--tokenizer", "bytes", "--seq-len", "64"]
    result = CliRunner().invoke(convert, [*arguments, "--workers", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    return tmp_path / "shards", result.output


def test_convert_ends_with_a_table_of_the_domains(shards):
    folder, output = shards
    for name, domain in Manifest.load(folder).domains.items():
        (line,) = [line for line in output.splitlines() if line.strip().startswith(f"{name} ")]
        assert f"{domain.splits['train'].num_samples:,}" in line


def test_what_is_converted_already_is_said(shards, tmp_path):
    _, output = shards
    arguments = [str(tmp_path / "corpus"), "--out", str(tmp_path / "shards"), "--tokenizer", "bytes", "--seq-len", "64"]
    for more in ([], ["--extend"]):
        result = CliRunner().invoke(convert, [*arguments, *more], catch_exceptions=False)
        assert (result.exit_code, result.stderr) == (0, "Nothing to do: all of this was converted before.\n")
        assert result.stdout.splitlines()[-3:] == output.splitlines()[-3:]


def test_inspect_shows_documents_joined_by_end_of_text(shards):
    result = CliRunner().invoke(inspect, [str(shards[0]), "--sample", "2", "--domain", "book"], catch_exceptions=False)
    assert "book / train / sample 1" in result.output
    assert "--- end of document ---" not in result.output  # its two documents are longer than these samples
    assert "web / train" not in result.output


def test_inspect_shows_where_documents_end_and_what_is_padding(tmp_path):
    texts = ["one <|endoftext|>", "two", "three"]
    write_jsonl(tmp_path / "in" / "a" / "a.jsonl", texts)
    for packing in ("concat", "none"):
        given: dict = {"tokenizer": "bytes", "seq_len": 40, "held_out": 0, "packing": packing}
        given |= {"tail": "pad"} if packing == "concat" else {}
        conversion([tmp_path / "in"], tmp_path / packing, **given)
        shown = CliRunner().invoke(inspect, [str(tmp_path / packing), "--sample", "3"], catch_exceptions=False).output
        assert shown.count("--- end of document ---") == 3
        assert [text for text in texts if text in shown] == texts
        padding = 40 - sum(len(text) + 1 for text in texts)
        assert (f"--- {padding} tokens of padding ---" in shown) == (packing == "concat")


def test_what_was_left_out_and_copied_is_said_of_extensions_too(tmp_path):
    texts = [f"document {n} of some length" for n in range(90)]
    for domain in ("a", "b"):
        write_jsonl(tmp_path / "in" / domain / "a.jsonl", texts)
    options = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes", "--seq-len", "32"]
    options += ["--on-bad-record", "quarantine", "--max-bad", "0.5", "--workers", "1", "--allow-empty"]
    first = CliRunner().invoke(convert, options, catch_exceptions=False)
    assert "Left out" not in first.output
    assert "held-out" not in first.output  # copies land on one side
    write_jsonl(tmp_path / "in" / "c" / "c.jsonl", texts[:3])
    (tmp_path / "in" / "a" / "b.jsonl").write_text('{"body": "x"}\n{"text": "another"}\n')
    more = CliRunner().invoke(convert, [*options, "--extend"], catch_exceptions=False)
    for output in (more.output, CliRunner().invoke(inspect, [str(tmp_path / "out")]).output):
        assert "Left out 1 of 185 records: 1 no_text (kept in quarantine.1.jsonl)." in output
        assert "a/b.jsonl, line 1: no text field 'text'" in output
    for file in (tmp_path / "in").rglob("*.jsonl"):
        file.unlink()
    write_jsonl(tmp_path / "in" / "a" / "a.jsonl", [texts[0]] * 60)
    copied = CliRunner().invoke(convert, [*options, "--fresh"], catch_exceptions=False)
    assert re.search(r"[1-9] training documents have the very texts of held-out ones", copied.output)


def test_inspect_prints_the_manifest_as_json(shards):
    result = CliRunner().invoke(inspect, [str(shards[0]), "--json"], catch_exceptions=False)
    assert json.loads(result.output)["domains"].keys() == {"book", "code", "web"}


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_narrow_terminal_keeps_names_and_cuts_no_number(tmp_path, columns):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "web").rename(tmp_path / "corpus" / "a-domain-of-a-very-long-name")
    manifest = conversion(tmp_path / "corpus", tmp_path / "shards", tokenizer="bytes", seq_len=64)
    for command in (inspect, stats):
        result = CliRunner().invoke(command, [str(tmp_path / "shards")], env={"COLUMNS": str(columns)})
        lines = result.output.splitlines()
        assert max(map(len, lines)) <= columns
        names = "".join(re.findall(r"^ ?([a-z-]+)", result.output, re.MULTILINE))
        assert all(name in names for name in manifest.names)
        assert "…" not in result.output
        words = " ".join(result.output.split())
        columns_of = {
            inspect: "docs train valid tokens share size held",
            stats: "tokens docs p10 p50 B/tok copies H1 H2",
        }
        assert all(name in words for name in columns_of[command].split())
        assert ("no room for" in words) == (columns < 72)


def test_output_that_is_piped_has_every_column(tmp_path, shards):
    done = run("stats", str(shards[0]))
    (heading,) = [line for line in done.stdout.splitlines() if "B/tok" in line]
    assert heading.split()[-2:] == ["H1", "H2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mixer.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nowhere"], "no folder of shards at nowhere"),
        (["convert", "nowhere", "--out", "x", "--tokenizer", "bytes", "--seq-len", "8"], "no input at nowhere"),
    ],
)
def test_wrong_paths_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_and_workers_import_nothing_heavy():
    probe = (
        "import sys\n"
        "try:\n    from mixer.cli import main; main(['convert', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'torch', 'rich', 'tokenizers'} & set(sys.modules)), file=sys.stderr)\n"
        "import converters.stage, converters.packing\n"
        "print(sorted({'torch', 'streaming', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stderr.splitlines() == ["[]", "[]"]
    assert "Examples:" in done.stdout


@pytest.mark.parametrize(("asked", "expected"), [(None, "1"), ("3", "3")])
def test_numpy_starts_no_threads_for_linear_algebra(asked, expected):
    probe = (
        "import os, click\nfrom mixer.cli import cli\n"
        "cli.get_command(click.Context(cli), 'convert')\nprint(os.environ['OPENBLAS_NUM_THREADS'])\n"
        "import sys; print('numpy' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if asked:
        environment["OPENBLAS_NUM_THREADS"] = asked
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [expected, "False"]
