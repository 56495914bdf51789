"""An update rule: a pure ``(init, update)`` pair that turns per-domain losses into domain weights.

    rule = doremi()
    state = rule.init(["code", "web"])
    state, weights = rule.update(state, signals)      # weights (D,), >= 0, sum 1
    frozen = rule.result(state)                       # the weights to train the main model on

States are NamedTuples of float64 arrays and ints: no clock, no random numbers, no I/O, and no argument is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["Domains", "UpdateRule", "as_domains", "state_from_dict", "state_to_dict"]

Vector = NDArray[np.float64]


class Domains(NamedTuple):
    """What a rule may know of the domains beforehand.

    Attributes:
        names: sorted, D of them.
        num_tokens: (D,) tokens available for training; ones where unknown.
        prior: (D,) weights that samples are drawn by when nothing else is decided; sums to 1.
    """

    names: tuple[str, ...]
    num_tokens: Vector
    prior: Vector


def as_domains(
    domains: Domains | Sequence[str] | Any,
    num_tokens: Sequence[float] | None = None,
    prior: Sequence[float] | None = None,
) -> Domains:
    """Return ``Domains`` from names alone: sizes default to 1 each, the prior to uniform; or from a loader.

    Args:
        domains: names, or a loader with ``domains``, such as ``MixtureLoader``: then sizes are its shards', and the
            prior is what it draws by.
    """
    if isinstance(domains, Domains):
        return domains
    if hasattr(domains, "domains"):
        from algorithms.loader_facts import domains_of  # which makes Domains, too

        return domains_of(None, domains)
    names = tuple(domains)
    if not names or len(set(names)) != len(names):
        raise InputError(f"an update rule needs at least one domain and no name twice; got {list(names)}.")
    count = len(names)
    sizes = np.ones(count) if num_tokens is None else np.asarray(num_tokens, dtype=np.float64)
    weights = np.full(count, 1.0 / count) if prior is None else np.asarray(prior, dtype=np.float64)
    if sizes.shape != (count,) or weights.shape != (count,):
        raise InputError(f"sizes {sizes.shape} and prior {weights.shape} must have one entry per domain: ({count},).")
    for what, values in (("sizes", sizes), ("the prior", weights)):
        if not np.all(np.isfinite(values)) or np.any(values < 0) or not np.any(values > 0):
            raise InputError(f"{what} of {list(names)} must be finite, >= 0 and not all 0; got {values.tolist()}.")
    return Domains(names, sizes, weights / weights.sum())


class UpdateRule(NamedTuple):
    """A rule and its settings.

    Attributes:
        name: row in ``UPDATE_RULES``.
        settings: keyword arguments it was made with, JSON-like, for provenance and checkpoints.
        init: ``Domains -> state``; also from names alone, or from a loader, see ``as_domains``.
        update: ``(state, Signals) -> (state, weights (D,))``; the returned weights are those to use from now on.
        weights: ``state -> (D,)``, the weights in force (the first ones right after ``init``).
        result: ``state -> (D,)``, the weights to freeze into a mixture (an average where the method says so).
        needs: optional signals it reads: "reference", "heldout", "heldout_reference", "behaviour", "gradients",
            "gradient_variance", "histogram" (see ``Signals``).
        applies: what its weights act on by default: the per-domain "loss" or the "sampling".
        averages: whether ``result`` is the mean of the weights in force, so that more steps can be extrapolated.
        first_move: number of domains -> updates before which the result cannot leave what it starts from.
        normalization: how loss weights meet token counts: "domain" is Σ_d w_d · mean loss of d (paper form);
            "tokens" is Σ w_d ℓ / Σ w_d over all tokens (official DoReMi code).
    """

    name: str
    settings: Mapping[str, Any]
    init: Callable[[Any], Any]
    update: Callable[[Any, Signals], tuple[Any, Vector]]
    weights: Callable[[Any], Vector]
    result: Callable[[Any], Vector]
    needs: frozenset[str] = frozenset()
    applies: Literal["loss", "sampling"] = "loss"
    normalization: Literal["domain", "tokens"] = "domain"
    averages: bool = True
    first_move: Callable[[int], int] = lambda num_domains: 1


def state_to_dict(state: Any) -> dict[str, Any]:
    """Return a rule's state as builtins, exact to the bit through JSON and ``torch.save``."""
    return {name: _to_builtin(value) for name, value in state._asdict().items()}


def _to_builtin(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return state_to_dict(value) if hasattr(value, "_asdict") else value


def state_from_dict(template: Any, saved: Mapping[str, Any]) -> Any:
    """Return a state like ``template`` (from ``rule.init``) with the saved values.

    Raises: InputError: if the fields or shapes differ.
    """
    if set(saved) != set(template._fields):
        raise InputError(
            f"saved rule state has fields {sorted(saved)}, this rule has {sorted(template._fields)}. "
            "Use the rule and version it was saved with."
        )
    values = {}
    for name, like in template._asdict().items():
        if hasattr(like, "_asdict"):
            values[name] = state_from_dict(like, saved[name])
            continue
        value = np.asarray(saved[name], dtype=like.dtype) if isinstance(like, np.ndarray) else type(like)(saved[name])
        if isinstance(like, np.ndarray) and value.shape != like.shape:
            raise InputError(
                f"saved rule state {name!r} has shape {value.shape}, expected {like.shape}: "
                "it was made for other domains."
            )
        values[name] = value
    return type(template)(**values)
