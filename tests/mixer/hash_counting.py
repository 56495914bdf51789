"""Importing this counts, over all processes, the shards that are compared with their hashes: a line each in a file."""

from __future__ import annotations

import os
from typing import Any

from mixer import mds

_hasher = mds.hasher


def _counting(algorithm: str, data: Any = b"") -> Any:
    if "COUNT_HASHES" in os.environ and algorithm == "xxh64":
        with open(os.environ["COUNT_HASHES"], "ab", buffering=0) as file:
            file.write(f"{os.getpid()}\n".encode())
    return _hasher(algorithm, data)


mds.hasher = _counting


def unchanged(batch: Any) -> Any:
    """A transform, whose import brings this module into worker processes."""
    return batch
