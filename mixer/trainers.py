"""Where trainers stand: what Composer and Lightning must be told of a ``MixtureLoader`` and have no way to be told.

Both are looked up as callers, by name; neither is imported.

Composer draws and throws away as many batches as have been trained on when ``fit()`` begins inside an epoch, unless a
checkpoint has just put the dataset into place. A loader that goes on by itself would leave a gap. And of an epoch of a
stated length (``train_subset_num_batches``) Composer would then read the whole once more, not the rest.

Lightning puts ``loader.state_dict()`` into its checkpoints while it has fetched a batch that is not trained on yet, so
that this batch would be lost on resumption.
"""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixer.dataloader import MixtureLoader

__all__ = ["fetched_ahead", "is_spinning", "keep_place"]


def keep_place(loader: MixtureLoader, caller: FrameType | None) -> int | None:
    """Keep a Composer trainer that is about to iterate a loader from skipping batches that it has delivered.

    A loader that stands before what was trained on (its state was not loaded with the checkpoint) is left to skip.

    Returns: batches that are left of the trainer's epoch, where that has a length; else None.
    """
    state = _composer_state(loader, caller)
    if state is None or loader.step < int(state.timestamp.batch_in_epoch):
        return None
    state.dataset_resumption["train"] = True
    length = state.dataloader_len
    return None if length is None else max(int(length) - int(state.timestamp.batch_in_epoch), 0)


def is_spinning(loader: MixtureLoader, caller: FrameType | None) -> bool:
    """Say whether Composer only draws a batch for each epoch behind it, to bring a sampler's seed up to date."""
    spinning = caller is not None and caller.f_code.co_name == "_spin_dataloaders_to_cur_epoch"
    return spinning and _composer_state(loader, caller) is not None


def _composer_state(loader: MixtureLoader, caller: FrameType | None) -> Any:
    if caller is None or caller.f_globals.get("__name__") != "composer.trainer.trainer":
        return None
    state = getattr(caller.f_locals.get("self"), "state", None)
    return state if getattr(state, "train_dataloader", None) is loader else None


def fetched_ahead(caller: FrameType | None) -> int:
    """Return how many of the batches delivered a trainer that asks for the state has not trained on yet."""
    for _ in range(4):  # a comprehension, the loaders' container, the loop that fetches
        if caller is None or "lightning" not in str(caller.f_globals.get("__name__")):
            return 0
        fetcher = getattr(caller.f_locals.get("self"), "_data_fetcher", None)
        if fetcher is not None:
            return len(getattr(fetcher, "batches", ()))
        caller = caller.f_back
    return 0
