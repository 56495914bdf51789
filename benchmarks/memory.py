"""How much memory does a conversion take, whatever the files and documents?

    python -m benchmarks.memory                 # files and records of 256 MB
    python -m benchmarks.memory --size 1GB
    python -m benchmarks.memory --only csv --only gigatoken

Every row is one conversion by two workers: of one giant file of many records, or of one giant record between two small
ones, in every format; of documents of 8 MiB by every tokenizer, once of sentences and once such as are hard to cut (a
genome, one letter, numbers, Chinese without punctuation); and of many documents in every packing. Shown is the peak of
resident memory of the largest process, parent or worker, as the system counts it; "refused" is a file that can only be
unpacked whole, with an error that says so. At the end, all beside the goal of 200 MB. Results also go to
benchmarks/results/memory.json.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import itertools
import json
import lzma
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks import RESULTS
from benchmarks.conversion import measured
from benchmarks.goals import Row, print_goals
from converters.options import size_in_bytes

CONVERT = """
import json, sys
from converters import convert
if __name__ == "__main__":
    source, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    manifest = convert([source], out, **{"on_bad_record": "quarantine", "max_bad": 1, "held_out": 0, **options})
    facts = manifest.converter
    print(json.dumps({"read": facts["documents_read"], **facts["skipped"]}))
