"""The one thing that a Composer trainer must be told: a ``MixtureLoader`` stands where training stopped.

When ``fit()`` begins inside an epoch, Composer draws and throws away as many batches as have been trained on, unless a
checkpoint has just put the dataset into place. A loader that goes on by itself would leave a gap. Composer has no way
for a loader to say so, so the trainer is looked up as the caller of ``iter(loader)``. Composer is not imported.
"""

from __future__ import annotations

from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixer.dataloader import MixtureLoader

__all__ = ["is_spinning", "keep_place"]


def keep_place(loader: MixtureLoader, caller: FrameType | None) -> None:
    """Keep a Composer trainer that is about to iterate a loader from skipping batches that it has delivered.

    A loader that stands before what was trained on (its state was not loaded with the checkpoint) is left to skip.
    """
    state = _state_of(loader, caller)
    if state is not None and loader.step >= int(state.timestamp.batch_in_epoch):
        state.dataset_resumption["train"] = True


def is_spinning(loader: MixtureLoader, caller: FrameType | None) -> bool:
    """Say whether a trainer only draws a batch for each epoch behind it, to bring a sampler's seed up to date."""
    spinning = caller is not None and caller.f_code.co_name == "_spin_dataloaders_to_cur_epoch"
    return spinning and _state_of(loader, caller) is not None


def _state_of(loader: MixtureLoader, caller: FrameType | None) -> Any:
    if caller is None or caller.f_globals.get("__name__") != "composer.trainer.trainer":
        return None
    state = getattr(caller.f_locals.get("self"), "state", None)
    return state if getattr(state, "train_dataloader", None) is loader else None
