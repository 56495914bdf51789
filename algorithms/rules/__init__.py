"""Every update rule by name: a new one is a file and a row here; the row enters it into the shared tests."""

from __future__ import annotations

from collections.abc import Callable

from algorithms.rules.base import Domains, UpdateRule, as_domains, state_from_dict, state_to_dict
from algorithms.rules.doremi import doremi, easiest, hardest
from algorithms.rules.group_dro import group_dro

__all__ = ["Domains", "UPDATE_RULES", "UpdateRule", "as_domains", "state_from_dict", "state_to_dict"]

UPDATE_RULES: dict[str, Callable[..., UpdateRule]] = {
    "doremi": doremi,
    "hardest": hardest,
    "easiest": easiest,
    "group_dro": group_dro,
}