"""

SENTENCE = "The quick brown fox jumps over the lazy dog, {}; 漢字 and ünïcödé too.\n"


def text(size: int, number: int = 0) -> str:
    """Return about ``size`` characters of text, which compresses as prose does and not better."""
    lines = (SENTENCE.format((number + n) * 2654435761 % (1 << 64)) for n in itertools.count())
    length = len(SENTENCE) + 10
    return "".join(itertools.islice(lines, max(1, size // length)))


def documents(size: int, each: int = 4000) -> Iterator[str]:
    """Yield documents of about ``each`` characters, ``size`` in all."""
    return (text(each, 1000 * n) for n in range(max(1, size // each)))


def giant(size: int) -> Iterator[str]:
    """Yield a small document, one of ``size``, and another small one."""
    some = text(1 << 20)
    yield "first"
    yield some * (size // len(some))
    yield "last"


# --- formats: name -> (file name, how it is written) ----------------------------------------------------------------


def jsonl(path: Path, texts: Iterable[str], opened: Callable[..., Any] = open) -> None:
    with opened(path, "wb") as file:
        for each in texts:
            file.write(json.dumps({"text": each}, ensure_ascii=False).encode() + b"\n")


def zstd(path: Path, texts: Iterable[str]) -> None:
    import zstandard

    jsonl(path, texts, zstandard.open)


def lines(path: Path, texts: Iterable[str], join: str = " ", end: str = "\n") -> None:
    with open(path, "wb") as file:
        for each in texts:
            file.write(each.replace("\n", join).encode() + end.encode())


def separated(path: Path, texts: Iterable[str], delimiter: str = ",") -> None:
    import csv

    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


def open_quote(path: Path, texts: Iterable[str]) -> None:
    separated(path, [])
    with open(path, "ab") as file:
        file.write(b'0,first\r\n1,"never closed ')
        for each in texts:
            file.write(each.encode() + b"\r\n")


def parquet(path: Path, texts: Iterable[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": list(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=1 << 30, write_batch_size=16, compression="zstd")


def parquet_page(path: Path, texts: Iterable[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": list(texts)})
    pyarrow.parquet.write_table(table, path, data_page_size=1 << 30, use_dictionary=False, write_batch_size=1 << 20)


def arrow(path: Path, texts: Iterable[str], kind: str = "stream", compression: str | None = None) -> None:
    import pyarrow

    batch = pyarrow.record_batch({"text": pyarrow.array(list(texts), pyarrow.large_string())})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, make(file, batch.schema, options=options) as writer:
        writer.write_batch(batch)


def wet(path: Path, texts: Iterable[str]) -> None:
    with open(path, "wb") as file:
        for each in texts:
            body = each.encode()
            head = (
                f"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            file.write(head.encode() + body + b"\r\n\r\n")


def mds(path: Path, texts: Iterable[str], compress: Callable[[bytes], bytes] = bytes) -> None:
    from mixer.mds import encode_shard

    path.write_bytes(compress(encode_shard({"text": "str"}, [{"text": each} for each in texts])))


def mds_zstd(path: Path, texts: Iterable[str]) -> None:
    import zstandard

    mds(path, texts, zstandard.compress)


def mds_tokens(path: Path, texts: Iterable[str]) -> None:
    import numpy as np

    from mixer.mds import encode_shard

    ids = np.concatenate([np.append(np.frombuffer(each.encode(), np.uint8), np.uint16(256)) for each in texts])
    rows = ids[: len(ids) // 1024 * 1024].reshape(-1, 1024)
    path.write_bytes(encode_shard({"tokens": "ndarray:uint16:1024"}, rows))


FILES: dict[str, tuple[str, Callable[[Path, Iterable[str]], None], dict[str, Any]]] = {
    "jsonl": ("a.jsonl", jsonl, {}),
    "jsonl.gz": ("a.jsonl.gz", functools.partial(jsonl, opened=functools.partial(gzip.open, compresslevel=1)), {}),
    "jsonl.zst": ("a.jsonl.zst", zstd, {}),
    "jsonl.bz2": ("a.jsonl.bz2", functools.partial(jsonl, opened=functools.partial(bz2.open, compresslevel=1)), {}),
    "jsonl.xz": ("a.jsonl.xz", functools.partial(jsonl, opened=functools.partial(lzma.open, preset=0)), {}),
    "csv": ("a.csv", separated, {}),
    "csv, open quote": ("a.csv", open_quote, {}),
    "tsv": ("a.tsv", functools.partial(separated, delimiter="\t"), {}),
    "parquet": ("a.parquet", parquet, {}),
    "parquet, one page": ("a.parquet", parquet_page, {}),
    "arrow stream": ("a.arrow", arrow, {}),
    "arrow file": ("a.arrow", functools.partial(arrow, kind="file"), {}),
    "arrow file, zstd": ("a.arrow", functools.partial(arrow, kind="file", compression="zstd"), {}),
    "warc": ("a.wet", wet, {}),
    "mds": ("shard.00000.mds", mds, {}),
    "mds.zstd": ("shard.00000.mds.zstd", mds_zstd, {}),
    "mds, tokens": ("shard.00000.mds", mds_tokens, {"tokens_from": "bytes"}),
    "text": ("a.txt", functools.partial(lines, join="\n"), {}),
    "text-lines": ("a.txt", lines, {"format": "text-lines"}),
    "text-blocks": ("a.txt", functools.partial(lines, join="\n", end="\n\n"), {"format": "text-blocks"}),
}


SHAPES: dict[str, Callable[[int], Iterator[str]]] = {"many records": documents, "one giant record": giant}


# --- tokenizers and packings ----------------------------------------------------------------------------------------


def wide_documents(folder: Path, count: int = 8, size: int = 8_000_000) -> Path:
    """Write documents of almost 8 MiB, one of its characters needing four bytes: Python keeps all of them in four."""
    some = "😀" + text(size, 7)
    while len(some.encode()) > size:
        some = some[: -size // 100]
    folder.mkdir(parents=True)
    jsonl(folder / "a.jsonl", (f"{number} {some}" for number in range(count)))
    return folder


def hard_documents(folder: Path, names: Iterable[str] = ("genome", "letter", "numbers", "chinese")) -> Path:
    """Write documents of almost 8 MiB that have no usual place to cut."""
    chance = random.Random(0)
    han = [chr(number) for number in range(0x4E00, 0x5600)]
    made = {
        "genome": lambda: "".join(chance.choices("ACGT", k=8_000_000)),
        "letter": lambda: "a" * 8_000_000,
        "numbers": lambda: " + ".join(str(number * 7919 % 1_000_003) for number in range(900_000)),
        "chinese": lambda: "".join(chance.choices(han, k=2_600_000)),
    }
    folder.mkdir(parents=True)
    jsonl(folder / "a.jsonl", (made[name]() for name in names))
    return folder


def tokenizers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the options of every kind of tokenizer that is installed, by name; small ones are trained."""
    import importlib.util

    from tokenizers import Tokenizer, models, normalizers, trainers

    from converters.training import train_bpe

    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:80]]
    folder.mkdir(parents=True)
    (folder / "words.json").write_text(train_bpe([*texts, text(100_000)], 32_000))
    whole = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    specials = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    lines = [line for each in texts for line in each.split(" ")]
    whole.train_from_iterator(lines, trainers.BpeTrainer(special_tokens=specials, show_progress=False))
    whole.save(str(folder / "whole.json"))
    found: dict[str, dict[str, Any]] = {
        "bytes": {"tokenizer": "bytes"},
        "hf, byte-level of 32,000": {"tokenizer": str(folder / "words.json")},
        "hf, no words (as Llama 2)": {"tokenizer": str(folder / "whole.json"), "eos": "</s>"},
    }
    if importlib.util.find_spec("gigatoken"):
        found["gigatoken of 32,000"] = {"tokenizer": str(folder / "words.json"), "backend": "gigatoken"}
    if importlib.util.find_spec("bpe_openai"):
        for name in ("cl100k_base", "o200k_base"):
            found[f"hf, {name}"] = {"tokenizer": f"tiktoken:{name}"}
            if importlib.util.find_spec("gigatoken"):
                found[f"gigatoken, {name}"] = {"tokenizer": f"tiktoken:{name}", "backend": "gigatoken"}
    if importlib.util.find_spec("sentencepiece"):
        found |= {
            f"sentencepiece, {kind}": {"tokenizer": sentencepiece(folder, texts, kind)} for kind in ("bpe", "unigram")
        }
    return found


