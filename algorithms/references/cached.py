"""Losses computed once and read back beside the shards: no second model in memory, no second forward pass.

    mixer score shards --model reference --out scores            # writes, and continues after an interruption
    DomainReweighting(doremi(), reference="scores")

    scores/run.json             what was scored with what: fingerprints of model, tokenizer and shards
    scores/<domain>/00000.npy   one file per shard: float16 (samples, T - 1), or float32 (samples,) sums
    scores/result.json          digests; written last, so that a folder without it is unfinished

float16 moves a loss by at most 1 part in 2048, without bias. One sum per sample takes 1/500 of the space and does for
every rule that does not clip the excess of single tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from algorithms.losses import labels_of, loss_mask
from algorithms.references.base import Reference
from algorithms.references.frozen import FrozenModel, is_encoder_decoder
from algorithms.runs import begin_run, finish_run, read_result, read_settings
from algorithms.same_tokenizer import check_tokenizer
from algorithms.samples import read_batch
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest
from mixer.manifest import domain_folder
from mixer.shards import DomainShards, open_domain
from mixer.side_columns import SideColumn, file_digest, shards_facts

__all__ = ["COLUMN", "CachedLosses", "LossesInBatch", "check_shards", "score", "shards_facts"]

COLUMN = "reference_loss"  # batch key: (B, S) per token, or (B,) sums
Per = Literal["token", "sample"]


def score(
    shards: str | os.PathLike[str],
    reference: FrozenModel,
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    per: Per = "token",
    batch_size: int = 32,
    on_shard: Callable[[str, int], None] = lambda domain, num_samples: None,
) -> Path:
    """Write the reference's losses of every sample of ``shards`` to ``out``, and return it.

    Args:
        per: "token" keeps every loss, "sample" one sum per sample.
        batch_size: samples per forward pass.
        on_shard: called after each shard with its domain and number of samples, also for those found finished.

    Raises:
        InputError: ``out`` holds something else, or the shards have no such split.
        DataError: a loss is not finite; the sample is named.
    """
    if per not in ("token", "sample"):
        raise InputError(f'losses are kept per "token" or per "sample"; got {per!r}.')
    manifest, folder = load_manifest(shards), Path(out)
    if is_encoder_decoder(reference.model):
        raise InputError(
            "an encoder-decoder model predicts labels, and shards hold none to score. Run it online: reference=model."
        )
    if reference.folder is not None:
        check_tokenizer(reference.folder, shards, manifest)
    model = {"reference": reference.fingerprint, "dtype": str(next(reference.model.parameters()).dtype)}
    settings = {"command": "score", "kind": per, **model, **shards_facts(manifest, split)}
    if _finished(folder, settings):
        for name in manifest.names:
            on_shard(name, manifest.split(name, split).num_samples)
        return folder
    files: dict[str, list[list[Any]]] = {}
    for name in manifest.names:
        domain = open_domain(shards, name, split, manifest=manifest)
        files[name] = []
        for number, size in enumerate(domain.shard_sizes.tolist()):
            path = folder / domain_folder(name) / f"{number:05}.npy"
            if not path.exists():
                _save(path, _shard_losses(domain, number, reference, per, batch_size))
            files[name].append([path.name, size, file_digest(path)])
            on_shard(name, size)
    finish_run(folder, {"files": files})
    return folder


def _finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Claim ``folder``; return whether all is there. Files that were lost since are computed again, like new ones."""
    result = begin_run(folder, settings)
    if result is None:
        return False
    if not _missing(folder, result["files"]):
        return True
    (folder / "result.json").unlink()
    begin_run(folder, settings)
    return False


def _missing(folder: Path, files: Mapping[str, list[list[Any]]]) -> list[Path]:
    paths = [folder / domain_folder(name) / str(row[0]) for name, rows in files.items() for row in rows]
    return [path for path in paths if not path.is_file()]


def check_shards(where: Path, settings: Mapping[str, Any], domains: Sequence[str], loader: Any, shift: bool) -> None:
    """Raise InputError unless ``settings`` were written for the shards that ``loader`` reads, naming both sides.

    Args:
        shift: False where the model in training predicts labels, of which such losses know nothing.
    """
    if not shift:
        raise InputError(
            f"{where} holds losses of next tokens, and an encoder-decoder model predicts labels. Run a reference of "
            "its kind online, or put its losses into the batch as 'reference_loss'."
        )
    manifest = getattr(loader, "manifest", None)
    if loader is None:
        raise InputError(
            f"{where} belongs to certain shards, and names alone do not say which are read: DomainLosses(loader, ...)."
        )
    if manifest is None:
        raise InputError(
            f"{where} belongs to certain shards, and {type(loader).__name__} does not say which it reads: "
            "use MixtureLoader, or put the losses into the batch as 'reference_loss'."
        )
    facts = shards_facts(manifest, settings["split"])
    for key in ("tokenizer", "seq_len"):
        if settings[key] != facts[key]:
            raise InputError(
                f"{where} was computed for {key} {settings[key]}, the loader reads {facts[key]}. "
                "Run `mixer score` for these shards."
            )
    if settings["shards"] != facts["shards"]:
        raise InputError(
            f"{where} was computed for other shards than the loader reads: "
            f"{_difference(settings['shards'], facts['shards'])}. Run `mixer score` for these shards."
        )
    if getattr(loader, "split", settings["split"]) != settings["split"]:
        raise InputError(f"{where} holds losses of split {settings['split']!r}, the loader reads {loader.split!r}.")
    if tuple(domains) != tuple(manifest.names):
        raise InputError(f"{where} is of the domains {list(manifest.names)}, the run's are {list(domains)}.")


