"""The endless shuffled order of one domain, computed where it is read.

In every epoch the shards are permuted and cut into windows of whole shards; inside a window the samples are permuted.
Both permutations are pure functions of (seed, domain, epoch, window), so any position of a domain of 1e10 samples is
found in milliseconds, nothing grows with the number of samples, and every epoch holds each sample exactly once.
Weights, ranks and other domains have no part in it.

    epoch e:  | shards 7 2 9 | shards 0 4 | ...      window = whole shards, at least WINDOW_SAMPLES together
              | 131 k samples permuted | ...
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.errors import InputError
from mixer.randomness import key, permutation

__all__ = ["WINDOW_SAMPLES", "Order", "Window"]

WINDOW_SAMPLES = 1 << 17  # part of the order: changing it changes every run (the golden file in the tests pins it)

Indices = NDArray[np.int64]


class Window(NamedTuple):
    """A stretch of an epoch that is shuffled as one: positions ``start`` to ``stop`` of the epoch.

    ``shards`` are in the order in which they were dealt; ``samples[p - start]`` is the sample at position p of the
    epoch.
    """

    epoch: int
    start: int
    stop: int
    shards: Indices
    samples: Indices


class _Epoch(NamedTuple):
    shards: Indices  # the order of shards in this epoch
    starts: Indices  # windows' first positions, and the end of the epoch
    firsts: Indices  # windows' first place in ``shards``, and their number


class Order:
    """Position → sample index of one domain, for ever.

    Args:
        seed: of the run.
        domain: its name; two domains of one seed have unrelated orders.
        shard_sizes: (S,) samples per shard, in the order of the index; samples are numbered through them.
        window_samples: least number of samples that are shuffled together (but in the last window of an epoch).

    >>> order = Order(seed=0, domain="web", shard_sizes=[3, 2])
    >>> sorted(order.at(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self, seed: int, domain: str, shard_sizes: Sequence[int] | Indices, window_samples: int = WINDOW_SAMPLES
    ) -> None:
        self.seed, self.domain, self.window_samples = seed, domain, window_samples
        self._sizes = np.asarray(shard_sizes, np.int64)
        if self._sizes.ndim != 1 or (self._sizes < 0).any() or self._sizes.sum() <= 0:
            raise InputError(f"domain {domain!r} has no samples to order. Convert more text for it, or leave it out.")
        self._firsts = np.zeros(len(self._sizes) + 1, np.int64)
        np.cumsum(self._sizes, out=self._firsts[1:])
        self.num_samples = int(self._firsts[-1])
        self._grown: dict[int, list[tuple[int, int]]] = {}
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._current: Window | None = None

    @property
    def window_shards(self) -> int:
        """The most shards that a window of the first epoch is read from; those of later epochs have about as many."""
        return int(np.diff(self._epoch(0).firsts).max())

    def at(self, positions: Indices) -> Indices:
        """Return the sample indices (n,) at ascending stream positions (n,) ≥ 0."""
        if not len(positions):
            return np.zeros(0, np.int64)
        window = self._current
        if window is not None:
            start = window.epoch * self.num_samples + window.start
            if start <= positions[0] and positions[-1] < start + len(window.samples):
                return window.samples[positions - start]
        parts = []
        while len(positions):
            window = self.window(int(positions[0]))
            start = window.epoch * self.num_samples + window.start
            here = int(np.searchsorted(positions, start + len(window.samples)))
            parts.append(window.samples[positions[:here] - start])
            positions = positions[here:]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def take(self, first: int, count: int) -> Indices:
        """Return the sample indices (count,) at ``count`` positions from ``first`` on."""
        window = self._current
        if window is not None:
            begin = first - window.epoch * self.num_samples - window.start
            if begin >= 0 and begin + count <= len(window.samples):
                return window.samples[begin : begin + count]
        return self.at(np.arange(first, first + count))

    def window(self, position: int) -> Window:
        """Return the window that holds a stream position."""
        now = self._current
        if now is not None and 0 <= position - now.epoch * self.num_samples - now.start < len(now.samples):
            return now
        epoch, number = self._locate(position)
        self._current = self._shuffle(self._epoch(epoch), epoch, number)
        return self._current

    def shards_at(self, position: int) -> tuple[Indices, int]:
        """Return the shards that the window at a stream position is read from, and the position where the next begins.

        For reading ahead: it costs nothing, because no sample is shuffled.
        """
        epoch, number = self._locate(position)
        plan = self._epoch(epoch)
        shards = plan.shards[plan.firsts[number] : plan.firsts[number + 1]]
        return shards, epoch * self.num_samples + int(plan.starts[number + 1])

    def shards_from(self, position: int) -> Indices:
        """Return the shards that the rest of the window at a stream position is read from, first needed first."""
        window = self.window(position)
        rest = window.samples[position - window.epoch * self.num_samples - window.start :]
        shards, first = np.unique(np.searchsorted(self._firsts, rest, side="right") - 1, return_index=True)
        return np.asarray(shards[np.argsort(first)], np.int64)

    def _locate(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        return epoch, int(np.searchsorted(self._epoch(epoch).starts, offset, side="right")) - 1

    def _epoch(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            plan = self._epochs[epoch] = self._deal(epoch)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return plan

    def grow(self, epoch: int, events: Sequence[tuple[int, int]]) -> None:
        """Say that in the midst of an epoch new shards were added behind the old ones.

        Args:
            epoch: the one in which it happened.
            events: (position in the epoch, number of samples before), in order. What was begun before is read to its
                window's end; the rest of the epoch is the shards not yet begun and the new ones.
        Raises: InputError: if the old samples do not end with a shard.
        """
        for _, num_samples in events:
            if num_samples not in self._firsts:
                raise InputError(
                    f"domain {self.domain!r} had {num_samples:,} samples, and no shard ends there now: a domain grows"
                    " by new shards behind the old ones, which stay as they are."
                )
        self._grown = {epoch: list(events)} if events else {}
        self._epochs.clear()
        self._current = None

    def _deal(self, epoch: int) -> _Epoch:
        """Permute the shards of an epoch and cut them into windows."""
        events = self._grown.get(epoch, [])
        counts = [int(np.searchsorted(self._firsts, before)) for _, before in events] + [len(self._sizes)]
        plan = self._cut(permutation(key(self.seed, self.domain, epoch, "shards"), counts[0]))
        for number, (offset, _) in enumerate(events):
            begun = int(np.searchsorted(plan.starts, offset))  # windows that have been begun
            kept, rest = plan.shards[: plan.firsts[begun]], plan.shards[plan.firsts[begun] :]
            rest = np.concatenate([rest, np.arange(counts[number], counts[number + 1])])
            rest = rest[permutation(key(self.seed, self.domain, epoch, "grown", number), len(rest))]
            new, start = self._cut(rest), plan.starts[begun]
            starts = np.concatenate([plan.starts[:begun], new.starts + start])
            firsts = np.concatenate([plan.firsts[:begun], new.firsts + len(kept)])
            plan = _Epoch(np.concatenate([kept, rest]), starts, firsts)
        return plan

    def _cut(self, shards: Indices) -> _Epoch:
        """Cut a sequence of shards into windows."""
        if not len(shards):
            return _Epoch(shards, np.zeros(1, np.int64), np.zeros(1, np.int64))
        ends = np.cumsum(self._sizes[shards])
        begins = ends - self._sizes[shards]
        block = begins // self.window_samples  # a shard belongs to the window in which it begins
        firsts = np.flatnonzero(np.diff(block, prepend=-1))
        return _Epoch(shards, np.append(begins[firsts], ends[-1]), np.append(firsts, len(shards)))

    def _shuffle(self, plan: _Epoch, epoch: int, number: int) -> Window:
        shards = plan.shards[plan.firsts[number] : plan.firsts[number + 1]]
        sizes = self._sizes[shards]
        total = int(sizes.sum())
        # Sample j of the window, before shuffling, is sample j - before[k] of the window's k-th shard.
        before = np.cumsum(sizes) - sizes
        samples = np.repeat(self._firsts[shards] - before, sizes)
        samples += np.arange(total, dtype=np.int64)
        order = permutation(key(self.seed, self.domain, epoch, "window", number), total)
        start = int(plan.starts[number])
        return Window(epoch, start, start + total, shards, samples[order])
