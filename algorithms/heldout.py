"""Held-out windows: the same few samples of every domain, evaluated in place while training goes on.

    windows = HeldOutWindows("shards", samples_per_domain=16)
    DomainReweighting(on_demand(), heldout=windows, every="50ba")        # or heldout="shards"

Training losses are measured on samples that the model is being fitted to, and on more of one domain than of another.
Rules that sample on demand, or compare with targets, read these instead. The cost of an update is that of a forward
pass over D x samples_per_domain samples, spread over the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.losses import IGNORED, domain_sums, labels_of, loss_mask
from algorithms.models import samples_per_forward
from algorithms.ranks import all_reduce
from algorithms.samples import evenly_spread
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest

__all__ = ["HeldOutWindows"]

Samples = NDArray[np.int64] | Mapping[str, NDArray[np.int64]]


class HeldOutWindows:
    """Fixed samples of each domain.

    Args:
        shards: folder of shards with a held-out split; or the samples themselves by domain: (n, T) ids, or columns of
            a batch such as ``{"input_ids": (n, S), "labels": (n, T)}`` for encoder-decoder models, or with an
            ``attention_mask`` (n, T) where samples are padded.
        split: where they are read from.
        samples_per_domain: how many, spread evenly over the split.
        batch_size: samples per forward pass on each rank; by default 16, or as many as have 512 MiB of logits.

    Raises: InputError: if a domain has no such split, or domains have different columns.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Mapping[str, Samples],
        *,
        split: str = "validation",
        samples_per_domain: int = 16,
        batch_size: int | None = None,
    ) -> None:
        if samples_per_domain < 1 or (batch_size is not None and batch_size < 1):
            raise InputError(f"samples_per_domain and batch_size must be >= 1; got {samples_per_domain}, {batch_size}.")
        given = shards if isinstance(shards, Mapping) else _read(Path(shards), split, samples_per_domain)
        self.domains = tuple(sorted(given))
        self.batch_size = batch_size or (16 if isinstance(shards, Mapping) else _samples_at_once(Path(shards)))
        samples = [_columns(given[name]) for name in self.domains]
        counts = [len(columns["input_ids"]) for columns in samples]
        if not all(counts):
            raise InputError(f"domains without held-out samples: {[n for n, c in zip(self.domains, counts) if not c]}.")
        self._columns = _joined(self.domains, samples)
        self.domain_ids = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))

    @property
    def input_ids(self) -> Tensor:
        """All windows, (n, T), domain after domain."""
        return self._columns["input_ids"]

    def batches(self, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share: as many batches on every rank, with labels ignored where there is nothing left."""
        count = len(self.domain_ids)
        share = -(-count // world_size)
        for start in range(0, share, self.batch_size):
            places = torch.arange(start, min(start + self.batch_size, share)) * world_size + rank
            rows = places.clamp(max=count - 1)
            batch = {name: values[rows] for name, values in self._columns.items()}
            labels = torch.where((places < count)[:, None], labels_of(batch), IGNORED)
            yield {**batch, "labels": labels, "domain_ids": self.domain_ids[rows]}

    def check(self, domains: Sequence[str], *, shift: bool = True) -> None:
        """Raise InputError unless these are windows of exactly ``domains``, with labels for models that need them.

        Args:
            shift: False for encoder-decoder models, see ``token_losses``.
        """
        if self.domains != tuple(domains):
            raise InputError(f"the held-out windows are of {list(self.domains)}, the domains are {list(domains)}.")
        if not shift and "labels" not in self._columns:
            raise InputError(
                "held-out windows for an encoder-decoder model need labels: give HeldOutWindows({domain: "
                "{'input_ids': ..., 'labels': ...}})."
            )

    @torch.no_grad()
    def evaluate(
        self,
        token_losses: Callable[[dict[str, Tensor]], Tensor],
        rank: int,
        world_size: int,
        *,
        shift: bool = True,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the sums of the losses and the tokens of every domain, (D,) each, over all ranks.

        Args:
            token_losses: maps a batch to losses (B, S).
            shift: whether S is one less than the number of labels, see ``token_losses``.

        Raises: DataError: if a loss is not finite.
        """
        total: Any = None
        for batch in self.batches(rank, world_size):
            loss = token_losses(batch)
            mask = loss_mask(batch["labels"].to(loss.device), shift=shift)
            sums = domain_sums(loss, mask, batch["domain_ids"], len(self.domains))
            total = sums if total is None else total + sums
        tokens, losses, *_ = all_reduce(total).double().cpu().numpy()
        if not np.isfinite(losses).all():
            bad = [name for name, value in zip(self.domains, losses) if not np.isfinite(value)]
            raise DataError(
                f"the held-out loss of {bad} is not finite: the model has diverged. Lower the learning rate."
            )
        return losses, tokens


def _columns(samples: Samples) -> dict[str, NDArray[np.int64]]:
    return dict(samples) if isinstance(samples, Mapping) else {"input_ids": samples}


def _joined(domains: Sequence[str], samples: Sequence[Mapping[str, NDArray[np.int64]]]) -> dict[str, Tensor]:
    """Return the columns of all domains, one after the other."""
    names = set(samples[0])
    for domain, columns in zip(domains, samples):
        if set(columns) != names:
            raise InputError(
                f"the held-out windows of {domain!r} have the columns {sorted(columns)}, those of {domains[0]!r} "
                f"{sorted(names)}; all domains need the same."
            )
        widths = {name: values.shape[1:] for name, values in columns.items()}
        first = {name: samples[0][name].shape[1:] for name in columns}
        if widths != first:
            raise InputError(
                f"the held-out windows of {domain!r} have shapes {widths}, those of {domains[0]!r} {first}; pad them "
                "to one length, with an attention_mask."
            )
    joined = {name: np.concatenate([columns[name] for columns in samples]) for name in sorted(names)}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in joined.items()}


def _samples_at_once(shards: Path) -> int:
    manifest = load_manifest(shards)
    return min(16, samples_per_forward(manifest.tokenizer.vocab_size, manifest.seq_len))


def _read(shards: Path, split: str, count: int) -> dict[str, dict[str, NDArray[np.int64]]]:
    found = {}
    for name in load_manifest(shards).names:
        batch = evenly_spread(shards, name, split=split, max_samples=count)
        found[name] = {column: values.numpy() for column, values in batch.items()}
    return found
