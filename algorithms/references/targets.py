"""One target loss per domain as reference: given, or read off a scaling curve. No model, no forward pass.

TargetLosses({"code": 1.1, "web": 2.6})
TargetLosses.from_curves({"code": ([1e8, 2e8, 4e8, 8e8], [1.9, 1.7, 1.6, 1.5]), ...}, at=1e11)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from algorithms.losses import labels_of, target_domains
from algorithms.references.base import Reference
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["BestSoFar", "TargetLosses"]


def _is_loss(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


class _PerDomain(Reference):
    """A reference that is one number per domain, in nats per token."""

    per_token = False

    def __init__(self, losses: Mapping[str, float]) -> None:
        bad = {name: loss for name, loss in losses.items() if not _is_loss(loss)}
        if bad or not losses:
            raise InputError(
                f"target losses must be finite numbers >= 0, in nats per token, by domain; got {bad or 'none'}."
            )
        self.losses = {name: float(losses[name]) for name in sorted(losses)}
        self._values = torch.tensor(list(self.losses.values()), dtype=torch.float32)

    @property
    def fingerprint(self) -> str:
        return f"targets:{xxhash.xxh3_128(json.dumps(self.losses)).hexdigest()}"

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:
        missing = sorted(set(domains) - set(self.losses))
        if missing:
            raise InputError(f"no target loss for the domains {missing}; there are targets for {sorted(self.losses)}.")
        self._values = torch.tensor([self.losses[name] for name in domains], dtype=torch.float32)

    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        labels = labels_of(batch)
        positions = labels[:, 1:] if self.shift else labels
        domains = target_domains(batch["domain_ids"], positions)
        values = self._values.to(labels.device)[domains]
        return values[:, None].expand(positions.shape) if values.ndim == 1 else values


class TargetLosses(_PerDomain):
    """Target losses by domain, in nats per token: of an earlier run, of a scaling law, or wanted.

    They stand for whole domains: rules that clip the excess of single tokens cannot use them.
    """

    @classmethod
    def load(cls, path: str | Path) -> TargetLosses:
        """Read ``{"domain": loss, ...}`` from a JSON file."""
        try:
            losses = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(losses)
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise InputError(
                f'{path} holds no target losses ({reason}): expected {{"domain": nats per token, ...}}.'
            ) from error

    @classmethod
    def from_curves(cls, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], at: float) -> TargetLosses:
        """Return the losses that each domain's scaling curve e + b * n^-a gives at ``n = at``.

        Args:
            curves: by domain, sizes n (tokens or parameters, at least 4) and the losses measured there.
            at: size of the run that the targets are for.

        >>> sizes = [1e6, 1e7, 1e8, 1e9]
        >>> curve = (sizes, [2 + 50 * n**-0.3 for n in sizes])
        >>> round(TargetLosses.from_curves({"web": curve}, at=1e10).losses["web"], 3)  # 2 + 50 * 0.001
        2.05
        """
        from algorithms.rules.power_law import fit_power_law

        if not at > 0:
            raise InputError(f"targets are read off at a positive size; got {at}.")
        laws = {name: fit_power_law(np.asarray(sizes), np.asarray(losses)) for name, (sizes, losses) in curves.items()}
        return cls({name: float(law.loss(at)) for name, law in laws.items()})


class BestSoFar(_PerDomain):
    """The lowest smoothed training loss that each domain has had: the excess is what has been forgotten since.

    Args:
        initial: loss before anything is learnt, for all domains or by name; ln(vocabulary) is that of a uniform guess.
        smoothing: share of the newest step in the moving average whose minimum is kept; single steps are noisy.
    """

    def __init__(self, initial: float | Mapping[str, float], smoothing: float = 0.1) -> None:
        if not 0 < smoothing <= 1:
            raise InputError(f"smoothing must lie in (0, 1]; got {smoothing}.")
        self._initial, self.smoothing = initial, smoothing
        super().__init__(initial if isinstance(initial, Mapping) else {"any": initial})
        self._average: Tensor | None = None  # None until bound or restored

    def bind(self, domains: Sequence[str], loader: Any = None) -> None:
        if self._average is None:
            initial = self._initial if isinstance(self._initial, Mapping) else dict.fromkeys(domains, self._initial)
            self.losses = dict(initial)
            super().bind(domains, loader)
            self._average = torch.full((len(domains),), math.nan)

    @property
    def fingerprint(self) -> str:
        return f"best-so-far:{json.dumps(self._initial, sort_keys=True)}:{self.smoothing}"

    def observe(self, signals: Signals) -> None:
        assert self._average is not None, "bind comes first"
        tokens, loss = torch.from_numpy(signals.num_tokens), torch.from_numpy(signals.loss)
        present = tokens > 0
        mean = (loss / tokens.clamp(min=1)).float()
        moved = torch.where(self._average.isnan(), mean, self._average + self.smoothing * (mean - self._average))
        self._average = torch.where(present, moved, self._average)
        self._values = torch.where(present, torch.minimum(self._values, self._average), self._values)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._values.tolist(), "average": None if self._average is None else self._average.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["average"] is not None:
            self._values, self._average = torch.tensor(state["best"]), torch.tensor(state["average"])
