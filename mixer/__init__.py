"""Weighted, resumable mixing of text domains for language-model pretraining.

    from mixer import Mixture, MixtureLoader
    loader = MixtureLoader("shards", mixture=Mixture.load("mixture.json"), global_batch_size=64)

Names are loaded when first used, so that ``import mixer`` costs little and ``mixer --help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixer.allocation import allocate
    from mixer.dataloader import MixtureLoader
    from mixer.errors import DataError, ExhaustedError, InputError
    from mixer.manifest import Manifest
    from mixer.mixer import Mixer
    from mixer.mixture import Mixture
    from mixer.projection import project
    from mixer.shards import open_domain
    from mixer.static_weights import proportional, temperature, uniform, unimax

__all__ = [
    "DataError",
    "ExhaustedError",
    "InputError",
    "Manifest",
    "Mixer",
    "Mixture",
    "MixtureLoader",
    "allocate",
    "open_domain",
    "project",
    "proportional",
    "temperature",
    "uniform",
    "unimax",
]
__version__ = "0.1.0"

_HOMES = {
    "DataError": "mixer.errors",
    "ExhaustedError": "mixer.errors",
    "InputError": "mixer.errors",
    "Manifest": "mixer.manifest",
    "Mixer": "mixer.mixer",
    "Mixture": "mixer.mixture",
    "MixtureLoader": "mixer.dataloader",
    "allocate": "mixer.allocation",
    "open_domain": "mixer.shards",
    "project": "mixer.projection",
    "proportional": "mixer.static_weights",
    "temperature": "mixer.static_weights",
    "uniform": "mixer.static_weights",
    "unimax": "mixer.static_weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mixer' has no attribute {name!r}")
