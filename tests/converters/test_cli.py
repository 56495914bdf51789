"""What a person types and sees."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from converters.cli import convert, inspect
from mixer.manifest import Manifest
from tests.converters.corpora import write_corpus


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


def test_inspect_shows_documents_joined_by_end_of_text(shards):
    result = CliRunner().invoke(inspect, [str(shards[0]), "--sample", "2", "--domain", "book"], catch_exceptions=False)
    assert "book / train / sample 1" in result.output
    assert "web / train" not in result.output


def test_inspect_prints_the_manifest_as_json(shards):
    result = CliRunner().invoke(inspect, [str(shards[0]), "--json"], catch_exceptions=False)
    assert json.loads(result.output)["domains"].keys() == {"book", "code", "web"}


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
