"""Whether a model can read what a tokenizer has written: another tokenizer's ids mean something else, unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from mixer.errors import InputError
from mixer.manifest import Manifest

__all__ = ["check_room", "check_tokenizer"]


def check_tokenizer(model: str | os.PathLike[str], shards: str | os.PathLike[str], manifest: Manifest) -> None:
    """Raise InputError where the tokenizer beside a model is not the one that made the shards.

    Tokens that only the model's has, such as special ones added later, do no harm. Nothing is known, and nothing is
    raised, where either has no ``tokenizer.json``.

    Args:
        model: a Hugging Face folder.
    """
    theirs, info = Path(model) / "tokenizer.json", manifest.tokenizer
    ours = Path(shards) / (info.file or "")
    if not theirs.is_file() or info.kind not in ("hf", "bytes"):
        return
    difference = "the shards hold bytes"
    if info.kind == "hf":
        if not ours.is_file() or ours.read_bytes() == theirs.read_bytes():
            return
        difference = _difference(theirs, ours)
    if difference:
        raise InputError(
            f"the model {model} was trained with another tokenizer: {difference}. Give a model of the shards' "
            "tokenizer, or convert with the model's: mixer convert --tokenizer."
        )


def check_room(model: nn.Module, loader: Any, what: str) -> None:
    """Raise InputError where samples do not fit into a model: an index error, later, would say nothing.

    That is where the shards may hold more ids than the model knows, or a sample more tokens than the model has learnt
    positions for. Rotary and relative positions have no such end.

    Args:
        model: nothing is raised where its ``config`` does not tell, or the loader has no manifest.
        what: what the message calls the model, such as "the reference".
    """
    manifest, config = getattr(loader, "manifest", None), getattr(model, "config", None)
    if manifest is None or config is None:
        return
    known, used = getattr(config, "vocab_size", None), manifest.tokenizer.vocab_size
    if known is not None and known < used:
        raise InputError(
            f"{what} has a vocabulary of {known} ids, the shards use {used}. Give a model of the tokenizer of these "
            "shards, or convert with the model's: mixer convert --tokenizer."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions >= manifest.seq_len or manifest.variable_length:
        return
    if _learns_positions(model, positions):
        raise InputError(
            f"{what} has learnt {positions} positions, a sample of the shards has {manifest.seq_len} tokens. Give "
            "another model, or convert with a smaller --seq-len."
        )


def _learns_positions(model: nn.Module, count: int) -> bool:
    """Return whether the model has a table of ``count`` positions; OPT and its kin keep two more than they say."""
    tables = (
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    )
    return any(0 <= table.num_embeddings - count <= 2 for table in tables)


def _difference(theirs: Path, ours: Path) -> str:
    """Say how the model's tokenizer differs from the shards' in what decides about ids, or ""."""
    known, merges = _ids_and_merges(theirs)
    expected, our_merges = _ids_and_merges(ours)
    differing = [token for token, number in expected.items() if known.get(token) != number]
    if differing:
        first = min(differing, key=lambda token: expected[token])
        there = f"id {known[first]} to the model" if first in known else "unknown to the model"
        count = f"{len(differing):,} of {len(expected):,} tokens differ"
        return f"{count}, such as {first!r}, {there}, id {expected[first]} in the shards"
    if merges != our_merges:
        return f"its {len(merges):,} merges are not the shards' {len(our_merges):,}"
    return ""


def _ids_and_merges(file: Path) -> tuple[dict[str, int], list[Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.fspath(file))
    # As the library writes it: files of other versions spell merges otherwise.
    return tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"].get("merges", [])
