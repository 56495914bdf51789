"""Just train twice, by example: shards in which the samples that a first model learnt badly are there several times.

    mixer train shards --steps 200 --out first                        # 1: an early model
    mixer score shards --model first/model --per sample --out scores  #    its loss of every sample
    mixer upsample shards --scores scores --upweight 5 --out again    # 2: train from scratch, in proportion to size
    mixer train again --mixture proportional --out second

Liu, Haghgoo, Chen, Raghunathan, Koh, Sagawa, Liang, Finn 2021, arXiv:2107.09044: E is what the first model gets wrong,
and the second one trains on the union of all examples with lambda - 1 more copies of E. A language model has no error
bit; E is the top share of the losses above their domain's median (``rules.jtt.error_set``). The rule ``jtt`` does the
same for whole domains, without new shards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from algorithms.references.cached import CachedLosses
from algorithms.rules.jtt import error_set
from algorithms.rules.settings import number
from mixer import mds
from mixer.errors import InputError
from mixer.manifest import Domain, Manifest, Split, domain_folder
from mixer.shards import DomainShards, open_domain

__all__ = ["upsample"]

HASHES = ("xxh64",)
SHARD_BYTES = 1 << 26


def upsample(
    shards: str | os.PathLike[str],
    scores: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    upweight: int = 5,
    share: float = 0.2,
    baseline: str = "median",
) -> dict[str, int]:
    """Write shards in which bad samples are there ``upweight`` times; return how many there are, by domain.

    Other splits and the tokenizer are copied as they are, so that held-out losses stay comparable.

    Args:
        shards: from ``mixer convert``.
        scores: what ``mixer score`` wrote for their split train with the first model.
        out: a folder that does not exist yet; the manifest is written last.
        upweight: lambda; the paper has 100 and 50 for images, 4 and 6 for text.
        share, baseline: what counts as bad, see ``error_set``.

    Samples keep their length and all columns of their shards; values that lie beside the shards belong to the old ones.

    Raises: InputError: if the scores are of other shards, or the folder exists.
    """
    manifest, folder = Manifest.load(shards), Path(out)
    copies = int(number(upweight, "upweight", low=1))
    if folder.exists():
        raise InputError(f"{folder} exists already; name a new folder.")
    losses = CachedLosses(scores)
    losses.bind(manifest.names, _Read(manifest))
    opened = {name: open_domain(shards, name, "train", manifest=manifest) for name in manifest.names}
    bad = _bad_samples(losses, opened, share, baseline)
    domains = {}
    for name, samples in opened.items():
        order = np.concatenate([np.arange(len(samples)), np.repeat(bad[name], copies - 1)])
        split = _write(folder, f"{domain_folder(name)}/train", samples, order, manifest.split(name, "train"))
        domains[name] = _with_split(manifest.domains[name], split)
        for other in set(manifest.domains[name].splits) - {"train"}:
            path = manifest.split(name, other).path
            shutil.copytree(Path(shards) / path, folder / path)
    if manifest.tokenizer.file:
        shutil.copytree((Path(shards) / manifest.tokenizer.file).parent, folder / Path(manifest.tokenizer.file).parent)
    facts = {"upweight": copies, "share": share, "baseline": baseline, "reference": losses.fingerprint}
    made = replace(manifest, domains=domains, converter={**_without_files(manifest.converter), "upsampled": facts})
    made.save(folder)
    return {name: len(rows) for name, rows in bad.items()}


def _without_files(converter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is on record of a conversion, but for the files that stay beside its shards."""
    kept = {name: value for name, value in converter.items() if name not in ("inputs", "quarantine", "digest")}
    if "extensions" in kept:
        kept["extensions"] = [_without_files(each) for each in kept["extensions"]]
    return kept


class _Read:
    """What ``CachedLosses.bind`` asks of a loader."""

    split = "train"

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest


def _bad_samples(
    losses: CachedLosses, opened: dict[str, DomainShards], share: float, baseline: str
) -> dict[str, NDArray[np.int64]]:
    """Return the numbers of the bad samples of each domain, chosen over all domains together."""
    ids = np.repeat(np.arange(len(opened)), [len(samples) for samples in opened.values()])
    numbers = np.concatenate([np.arange(len(samples)) for samples in opened.values()])
    tokens = np.concatenate([_num_tokens(samples) for samples in opened.values()])
    means = losses.per_sample(ids, numbers) / np.maximum(tokens - 1, 1)  # the first token is predicted by nothing
    chosen = error_set(means, ids, share, baseline)
    return {name: numbers[chosen][ids[chosen] == domain] for domain, name in enumerate(opened)}


def _num_tokens(samples: DomainShards) -> NDArray[np.int64]:
    """Return the tokens of every sample, (n,)."""
    if not samples.variable:
        return np.full(len(samples), samples.seq_len, np.int64)
    views = [samples.view(shard) for shard in range(len(samples.shard_sizes))]
    sizes = samples.shard_sizes.tolist()
    return np.array([view.length(row, samples.seq_len) for view, size in zip(views, sizes) for row in range(size)])


def _write(folder: Path, path: str, samples: DomainShards, order: NDArray[np.int64], old: Split) -> Split:
    """Write the samples in ``order`` as one MDS folder, each with all its columns."""
    columns, entries = samples.columns, []
    (folder / path).mkdir(parents=True)
    for count, rows in enumerate(_parts(samples, order)):
        raw, name = mds.shard_of_rows(columns, rows, hashes=HASHES), f"shard.{count:05}.mds"
        (folder / path / name).write_bytes(raw)
        entries.append(mds.shard_entry(columns, name, raw, num_samples=len(rows), hashes=HASHES))
    index = mds.write_index(folder / path, entries).read_bytes()
    return Split(
        path=path,
        num_samples=len(order),
        num_tokens=int(_num_tokens(samples)[order].sum()),
        num_documents=old.num_documents,
        num_shards=len(entries),
        size_bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        fingerprint=f"sha256:{hashlib.sha256(index).hexdigest()}",
    )


def _parts(samples: DomainShards, order: NDArray[np.int64]) -> Iterator[list[bytes]]:
    """Yield the samples as they are encoded, for one shard after the other."""
    offsets: dict[int, NDArray[np.int64]] = {}
    part: list[bytes] = []
    size = 0
    shards = np.searchsorted(samples.firsts, order, side="right") - 1
    for shard, row in zip(shards.tolist(), (order - samples.firsts[shards]).tolist()):
        data = samples.view(shard).data
        if shard not in offsets:
            offsets[shard] = mds.parse_header(data).offsets
        begin, end = offsets[shard][row : row + 2].tolist()
        if part and size + end - begin > SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(bytes(data[begin:end]))
        size += end - begin
    yield part


def _with_split(domain: Domain, split: Split) -> Domain:
    # What went into the conversion stays on record; the identity of tokens in and out no longer holds for this split.
    kept = {name: value for name, value in domain.tokens_in.items() if name != "train"}
    return replace(domain, splits={**domain.splits, "train": split}, tokens_in=kept)
