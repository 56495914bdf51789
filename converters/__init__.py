"""Text corpora in, one set of MDS shards per domain out.

    from converters import convert
    manifest = convert(["corpus/"], "shards", tokenizer="tokenizer.json", seq_len=2048)

Four steps, one module each: ``plan`` (inputs -> units), ``stage`` (tokenise each unit once), ``packing`` (samples and
shards per domain), ``conversion`` (which commits the index files and the manifest last). Formats, domain rules,
tokenizers and engines are rows in the dicts of ``readers``, ``domains``, ``tokenizers`` and ``engines``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.conversion import convert
    from converters.inspecting import decoded_samples

__all__ = ["convert", "decoded_samples"]

_HOMES = {"convert": "converters.conversion", "decoded_samples": "converters.inspecting"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'converters' has no attribute {name!r}")
