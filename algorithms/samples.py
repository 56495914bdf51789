"""Samples of one domain as a batch, of one length or padded: what is read outside of a loader."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixer.padding import Padding
from mixer.shards import DomainShards, open_domain

__all__ = ["evenly_spread", "read_batch"]


def read_batch(samples: DomainShards, indices: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return ``input_ids`` (n, T); with ``labels`` and ``attention_mask`` where samples are padded to T tokens."""
    if not samples.variable:
        return {"input_ids": torch.from_numpy(samples.read(indices).astype(np.int64))}
    rows = [torch.from_numpy(row.astype(np.int64)) for row in samples.read_lists(indices)]
    return Padding(length=samples.seq_len)([{"input_ids": row} for row in rows])


def evenly_spread(
    shards: str | os.PathLike[str], domain: str, *, split: str = "validation", max_samples: int = 256
) -> dict[str, Tensor]:
    """Return every sample of the split, or ``max_samples`` spread evenly over it, as ``read_batch`` does."""
    samples = open_domain(shards, domain, split)
    count = min(max_samples, samples.num_samples)
    return read_batch(samples, np.arange(count) * samples.num_samples // count)
