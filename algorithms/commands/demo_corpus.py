"""A corpus of very unequal domains out of files that every install has: the packages that came with this one.

No download and nothing made up: Python and C++ sources, type stubs, package READMEs, API descriptions, licences,
and the hash lists of ``RECORD`` files, a domain near to noise. Each domain takes files in an order given by the hash
of their path until it is as large as its limit, so a given set of installed packages always gives the same corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mixer.errors import InputError

__all__ = ["DEMO_DOMAINS", "build_corpus"]


class _Source(NamedTuple):
    """Files of one domain: which paths, how a file becomes text, and how many bytes to take at most."""

    pattern: str
    limit_bytes: int
    read: Callable[[Path], str]


def build_corpus(out: str | os.PathLike[str], *, root: Path | None = None) -> dict[str, int]:
    """Write ``out/<domain>/documents.jsonl`` for every domain and return the bytes of text of each.

    Args:
        root: folder of installed packages; default this interpreter's.

    Raises: InputError: fewer than 20 MB or a domain without any file were found.
    """
    root = root or Path(sysconfig.get_path("purelib"))
    files = sorted(_walk(root), key=lambda path: hashlib.sha256(path.encode()).digest())
    sizes = {}
    for domain, source in DEMO_DOMAINS.items():
        matching = (root / path for path in files if re.search(source.pattern, path))
        sizes[domain] = _write_domain(Path(out) / domain / "documents.jsonl", matching, source)
    if min(sizes.values()) == 0 or sum(sizes.values()) < 20e6:
        raise InputError(
            f"the packages in {root} give too little text for the demo ({sizes}); install this package with its "
            "composer extra: pip install 'domain-mixer[composer]'."
        )
    return sizes


def _write_domain(path: Path, files: Iterator[Path], source: _Source) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    size = 0
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as output:
        for file in files:
            if size >= source.limit_bytes:
                break
            text = _text_of(file, source)
            digest = hashlib.sha256(text.encode()).digest()
            # Licences and vendored modules come many times over; one copy is enough.
            if len(text) < 200 or digest in seen:
                continue
            seen.add(digest)
            output.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    os.replace(partial, path)
    return size


def _text_of(file: Path, source: _Source) -> str:
    """The file's text, at most 100,000 characters of it (a few generated files would fill a domain alone)."""
    try:
        return source.read(file)[:100_000]
    except (OSError, UnicodeDecodeError, gzip.BadGzipFile):
        return ""


def _walk(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root)


def _plain(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _readme(file: Path) -> str:
    """The description below the header fields of a METADATA file."""
    return _plain(file).partition("\n\n")[2]


def _gzipped(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode("utf-8")


DEMO_DOMAINS = {
    "python": _Source(r"\.py$", 13_000_000, _plain),
    "cpp": _Source(r"\.(h|hpp|cuh)$", 5_000_000, _plain),
    "api": _Source(r"botocore/data/.*service.*\.json\.gz$", 2_000_000, _gzipped),
    "hashes": _Source(r"\.dist-info/RECORD$", 1_600_000, _plain),
    "stubs": _Source(r"\.pyi$", 1_000_000, _plain),
    "readme": _Source(r"\.dist-info/METADATA$", 600_000, _readme),
    "licences": _Source(r"(?i)(licen[cs]e|copying|notice)[^/]*$", 200_000, _plain),
}
