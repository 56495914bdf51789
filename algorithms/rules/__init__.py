"""Update rules by name; ``catalogue.py`` is the table that a new one enters."""

from __future__ import annotations

from collections.abc import Callable

from algorithms.rules.base import Domains, UpdateRule, as_domains, state_from_dict, state_to_dict
from algorithms.rules.catalogue import CATALOGUE

__all__ = ["CATALOGUE", "Domains", "UPDATE_RULES", "UpdateRule", "as_domains", "state_from_dict", "state_to_dict"]

UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {name: entry.make for name, entry in CATALOGUE.items()}
