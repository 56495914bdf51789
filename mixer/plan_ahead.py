"""What worker processes need: a plan that runs ahead of what is delivered, and can be taken back.

The plan is made in the training process, batch by batch, as torch asks for indices; a snapshot of the mixer is kept for
every batch that has been planned and not yet delivered. So the loader's position is that of the last delivered batch,
however far the workers are; and weights that are set now hold from a batch that no worker can have been given yet.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DistributedSampler

from mixer.errors import DataError, InputError
from mixer.mixer import RunEnded, Snapshot, Stage

if TYPE_CHECKING:
    from mixer.dataloader import MixtureLoader

__all__ = ["PlanSampler", "as_is", "leave_with_parent"]


class PlanSampler(DistributedSampler):  # type: ignore[type-arg]
    """Plan this rank's draws, one by one; with several ranks Composer asks for a DistributedSampler in this place.

    It has no length, so that trainers see an endless loader.
    """

    def __init__(self, loader: MixtureLoader) -> None:
        self._loader = loader
        self.num_replicas, self.rank, self.epoch = loader.world_size, loader.rank, 0
        self.shuffle, self.drop_last, self.seed = False, True, 0
        self.planned: deque[Snapshot] = deque()  # after each batch that is planned and not delivered
        self.is_ours = False  # while the loader itself begins to iterate
        self.end: Exception | None = None  # why planning stopped; raised when what was planned has been delivered

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (domain id, sample index); torch gathers them to this rank's batches.

        Raises: InputError: if it is not the loader that asks: whoever took it apart would share out, shuffle or skip
            once more, and its state would not be that of what was delivered.
        """
        if not self.is_ours:
            raise InputError(
                "something took this MixtureLoader apart to make a loader of its own (accelerate's prepare, Lightning"
                " with use_distributed_sampler): hand it over as it is; it shares out its batches over ranks itself."
            )
        loader, mine = self._loader, slice(self.rank, None, self.num_replicas)
        while True:
            try:
                draws = loader._plan_batch()
            except (RunEnded, DataError) as end:
                self.end = end
                return
            # Of remote shards this process fetches ahead for its workers; local ones they map when they need them.
            samples = loader.reader.sample_ids(draws, ahead=loader.reader.cache is not None)
            self.planned.append(loader.mixer.snapshot())
            yield from zip(draws.domain_ids[mine].tolist(), samples[mine].tolist())

    def add(self, stage: Stage) -> None:
        """Let a newly scheduled stage be part of the state at every batch not yet delivered."""
        self.planned = deque(snapshot.with_stage(stage) for snapshot in self.planned)

    def __len__(self) -> int:
        raise TypeError("a MixtureLoader has no length: it goes on until training stops or its domains are used up")


def leave_with_parent(_: int) -> None:
    """Let this worker end when the training process does, however that ends.

    torch's own watch looks at the parent by id, which is the fork server: that waits for the workers in turn.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_after, args=(parent.sentinel,), daemon=True).start()


def _leave_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def as_is(batch: Any) -> Any:
    """Collate nothing: batches come whole."""
    return batch
