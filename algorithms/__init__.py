"""Find domain weights with distributionally robust optimisation while a proxy model trains.

    from algorithms import DomainReweighting, doremi
    algorithm = DomainReweighting(doremi(), reference=reference)
    trainer = Trainer(model=model, train_dataloader=loader, algorithms=[algorithm], max_duration="1000ba")

Names are loaded when first used: only ``DomainReweighting`` needs Composer, and importing that takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from algorithms.domain_losses import DomainLosses
    from algorithms.domain_reweighting import DomainReweighting
    from algorithms.early_stopping import WorstDomainEarlyStopping
    from algorithms.heldout import HeldOutWindows
    from algorithms.losses import token_losses
    from algorithms.mixture_monitor import MixtureMonitor
    from algorithms.presence import warn_of_absences
    from algorithms.references import FrozenModel, Reference, as_reference
    from algorithms.rules.base import Domains, UpdateRule
    from algorithms.rules.doremi import doremi
    from algorithms.rules.group_dro import group_dro
    from algorithms.signals import Signals
    from algorithms.worst_subset import WorstSubset

_HOMES = {
    "DomainLosses": "algorithms.domain_losses",
    "DomainReweighting": "algorithms.domain_reweighting",
    "HeldOutWindows": "algorithms.heldout",
    "MixtureMonitor": "algorithms.mixture_monitor",
    "WorstDomainEarlyStopping": "algorithms.early_stopping",
    "WorstSubset": "algorithms.worst_subset",
    "Domains": "algorithms.rules.base",
    "FrozenModel": "algorithms.references",
    "Reference": "algorithms.references",
    "Signals": "algorithms.signals",
    "UpdateRule": "algorithms.rules.base",
    "as_reference": "algorithms.references",
    "doremi": "algorithms.rules.doremi",
    "group_dro": "algorithms.rules.group_dro",
    "token_losses": "algorithms.losses",
    "warn_of_absences": "algorithms.presence",
}

__all__ = [
    "DomainLosses",
    "DomainReweighting",
    "Domains",
    "FrozenModel",
    "HeldOutWindows",
    "MixtureMonitor",
    "Reference",
    "Signals",
    "UpdateRule",
    "WorstDomainEarlyStopping",
    "WorstSubset",
    "as_reference",
    "doremi",
    "group_dro",
    "token_losses",
    "warn_of_absences",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'algorithms' has no attribute {name!r}")
