"""Per-domain bigram tables: a reference that needs no model, only one pass over the shards.

    p_d(b | a) = (c_d(a, b) + k * u_d(b)) / (c_d(a) + k)        u_d(b) = (c_d(b) + 1) / (N_d + V)        k = 5

The baseline of DRO-LM (Oren, Sagawa, Hashimoto, Liang 2019, arXiv:1909.02060): what a domain's loss is compared with is
the entropy of its own short contexts. A trained model is well below it, so the excess loss is negative: use it with
rules that do not clip at 0 (``dro_lm``, ``doremi(clip="none")``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from algorithms.losses import IGNORED, labels_of, target_domains
from algorithms.references.base import Reference
from algorithms.references.cached import check_shards, shards_facts
from algorithms.runs import begin_run, finish_run, read_result, read_settings
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest
from mixer.manifest import domain_folder
from mixer.shards import DomainShards, open_domain

__all__ = ["BigramLosses", "BigramTable", "bigram_distances", "count_bigrams"]

SMOOTHING = 5.0
TOKENS_AT_ONCE = 1 << 22


class BigramTable(NamedTuple):
    """Counts of one domain: (P,) pairs a * V + b, sorted, and how often each; (V,) tokens, and those before another."""

    pairs: Tensor
    pair_counts: Tensor
    counts: Tensor
    contexts: Tensor

    @classmethod
    def of(cls, parts: Iterator[Sequence[NDArray[np.int64]]], vocab_size: int) -> BigramTable:
        """Count samples, (n, T) or n arrays of any lengths, a part at a time; no pair reaches over their ends."""
        pairs, pair_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        counts, contexts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
        for part in parts:
            first, second = (np.concatenate([row[ends] for row in part]) for ends in (slice(None, -1), slice(1, None)))
            counts += np.bincount(np.concatenate(list(part)), minlength=vocab_size)
            contexts += np.bincount(first, minlength=vocab_size)
            new, new_counts = np.unique(first * vocab_size + second, return_counts=True)
            pairs, inverse = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            pair_counts = np.bincount(inverse, np.concatenate([pair_counts, new_counts])).astype(np.int64)
        return cls(*(torch.from_numpy(table) for table in (pairs, pair_counts, counts, contexts)))

    def losses(self, first: Tensor, second: Tensor, smoothing: float = SMOOTHING) -> Tensor:
        """Return -log p(second | first) in nats, float32, of token ids of any one shape."""
        vocab_size = len(self.counts)
        wanted = first * vocab_size + second
        places = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        together = torch.where(self.pairs[places] == wanted, self.pair_counts[places], 0).double()
        alone = (self.counts[second] + 1) / (self.counts.sum().double() + vocab_size)
        return -torch.log((together + smoothing * alone) / (self.contexts[first] + smoothing)).float()


class BigramLosses(Reference):
    """The losses of per-domain bigram tables that ``count_bigrams`` wrote.

    Args:
        folder: what ``mixer score --bigram`` wrote.
        smoothing: k above, in pseudo-counts.
    """

    def __init__(self, folder: str | os.PathLike[str], smoothing: float = SMOOTHING) -> None:
        if not smoothing > 0:
            raise InputError(
                f"the smoothing of a bigram table must be > 0, else unseen pairs have no loss; got {smoothing}."
            )
        self.folder, self.smoothing = Path(folder), smoothing
        files = read_result(self.folder)["files"]
        self.settings = read_settings(self.folder)
        self.domains = tuple(sorted(files))
        self.tables = [_load(self.folder / file, digest) for file, digest in (files[name] for name in self.domains)]
        digests = xxhash.xxh3_128("".join(files[name][1] for name in self.domains) + str(smoothing)).hexdigest()
        self._fingerprint = f"bigram:{digests}"

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:
        check_shards(self.folder, self.settings, domains, loader, self.shift)

    def to(self, device: torch.device | str) -> BigramLosses:
        self.tables = [BigramTable(*(values.to(device) for values in table)) for table in self.tables]
        return self

    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        ids, targets = batch["input_ids"], labels_of(batch)[:, 1:]
        mask = targets != IGNORED
        domains = target_domains(batch["domain_ids"], targets)
        domains = domains[:, None].expand_as(targets) if domains.ndim == 1 else domains
        losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
        for domain, table in enumerate(self.tables):
            here = mask & (domains == domain)
            losses[here] = table.losses(ids[:, :-1][here], targets[here], self.smoothing)
        return losses


def count_bigrams(
    shards: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    on_domain: Callable[[str, int], None] = lambda domain, num_samples: None,
) -> Path:
    """Count the bigrams of every domain of ``shards`` into ``out``, and return it; domains found finished are kept.

    Args:
        on_domain: called after each domain with its number of samples.
    """
    manifest, folder = load_manifest(shards), Path(out)
    if begin_run(folder, {"command": "score", "kind": "bigram", **shards_facts(manifest, split)}) is not None:
        return folder
    files = {}
    for name in manifest.names:
        domain = open_domain(shards, name, split, manifest=manifest)
        path = folder / f"{domain_folder(name)}.npz"
        if not path.exists():
            _save(path, BigramTable.of(_parts(domain), _vocab_size(manifest.tokenizer.vocab_size, domain)))
        files[name] = [path.name, _digest(path)]
        on_domain(name, len(domain))
    finish_run(folder, {"files": files})
    return folder


def bigram_distances(folder: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Return how far domains are apart by the tables that ``count_bigrams`` wrote, for the rule ``wasserstein``.

    The root of the Jensen-Shannon divergence of their pairs of tokens, a metric: 0 for the same pairs as often, 0.833
    (the root of ln 2) for none in common. Few tokens show few of a domain's pairs, and so look farther from all others.
    """
    counted = BigramLosses(folder)
    shares = [_shares(table) for table in counted.tables]
    return {
        name: {other: _distance(shares[i], shares[j]) for j, other in enumerate(counted.domains) if j > i}
        for i, name in enumerate(counted.domains[:-1])
    }


