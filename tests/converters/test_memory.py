"""No process of a conversion takes more than 200 MB, whatever the size of a file or of a record in it.

Each conversion runs in processes of its own; the peak is that of the largest, as the system counts it. The files of
``benchmarks.memory`` are larger than what is allowed, so that a reader that holds one whole is found out.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import click
import pytest

from benchmarks.conversion import measured
from benchmarks.memory import CONVERT, FILES, documents, giant, hard_documents, lines, sentencepiece, wide_documents
from converters.training import train_bpe

MOST = 200 * 1e6 / (1 << 20)  # MiB
GIANT = 170_000_000
# Their readers can only unpack a large page or compressed batch whole; they are refused before that.
REFUSED = {"parquet", "parquet, one page", "arrow file, zstd"}
SLOW = {"jsonl.bz2", "jsonl.xz", "tsv", "parquet"}  # as others, but slow to write

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux does"),
]


def converted(source: Path, out: Path, **options: object) -> dict:
    given = {"tokenizer": "bytes", "seq_len": 2, "workers": 2, "allow_empty": True, **options}
    return measured(CONVERT, str(source), str(out), json.dumps(given))


@pytest.mark.parametrize("name", [name for name in FILES if name not in SLOW])
def test_giant_record_is_left_out_and_its_neighbours_kept(tmp_path, name):
    file, write, options = FILES[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / file, giant(GIANT if name != "csv, open quote" else 24_000_000))
    if name in REFUSED:
        with pytest.raises(click.ClickException, match=r"DataError: .*unpacked whole.*--max-record \d+MiB"):
            converted(tmp_path / "in", tmp_path / "out", **options)
        return
    if name == "text":  # the whole file is the record
        with pytest.raises(click.ClickException, match=r"no text in 1 records of 1 files: 1 oversized"):
            converted(tmp_path / "in", tmp_path / "out", **options)
        return
    facts = converted(tmp_path / "in", tmp_path / "out", **{**options, "seq_len": 2048 if "quote" in name else 2})
    assert facts["peak_mb"] < MOST
    if "quote" in name:  # its own line is left out, and the last, which has one field; all others are records
        assert (facts["csv"], facts["read"] > 10_000) == (2, True)
    elif name == "mds, tokens":  # cut after its last whole sample
        assert facts["oversized"] == 1
    else:
        assert (facts["read"], facts["oversized"]) == (3, 1)


@pytest.mark.parametrize("name", ["jsonl.zst", "parquet", "arrow file", "mds.zstd"])
def test_giant_file_takes_no_more_than_its_largest_records(tmp_path, name):
    file, write, options = FILES[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / file, documents(100_000_000, 40_000))
    facts = converted(tmp_path / "in", tmp_path / "out", **{**options, "seq_len": 2048, "shard_size": "8MiB"})
    assert facts["peak_mb"] < MOST
    assert facts["read"] == 2500


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit"}, {"doc_starts": True}, {"shuffle_seed": 1}], ids=str)
def test_packing_takes_a_shard_and_not_a_unit(tmp_path, options):
    lines(tmp_path / "a.txt", documents(60_000_000, 1000))
    given = {"format": "text-lines", "unit_size": "1GB", "seq_len": 512, **options}
    assert converted(tmp_path / "a.txt", tmp_path / "out", **given)["peak_mb"] < MOST


def test_a_shard_of_a_million_short_documents_takes_no_more(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"".join(b"%014d\n" % (number * 48271) for number in range(1_600_000)))
    given = {"format": "text-lines", "unit_size": "1GB", "seq_len": 2048, "packing": "none"}
    assert converted(tmp_path / "a.txt", tmp_path / "out", **given)["peak_mb"] < MOST


@pytest.mark.parametrize("kind", ["hf", "gigatoken", "o200k_base", "gigatoken, o200k_base", "unigram"])
def test_documents_up_to_the_limit_are_encoded(tmp_path, kind):
    source = wide_documents(tmp_path / "in", 4 if kind == "gigatoken" else 1)
    given = {**tokenizer_of(kind, tmp_path), "unit_size": "16MiB", "seq_len": 2048}
    facts = converted(source, tmp_path / "out", **given)
    assert facts["peak_mb"] < MOST
    assert "oversized" not in facts


@pytest.mark.parametrize("kind", ["hf", "gigatoken, o200k_base", "unigram"])
def test_word_of_megabytes_is_encoded_or_left_out(tmp_path, kind):
    given = {**tokenizer_of(kind, tmp_path), "seq_len": 2048}
    source = hard_documents(tmp_path / "in", ["genome"])
    (source / "b.jsonl").write_text(json.dumps({"text": "some words " * 9999}))
    facts = converted(source, tmp_path / "out", **given)
    assert facts["peak_mb"] < MOST
    assert facts["read"] == 2
    assert facts.get("oversized", 0) == (1 if kind == "unigram" else 0)  # a word of which it must see all


def tokenizer_of(kind: str, folder: Path) -> dict[str, str]:
    """Return the options of a kind of tokenizer; skips the test where its package is missing."""
    needed = {"hf": "tokenizers", "o200k_base": "bpe_openai", "unigram": "sentencepiece"}
    for part in kind.split(", "):
        pytest.importorskip(needed.get(part, part))
    if kind == "unigram":
        genome = "".join(random.Random(0).choices("ACGT", k=20_000))
        tokenizer = sentencepiece(folder, [*documents(100_000), genome], kind, vocab_size=400)
    elif "o200k_base" in kind:
        tokenizer = "tiktoken:o200k_base"
    else:
        tokenizer = str(folder / "tokenizer.json")
        Path(tokenizer).write_text(train_bpe(list(documents(100_000)), 1000))
    return {"tokenizer": tokenizer, "backend": "gigatoken" if "gigatoken" in kind else "hf"}
