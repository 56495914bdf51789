"""Log what a ``MixtureLoader`` delivers.

    trainer = Trainer(train_dataloader=loader, callbacks=[MixtureMonitor()], ...)

For logging alone: a second ``fit()`` goes on where the first one stopped without any callback.
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

    def batch_end(self, state: State, logger: Logger) -> None:
        loader, step = state.train_dataloader, state.timestamp.batch.value
        if isinstance(loader, MixtureLoader) and step % self.every == 0:
            logger.log_metrics(loader.metrics(), step=step - 1)  # the step by which Composer logs this batch's loss