def sentencepiece(folder: Path, texts: list[str], kind: str, vocab_size: int = 2000) -> str:
    """Train a model of that kind; return its file."""
    import sentencepiece as library

    (folder / "lines.txt").write_text("\n".join(texts))
    given: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
        "max_sentence_length": 100_000,
    }
    library.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / kind), model_type=kind, **given
    )
    return str(folder / f"{kind}.model")


PACKINGS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat, document starts": {"doc_starts": True},
    "best_fit": {"packing": "best_fit"},
    "none": {"packing": "none"},
    "shuffled": {"shuffle_seed": 1},
    "deduplicated": {"dedupe": True},
    "held out": {"held_out": 0.01},
}


def peak(source: Path, scratch: Path, **options: Any) -> float | str:
    """Convert; return the peak of the largest process in MiB, or what was refused."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        given = {"tokenizer": "bytes", "seq_len": 2048, "workers": 2, "allow_empty": True, **options}
        try:
            return measured(CONVERT, str(source), f"{out}/shards", json.dumps(given))["peak_mb"]
        except click.ClickException as error:
            reason = error.message.strip().splitlines()[-1]
            is_limit = ("DataError" in reason and "--max-record" in reason) or "oversized" in reason
            if not is_limit:
                raise
            return "refused"


def measurements(scratch: Path, size: int) -> Iterator[tuple[str, str, Callable[[], float | str]]]:
    """Yield group, name and what to measure."""
    for name, (file, write, options) in FILES.items():
        for shape, make in SHAPES.items():
            # Two small documents fill a short sample only; after a quote that is never closed come many.
            given = {**options, **({"seq_len": 2} if make is giant and "quote" not in name else {})}
            yield f"format, {shape}", name, functools.partial(_of_file, scratch, file, write, make, size, given)
    source, hard = wide_documents(scratch / "wide"), hard_documents(scratch / "hard")
    for name, options in tokenizers(scratch / "tokenizers").items():
        yield "tokenizer", name, functools.partial(peak, source, scratch, unit_size="16MiB", **options)
        yield "tokenizer, hard to cut", name, functools.partial(peak, hard, scratch, **options)
    many = scratch / "many"
    many.mkdir()
    lines(many / "a.txt", documents(size))
    for name, options in PACKINGS.items():
        yield "packing", name, functools.partial(peak, many, scratch, format="text-lines", unit_size="10GB", **options)


def _of_file(
    scratch: Path, file: str, write: Callable[..., None], make: Callable[[int], Any], size: int, options: dict[str, Any]
) -> float | str:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = Path(folder) / "in"
        source.mkdir()
        write(source / file, make(size))
        return peak(source, scratch, **options)


def goals(found: dict[str, dict[str, float | str]]) -> list[Row]:
    """Return the largest of each group beside the goal, and each that is above it."""
    rows = []
    for group, peaks in found.items():
        sizes = {name: peak * 1.048576 for name, peak in peaks.items() if not isinstance(peak, str)}
        above = {name: size for name, size in sizes.items() if size > 200}
        if below := sizes.keys() - above.keys():
            most = max(below, key=lambda name: sizes[name])
            rows.append(Row(f"{group}: {len(below)} of {len(sizes)}", f"to {sizes[most]:.0f} MB", "<= 200 MB", True))
        for name, size in above.items():
            rows.append(Row(f"{group}: {name}", f"{size:.0f} MB", "<= 200 MB", False))
    return rows


@click.command()
@click.option("--size", default="256MB", show_default=True, help="Of a giant file or record.")
@click.option("--only", multiple=True, help="Measure what has this in its group or name; may be repeated.")
def main(size: str, only: tuple[str, ...]) -> None:
    """Measure the peak memory of conversions, in MiB."""
    found: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for group, name, measure in measurements(Path(scratch), size_in_bytes(size)):
            if only and not any(word in group or word in name for word in only):
                continue
            found.setdefault(group, {})[name] = value = measure()
            click.echo(f"{group:28} {name:28} {value if isinstance(value, str) else round(value):>8}")  # takes minutes
    print_goals(f"files and records of {size}", goals(found))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps({"size": size, "peak_mib": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
