"""What the text of each domain is like: document lengths, bytes per token, duplicates, entropies.

All of it is counted from the shards alone: samples follow one another as they were cut, so joining them gives the
documents back (where samples were filled best-fit, a document longer than a sample counts as its pieces). Padding is
left out. The entropies are of the empirical token distribution, in bits per token: H1 of single tokens, H2 of a
token given the one before it. Where a domain is longer than ``max_tokens``, its first shards stand for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from converters.inspecting import read_index, require_split, shard_rows
from converters.locations import Location, load_manifest, location
from mixer.errors import InputError
from mixer.manifest import Manifest
from mixer.names import plot_label
from mixer.units import short

__all__ = ["DomainStatistics", "domain_statistics", "entropies", "plot_statistics"]

LIGHT, DARK = "#9db8d2", "#33658a"  # of one hue, apart by lightness alone: for every reader, and in print


class DomainStatistics(NamedTuple):
    """Facts of one domain's split.

    ``lengths`` are tokens per document; ``quantiles`` their 10th, 50th, 90th percentile; ``duplicates`` the share of
    documents whose exact tokens came before; ``h1`` and ``h2`` bits per token.
    """

    domain: str
    tokens: int
    documents: int
    lengths: NDArray[np.int64]
    quantiles: tuple[float, float, float]
    bytes_per_token: float
    duplicates: float
    h1: float
    h2: float
    distinct_tokens: int


def domain_statistics(
    shards: str | os.PathLike[str], *, split: str = "train", max_tokens: int = 20_000_000
) -> list[DomainStatistics]:
    """Return the facts of every domain that has the split, in the order of domain ids."""
    manifest = load_manifest(location(shards))
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}.")
    require_split(manifest, split)
    rows = []
    for name in manifest.names:
        if split in manifest.domains[name].splits:
            samples = _samples(location(shards) / manifest.split(name, split).path, manifest.column, max_tokens)
            rows.append(_statistics(name, samples, manifest))
    return rows


def _samples(folder: Location, column: str, max_tokens: int) -> list[NDArray[Any]]:
    """Return the first samples, cut after ``max_tokens``."""
    samples: list[NDArray[Any]] = []
    left = max_tokens
    for entry in read_index(folder):
        for row in shard_rows(folder, entry, column):
            samples.append(row[:left])
            left -= len(row)
            if left <= 0:
                return samples
    return samples


def without_padding(
    samples: Sequence[NDArray[Any]], eos: int, *, joined: bool
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the tokens of all samples, and the places at which documents end.

    No document is empty, so an end of text right after another one is padding. Unless samples are ``joined`` as they
    were cut, a document ends with its sample too.

    >>> tokens, ends = without_padding([np.array([5, 0, 6, 0, 0]), np.array([7, 8, 9, 7, 8])], 0, joined=False)
    >>> tokens.tolist(), ends.tolist()
    ([5, 0, 6, 0, 7, 8, 9, 7, 8], [1, 3, 8])
    """
    tokens = np.concatenate(samples)
    last = np.cumsum([len(sample) for sample in samples]) - 1
    is_end = tokens == eos
    padding = np.zeros(len(tokens), np.bool_)
    padding[1:] = is_end[1:] & is_end[:-1]
    padding[last[:-1] + 1] = False  # the first token of a sample is none
    if not joined:
        is_end[last] = True
    return tokens[~padding], np.flatnonzero(is_end[~padding])


def _statistics(name: str, samples: Sequence[NDArray[Any]], manifest: Manifest) -> DomainStatistics:
    domain, eos = manifest.domains[name], manifest.tokenizer.eos_id
    joined = manifest.converter.get("request", {}).get("packing") != "best_fit"
    tokens, ends = without_padding(samples, eos, joined=joined)
    lengths = np.diff(ends, prepend=-1)  # with their end of text; the cut document at the end is left out
    all_tokens = sum(domain.tokens_in.values()) or sum(part.num_tokens for part in domain.splits.values())
    h1, h2, distinct = entropies(tokens)
    quantiles = np.quantile(lengths, [0.1, 0.5, 0.9]) if len(lengths) else [float("nan")] * 3
    return DomainStatistics(
        domain=name,
        tokens=len(tokens),
        documents=len(lengths),
        lengths=lengths,
        quantiles=(float(quantiles[0]), float(quantiles[1]), float(quantiles[2])),
        bytes_per_token=domain.text_bytes / all_tokens,
        duplicates=_duplicates(tokens, ends, lengths),
        h1=h1,
        h2=h2,
        distinct_tokens=distinct,
    )


def _duplicates(tokens: NDArray[Any], ends: NDArray[np.int64], lengths: NDArray[np.int64]) -> float:
    documents = (tokens[end - length + 1 : end + 1] for end, length in zip(ends, lengths))
    hashes = {xxhash.xxh3_128_digest(document.tobytes()) for document in documents}
    return 1 - len(hashes) / len(ends) if len(ends) else 0.0


def entropies(tokens: NDArray[Any]) -> tuple[float, float, int]:
    """Return H1 and H2 in bits per token, and how many different tokens there are.

    >>> h1, h2, distinct = entropies(np.array([0, 1, 2, 3] * 1000, np.uint16))
    >>> round(h1, 6), round(abs(h2), 6), distinct
    (2.0, 0.0, 4)
    """
    _, single = np.unique(tokens, return_counts=True)
    if len(tokens) < 2:
        return _bits(single), 0.0, len(single)
    before, after = tokens[:-1].astype(np.uint64), tokens[1:].astype(np.uint64)
    _, pairs = np.unique(before << np.uint64(32) | after, return_counts=True)
    _, firsts = np.unique(before, return_counts=True)
    return _bits(single), _bits(pairs) - _bits(firsts), len(single)


def _bits(counts: NDArray[np.int64]) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def plot_statistics(rows: list[DomainStatistics], path: str | os.PathLike[str]) -> None:
    """Write a picture: how long documents are, and entropies, a row per domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(2.5, 1.4 + 0.32 * len(rows))), sharey=True)
    place = np.arange(len(rows))
    for y, row in zip(place, rows):
        if len(row.lengths):
            low, median, high = row.quantiles
            left.plot([row.lengths.min(), row.lengths.max()], [y, y], color=LIGHT, linewidth=1.5)
            left.plot([low, high], [y, y], color=LIGHT, linewidth=8, solid_capstyle="butt")
            left.plot([median], [y], "o", color=DARK)
    left.set(xscale="log", xlabel="tokens per document\n(dot: median; bar: 10th to 90th percentile; line: all)")
    first, last = left.get_xlim()
    between = (1, 2, 5) if last < 200 * first else (1, 3) if last < 1e5 * first else (1,)  # room for so many numbers
    left.xaxis.set_major_locator(ticker.LogLocator(subs=between))
    left.xaxis.set_major_formatter(ticker.FuncFormatter(lambda length, _: short(length)))
    left.xaxis.set_minor_formatter(ticker.NullFormatter())
    left.set_title("Document lengths", loc="left", fontweight="bold")
    left.set(yticks=place, yticklabels=[plot_label(row.domain) for row in rows], ylim=(len(rows) - 0.4, -0.6))
    right.barh(place - 0.2, [row.h1 for row in rows], 0.4, color=LIGHT)
    right.barh(place + 0.2, [row.h2 for row in rows], 0.4, color=DARK)
    right.set_xlabel("bits per token\n(light: H1, of single tokens; dark: H2, given the token before)")
    right.set_title("Entropy", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