def _shares(table: BigramTable) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    counts = table.pair_counts.double()
    return table.pairs.cpu().numpy(), (counts / counts.sum().clamp(min=1)).cpu().numpy()


def _distance(
    one: tuple[NDArray[np.int64], NDArray[np.float64]], other: tuple[NDArray[np.int64], NDArray[np.float64]]
) -> float:
    _, ours, theirs = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    p, q = one[1][ours], other[1][theirs]
    # A pair that only one of them has adds its share times ln 2.
    in_common = p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))
    divergence = 0.5 * np.sum(in_common) + 0.5 * np.log(2) * (2 - np.sum(p) - np.sum(q))
    return float(np.sqrt(max(divergence, 0.0)))


def _parts(domain: DomainShards) -> Iterator[Sequence[NDArray[np.int64]]]:
    size = max(1, TOKENS_AT_ONCE // domain.seq_len)
    for start in range(0, len(domain), size):
        indices = np.arange(start, min(start + size, len(domain)))
        rows = domain.read_lists(indices) if domain.variable else domain.read(indices)
        yield [row.astype(np.int64) for row in rows]


def _vocab_size(stated: int, domain: DomainShards) -> int:
    # Folders that others made do not state one; pairs are numbered by it.
    return stated or int(max(row.max() for part in _parts(domain) for row in part)) + 1


def _save(path: Path, table: BigramTable) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npz")
    np.savez(partial, **{name: value.numpy() for name, value in table._asdict().items()})
    os.replace(partial, path)


def _load(path: Path, digest: str) -> BigramTable:
    if not path.exists() or _digest(path) != digest:
        raise DataError(f"the bigram table {path} is missing or damaged. Remove its folder and count again.")
    with np.load(path) as saved:
        return BigramTable(*(torch.from_numpy(saved[name]) for name in BigramTable._fields))


def _digest(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()
