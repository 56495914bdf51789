"""Short Composer runs and what they leave behind."""

from __future__ import annotations

from typing import Any

import torch
from composer import Algorithm, Callback, State, Trainer
from composer.loggers import Logger, LoggerDestination
from torch import Tensor

from tests.algorithms.tiny import Loader, llama, wrap


def make_trainer(
    *algorithms: Algorithm,
    model: torch.nn.Module | None = None,
    loader: Any = None,
    steps: int = 3,
    micro: int | str | None = None,
    lr: float = 0.1,
    **options: Any,
) -> Trainer:
    """Return a trainer, on the CPU, for ``steps`` steps of plain SGD; anything else goes to ``Trainer``."""
    model = wrap(llama()) if model is None else model
    return Trainer(
        model=model,
        train_dataloader=Loader() if loader is None else loader,
        algorithms=list(algorithms),
        optimizers=options.pop("optimizers", None) or torch.optim.SGD(model.parameters(), lr=lr),
        max_duration=f"{steps}ba",
        device=options.pop("device", "cpu"),
        device_train_microbatch_size=micro,
        progress_bar=False,
        auto_log_hparams=False,
        seed=options.pop("seed", 1),
        **options,
    )


def fit(*algorithms: Algorithm, **options: Any) -> Trainer:
    """Train and return the trainer."""
    trainer = make_trainer(*algorithms, **options)
    trainer.fit()
    return trainer


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def parameters(trainer: Trainer) -> Tensor:
    """Return all parameters of the trained model as one vector."""
    return flat(trainer.state.model.parameters()).clone()


class Gradients(Callback):
    """Keep the gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.steps.append(flat(parameter.grad for parameter in state.model.parameters()).clone())


class Metrics(LoggerDestination):
    """Keep what is logged: name -> list of (step, value)."""

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[int, float]]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.series.setdefault(name, []).append((step, value))  # type: ignore[arg-type]
