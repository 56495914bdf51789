"""The loader: weighted, changeable at every batch, exactly resumable; a ``torch.utils.data.DataLoader``.

    loader = MixtureLoader("shards", mixture={"code": 0.3, "web": 0.7}, global_batch_size=64, seed=17)
    for batch in loader:                     # {"input_ids": (B, T), "domain_ids": (B,), "sample_ids": (B,)}, all int64
        loader.set_weights({"code": 0.5, "web": 0.5})            # decides the very next batch
    state = loader.state_dict();  loader.load_state_dict(state)

Without worker processes a batch is planned at the moment it is asked for and gathered from memory-mapped shards; that
is faster than any hand-over from another process, and nothing planned ahead has to be taken back when weights change.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from mixer.budget import Plan, plan_budget
from mixer.cache import RemoteCache
from mixer.dataset import MixtureDataset
from mixer.errors import DataError, ExhaustedError, InputError
from mixer.folders import load_manifest
from mixer.manifest import Manifest
from mixer.mixer import Draws, Mixer, RunEnded, Snapshot, Weights
from mixer.plan_ahead import PlanSampler, as_is, leave_with_parent
from mixer.remote_shards import RemoteShards
from mixer.setup import MixtureLike, mixer_for, resolve_curriculum, resolve_mixture, tokens_in
from mixer.trainers import fetched_ahead, is_spinning, keep_place
from mixer.units import parse_bytes, short

__all__ = ["MixtureLoader", "resolve_mixture"]

Batch = dict[str, torch.Tensor]
_READ_AHEAD = 8
_REMEMBERED = 8
_IMPORTED = (
    " If none lives to give a batch, see what they printed: workers import the program that started them, which must"
    " make its loader below `if __name__ == '__main__':`."
)


class MixtureLoader(DataLoader[Any]):
    """Endless batches from a mixture of domains.

    Args:
        shards: folder of shards, from ``mixer convert`` or of MDS folders by domain.
        mixture: "proportional" (to samples), "uniform", weights by domain, a ``Mixture``, or the path of a mixture
            file.
        global_batch_size: samples per batch over all ranks; must divide by ``world_size``.
        split: "train" or "validation".
        seed: of the order of samples and of the batches.
        rank, world_size: which share of every global batch to deliver; default torch.distributed's, else torchrun's.
        num_workers: processes that run ``collate`` and ``transform``. Without either none is started: reading in the
            training process is faster than any hand-over from another. They import the program that started them: what
            it does belongs below ``if __name__ == "__main__":``.
        columns: other columns, of the shards or beside them (``mixer add-column``), to deliver with the tokens: tensors
            where all values have one shape, else lists; ``mixer.boundaries`` turns ``doc_starts`` into position ids.
        collate: from a list of samples (dicts of ``input_ids`` (n,), ``domain_ids``, ``sample_ids``, other columns) to
            a batch; must be importable for processes. Samples of one length are gathered faster without it; where they
            differ in length the default is ``mixer.padding.Padding``, with the tokenizer's end-of-text id.
        transform: from a batch of this rank to what is delivered; must be importable (it is pickled) for processes.
        read_ahead: batches that may be planned before they are delivered. A change of weights holds after that many:
            none without processes, 8 with any number of them. Give it to have the same samples with and without.
        max_epochs: how often a domain may be read: a number, or one by domain; None for no limit.
        on_exhausted: what happens then: "repeat" (an error, if there is a limit), "drop" (its weight goes to the
            others), "stop" (the run ends); the latter two allow one epoch unless ``max_epochs`` says more.
        pin_memory: deliver tensors in page-locked memory, for copies to a GPU that do not wait.
        remote: where the shards are, if not in ``shards``, which is then the folder that caches them: ``s3://…``,
            ``gs://…`` and every other scheme of streaming's ``Stream``, or a path. Or the address of each remote
            domain's MDS folder, by name; domains that lie in ``shards`` are then read there.
        cache_limit: bytes of shards to keep in the cache, such as "200GB"; None for all.
        download_timeout: seconds after which an attempt to fetch a file is given up when less than a MiB came in them.
        download_retry: further attempts, after waits of 0.2, 0.4, 0.8, … s. So a server that does not answer is an
            error after (retry + 1) · timeout + 2 s: by default 2 minutes.
        verify: "hash" checks every shard before its first use, "never" only sizes and offsets.
        dtype: of ``input_ids``; "stored" saves the conversion from the shards' own.
        force: use a mixture that was made for other shards; what differs is recorded in ``loader.mixture.provenance``.
    Raises: InputError, DataError: one sentence that names what does not fit.

    Attributes: ``domains`` (sorted names that ``domain_ids`` index), ``num_samples`` (by domain), ``manifest``,
    ``mixture``, ``step`` (batches delivered), ``weights``, ``variable_length``.

    Every batch is whole: none is smaller at the end, and a run that ends (``on_exhausted``) ends before the first batch
    that cannot be filled. So shapes are static, but for samples that differ in length (see ``Padding(length=…)``).

    Where samples differ in length, a batch has ``global_batch_size`` of them, weights are shares of tokens, and what is
    owed is counted in tokens: see ``mixer.token_allocation``.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str],
        *,
        mixture: MixtureLike = "proportional",
        global_batch_size: int,
        split: str = "train",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        max_epochs: float | Mapping[str, float] | None = None,
        on_exhausted: str = "repeat",
        remote: str | Mapping[str, str] | None = None,
        cache_limit: int | str | None = None,
        download_timeout: float = 30.0,
        download_retry: int = 3,
        verify: Literal["hash", "never"] = "hash",
        force: bool = False,
        pin_memory: bool = False,
        dtype: Literal["int64", "stored"] = "int64",
        columns: Sequence[str] = (),
        collate: Callable[[list[dict[str, Any]]], Any] | None = None,
        transform: Callable[[Batch], Any] | None = None,
        read_ahead: int | None = None,
    ) -> None:
        cache = _cache(shards, remote, cache_limit, timeout=download_timeout, retries=download_retry)
        self.folder = Path(shards)
        self.rank, self.world_size = _rank_and_world(rank, world_size)
        share = _share(global_batch_size, self.world_size)
        self.manifest: Manifest = load_manifest(shards, cache, split)
        dataset = MixtureDataset(shards, split, seed, verify, self.manifest, dtype, cache, columns)
        self.domains, self.num_samples, self.split = dataset.domains, dataset.num_samples, split
        self.curriculum = resolve_curriculum(mixture, self.manifest, split=split, force=force)
        self.mixture = self.curriculum[0].mixture
        self.mixer: Mixer = mixer_for(
            self.manifest,
            self.curriculum,
            split=split,
            batch_size=global_batch_size,
            seed=seed,
            max_epochs=max_epochs,
            on_exhausted=on_exhausted,
        )
        dataset._loader, dataset.transform = self, transform
        dataset.collate = collate or dataset.collate
        self.variable_length = dataset.variable
        if self.variable_length:
            self.mixer.lengths = dataset.lengths
        if cache is not None:
            self._check_limit(dataset, cache)
        self.reader: MixtureDataset = dataset
        self._ended, self._generation = "", 0
        self._last: tuple[torch.Tensor | None, np.ndarray] = (None, np.zeros(0, np.int64))
        if num_workers < 0:
            raise InputError(f"num_workers must be 0 or more; got {num_workers}.")
        # Reading takes no processes: they would only be slower. The user's own code is what they are for.
        processes = num_workers if transform is not None or collate is not None else 0
        self.read_ahead = (_READ_AHEAD if processes else 0) if read_ahead is None else read_ahead
        if self.read_ahead < processes:
            raise InputError(
                f"read_ahead {self.read_ahead} must be at least num_workers {num_workers}: each needs a batch."
            )
        self._plan, self._delivered = PlanSampler(self), self.mixer.snapshot()
        self._before: deque[Snapshot] = deque(maxlen=_REMEMBERED)  # each of the batches delivered last
        options: dict[str, Any] = {}
        if processes:  # forking a process that has threads is not safe
            options = {"multiprocessing_context": "forkserver", "worker_init_fn": leave_with_parent}
            options["prefetch_factor"] = self.read_ahead // processes
        super().__init__(
            dataset,
            batch_size=share,
            sampler=self._plan,
            num_workers=processes,
            collate_fn=as_is,
            pin_memory=pin_memory,
            drop_last=True,
            **options,
        )

    def _check_limit(self, dataset: MixtureDataset, cache: RemoteCache) -> None:
        """Refuse a cache that cannot hold what is read at one time: every batch would fetch shards anew."""
        needed = {
            name: shards.window_bytes(order.shards_at(0)[0])
            for name, shards, order, weight in zip(self.domains, dataset.shards, dataset.orders, self.mixer.weights)
            if weight > 0 and isinstance(shards, RemoteShards) and order is not None
        }
        total = sum(needed.values())
        if cache.limit is not None and total > cache.limit:
            largest = sorted(needed, key=lambda name: -needed[name])[:3]
            raise InputError(
                f"cache_limit {cache.limit:,} bytes cannot hold the windows that are read at a time: {total:,} bytes"
                f" over {len(needed)} domains ({', '.join(f'{name} {short(needed[name])}' for name in largest)}, …)."
                " Raise it to at least that; twice as much leaves room to read ahead."
            )

    def counts_of(self, batch: Mapping[str, Any]) -> np.ndarray | None:
        """Return how many samples of each domain the *global* batch holds, (D,) int64, without asking other ranks.

        Known for the batch delivered last, as it was delivered; None for any other, and with worker processes.
        """
        ids, counts = self._last
        return counts if ids is not None and batch.get("domain_ids") is ids else None

    @property
    def ended(self) -> str:
        """Why this loader has ended, or "" while it has not."""
        return self._ended

    @property
    def step(self) -> int:
        """Global batches delivered so far."""
        return self._now.step

    @property
    def _now(self) -> Snapshot:
        """The counters after the last delivered batch; workers may be further."""
        return self._delivered if self.num_workers else self.mixer.snapshot()

    @property
    def global_batch_size(self) -> int:
        return self.mixer.batch_size

    @property
    def weights(self) -> dict[str, float]:
        """The weights by domain that decide the next batch."""
        return dict(zip(self.domains, self.mixer.weights_at(self._now).tolist()))

    def set_weights(self, weights: Weights) -> None:
        """Draw by these weights from batch ``step + read_ahead`` on: the very next one, unless there are processes.

        Args:
            weights: shares by domain, or (D,) in the order of ``domains``; normalised. Every rank must set the same.
        """
        self.schedule(self.step + self.read_ahead, weights)

    def schedule(self, step: int, weights: Weights, *, ramp: int = 0) -> None:
        """Draw by these weights from batch ``step`` on; see ``Mixer.schedule``. It is part of the state.

        Raises: InputError: if the batch may be planned already (before ``self.step + self.read_ahead``).
        """
        if step - ramp < self.step + self.read_ahead and ramp:
            raise InputError(
                f"a ramp of {ramp} to batch {step} would begin before batch {self.step + self.read_ahead}."
            )
        if step < self.step + self.read_ahead:
            raise InputError(f"batch {step} may be planned already; schedule from {self.step + self.read_ahead} on.")
        stage = self.mixer.schedule(step, weights, ramp=ramp)
        self._plan.add(stage)
        self._delivered = self._delivered.with_stage(stage)
        self._before = deque((snapshot.with_stage(stage) for snapshot in self._before), _REMEMBERED)

    # --- batches ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Continue with the next batch; iterating again goes on and never rewinds.

        Raises: ExhaustedError: if the run had ended before this iteration began.
        """
        caller = sys._getframe(1)
        if is_spinning(self, caller):
            return iter(())
        left = keep_place(self, caller)
        if self._ended:
            raise ExhaustedError(
                f"this loader has ended ({self._ended}); iterating it again would yield nothing. Make a new one, load"
                " an earlier state, or allow more epochs (max_epochs)."
            )
        batches = self._from_workers() if self.num_workers else self._in_process()
        return batches if left is None else itertools.islice(batches, left)

    def _in_process(self) -> Iterator[Any]:
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Any:
        """Plan and read one batch, or return None at the end; after an error the counters stand before it."""
        before = self.mixer.snapshot()
        try:
            draws = self._plan_batch()
            sample_ids = self.reader.sample_ids(draws)
            mine = slice(self.rank, None, self.world_size)
            batch = self.reader.batch(draws.domain_ids[mine], sample_ids[mine])
        except RunEnded as end:
            self._ended = str(end)
            return None
        except BaseException:
            self.mixer.restore(before)
            raise
        if self.pin_memory and torch.cuda.is_available():
            batch = _pinned(batch)
        self._last = (batch.get("domain_ids") if isinstance(batch, Mapping) else None, draws.counts)
        self._before.append(before)
        return batch

    def _plan_batch(self) -> Draws:
        if self.variable_length:
            self.reader.expect(self.mixer.positions, self.mixer.weights)
        return self.mixer.next_batch()

    def _from_workers(self) -> Iterator[Any]:
        """Deliver what the workers have made ready; begin anew where a state was loaded meanwhile."""
        self._generation += 1
        while True:
            generation = self._generation
            self.mixer.restore(self._delivered)
            self._plan.planned.clear()
            self._plan.end = None
            for batch in self._timed(self._ready()):
                if isinstance(batch, Exception):
                    raise batch
                self._before.append(self._delivered)
                self._delivered = self._plan.planned.popleft()
                yield batch
                if generation != self._generation:
                    break
            else:
                break
        if not isinstance(self._plan.end, RunEnded):
            raise self._plan.end or DataError("the worker processes ended without an error; go on from the last state.")
        self._ended = str(self._plan.end)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Count the seconds that the training process waits for its workers."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.reader.waited_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _ready(self) -> Iterator[Any]:
        first = True
        try:
            self._plan.is_ours = True
            batches = super().__iter__()  # plans the first of them at once
            self._plan.is_ours = False
            for batch in batches:
                first = False
                yield batch
        except (RuntimeError, EOFError, ConnectionError) as error:  # the latter: killed while it handed a batch over
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                raise
            what = " ".join(str(error).split())
            raise DataError(
                f"a worker process of the loader died: {what}. Go on from the last state.{_IMPORTED if first else ''}"
            ) from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if "pickle" not in str(error):
                raise
            raise InputError(
                f"collate or transform cannot be sent to worker processes: {error}. Define it at the top level of a"
                " module, or leave out num_workers."
            ) from error

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last delivered batch, as JSON-like builtins; the same on every rank.

        Lightning, which fetches ahead, gets the position after the last batch that it has trained on.
        """
        ahead = min(fetched_ahead(sys._getframe(1)), len(self._before))
        return self.mixer.state_dict(self._before[-ahead] if ahead else self._now)

    def load_state_dict(self, state: Mapping[str, Any], *, remap: bool = False) -> None:
        """Continue after the batch at which ``state`` was taken, on any number of ranks and with any batch size.

        Args:
            state: from ``state_dict``.
            remap: allow domains to be added, dropped, or grown by new shards; see ``Mixer.load_state_dict``.
        Raises: InputError: if the state was saved for other data or another seed; both sides are named.
        """
        before = self.mixer.snapshot(), self.mixer.grown
        self.mixer.load_state_dict(state, remap=remap)
        try:
            self.reader.grow(self.mixer.grown)
        except InputError:
            self.mixer.restore(before[0])
            self.mixer.grown = before[1]
            raise
        self._ended, self._delivered = "", self.mixer.snapshot()
        self._before.clear()
        self._generation += 1

    def plan(self, budget_tokens: float) -> Plan:
        """Return what a run of so many tokens would read of each domain by the present weights, in tokens.

        Epochs by domain, which are held at ``max_epochs`` and where their weight goes, what the repeated data is worth,
        and whether the run ends early; scheduled changes of weights are not part of it (``mixer simulate`` follows
        them).
        """
        sizes = np.array([tokens_in(self.manifest, name, self.split) for name in self.domains], np.float64)
        weights, mixer = self.mixer.weights_at(self._now), self.mixer
        return plan_budget(self.domains, weights, sizes, budget_tokens, mixer.max_epochs, mixer.on_exhausted)

    def metrics(self, prefix: str = "mixture/") -> dict[str, float]:
        """Return the numbers of ``stats`` as one flat dict, for any logger."""
        stats = self.stats()
        domains = stats["domains"].items()
        flat = {f"{prefix}{domain}/{name}": float(value) for domain, row in domains for name, value in row.items()}
        flat |= {f"{prefix}cache/{name}": float(value) for name, value in stats.get("cache", {}).items()}
        return flat | {f"{prefix}waited_seconds": stats["waited_seconds"]}

    def stats(self) -> dict[str, Any]:
        """Return what was delivered so far, by domain: target and realised share, samples, tokens, epochs.

        Shares are of samples, or of tokens where samples differ in length, as the weights are.
        """
        now, limits, weights = self._now, self.mixer.sample_limits, self.weights
        tokens = now.tokens if self.variable_length else now.drawn * self.manifest.seq_len
        counted = now.tokens if self.variable_length else now.drawn  # what weights are shares of
        total, domains = max(int(counted.sum()), 1), {}
        for i, name in enumerate(self.domains):
            domains[name] = {
                "weight": weights[name],
                "target_share": (int(counted[i]) + float(now.credit[i])) / total,
                "share": int(counted[i]) / total,
                "samples": int(now.drawn[i]),
                "tokens": int(tokens[i]),
                "epochs": float(now.positions[i] / max(self.num_samples[name], 1)),
                "exhausted": bool(limits is not None and now.positions[i] >= limits[i]),
            }
        stats = {"step": now.step, "samples": int(now.drawn.sum()), "tokens": int(tokens.sum()), "domains": domains}
        stats["waited_seconds"] = self.reader.waited_seconds
        if self.reader.cache is not None:
            stats["cache"] = self.reader.cache.space.stats()
        return stats


