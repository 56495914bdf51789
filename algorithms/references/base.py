"""A reference: anything that gives a loss to compare each training loss with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from algorithms.signals import Signals

__all__ = ["Reference"]


class Reference(ABC):
    """Gives a loss for every predicted token of a batch. A missing value is an error, never zero.

    ``per_token`` is False where only the sums over a sample or a domain mean something: rules that clip the excess of
    single tokens cannot use those. ``for_any_batch`` is False where only certain samples have a loss.
    """

    per_token: bool = True
    for_any_batch: bool = True
    shift: bool = True  # set by the training loop: False for encoder-decoder models

    @abstractmethod
    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """Return float32 (B, S), in nats: S = T − 1 for causal models, T for encoder-decoder ones; no gradient.

        Args:
            batch: ``input_ids`` (B, T), ``domain_ids`` (B,) or (B, T), ``labels`` (B, T), and what else a loader adds.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of everything that the losses depend on, for provenance."""

    def to(self, device: torch.device | str) -> Reference:
        """Move to ``device`` and return itself."""
        return self

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:  # noqa: B027 (optional)
        """Check, before the first step, that this reference fits the domains and the loader.

        Raises: InputError: where it does not.
        """

    def columns(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return columns to add to a whole batch on the CPU, for ``token_losses`` to read; most need none."""
        return {}

    def observe(self, signals: Signals) -> None:  # noqa: B027 (optional)
        """Learn from the sums of one step, the same on every rank; most references do not."""

    def state_dict(self) -> dict[str, Any]:
        """Return what ``observe`` has changed, as builtins; frozen references have nothing to save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (optional)
        """Continue from ``state_dict()``."""
