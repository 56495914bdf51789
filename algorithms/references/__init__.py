"""References: what gives the losses that a DRO method compares with. One file per kind.

as_reference(model)              a frozen model, run on every batch
as_reference("path/to/model")    the same, from a Hugging Face folder or a Composer checkpoint
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from algorithms.references.base import Reference
from algorithms.references.frozen import FrozenModel
from mixer.errors import InputError

__all__ = ["FrozenModel", "Reference", "as_reference"]


def as_reference(source: Any) -> Reference:
    """Return a ``Reference`` from a model, the path of one, or a reference.

    Raises: InputError: if ``source`` is none of these.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, nn.Module | str | Path):
        return FrozenModel(source)
    raise InputError(f"a reference is a model, the path of a saved model, or a Reference; got {type(source).__name__}.")