def _cache(
    shards: str | os.PathLike[str],
    remote: str | Mapping[str, str] | None,
    cache_limit: int | str | None,
    **options: Any,
) -> RemoteCache | None:
    if remote is None:
        if cache_limit is not None:
            raise InputError(
                "cache_limit is for remote shards: local ones are never deleted. Give `remote`, or leave it."
            )
        return None
    limit = None if cache_limit is None else parse_bytes(cache_limit, "a cache_limit")
    return RemoteCache(remote, shards, limit, **options)


def _pinned(batch: Any) -> Any:
    """Return a batch with its tensors in page-locked memory, from which copies to a GPU need not wait."""
    if isinstance(batch, Mapping):
        return {name: _pinned(value) for name, value in batch.items()}
    return batch.pin_memory() if isinstance(batch, torch.Tensor) else batch


def _rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise InputError(
            f"rank and world_size must be given together, 0 <= rank < world_size; got {rank} of {world_size}."
        )
    return rank, world_size


def _share(global_batch_size: int, world_size: int) -> int:
    if global_batch_size < 1:
        raise InputError(f"global_batch_size must be at least 1 sample; got {global_batch_size}.")
    if global_batch_size % world_size:
        near = max(world_size, round(global_batch_size / world_size) * world_size)
        raise InputError(
            f"global_batch_size {global_batch_size} does not divide by world_size {world_size}; use for example {near}."
        )
    return global_batch_size // world_size
