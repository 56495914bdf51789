"""Where documents begin inside packed samples, in the forms that attention wants.

    loader = MixtureLoader(shards, columns=["doc_starts"], transform=position_ids, ...)

For shards with a ``doc_starts`` column (``mixer convert --doc-starts``). Each rank gets those of its own rows; as a
transform it may run in worker processes. The padding of a padded sample counts as a document of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixer.errors import InputError

__all__ = ["cu_seqlens", "position_ids"]


def position_ids(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace ``doc_starts`` by ``position_ids`` (B, T) int64: each token's place in its document, from 0.

    >>> batch = {"input_ids": torch.zeros(1, 5), "doc_starts": [np.array([0, 3])]}
    >>> position_ids(batch)["position_ids"].tolist()
    [[0, 1, 2, 0, 1]]
    """
    starts, (rows, length) = _starts(batch), batch["input_ids"].shape
    begins = np.zeros((rows, length), np.int64)
    for row, places in enumerate(starts):
        begins[row, places] = places
    positions = np.arange(length) - np.maximum.accumulate(begins, axis=1)
    return _without_starts(batch) | {"position_ids": torch.from_numpy(positions)}


def cu_seqlens(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace ``doc_starts`` by ``cu_seqlens`` (n + 1,) int32 and ``max_seqlen``: documents of the flattened batch.

    The form of variable-length attention kernels: document i is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` of
    ``input_ids.flatten()``. Its length differs between batches; ``position_ids`` keeps shapes static.

    >>> batch = {"input_ids": torch.zeros(2, 5), "doc_starts": [np.array([0, 3]), np.array([0])]}
    >>> cu_seqlens(batch)["cu_seqlens"].tolist()
    [0, 3, 5, 10]
    """
    starts, (rows, length) = _starts(batch), batch["input_ids"].shape
    flat = [row * length + places for row, places in enumerate(starts)]
    edges = np.concatenate([*flat, [rows * length]]).astype(np.int32)
    longest = int(np.diff(edges).max())
    return _without_starts(batch) | {"cu_seqlens": torch.from_numpy(edges), "max_seqlen": longest}


def _starts(batch: dict[str, Any]) -> list[np.ndarray]:
    if "doc_starts" not in batch:
        raise InputError(
            "the batch has no doc_starts: load with columns=['doc_starts'], from shards converted with them."
        )
    starts = [np.append(np.asarray(places, np.int64).ravel(), 0) for places in batch["doc_starts"]]
    if "attention_mask" in batch:
        ends = batch["attention_mask"].sum(dim=1).tolist()
        starts = [np.append(places, end) for places, end in zip(starts, ends)]
    width = batch["input_ids"].shape[1]
    return [np.unique(places[places < width]) for places in starts]


def _without_starts(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "doc_starts"}
