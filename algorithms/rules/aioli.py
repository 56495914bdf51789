"""Aioli: measure on the model itself how each domain's share lowers each domain's loss, and move the weights by that.

A round has two parts. Learn: train a few steps on each of D mixtures in turn (share ``focus`` for one domain, the rest
spread evenly), ``sweeps`` times, and note the drop of every held-out loss; drop = A p is linear in the mixture p to
first order, so A is solved from the mean drops. Use: A >= 0 by a shift, divided by its sum, and

    w ~ w * exp(eta * sum_i A_ij)          for the rest of the round.

Chen, Hu, Lourie, Cho, Re 2024, arXiv:2411.05735, Algorithm 1. One update of this rule is one probe: call it every few
steps (4 in their runs), with held-out losses; the weights it returns are the next mixture to train on, probe or not.

What differs in the code: probes in random order, anew for each sweep; here sweep s starts at domain s, so that no order
has to be stored. With ``memory`` their code forgets w and tilts uniform weights by the moving average of A, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from algorithms.rules.ascent import uniform
from algorithms.rules.base import Domains, UpdateRule, as_domains
from algorithms.rules.on_demand import heldout
from algorithms.rules.settings import number, whole
from algorithms.rules.steps import Present, Vector, exponentiated, weights_of
from algorithms.signals import Signals
from mixer.errors import InputError

__all__ = ["AioliState", "aioli", "probe_mixtures", "transfer_matrix"]


class AioliState(NamedTuple):
    """(D,) log weights of the mixture in use, last held-out losses, 1 where ever seen; (D, D) sums of drops (row: whose
    loss, column: which probe) and the moving average of A; updates since the round began, and rounds done."""

    log_weights: Vector
    loss: Vector
    seen: Vector
    drops: Vector
    transfer: Vector
    position: int
    num_rounds: int


def aioli(
    eta: float = 0.2, sweeps: int = 4, focus: float = 0.625, period: int | None = None, memory: float | None = None
) -> UpdateRule:
    """Return Aioli.

    Args:
        eta: 0.1 to 0.5 in the paper's runs.
        sweeps: probes of each domain per round.
        focus: share of the probed domain in its probe mixture, above 1 / D.
        period: updates per round, probes included; by default 62 (250 steps at 4 steps per update in their runs), or
            twice the probes where that is more.
        memory: None, or the share of the old A in its moving average (0.1).

    Raises: InputError: at ``init``, if the probes do not fit into the period or ``focus`` does not single a domain out.

    >>> rule = aioli()
    >>> rule.weights(rule.init(["a", "b"])).tolist()  # before the first held-out losses: uniform
    [0.5, 0.5]
    """
    settings = dict(locals())
    eta, focus = number(eta, "eta", low=0), number(focus, "focus", low=0, high=1)
    num_sweeps = whole(sweeps, "sweeps", low=1)
    length_given = None if period is None else whole(period, "period", low=2)
    kept = None if memory is None else number(memory, "memory", low=0, high=1)

    def length(size: int) -> int:
        return length_given or max(62, 2 * num_sweeps * size)

    def init(domains: Domains | Sequence[str]) -> AioliState:
        size = len(as_domains(domains).names)
        _check_room(size, num_sweeps, focus, length(size))
        zeros, square = np.zeros(size), np.zeros((size, size))
        return AioliState(np.log(uniform(size)), zeros, zeros, square, square, 0, 0)

    def update(state: AioliState, signals: Signals) -> tuple[AioliState, Vector]:
        fresh, present = heldout(signals, state.loss.size)
        if not present.any():
            return state, weights(state)
        num_probes = num_sweeps * fresh.size
        new = _measured(state, fresh, present, num_probes)
        if state.position == num_probes:
            new = _learn(new, focus, num_sweeps, eta, kept)
        new = new._replace(position=(state.position + 1) % length(fresh.size))
        return new, weights(new)

    def weights(state: AioliState) -> Vector:
        size = state.loss.size
        if 1 <= state.position <= num_sweeps * size:
            return probe_mixtures(size, focus)[_probed(state.position - 1, size)]
        return weights_of(state.log_weights)

    return UpdateRule(
        name="aioli",
        settings=settings,
        init=init,
        update=update,
        weights=weights,
        result=lambda state: weights_of(state.log_weights),
        needs=frozenset({"heldout"}),
        applies="sampling",
        averages=False,
        first_move=lambda num_domains: num_sweeps * num_domains + 1,
    )


def probe_mixtures(num_domains: int, focus: float) -> Vector:
    """Return the probe mixtures as rows, (D, D): ``focus`` on the diagonal, the rest spread evenly.

    >>> probe_mixtures(2, 0.75).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    if num_domains == 1:
        return np.ones((1, 1))
    rest = (1.0 - focus) / (num_domains - 1)
    return np.full((num_domains, num_domains), rest) + np.eye(num_domains) * (focus - rest)


def transfer_matrix(drops: Vector, focus: float) -> Vector:
    """Return A (D, D) with drops[i, j] = sum_l A[i, l] * probe_mixtures[j, l].

    >>> truth = np.array([[0.3, 0.1], [0.0, 0.2]])
    >>> bool(np.allclose(transfer_matrix(truth @ probe_mixtures(2, 0.7).T, 0.7), truth))
    True
    """
    return np.linalg.solve(probe_mixtures(drops.shape[0], focus), drops.T).T


def _check_room(size: int, sweeps: int, focus: float, period: int) -> None:
    if sweeps * size >= period or (size > 1 and focus <= 1.0 / size):
        raise InputError(
            f"aioli probes {size} domains {sweeps} times per round of {period} updates with a focus of {focus:g}: "
            f"the period must exceed {sweeps * size}, and the focus 1/{size}."
        )


def _measured(state: AioliState, fresh: Vector, present: Present, num_probes: int) -> AioliState:
    """Return the state with the new held-out losses, and their drops where a probe mixture was trained on."""
    drops = state.drops.copy()
    if 1 <= state.position <= num_probes:
        again = present & (state.seen > 0)
        drops[:, _probed(state.position - 1, fresh.size)] += np.where(again, state.loss - fresh, 0.0)
    loss, seen = np.where(present, fresh, state.loss), np.where(present, 1.0, state.seen)
    return state._replace(loss=loss, seen=seen, drops=drops)


def _probed(index: int, num_domains: int) -> int:
    sweep, place = divmod(index, num_domains)
    return (place + sweep) % num_domains


def _learn(state: AioliState, focus: float, sweeps: int, eta: float, memory: float | None) -> AioliState:
    matrix = transfer_matrix(state.drops / sweeps, focus)
    matrix = matrix - min(float(matrix.min()), 0.0)
    total = matrix.sum()
    matrix = matrix / total if total > 0 else np.full(matrix.shape, 1.0 / matrix.size)
    start = state.log_weights
    if memory is not None:
        matrix = matrix if state.num_rounds == 0 else (1 - memory) * matrix + memory * state.transfer
        start = np.log(uniform(start.size))
    log_weights = exponentiated(start, eta * matrix.sum(axis=0))
    cleared = np.zeros(state.drops.shape)
    return state._replace(log_weights=log_weights, transfer=matrix, drops=cleared, num_rounds=state.num_rounds + 1)
