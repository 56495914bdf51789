"""A rule at work: its state, the sums since its last update, and the history. Knows nothing of any training framework.

    run = RuleRun(doremi(), as_domains(loader.domains))
    run.add(signals)                # after every step
    weights = run.update(step)      # after every step, or every few

``DomainReweighting`` drives one; so may a loop of your own that updates at intervals or wants a history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from algorithms.rules.base import Domains, UpdateRule, state_from_dict, state_to_dict
from algorithms.signals import Signals
from algorithms.trajectory import Trajectory
from mixer.errors import InputError

__all__ = ["RuleRun", "ready_and_rest"]


class RuleRun:
    """A rule, or None to keep the history of the losses alone, over the steps of one training run.

    Args:
        min_tokens: a domain takes part in an update once so many of its tokens have added up; until then its sums
            wait, and it counts as absent. Scores of few tokens are mostly noise.
    """

    def __init__(self, rule: UpdateRule | None, domains: Domains, min_tokens: int = 0) -> None:
        if min_tokens < 0:
            raise InputError(f"min_tokens must be >= 0; got {min_tokens}.")
        self.rule, self.names, self.min_tokens = rule, domains.names, min_tokens
        self.state = rule.init(domains) if rule else None
        self.trajectory = Trajectory(len(domains.names))
        self.num_updates = 0
        self._pending: Signals | None = None

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """The weights (D,) in force; None without a rule."""
        return self.rule.weights(self.state) if self.rule else None

    @property
    def result(self) -> NDArray[np.float64]:
        """The weights (D,) to freeze into a mixture."""
        if self.rule is None:
            raise InputError("without a rule there are no weights to freeze.")
        return self.rule.result(self.state)

    def add(self, signals: Signals) -> None:
        """Add the sums of one step."""
        self._pending = signals if self._pending is None else self._pending + signals

    def update(self, step: int, **measured: Any) -> Signals:
        """Run the rule on the sums since its last update, and return those it got.

        Args:
            step: what the history calls this update.
            measured: fields of ``Signals`` that are measured at updates only.
        """
        if self._pending is None:
            raise InputError("no sums were added since the last update.")
        signals, self._pending = ready_and_rest(self._pending, self.min_tokens)
        signals = signals._replace(**measured)
        if self.rule is None:
            self.trajectory.append(step, signals.num_tokens / max(signals.num_tokens.sum(), 1.0), signals)
            return signals
        self.state, weights = self.rule.update(self.state, signals)
        self.num_updates += 1
        self.trajectory.append(step, weights, signals)
        return signals

    def signature(self, *more: NDArray[np.float64] | None) -> int:
        """Return a digest of what all ranks have to hold alike: the rule's state, and ``more`` arrays."""
        digest = xxhash.xxh3_64()
        for value in (*_leaves(self.state), *more):
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        return digest.intdigest()

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint and this run have to agree on, and all ranks."""
        name, settings = (self.rule.name, dict(self.rule.settings)) if self.rule else (None, {})
        return {"domains": list(self.names), "rule": name, "settings": settings}

    def state_dict(self) -> dict[str, Any]:
        """Return builtins and tensors, of a size that does not grow with the run."""
        waiting = self._pending
        return {
            "state": state_to_dict(self.state) if self.rule else {},
            "pending": None if waiting is None else [None if row is None else row.tolist() for row in waiting],
            "num_updates": self.num_updates,
            "trajectory": self.trajectory.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()`` of the same rule on the same domains."""
        if self.rule:
            self.state = state_from_dict(self.state, saved["state"])
        rows = [None if row is None else np.array(row, dtype=np.float64) for row in saved["pending"] or []]
        self._pending = Signals(*rows) if rows else None  # type: ignore[arg-type]
        self.num_updates = int(saved["num_updates"])
        self.trajectory.load_state_dict(saved["trajectory"])


def ready_and_rest(signals: Signals, min_tokens: int) -> tuple[Signals, Signals | None]:
    """Return the sums of domains with at least ``min_tokens``, the others absent; and those others' sums.

    >>> sums = Signals(np.array([5.0, 50.0]), np.array([10.0, 60.0]))
    >>> ready, rest = ready_and_rest(sums, 10)
    >>> ready.num_tokens.tolist(), rest.loss.tolist()
    ([0.0, 50.0], [10.0, 0.0])
    """
    waits = (signals.num_tokens > 0) & (signals.num_tokens < min_tokens)
    if not waits.any():
        return signals, None

    def part(keep: NDArray[np.bool_]) -> Signals:
        # Domains are the first axis of every field.
        rows = (None if row is None else np.where(keep, row.T, 0.0).T for row in signals)
        return Signals(*rows)  # type: ignore[arg-type]

    # What samples were drawn by belongs to no domain alone, and to the batches of this update.
    return part(~waits)._replace(behaviour=signals.behaviour), part(waits)._replace(behaviour=_none_of(signals))


def _none_of(signals: Signals) -> NDArray[np.float64] | None:
    return None if signals.behaviour is None else np.zeros_like(signals.behaviour)


def _leaves(state: Any) -> list[Any]:
    if hasattr(state, "_asdict"):
        return [leaf for value in state for leaf in _leaves(value)]
    return [state]
