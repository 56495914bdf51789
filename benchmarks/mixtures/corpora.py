"""Shards to compare mixtures on: four synthetic domains of known entropy, and a sample of RedPajama.

    easy     a fixed cycle over 64 symbols                                      0 nats per token
    noise    independent uniform symbols                                        ln 64 = 4.16
    order1   4 successors per symbol, p = (.55, .25, .15, .05)                  1.11
    order2   4 successors per pair of 24 symbols, the same p                    1.11, and 9 times as much to learn

The synthetic domains share nothing but the alphabet. A sample is a tag of its domain and 32 symbols, the first one or
two of which are uniform.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixer import mds
from mixer.errors import InputError
from mixer.manifest import Domain, Manifest, Split, TokenizerInfo, domain_folder

__all__ = ["FourDomains", "entropy_floors", "shards_of"]

SUCCESSOR_SHARES = np.array([0.55, 0.25, 0.15, 0.05])
SIZES = {"easy": 48_000, "noise": 24_000, "order1": 10_000, "order2": 5_000}  # samples to train on
HELD_OUT = 512  # samples per domain
REDPAJAMA = Path(os.environ.get("DOMAIN_MIXER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


class FourDomains:
    """Endless samples of the four domains, each a function of the generator, domain and count.

    Args:
        pair_symbols: alphabet of order2; its contexts are all pairs of them.
    """

    names = ("easy", "noise", "order1", "order2")
    symbols, length = 64, 32
    vocab_size = symbols + len(names)

    def __init__(self, pair_symbols: int = 24) -> None:
        rng = np.random.default_rng(1234)
        self.pair_symbols = pair_symbols
        self.cycle = rng.permutation(self.symbols)
        self.order1 = np.array([rng.permutation(self.symbols)[:4] for _ in range(self.symbols)])
        pairs = range(pair_symbols)
        self.order2 = np.array([[rng.permutation(pair_symbols)[:4] for _ in pairs] for _ in pairs])

    def sample(self, rng: np.random.Generator, domain: int, count: int) -> NDArray[np.int64]:
        """Return (count, 33) ids: the tag of the domain, then 32 symbols."""
        rows = np.empty((count, self.length + 1), dtype=np.int64)
        rows[:, 0] = self.symbols + domain
        rows[:, 1:3] = rng.integers(0, self.pair_symbols if domain == 3 else self.symbols, (count, 2))
        choices = rng.choice(4, size=(count, self.length + 1), p=SUCCESSOR_SHARES)
        for place in range(2, self.length + 1):
            last = rows[:, place - 1]
            if domain == 0:
                rows[:, place] = self.cycle[last]
            elif domain == 1:
                rows[:, place] = rng.integers(0, self.symbols, count)
            elif domain == 2:
                rows[:, place] = self.order1[last, choices[:, place]]
            elif place > 2:
                rows[:, place] = self.order2[rows[:, place - 2], last, choices[:, place]]
        return rows


def entropy_floors() -> dict[str, float]:
    """Return the lowest possible mean loss of each synthetic domain, in nats per token: first symbols are uniform.

    >>> {name: round(floor, 3) for name, floor in entropy_floors().items()}
    {'easy': 0.13, 'noise': 4.159, 'order1': 1.205, 'order2': 1.239}
    """
    successor = -float(np.sum(SUCCESSOR_SHARES * np.log(SUCCESSOR_SHARES)))
    length, start = FourDomains.length, float(np.log(FourDomains.symbols))
    return {
        "easy": start / length,
        "noise": start,
        "order1": (start + (length - 1) * successor) / length,
        "order2": (2 * float(np.log(24)) + (length - 2) * successor) / length,
    }


def shards_of(corpus: str, folder: Path) -> Path:
    """Return the shards of "synthetic", "redpajama" or a path, made in ``folder`` if they are not there yet."""
    makers = {"synthetic": _synthetic, "redpajama": _redpajama}
    if corpus not in makers:
        return Path(corpus)
    out = folder / "shards"
    if not (out / "manifest.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        makers[corpus](out)
    return out


def _synthetic(out: Path) -> None:
    corpus, domains = FourDomains(), {}
    for number, name in enumerate(corpus.names):
        splits = {}
        for split, count in (("train", SIZES[name]), ("validation", HELD_OUT)):
            rng = np.random.default_rng((7, number, split == "validation"))
            splits[split] = _write(out, name, split, corpus.sample(rng, number, count).astype(np.uint16))
        domains[name] = Domain(splits)
    info = TokenizerInfo("synthetic", "sha256:" + "0" * 64, corpus.vocab_size, 0)
    Manifest(domains, corpus.length + 1, "uint16", info).save(out)


def _write(out: Path, name: str, split: str, rows: NDArray[np.uint16]) -> Split:
    folder = out / domain_folder(name) / split
    folder.mkdir(parents=True)
    columns: Mapping[str, str] = {"tokens": mds.token_encoding("uint16", rows.shape[1])}
    raw = mds.encode_shard(columns, rows, hashes=("xxh64",))
    (folder / "shard.00000.mds").write_bytes(raw)
    entry = mds.shard_entry(columns, "shard.00000.mds", raw, num_samples=len(rows), hashes=("xxh64",))
    mds.write_index(folder, [entry])
    fingerprint = "sha256:" + mds.hash_hex("sha256", (folder / "index.json").read_bytes())
    return Split(str(folder.relative_to(out)), len(rows), rows.size, len(rows), 1, len(raw), fingerprint)


def _redpajama(out: Path) -> None:
    from converters.conversion import convert

    source = REDPAJAMA / "redpajama-sample"
    if not source.exists():
        raise InputError(f"the sample data is not at {source}: set DOMAIN_MIXER_DATA to the folder that holds it.")
    convert([source], out, train_tokenizer=2048, seq_len=64, held_out=0.1)
