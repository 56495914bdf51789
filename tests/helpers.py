"""Helpers shared by the tests of all packages: resumption, shard folders, sample data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer import mds
from mixer.manifest import Domain, Manifest, Split, TokenizerInfo, domain_folder

__all__ = ["assert_resumes", "assert_same", "data_folder", "row_of", "write_domain", "write_shards"]


def assert_resumes(
    make: Callable[[], Any],
    steps: int,
    next_: Callable[[Any], Any] = next,
    *,
    same: Callable[[Any, Any], None] | None = None,
    save: Callable[[Any], Any] = lambda thing: thing.state_dict(),
    load: Callable[[Any, Any], None] = lambda thing, state: thing.load_state_dict(state),
    remake: Callable[[], Any] | None = None,
) -> None:
    """Check that a fresh object restored at *every* step gives exactly what the uninterrupted one gave after it.

    The state goes through JSON. ``next_(thing)`` takes one step and returns what is compared; ``remake`` builds the
    object that is restored, where it differs from ``make`` (another number of ranks, other settings).
    """
    thing, states, outputs = make(), [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(save(thing))))
        outputs.append(next_(thing))
    last = save(thing)
    for step, state in enumerate(states):
        other = (remake or make)()
        load(other, state)
        for later in range(step, steps):
            (same or assert_same)(next_(other), outputs[later])
        assert_same(json.loads(json.dumps(save(other))), json.loads(json.dumps(last)))


def assert_same(got: Any, expected: Any) -> None:
    """Compare nested values bit for bit: tensors, arrays, containers, numbers."""
    if hasattr(expected, "detach"):
        got, expected = np.asarray(got.detach()), np.asarray(expected.detach())
    if isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, Mapping):
        assert set(got) == set(expected)
        for name in expected:
            assert_same(got[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert_same(one, other)
    else:
        assert got == expected, f"{got!r} != {expected!r}"


def row_of(domain: str, sample: int, seq_len: int, dtype: str = "uint16") -> np.ndarray:
    """Return the row that ``write_shards`` stores for a sample: no two samples of a folder have the same one."""
    start = sum(domain.encode()) * 7 + sample * 13
    row = (np.arange(seq_len, dtype=np.int64) * 31 + start) % 60_000
    row[:2] = sample % 60_000, (sample // 60_000 + sum(domain.encode())) % 60_000
    return row.astype(dtype)


def write_domain(
    folder: Path,
    rows: np.ndarray,
    *,
    columns: Mapping[str, str] | None = None,
    samples_per_shard: int = 64,
    compression: str | None = None,
    hashes: tuple[str, ...] = ("xxh64",),
) -> None:
    """Write rows (n, T), or n mappings, as one MDS folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if columns is None:
        columns = {"tokens": mds.token_encoding(rows.dtype.name, rows.shape[1])}
    options: dict[str, Any] = {"compression": compression, "hashes": hashes}
    entries = []
    for number, start in enumerate(range(0, len(rows), samples_per_shard)):
        part = rows[start : start + samples_per_shard]
        raw, name = mds.encode_shard(columns, part, **options), f"shard.{number:05}.mds"
        zipped = mds.compress(compression, raw) if compression else None
        entry = mds.shard_entry(columns, name, raw, num_samples=len(part), zipped=zipped, **options)
        (folder / (entry["zip_data"] or entry["raw_data"])["basename"]).write_bytes(zipped or raw)
        entries.append(entry)
    mds.write_index(folder, entries)


def write_shards(
    folder: Path,
    num_samples: Mapping[str, int],
    *,
    seq_len: int = 16,
    dtype: str = "uint16",
    validation: Mapping[str, int] | None = None,
    samples_per_shard: int = 64,
    compression: str | None = None,
    hashes: tuple[str, ...] = ("xxh64",),
    manifest: bool = True,
    vocab_size: int = 60_000,
    rows: Callable[[str, int, int, str], np.ndarray] = row_of,
) -> Path:
    """Write a small real folder of shards: ``num_samples`` by domain in split train, ``validation`` likewise.

    Sample i of a domain is ``rows(domain, i, seq_len, dtype)``; in the validation split i counts on after the train
    split.
    """
    domains = {}
    for domain in sorted(num_samples):
        splits, first = {}, 0
        for split, count in (("train", num_samples[domain]), ("validation", (validation or {}).get(domain, 0))):
            if not count:
                continue
            path = folder / domain_folder(domain) / split
            table = np.stack([rows(domain, first + i, seq_len, dtype) for i in range(count)])
            write_domain(path, table, samples_per_shard=samples_per_shard, compression=compression, hashes=hashes)
            first += count
            index = (path / "index.json").read_bytes()
            entries = json.loads(index)["shards"]
            splits[split] = Split(
                path=str(path.relative_to(folder)),
                num_samples=count,
                num_tokens=count * seq_len,
                num_documents=count,
                num_shards=len(entries),
                size_bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
                fingerprint="sha256:" + mds.hash_hex("sha256", index),
            )
        domains[domain] = Domain(splits)
    if manifest:
        tokenizer = TokenizerInfo("test", "sha256:" + "0" * 64, vocab_size, 0)
        Manifest(domains, seq_len, dtype, tokenizer).save(folder)
    return folder


def data_folder(*parts: str) -> Path:
    """Return a path in the shared sample data, or skip the test where that data is absent."""
    root = Path(os.environ.get("DOMAIN_MIXER_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the sample data at {path} (set DOMAIN_MIXER_DATA)")
    return path
