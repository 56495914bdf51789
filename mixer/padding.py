"""Samples of different lengths → one batch.

    loader = MixtureLoader(shards, global_batch_size=64, collate=Padding(pad_id=0, multiple=64))

A collate is any callable from a list of samples to a batch; a sample is a dict of ``input_ids`` (n,), ``domain_ids``
and ``sample_ids`` (scalars) and the other columns asked for. ``Padding`` is the one that is used unless another is
given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixer.errors import InputError

__all__ = ["IGNORED", "Padding", "stacked"]

IGNORED = -100  # the label that losses skip, in torch and everywhere else


@dataclass(frozen=True)
class Padding:
    """Pad samples on the right to one length, and say where they are real.

    The batch gets ``input_ids`` (B, T), ``attention_mask`` (B, T) of 1 and 0, ``labels`` (B, T), the ids with -100
    where padded (not shifted: models shift); ``domain_ids``, ``sample_ids`` (B,); other columns as they are.

    Args:
        pad_id: what stands behind the end of a sample; it bears no loss, so any id of the vocabulary will do.
        multiple: T is the longest sample of the batch, rounded up to a multiple of this.
        length: always pad to this length, for static shapes; a longer sample is an error.

    >>> samples = [{"input_ids": torch.tensor([7, 8, 9])}, {"input_ids": torch.tensor([5])}]
    >>> batch = Padding(multiple=4)(samples)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8, 9, 0], [5, 0, 0, 0]], [[7, 8, 9, -100], [5, -100, -100, -100]])
    """

    pad_id: int = 0
    multiple: int = 8
    length: int | None = None

    def __post_init__(self) -> None:
        if self.pad_id < 0 or self.multiple < 1 or (self.length is not None and self.length < 1):
            raise InputError(f"pad_id must be >= 0, multiple and length >= 1; got {self}.")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of some samples.

        Raises: InputError: if a sample is longer than ``length``.
        """
        rows = [sample["input_ids"] for sample in samples]
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max(initial=1))
        if self.length is not None and longest > self.length:
            raise InputError(
                f"a sample has {longest:,} tokens and batches are padded to {self.length:,}: give a greater length, or"
                " convert with a smaller --seq-len."
            )
        width = self.length or -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), width), self.pad_id, dtype=rows[0].dtype)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        mask = torch.from_numpy(np.arange(width) < lengths[:, None])
        labels = torch.where(mask, ids.to(torch.int64), IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask.to(torch.int64), "labels": labels}
        others = {name: stacked([sample[name] for sample in samples]) for name in samples[0] if name != "input_ids"}
        return batch | others


def stacked(values: list[Any]) -> Any:
    """Return one tensor where all values have one shape, else the list; unsigned integers become int64.

    >>> stacked([1, 2]), stacked(["a", "b"])
    (tensor([1, 2]), ['a', 'b'])
    """
    if all(isinstance(value, bool | int | float) for value in values):
        return torch.tensor(values)
    if all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values):
        return torch.stack(values)
    if not all(isinstance(v, np.ndarray) and v.shape == values[0].shape and v.dtype == values[0].dtype for v in values):
        return values
    table = np.stack(values)
    return torch.from_numpy(table.astype(np.int64) if table.dtype.kind == "u" and table.dtype != np.uint8 else table)
