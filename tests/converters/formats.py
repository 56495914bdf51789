"""One writer per input format: the counterpart of each row of ``converters.readers.FORMATS``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixer.mds import encode_shard


def _jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))


def _table(texts: list[str]):
    import pyarrow as pa

    return pa.table({"id": list(range(len(texts))), "text": texts})


def _parquet(path: Path, texts: list[str]) -> None:
    import pyarrow.parquet as pq

    pq.write_table(_table(texts), path, row_group_size=7)


def _arrow_file(path: Path, texts: list[str]) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _table(texts).schema) as writer:
        writer.write_table(_table(texts), max_chunksize=7)


def arrow_stream(path: Path, texts: list[str]) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _table(texts).schema) as writer:
        writer.write_table(_table(texts), max_chunksize=7)


def _separated(delimiter: str) -> Callable[[Path, list[str]], None]:
    def write(path: Path, texts: list[str]) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["id", "text"], *enumerate(texts)])

    return write


def _wet(path: Path, texts: list[str]) -> None:
    with open(path, "wb") as file:
        file.write(b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 12\r\n\r\nsoftware: us\r\n\r\n")
        for number, text in enumerate(texts):
            body = text.encode()
            head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://x/{number}\r\n"
            head += f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n\r\n"
            file.write(head.encode() + body + b"\r\n\r\n")


def _mds(path: Path, texts: list[str]) -> None:
    columns = {"text": "str", "id": "int", "extra": "ndarray:uint16"}
    rows = [{"text": text, "id": n, "extra": np.arange(n + 1, dtype=np.uint16)} for n, text in enumerate(texts)]
    path.write_bytes(encode_shard(columns, rows))


def _blocks(path: Path, texts: list[str]) -> None:
    path.write_text("\n\n \n".join(texts) + "\n", encoding="utf-8")


# format: (file name, writer). ``text`` holds one document per file, so it is given a folder.
WRITERS: dict[str, tuple[str, Callable[[Path, list[str]], None]]] = {
    "jsonl": ("a.jsonl", _jsonl),
    "parquet": ("a.parquet", _parquet),
    "arrow": ("a.arrow", _arrow_file),
    "csv": ("a.csv", _separated(",")),
    "tsv": ("a.tsv", _separated("\t")),
    "warc": ("a.warc.wet", _wet),
    "mds": ("shard.00000.mds", _mds),
    "text-lines": ("a.txt", lambda path, texts: path.write_text("\n".join(texts) + "\n", encoding="utf-8") and None),
    "text-blocks": ("a.txt", _blocks),
}
MUST_BE_NAMED = ("text-lines", "text-blocks")
