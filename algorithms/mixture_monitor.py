"""Log what a ``MixtureLoader`` delivers, and let a second ``fit()`` go on where the first one stopped.

    trainer = Trainer(train_dataloader=loader, callbacks=[MixtureMonitor()], ...)

Not needed beside ``DomainReweighting`` for the second purpose, which does the same.
"""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from mixer.dataloader import MixtureLoader

__all__ = ["MixtureMonitor"]


class MixtureMonitor(Callback):
    """Log ``loader.metrics()`` every so many batches: weights, shares and epochs by domain, waiting, cache.

    Args:
        every: batches between two logs, ≥ 1.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = max(int(every), 1)

    def fit_start(self, state: State, logger: Logger) -> None:
        # The loader knows its own position. Without this Composer would draw, and throw away, as many batches as have
        # been trained on, whenever fit() begins inside an epoch.
        if isinstance(state.train_dataloader, MixtureLoader):
            state.dataset_resumption["train"] = True

    def batch_end(self, state: State, logger: Logger) -> None:
        loader, step = state.train_dataloader, state.timestamp.batch.value
        if isinstance(loader, MixtureLoader) and step % self.every == 0:
            logger.log_metrics(loader.metrics(), step=step - 1)  # the step by which Composer logs this batch's loss