def _difference(scored: Mapping[str, str], read: Mapping[str, str]) -> str:
    """Say which domains differ in two mappings of domains to fingerprints."""
    kinds = {
        "the loader has no domains": sorted(set(scored) - set(read)),
        "nothing was computed for the domains": sorted(set(read) - set(scored)),
        "other samples are in the domains": sorted(d for d in set(scored) & set(read) if scored[d] != read[d]),
    }
    return "; ".join(f"{kind} {names}" for kind, names in kinds.items() if names)


class CachedLosses(Reference):
    """Losses that ``score`` wrote, looked up by ``domain_ids`` and ``sample_ids``.

    Args:
        folder: what ``mixer score`` wrote.

    Raises: InputError: if it is unfinished or holds something else.
    """

    for_any_batch = False

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        read_result(self.folder)
        if read_settings(self.folder).get("kind") not in ("token", "sample"):
            raise InputError(f"{self.folder} holds no losses of a reference. Give what `mixer score` wrote.")
        self._column = SideColumn(self.folder)
        self.settings = self._column.settings
        self.per_token = self.settings["kind"] == "token"
        self.domains = self._column.domains

    @property
    def fingerprint(self) -> str:
        return self.settings["reference"]

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:
        check_shards(self.folder, self.settings, domains, loader, self.shift)
        missing = _missing(self.folder, self._column.files)
        if missing:  # what is damaged shows when it is read
            raise DataError(
                f"files of losses are missing, such as {missing[0]} ({len(missing)} in all). Run the same `mixer "
                "score` again: it computes them anew."
            )

    def columns(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        missing = [name for name in ("domain_ids", "sample_ids") if name not in batch]
        if missing:
            raise InputError(f"cached losses are looked up by domain_ids and sample_ids; the batch lacks {missing}.")
        domain_ids, sample_ids = (batch[name].cpu().numpy() for name in ("domain_ids", "sample_ids"))
        if domain_ids.ndim != 1:
            raise InputError(
                "cached losses are those of whole samples, each of one domain; the batch has domain_ids of shape "
                f"{domain_ids.shape}. Run the reference online, or put its losses into the batch as {COLUMN!r}."
            )
        losses = torch.from_numpy(self._column.read_batch(self.domains, domain_ids, sample_ids))
        return {COLUMN: _to_width(losses, labels_of(batch).shape[1] - 1)}

    def per_sample(self, domain_ids: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the sum of the losses of each of n samples, float64 (n,)."""
        values = self._column.read_batch(self.domains, domain_ids, sample_ids).astype(np.float64)
        return values if values.ndim == 1 else values.sum(axis=1)

    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        return losses_in(batch if COLUMN in batch else {**batch, **self.columns(batch)})


class LossesInBatch(Reference):
    """Losses that the loader itself puts into every batch as ``reference_loss``: (B, S) per token, or (B,) sums."""

    for_any_batch = False

    def __init__(self, fingerprint: str = "in the batch", per_token: bool = True) -> None:
        self._fingerprint, self.per_token = fingerprint, per_token

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        if COLUMN not in batch:
            raise InputError(
                f"the batch has no {COLUMN!r} column; it has {sorted(batch)}. A missing reference is not 0."
            )
        return losses_in(batch, self.shift)


def losses_in(batch: Mapping[str, Any], shift: bool = True) -> Tensor:
    """Return the batch's reference losses as float32 (B, S); a sum is spread evenly over the sample's tokens."""
    labels = labels_of(batch)
    mask = loss_mask(labels, shift=shift)
    losses = batch[COLUMN].to(labels.device, torch.float32)
    if losses.ndim == 1:
        return losses[:, None] / mask.sum(1, keepdim=True).clamp(min=1) * mask
    if losses.shape != mask.shape:
        raise InputError(
            f"the column {COLUMN!r} has shape {tuple(losses.shape)}, the batch's losses {tuple(mask.shape)}."
        )
    return losses


def _to_width(losses: Tensor, width: int) -> Tensor:
    """Return losses per token as (B, ``width``): batches of unequal samples are padded to lengths of their own."""
    if losses.ndim == 1 or losses.shape[1] == width:
        return losses
    return F.pad(losses[:, :width], (0, max(width - losses.shape[1], 0)))


def _shard_losses(
    domain: DomainShards, shard: int, reference: FrozenModel, per: Per, batch_size: int
) -> NDArray[np.float16] | NDArray[np.float32]:
    first, last = domain.firsts[shard], domain.firsts[shard + 1]
    parts = []
    for start in range(first, last, batch_size):
        samples = np.arange(start, min(start + batch_size, last))
        losses = reference.token_losses(read_batch(domain, samples))
        bad = torch.nonzero(~losses.isfinite().all(1)).flatten().tolist()
        if bad:
            raise DataError(
                f"the reference's loss of sample {samples[bad[0]]} of domain {domain.domain!r} is not finite. "
                "Use float32, or another reference."
            )
        kept = losses.half() if per == "token" else losses.double().sum(1).float()
        parts.append(kept.cpu().numpy())
    return np.concatenate(parts)


def _save(path: Path, table: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npy")
    np.save(partial, table)
    os.replace(partial, path)
