"""Held-out windows: the same few samples of every domain, evaluated in place while training goes on.

    windows = HeldOutWindows("shards", samples_per_domain=16)
    DomainReweighting(on_demand(), heldout=windows, every="50ba")        # or heldout="shards"

Training losses are measured on samples that the model is being fitted to, and on more of one domain than of another.
Rules that sample on demand, or compare with targets, read these instead. The cost of an update is that of a forward
pass over D x samples_per_domain samples, spread over the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.losses import IGNORED, domain_sums, loss_mask
from algorithms.ranks import all_reduce
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest

__all__ = ["HeldOutWindows"]


class HeldOutWindows:
    """Fixed samples of each domain.

    Args:
        shards: folder of shards with a held-out split; or the samples themselves, (n, T) ids by domain.
        split: where they are read from.
        samples_per_domain: how many, spread evenly over the split.
        batch_size: samples per forward pass on each rank.

    Raises: InputError: if a domain has no such split.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | dict[str, NDArray[np.int64]],
        *,
        split: str = "validation",
        samples_per_domain: int = 16,
        batch_size: int = 16,
    ) -> None:
        if samples_per_domain < 1 or batch_size < 1:
            raise InputError(f"samples_per_domain and batch_size must be >= 1; got {samples_per_domain}, {batch_size}.")
        samples = shards if isinstance(shards, dict) else _read(Path(shards), split, samples_per_domain)
        self.domains = tuple(sorted(samples))
        self.batch_size = batch_size
        counts = [len(samples[name]) for name in self.domains]
        if not all(counts):
            raise InputError(f"domains without held-out samples: {[n for n, c in zip(self.domains, counts) if not c]}.")
        self.input_ids = torch.from_numpy(np.concatenate([samples[name] for name in self.domains]).astype(np.int64))
        self.domain_ids = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))

    def batches(self, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share: as many batches on every rank, with labels ignored where there is nothing left."""
        share = -(-len(self.input_ids) // world_size)
        for start in range(0, share, self.batch_size):
            places = torch.arange(start, min(start + self.batch_size, share)) * world_size + rank
            rows = places.clamp(max=len(self.input_ids) - 1)
            ids = self.input_ids[rows]
            labels = torch.where((places < len(self.input_ids))[:, None], ids, IGNORED)
            yield {"input_ids": ids, "labels": labels, "domain_ids": self.domain_ids[rows]}

    def check(self, domains: Sequence[str]) -> None:
        """Raise InputError unless these are windows of exactly ``domains``."""
        if self.domains != tuple(domains):
            raise InputError(f"the held-out windows are of {list(self.domains)}, the domains are {list(domains)}.")

    @torch.no_grad()
    def evaluate(
        self, token_losses: Callable[[dict[str, Tensor]], Tensor], rank: int, world_size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the sums of the losses and the tokens of every domain, (D,) each, over all ranks.

        Args:
            token_losses: maps a batch to losses (B, S).

        Raises: DataError: if a loss is not finite.
        """
        total: Any = None
        for batch in self.batches(rank, world_size):
            loss = token_losses(batch)
            mask = loss_mask(batch["labels"].to(loss.device))
            sums = domain_sums(loss, mask, batch["domain_ids"], len(self.domains))
            total = sums if total is None else total + sums
        tokens, losses, *_ = all_reduce(total).double().cpu().numpy()
        if not np.isfinite(losses).all():
            bad = [name for name, value in zip(self.domains, losses) if not np.isfinite(value)]
            raise DataError(
                f"the held-out loss of {bad} is not finite: the model has diverged. Lower the learning rate."
            )
        return losses, tokens


def _read(shards: Path, split: str, count: int) -> dict[str, NDArray[np.int64]]:
    from algorithms.evaluation import heldout_samples

    names = load_manifest(shards).names
    return {name: heldout_samples(shards, name, split=split, max_samples=count) for name in names}
