"""Read what the mixer has planned: draws → sample indices → rows of tokens.

The dataset owns one ``DomainShards`` and one ``Order`` per domain. It has no position of its own: what to read is told,
so any process can read any part of the plan.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from mixer import mds
from mixer.cache import RemoteCache
from mixer.errors import DataError, InputError
from mixer.folders import load_manifest
from mixer.manifest import Manifest
from mixer.mixer import Draws
from mixer.order import Order
from mixer.padding import Padding, stacked
from mixer.shards import DomainShards, Verify, View, open_domain
from mixer.side_columns import SideColumn, column_folder

__all__ = ["MixtureDataset"]

Ids = NDArray[np.int64]
_LENGTHS_AHEAD = 64  # samples whose lengths are looked up at a time


class MixtureDataset(Dataset[dict[str, torch.Tensor]]):
    """All domains of one split, read by (domain id, sample index).

    Args:
        root: folder of shards.
        split, seed, verify: as for ``MixtureLoader``.
        manifest: of ``root``.
        dtype: of ``input_ids``: "int64", or "stored" for that of the shards.
        columns: other columns of the shards to deliver too.

    ``dataset[(domain_id, sample_id)]`` is one sample; ``dataset.read(domain_ids, sample_ids)`` many at once.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        seed: int,
        verify: Verify = "hash",
        manifest: Manifest | None = None,
        dtype: Literal["int64", "stored"] = "int64",
        cache: RemoteCache | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        if dtype not in ("int64", "stored"):
            raise InputError(f"dtype must be 'int64' or 'stored'; got {dtype!r}.")
        if isinstance(columns, str):
            raise InputError(f"columns takes names of columns in a list; got {columns!r}. Write [{columns!r}].")
        self._as_int64 = dtype == "int64"
        self.manifest = manifest or load_manifest(root, cache)
        self.domains = self.manifest.names
        self.shards: list[DomainShards | None] = [
            (
                open_domain(root, name, split, verify=verify, manifest=self.manifest, cache=cache)
                if split in self.manifest.domains[name].splits
                else None
            )
            for name in self.domains
        ]
        self.orders = [
            Order(seed, name, shards.shard_sizes) if shards is not None and len(shards) else None
            for name, shards in zip(self.domains, self.shards)
        ]
        self.dtype = np.dtype(self.manifest.dtype)
        self.seq_len = self.manifest.seq_len
        self.columns = tuple(columns)
        self._beside = _side_columns(root, self.manifest, split, self.columns, self.shards)
        self._inside = tuple(name for name in self.columns if name not in self._beside)
        for shards in self.shards:
            if shards is not None and self._inside:
                _check_columns(shards, self._inside)
        sizes = [shards.shard_sizes if shards is not None else np.zeros(0, np.int64) for shards in self.shards]
        # All shards of all domains in one row, so that one search finds the shards of a whole batch.
        self._domain_shards = np.cumsum([0] + [len(size) for size in sizes])
        self._firsts = np.cumsum(np.concatenate([[0], *sizes]))
        self._domain_firsts = self._firsts[self._domain_shards]
        self._views: dict[int, View] = {}
        self._ahead = np.full(len(self.domains), -1, np.int64)
        self._ids = np.arange(len(self.domains))
        self._loader: Any = None
        self.variable = self.manifest.variable_length
        self._lengths: dict[int, tuple[int, Ids]] = {}  # domain → first position, lengths from there on
        self.collate: Callable[[list[dict[str, Any]]], Any] | None = None
        if self.variable:
            self.collate = Padding(max(self.manifest.tokenizer.eos_id, 0))
        self.cache, self.waited_seconds = cache, 0.0
        self.transform: Callable[[dict[str, torch.Tensor]], Any] | None = None

    @property
    def num_samples(self) -> dict[str, int]:
        return {name: 0 if shards is None else len(shards) for name, shards in zip(self.domains, self.shards)}

    def grow(self, grown: Mapping[str, tuple[int, list[tuple[int, int]]]]) -> None:
        """Take up how domains grew in the epochs they are in; see ``Order.grow``."""
        for name, order in zip(self.domains, self.orders):
            if order is not None:
                order.grow(*grown.get(name, (0, [])))
        self._ahead[:] = -1
        self._lengths.clear()

    # --- reading ---------------------------------------------------------------------------------------------------

    def sample_ids(self, draws: Draws, *, ahead: bool = True) -> Ids:
        """Return the sample indices (B,) of a planned batch, in its order; read ahead where a window begins."""
        if ahead:
            self._read_ahead(draws.firsts, draws.counts)
        parts = [
            self.orders[d].take(first, count)  # type: ignore[union-attr]
            for d, (first, count) in enumerate(zip(draws.firsts.tolist(), draws.counts.tolist()))
            if count
        ]
        return np.concatenate(parts)[draws.places]

    def expect(self, positions: Ids, weights: NDArray[np.float64]) -> None:
        """Look up, all domains side by side, what planning by lengths is about to ask for."""
        self._read_ahead(positions, np.where(weights > 0, _LENGTHS_AHEAD, 0))
        for d in np.flatnonzero(weights > 0).tolist():
            if d not in self._lengths:
                order, shards = self.orders[d], self._of(d)
                assert order is not None
                shards.need(np.unique(self._shards_of(d, order.take(int(positions[d]), _LENGTHS_AHEAD))).tolist())

    def lengths(self, domain: int, first: int, count: int) -> Ids:
        """Return the tokens (count,) of the samples at positions ``first`` … of a domain's order.

        They stand in the shards, which are opened and checked for it a little before they are read.
        """
        start, known = self._lengths.get(domain, (0, np.zeros(0, np.int64)))
        if not start <= first <= first + count <= start + len(known):
            start, known = first, self._look_up(domain, first, max(count, _LENGTHS_AHEAD))
            self._lengths[domain] = start, known
        return known[first - start : first - start + count]

    def _look_up(self, domain: int, first: int, count: int) -> Ids:
        self._read_ahead(*(np.where(self._ids == domain, value, 0) for value in (first, count)))
        order, owner = self.orders[domain], self._of(domain)
        assert order is not None
        samples = order.take(first, count)
        shards = self._shards_of(domain, samples)
        rows, found = samples - owner.firsts[shards], np.full(count, owner.seq_len, np.int64)
        wanted = np.unique(shards).tolist()
        owner.need(wanted)
        for shard in wanted:
            lengths = owner.view(shard).lengths
            if lengths is not None:
                here = shards == shard
                found[here] = lengths[rows[here]]
        return found

    def _shards_of(self, domain: int, samples: Ids) -> Ids:
        return np.asarray(self._of(domain).firsts.searchsorted(samples, side="right") - 1, np.int64)

    def read_lists(self, domain_ids: Ids, sample_ids: Ids) -> list[NDArray[Any]]:
        """Return the tokens of n samples, each of its own length, in the stored dtype."""
        samples = self._domain_firsts[domain_ids] + sample_ids
        shards = self._firsts.searchsorted(samples, side="right") - 1
        self._get_views(shards.tolist())
        found = []
        for shard, row in zip(shards.tolist(), (samples - self._firsts[shards]).tolist()):
            view = self._views[shard]
            found.append(np.frombuffer(view.data, self.dtype, view.length(row, self.seq_len), view.start(row)))
        return found

    def read(self, domain_ids: Ids, sample_ids: Ids) -> NDArray[Any]:
        """Return the token rows (n, T) of n samples, in the stored dtype."""
        out = np.empty((len(domain_ids), self.seq_len), self.dtype)
        target, width, views = memoryview(out.data).cast("B"), out.strides[0], self._views
        samples = self._domain_firsts[domain_ids] + sample_ids
        shards = self._firsts.searchsorted(samples, side="right") - 1
        at, wanted = 0, shards.tolist()
        for shard, row in zip(wanted, (samples - self._firsts[shards]).tolist()):
            try:
                data, first, stride, starts, _ = views[shard]
            except KeyError:  # rare: look for all that this batch lacks at once
                self._get_views(wanted)
                data, first, stride, starts, _ = views[shard]
            start = first + row * stride if starts is None else starts[row]
            target[at : at + width] = data[start : start + width]
            at += width
        return out

    def _get_views(self, wanted: list[int]) -> None:
        """Map those of a batch's shards that are not mapped yet; several are fetched side by side."""
        shards = [shard for shard in dict.fromkeys(wanted) if shard not in self._views]
        if not shards:
            return
        began = time.perf_counter()
        domains = (np.searchsorted(self._domain_shards, shards, side="right") - 1).tolist()
        owners = [(self._of(d), shard - int(self._domain_shards[d])) for d, shard in zip(domains, shards)]
        for owner, local in owners:
            owner.need([local])
        for shard, (owner, local) in zip(shards, owners):
            self._views[shard] = owner.view(local)
        if get_worker_info() is not None:
            self._forget_oldest(domains, set(wanted))
        self.waited_seconds += time.perf_counter() - began

    def _forget_oldest(self, domains: list[int], wanted: set[int]) -> None:
        """Keep about two windows, in a worker process: it knows samples, and not where windows begin."""
        for d in set(domains):
            order, first, last = self.orders[d], int(self._domain_shards[d]), int(self._domain_shards[d + 1])
            assert order is not None
            mapped = [shard for shard in self._views if first <= shard < last]
            kept = wanted.union(mapped[-2 * order.window_shards - 2 :])
            if not kept.issuperset(mapped):
                self._forget(d, {shard - first for shard in kept if first <= shard < last})

    def _of(self, domain: int) -> DomainShards:
        shards = self.shards[domain]
        assert shards is not None
        return shards

    def _read_ahead(self, firsts: Ids, counts: Ids) -> None:
        """Where a domain enters a new window: prepare it and the next one, and let go of those behind."""
        stops = firsts + counts
        moved = np.flatnonzero((stops > self._ahead) & (counts > 0)).tolist()
        if not moved:
            return
        now: list[tuple[DomainShards, list[int]]] = []
        later: list[tuple[DomainShards, list[int]]] = []
        for d in moved:
            order, shards = self.orders[d], self._of(d)
            assert order is not None
            current, end = order.shards_at(int(firsts[d]))
            # Finding out which shard is needed first costs milliseconds: worth it where shards have far to come.
            needed = (current if shards.cache is None else order.shards_from(int(firsts[d]))).tolist()
            while end < stops[d]:
                more, end = order.shards_at(end)
                needed += more.tolist()
            following = order.shards_at(end)[0].tolist()
            self._ahead[d] = end
            self._forget(d, set(needed) | set(following))
            now.append((shards, needed))
            later.append((shards, following))
        for upcoming in (now, later):
            for turn in range(max(len(shards) for _, shards in upcoming)):  # all domains side by side
                for owner, shards_of_it in upcoming:
                    owner.prepare(shards_of_it[turn : turn + 1])

    def _forget(self, domain: int, kept: set[int]) -> None:
        first, last = int(self._domain_shards[domain]), int(self._domain_shards[domain + 1])
        for shard in [shard for shard in self._views if first <= shard < last and shard - first not in kept]:
            del self._views[shard]
        self.shards[domain].keep(kept)  # type: ignore[union-attr]

    # --- torch's protocol ------------------------------------------------------------------------------------------

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, torch.Tensor]:
        return self.samples(np.array([draw[0]]), np.array([draw[1]]))[0]

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> Any:
        pairs = np.array(draws, np.int64).reshape(-1, 2)
        try:
            return self.batch(pairs[:, 0].copy(), pairs[:, 1].copy())
        except (DataError, InputError) as error:
            if get_worker_info() is None:
                raise
            return error  # torch would wrap it in a traceback; the loader raises it in the training process as it is

    def batch(self, domain_ids: Ids, sample_ids: Ids) -> dict[str, torch.Tensor]:
        """Return a batch as delivered: ``input_ids`` (n, T), ``domain_ids`` (n,), ``sample_ids`` (n,), int64.

        Where samples differ in length, and wherever a ``collate`` is given, it is what that makes of ``samples``.
        """
        if self.collate is not None:
            made = self.collate(self.samples(domain_ids, sample_ids))
            return made if self.transform is None else self.transform(made)
        rows = self.read(domain_ids, sample_ids)
        batch = {
            "input_ids": torch.from_numpy(rows.astype(np.int64) if self._as_int64 else rows),
            "domain_ids": torch.from_numpy(domain_ids),
            "sample_ids": torch.from_numpy(sample_ids),
        }
        if self.columns:
            rows_of_values = self._other_columns(domain_ids, sample_ids)
            batch |= {name: stacked(list(values)) for name, values in zip(self.columns, zip(*rows_of_values))}
        return batch if self.transform is None else self.transform(batch)

    def samples(self, domain_ids: Ids, sample_ids: Ids) -> list[dict[str, Any]]:
        """Return n samples as dicts: ``input_ids`` (length,), ``domain_ids`` and ``sample_ids`` (), other columns."""
        if self.variable:
            rows: Sequence[NDArray[Any]] = self.read_lists(domain_ids, sample_ids)
        else:
            rows = list(self.read(domain_ids, sample_ids))
        others = self._other_columns(domain_ids, sample_ids) if self.columns else [[]] * len(rows)
        made = []
        for i, row in enumerate(rows):
            tokens = torch.from_numpy(row.astype(np.int64 if self._as_int64 else row.dtype))
            ids = {"domain_ids": torch.tensor(int(domain_ids[i])), "sample_ids": torch.tensor(int(sample_ids[i]))}
            made.append({"input_ids": tokens, **ids, **dict(zip(self.columns, others[i]))})
        return made

    def _other_columns(self, domain_ids: Ids, sample_ids: Ids) -> list[list[Any]]:
        """Return the values of the other columns, sample by sample."""
        found: list[list[Any]] = []
        for domain, sample in zip(domain_ids.tolist(), sample_ids.tolist()):
            shards = self._of(domain)
            if not self._inside:
                found.append([])
                continue
            shard = int(shards.firsts.searchsorted(sample, side="right")) - 1
            row = sample - int(shards.firsts[shard])
            found.append(mds.sample_values(shards.view(shard).data, row, shards.columns, self._inside))
        if not self._beside:
            return found
        beside = {
            name: column.read_batch(self.domains, domain_ids, sample_ids) for name, column in self._beside.items()
        }
        for i, values in enumerate(found):
            row_of = dict(zip(self._inside, values))
            row_of |= {name: table[i].item() if table.ndim == 1 else table[i] for name, table in beside.items()}
            found[i] = [row_of[name] for name in self.columns]
        return found

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_views": {}, "_lengths": {}, "_ahead": np.full(len(self.domains), -1, np.int64), "_loader": None}
        return {**self.__dict__, **fresh}

    # --- Composer's protocol: it saves and restores the dataset, not the loader -------------------------------------

    def state_dict(self, num_samples: int | None = None, from_beginning: bool = True) -> dict[str, Any]:
        """Return the loader's state. Composer gives the samples trained on; the loader knows its position.

        It is one JSON string: sharded checkpoints load only the keys that the restoring run has too, and would leave
            out
        what was scheduled, or a domain, without a word.
        """
        return {"loader": json.dumps(self._loader.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``, of this dataset or of its loader."""
        self._loader.load_state_dict(json.loads(state["loader"]) if "loader" in state else state)


def _side_columns(
    root: str | os.PathLike[str],
    manifest: Manifest,
    split: str,
    wanted: Sequence[str],
    shards: Sequence[DomainShards | None],
) -> dict[str, SideColumn]:
    """Return those of the wanted columns that lie beside the shards and not in them."""
    inside = {name for each in shards if each is not None for name in each.columns}
    folders = {name: column_folder(root, name, split) for name in wanted if name not in inside}
    columns = {name: SideColumn(folder) for name, folder in folders.items() if folder.is_dir()}
    for column in columns.values():
        column.check(manifest, split)
    return columns


def _check_columns(shards: DomainShards, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in shards.columns]
    unsafe = [name for name in wanted if shards.columns.get(name) == "pkl"]
    if missing or unsafe:
        why = f"has no columns {missing}" if missing else f"stores {unsafe} as pickle, which would run code when read"
        raise InputError(f"domain {shards.domain!r} {why}; its columns are {dict(shards.columns)}. Ask for others.")
