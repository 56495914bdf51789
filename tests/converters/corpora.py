"""Small corpora with known content, and one hash over everything that a conversion wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

WORDS = ["the", "of", "domain", "weights", "ünïcödé", "漢字", "loss\n", "<|endoftext|>", "a", "\t", "12", "345", "é"]


def documents(domain: str, count: int, words: int = 60) -> list[str]:
    """Return ``count`` texts of one domain, always the same."""
    rng = np.random.default_rng([len(domain), *domain.encode()])
    return [" ".join(rng.choice(WORDS, rng.integers(1, 2 * words))) + f" #{n}" for n in range(count)]


def write_jsonl(path: Path, texts: list[str], **extra: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, **extra}, ensure_ascii=bool(n % 2)) for n, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_corpus(folder: Path, *, scale: int = 1) -> Path:
    """Write three domains of different size and schema: ``web`` in two files, ``code`` and tiny ``book``."""
    web = documents("web", 300 * scale)
    write_jsonl(folder / "web" / "a.jsonl", web[:200], meta={"set": "web"})
    write_jsonl(folder / "web" / "b.jsonl", web[200:])
    write_jsonl(folder / "code" / "c.jsonl", documents("code", 90 * scale), stars=3)
    write_jsonl(folder / "book" / "d.jsonl", documents("book", 2, words=900))
    return folder


def tree_hash(folder: Path) -> str:
    """Return one hash over the names and bytes of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
