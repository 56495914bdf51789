"""Random order as a pure function of what it is for: no generator, no state, the same on every NumPy and machine.

A 64-bit key is hashed from a tuple such as (seed, domain, epoch, window), so that streams do not overlap as they would
if the parts were added. A permutation is the sorted order of hashed counters; only integer arithmetic and sorting are
used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["key", "permutation", "permutations", "random_bits"]

Words = NDArray[np.uint64]
_WEYL, _MIX1, _MIX2 = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def key(*parts: int | str) -> int:
    """Return 64 bits hashed from the parts; every part and their order count.

    >>> key(1, "web", 0) != key(0, "web", 1)
    True
    """
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(seed_key: int | Words, count: int) -> Words:
    """Return ``count`` well-mixed words: splitmix64 (Steele et al. 2014) of the counters 1 … count.

    Keys of shape (k, 1) give k rows (k, count), each as its key alone would.
    """
    words = (_counters(count) if count <= 4096 else _make_counters(count)) + np.asarray(seed_key, np.uint64)
    scratch = words >> _S30
    words ^= scratch
    words *= _MIX1
    np.right_shift(words, _S27, out=scratch)
    words ^= scratch
    words *= _MIX2
    np.right_shift(words, _S31, out=scratch)
    words ^= scratch
    return words


def permutation(seed_key: int, count: int) -> NDArray[np.int64]:
    """Return a random order of 0 … count − 1.

    The low bits of each hashed word are replaced by its index, so sorting the words gives the order, without ties.

    >>> sorted(permutation(7, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    return permutations([seed_key], count)[0]


def permutations(seed_keys: Sequence[int], count: int) -> NDArray[np.int64]:
    """Return ``permutation(key, count)`` of every key, as rows (k, count); many cost little more than one."""
    if count <= 1:
        return np.zeros((len(seed_keys), count), np.int64)
    mask = np.uint64((1 << (count - 1).bit_length()) - 1)
    words = random_bits(np.array(seed_keys, np.uint64)[:, None], count)
    words |= mask
    words ^= mask
    words |= np.arange(count, dtype=np.uint64)
    words.sort(axis=1)
    words &= mask
    return words.view(np.int64)


def _make_counters(count: int) -> Words:
    counters = np.arange(1, count + 1, dtype=np.uint64)
    counters *= _WEYL
    return counters


@lru_cache(maxsize=64)
def _counters(count: int) -> Words:
    counters = _make_counters(count)
    counters.flags.writeable = False
    return counters
