"""Decide what every batch is made of, from counters alone: no data, no files, no random state.

    mixer = Mixer({"code": 50_000, "web": 900_000}, weights=[0.3, 0.7], batch_size=64, seed=17)
    draws = mixer.next_batch()                         # the global batch; rank r of n reads every n-th row from r on
    mixer.set_weights({"code": 0.5, "web": 0.5})       # decides the very next batch
    state = mixer.state_dict()                         # a few numbers per domain; any rank's is every rank's

A draw is (domain, position in that domain's endless order); ``mixer.order`` says which sample lies there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixer.allocation import allocate, allocate_independently
from mixer.errors import InputError
from mixer.exhaustion import EXHAUSTION, Exhausted, RunEnded
from mixer.order import WINDOW_SAMPLES
from mixer.randomness import key, permutations
from mixer.token_allocation import allocate_by_tokens, even_lengths

__all__ = ["Draws", "Mixer", "RunEnded", "Snapshot", "Stage"]

Vector = NDArray[np.float64]
Ids = NDArray[np.int64]
Weights = Mapping[str, float] | Sequence[float] | Vector

VERSION = 1
_STATE = {"seed", "window", "step", "batch_size", "scheduled", "domains"}
_FINGERPRINT = 16  # hex digits kept in a state: enough to tell data apart, and short
_FOREVER = np.int64(1) << np.int64(62)


class Draws(NamedTuple):
    """One global batch, in the order in which it is delivered.

    Attributes:
        step: index of the batch in the run, from 0.
        domain_ids, positions: (B,) int64, what each row is read from.
        counts, firsts: (D,) int64, samples per domain and the first of its positions; a domain's are consecutive.
        places: (B,) int64; row i of the batch is draw ``places[i]`` when draws are listed domain by domain.
    """

    step: int
    domain_ids: Ids
    positions: Ids
    counts: Ids
    firsts: Ids
    places: Ids


class Stage(NamedTuple):
    """From batch ``step`` on the weights are ``weights``; over the ``ramp`` batches before, they move there.

    ``samples`` is where it begins in samples of the run, if that is how it was asked for: then it stays there when the
    batch size changes. With ``tokens`` it begins with the first batch after so many, ``ramp`` is in tokens too, and
    ``step`` only says about when.
    """

    step: int
    ramp: int
    weights: Vector
    samples: int | None = None
    tokens: int | None = None

    def reached(self, now: Snapshot) -> int:
        """Return how far the run is beyond the beginning of this stage, in its unit; below 0 before it."""
        return now.step - self.step if self.tokens is None else int(now.tokens.sum()) - self.tokens


class Snapshot(NamedTuple):
    """The counters between two batches, see ``Mixer``."""

    step: int
    credit: Vector
    positions: Ids
    drawn: Ids
    tokens: Ids
    weights: Vector
    stages: list[Stage]

    def with_stage(self, stage: Stage) -> Snapshot:
        return self._replace(stages=_with_stage(self.stages, stage))


class Mixer:
    """Plan global batches from counters.

    Args:
        num_samples: samples by domain; one without any can have no weight. Domain ids follow the sorted names.
        weights: shares by domain name, or (D,) in the order of ids; normalised. Default: proportional to size.
        batch_size: samples in the global batch.
        seed: of every order in the run.
        max_epochs: how often a domain may be read, a number or one by domain; None for no limit, but 1 with
            ``on_exhausted`` "drop" or "stop".
        on_exhausted: a row of ``mixer.exhaustion.EXHAUSTION``.
        fingerprints: of the data by domain, compared when a state is loaded.
        independent: draw every sample on its own (multinomial) instead of carrying the rounding.
        mean_tokens: tokens of a mean sample by domain, where samples differ in length: weights are then shares of
            tokens and credit is counted in tokens, see ``mixer.token_allocation``. The lengths themselves come from
            ``lengths(domain id, first position, count)``, an attribute; until it is set all are as long as the mean.
    Raises: InputError: for names, sizes, weights or limits that do not fit.

    >>> mixer = Mixer({"code": 10, "web": 90}, weights={"code": 0.5, "web": 0.5}, batch_size=4)
    >>> mixer.next_batch().counts.tolist()
    [2, 2]
    """

    def __init__(
        self,
        num_samples: Mapping[str, int],
        *,
        weights: Weights | None = None,
        batch_size: int,
        seed: int = 0,
        max_epochs: float | Mapping[str, float] | None = None,
        on_exhausted: str = "repeat",
        fingerprints: Mapping[str, str] | None = None,
        independent: bool = False,
        mean_tokens: Mapping[str, float] | None = None,
    ) -> None:
        self.names = tuple(sorted(num_samples))
        if not self.names or min(num_samples.values()) < 0:
            raise InputError(f"a mixer needs at least one domain and sizes >= 0; got {dict(num_samples)!s:.200}.")
        if batch_size < 1:
            raise InputError(f"the batch size must be >= 1; got {batch_size}.")
        self.batch_size, self.seed, self.independent = int(batch_size), int(seed), independent
        self.num_samples = np.array([num_samples[name] for name in self.names], np.int64)
        self.fingerprints = {name: (fingerprints or {}).get(name, "") for name in self.names}
        self.on_exhausted, self.max_epochs = on_exhausted, _limits(self.names, max_epochs, on_exhausted)
        self._limits = _sample_limits(self.max_epochs, self.num_samples)
        self._weights = self._as_weights(self.num_samples.astype(np.float64) if weights is None else weights)
        self._stages: list[Stage] = []
        self.step = 0
        self._credit = np.zeros(len(self.names))
        self._positions = np.zeros(len(self.names), np.int64)
        self._drawn = np.zeros(len(self.names), np.int64)
        self._tokens = np.zeros(len(self.names), np.int64)
        self._means = None if mean_tokens is None else np.array([max(mean_tokens[n], 1.0) for n in self.names])
        self.lengths: Callable[[int, int, int], Ids] = self._even_lengths
        # name → (epoch, [(position in it, samples before)]) of domains that grew in the epoch they are in.
        self.grown: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self._order_of_batches: tuple[int, Ids] = (0, np.zeros((0, 0), np.int64))
        self._ids = np.arange(len(self.names), dtype=np.int64)

    # --- planning --------------------------------------------------------------------------------------------------

    def next_batch(self) -> Draws:
        """Plan the next global batch and move the counters on.

        Raises:
            RunEnded: if the policy ends the run here; nothing has moved.
            ExhaustedError: if a domain would be read more often than allowed and the policy is to refuse; nothing has
                moved.
        """
        weights, base, stages = _in_force(self.snapshot())
        counts, credit = self._allocate(weights)
        firsts = self._positions
        # Listed domain by domain, then put into an order that is random but the same on every rank.
        places = self._places()
        ids = np.repeat(self._ids, counts)
        offsets = firsts - counts.cumsum() + counts
        positions = offsets[ids]
        positions += np.arange(self.batch_size)
        draws = Draws(self.step, ids[places], positions[places], counts, firsts, places)
        if self._means is not None:
            self._tokens = self._tokens + self._tokens_of(counts)
        self._weights, self._stages = base, stages
        self._credit, self._positions, self._drawn = credit, firsts + counts, self._drawn + counts
        self.step += 1
        return draws

    def _tokens_of(self, counts: Ids) -> Ids:
        """Return the tokens (D,) of the next ``counts`` samples."""
        firsts = self._positions.tolist()
        found = [int(self.lengths(d, firsts[d], n).sum()) if n else 0 for d, n in enumerate(counts.tolist())]
        return np.array(found, np.int64)

    def _even_lengths(self, domain: int, first: int, count: int) -> Ids:
        assert self._means is not None
        return even_lengths(float(self._means[domain]), first, count)

    def _places(self) -> Ids:
        """Return the order of this batch; those of some hundred batches are made at once, which costs little more."""
        first, made = self._order_of_batches
        if not 0 <= self.step - first < len(made):
            steps = range(self.step, self.step + max(4096 // self.batch_size, 1))
            made = permutations([key(self.seed, "batch", step) for step in steps], self.batch_size)
            first, _ = self._order_of_batches = (self.step, made)
        return made[self.step - first]

    def snapshot(self) -> Snapshot:
        """Return the counters as they are; cheap, because planning replaces arrays and never changes them."""
        return Snapshot(
            self.step, self._credit, self._positions, self._drawn, self._tokens, self._weights, self._stages
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a ``snapshot`` of this mixer."""
        self.step, self._credit, self._positions, self._drawn, self._tokens, self._weights, self._stages = snapshot

    def _allocate(self, weights: Vector) -> tuple[Ids, Vector]:
        if self._limits is None:
            return self._share_out(weights, self._credit, self.batch_size)
        # Below 0 where a run goes on with less than it has read.
        remaining = np.maximum(self._limits - self._positions, 0)
        if (remaining > 0).all():
            counts, credit = self._share_out(weights, self._credit, self.batch_size)
            if not (counts > remaining).any():
                return counts, credit
        return self._allocate_within(weights, remaining)

    def _allocate_within(self, weights: Vector, remaining: Ids) -> tuple[Ids, Vector]:
        """Fill the batch when some domains have little left; the policy says what becomes of their share."""
        policy = EXHAUSTION[self.on_exhausted]
        given, credit = np.zeros_like(remaining), self._credit.copy()
        while True:
            counts, left = self._share_out(weights, credit, self.batch_size - int(given.sum()))
            owed = counts > remaining
            used_up = owed | ((remaining == 0) & (weights > 0))
            if not used_up.any():
                return given + counts, left
            event = Exhausted(self.names, weights, used_up, owed, self.max_epochs, self.step)
            kept = np.where(owed, 0.0, policy(event))
            if (kept == weights).all():
                return given + counts, left
            given[owed] += remaining[owed]
            remaining = np.where(owed, 0, remaining)
            credit[used_up & (kept == 0)] = 0.0
            weights = _normalised(kept)

    def _share_out(self, weights: Vector, credit: Vector, batch_size: int) -> tuple[Ids, Vector]:
        if self._means is not None:
            return self._share_out_tokens(weights, credit, batch_size, self._means)
        if not self.independent:
            return allocate(weights, credit, batch_size)
        drawn = allocate_independently(weights, batch_size, self.seed, self.step)
        return drawn, np.asarray(credit + batch_size * weights - drawn, np.float64)

    def _share_out_tokens(self, weights: Vector, credit: Vector, batch_size: int, means: Vector) -> tuple[Ids, Vector]:
        if self.independent:
            drawn = allocate_independently(_normalised(weights / means), batch_size, self.seed, self.step)
            tokens = self._tokens_of(drawn)
        else:
            firsts = self._positions.tolist()

            def upcoming(domain: int, count: int) -> Ids:
                return self.lengths(domain, firsts[domain], count)

            drawn, tokens = allocate_by_tokens(weights, credit, batch_size, means, upcoming)
        return drawn, np.asarray(credit + int(tokens.sum()) * weights - tokens, np.float64)

    # --- weights ---------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Vector:
        """The weights (D,) that decide the next batch."""
        return self.weights_at()

    def weights_at(self, at: Snapshot | None = None) -> Vector:
        """Return the weights (D,) that decide the batch after a ``snapshot``; by default the next one."""
        now = at or self.snapshot()
        return _in_force(now)[0].copy()

    def set_weights(self, weights: Weights) -> None:
        """Draw by these weights from the next batch on. Stages scheduled for later batches stay scheduled."""
        self.schedule(self.step, weights)

    def schedule_at(self, samples: int, weights: Weights, *, ramp: int = 0) -> Stage:
        """Like ``schedule``, with start and ramp in samples of the run; a batch belongs to the stage it begins in."""
        step = self.step + max(-(-(samples - int(self._drawn.sum())) // self.batch_size), 0)
        return self.schedule(step, weights, ramp=min(-(-ramp // self.batch_size), step - self.step), samples=samples)

    def schedule_at_tokens(self, tokens: int, weights: Weights, *, ramp: int = 0) -> Stage:
        """Like ``schedule``, with start and ramp in tokens of the run, where samples differ in length."""
        if self._means is None:
            raise InputError("samples of one length are scheduled by samples (schedule_at), not by tokens.")
        about = math.ceil(tokens / (self.batch_size * math.fsum(self._means.tolist()) / len(self._means)))
        stage = Stage(about, int(ramp), self._as_weights(weights), tokens=int(tokens))
        self._stages = _with_stage(self._stages, stage)
        return stage

    def schedule(self, step: int, weights: Weights, *, ramp: int = 0, samples: int | None = None) -> Stage:
        """Draw by these weights from batch ``step`` on, and move there in a straight line over the ``ramp`` batches
        before.

        Args:
            step: index of the first batch drawn by exactly these weights; not yet planned.
            weights: names → shares, or (D,); normalised.
            ramp: batches before ``step`` in which the weights move from those then in force; 0 for a jump.
        Raises: InputError: if the batch has been planned already, or the weights do not fit the domains.
        """
        if step < self.step or ramp < 0:
            raise InputError(
                f"cannot schedule weights for batch {step} with ramp {ramp}: batch {self.step} is the next to be"
                " planned."
            )
        stage = Stage(int(step), int(ramp), self._as_weights(weights), samples)
        self._stages = _with_stage(self._stages, stage)
        return stage

    def _as_weights(self, weights: Weights) -> Vector:
        if isinstance(weights, Mapping):
            if set(weights) != set(self.names):
                unknown, missing = sorted(set(weights) - set(self.names)), sorted(set(self.names) - set(weights))
                raise InputError(
                    f"weights must name every domain once: unknown {unknown}, missing {missing}; the domains are"
                    f" {_names(self.names)}. Give 0 to a domain that is not to be drawn."
                )
            weights = [weights[name] for name in self.names]
        vector = np.array(weights, np.float64)
        if vector.shape != (len(self.names),):
            raise InputError(f"weights have shape {vector.shape}, expected one per domain: ({len(self.names)},).")
        if not np.isfinite(vector).all() or (vector < 0).any() or not vector.any():
            bad = {name: value for name, value in zip(self.names, vector.tolist()) if not 0 <= value < math.inf}
            raise InputError(f"weights must be finite, >= 0 and not all 0; got {bad or 'only zeros'}.")
        empty = [name for i, name in enumerate(self.names) if vector[i] > 0 and not self.num_samples[i]]
        if empty:
            raise InputError(f"domains without a single sample cannot have a weight: {_names(empty)}. Give them 0.")
        return _normalised(vector)

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> Ids:
        """Samples (D,) taken from each domain's order so far, over all its epochs."""
        return self._positions.copy()

    @property
    def drawn(self) -> Ids:
        """Samples (D,) drawn in this run."""
        return self._drawn.copy()

    @property
    def mean_tokens(self) -> Vector | None:
        """Tokens (D,) of a mean sample where samples differ in length, else None."""
        return self._means

    @property
    def sample_limits(self) -> Ids | None:
        """Samples (D,) that may be taken from each domain, or None where nothing limits them."""
        return self._limits

    @property
    def credit(self) -> Vector:
        """What is owed (D,): the target up to here minus what was drawn, in samples, or tokens if lengths differ."""
        return self._credit.copy()

    def state_dict(self, at: Snapshot | None = None) -> dict[str, Any]:
        """Return all that a restart needs, as JSON-like builtins; the size does not grow with the run.

        ``at`` is an earlier ``snapshot`` to describe instead of the present.
        """
        now = at or self.snapshot()
        domains = {}
        for i, name in enumerate(self.names):
            domains[name] = {
                "position": int(now.positions[i]),
                "credit": float(now.credit[i]),
                "weight": float(now.weights[i]),
                "samples": int(self.num_samples[i]),
                "fingerprint": self.fingerprints[name][:_FINGERPRINT],
            }
            if now.drawn[i] != now.positions[i]:  # of a domain that was grown
                domains[name]["drawn"] = int(now.drawn[i])
            if self._means is not None:
                domains[name]["tokens"] = int(now.tokens[i])
            epoch, events = self.grown.get(name, (0, []))
            if events and int(now.positions[i]) // int(self.num_samples[i]) == epoch:
                domains[name]["grown"] = [list(event) for event in events]
        stages = [{**s._asdict(), "weights": s.weights.tolist()} for s in now.stages]
        for stage in stages:
            if stage["tokens"] is None:
                del stage["tokens"]
        return {
            "version": VERSION,
            "seed": self.seed,
            "window": WINDOW_SAMPLES,
            "step": now.step,
            "batch_size": self.batch_size,
            "scheduled": stages,
            "domains": domains,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, remap: bool = False) -> None:
        """Continue where ``state`` was taken; the weights of the state hold, whatever this mixer was made with.

        Args:
            state: from ``state_dict``, also through JSON.
            remap: allow domains to be added (unread), dropped, or to have grown by new shards; what was consumed of the
                others is kept, and this mixer's weights hold.
        Raises: InputError: naming both sides, if seed, order, domains, sizes or fingerprints differ.
        """
        saved = self._checked(state, remap)
        known = [name in saved for name in self.names]

        def column(field: str, default: Any, dtype: type) -> NDArray[Any]:
            return np.array([saved[n][field] if k else default for n, k in zip(self.names, known)], dtype)

        positions = column("position", 0, np.int64)
        drawn = np.array([saved[n].get("drawn", saved[n]["position"]) if n in saved else 0 for n in self.names])
        credit, tokens = column("credit", 0.0, np.float64), np.zeros(len(self.names), np.int64)
        if self._means is not None:
            tokens = column("tokens", 0, np.int64)
        if not remap:
            weights = column("weight", 0.0, np.float64)
            stages = [Stage(**{**s, "weights": np.array(s["weights"], np.float64)}) for s in state["scheduled"]]
            scale = state["batch_size"] / self.batch_size
            self._weights, self._stages = (
                weights,
                [_moved(s, state["step"], int(drawn.sum()), scale, self.batch_size) for s in stages],
            )
        self.grown = {}
        for i, name in enumerate(self.names):
            if name in saved:
                positions[i] = self._grow(i, name, saved[name])
        self.step = int(state["step"])
        self._positions, self._drawn, self._tokens, self._credit = positions, drawn, tokens, credit

    def _grow(self, i: int, name: str, saved: Mapping[str, Any]) -> int:
        """Return a domain's position in its present size, and note how it grew within the epoch it is in."""
        before, now = int(saved["samples"]), int(self.num_samples[i])
        epoch, offset = divmod(int(saved["position"]), before) if before else (0, 0)
        events = [(int(at), int(samples)) for at, samples in saved.get("grown", [])]
        if now != before and offset:
            events.append((offset, before))
        if events:
            self.grown[name] = (epoch, events)
        return epoch * now + offset

    def _checked(self, state: Mapping[str, Any], remap: bool) -> Mapping[str, Any]:
        """Return the saved domains, or refuse a state that was made for something else."""
        if not isinstance(state, Mapping):
            raise InputError(f"a mixer state is a dict, as state_dict() returns it; got {state!r:.80}.")
        if state.get("version") != VERSION or not _STATE.issubset(state):
            raise InputError(
                f"this is not a mixer state of version {VERSION}: it has version {state.get('version')!r} and keys"
                f" {sorted(state)[:8]}. Load it with the version of domain-mixer that saved it."
            )
        saved = state["domains"]
        differences = []
        for what, there, here in (("seed", state["seed"], self.seed), ("window", state["window"], WINDOW_SAMPLES)):
            if there != here:
                differences.append(f"the state has {what} {there}, this run {here}")
        if set(saved) != set(self.names) and not (remap and set(saved) & set(self.names)):
            differences.append(f"the state has the domains {_names(sorted(saved))}, these shards {_names(self.names)}")
        if any("tokens" in one for one in saved.values()) != (self._means is not None):
            counted = ("samples", "tokens") if self._means is not None else ("tokens", "samples")
            differences.append(f"the state counts credit in {counted[0]}, this run in {counted[1]}")
        for i, name in enumerate(self.names):
            if name in saved:
                differences += self._differences(i, name, saved[name], remap)
        if differences:
            raise InputError(
                f"this state was saved for other data: {'; '.join(differences[:6])}. Use the shards and seed it was"
                " saved with, or remap=True to add, drop or grow domains."
            )
        return saved

    def _differences(self, i: int, name: str, saved: Mapping[str, Any], remap: bool) -> list[str]:
        found = []
        if saved["samples"] != self.num_samples[i] and not (remap and saved["samples"] < self.num_samples[i]):
            found.append(f"domain {name!r} had {saved['samples']:,} samples, has {self.num_samples[i]:,}")
        there = saved["fingerprint"]
        here = self.fingerprints[name][: len(there) or _FINGERPRINT]
        if there and here and there != here and not remap:
            found.append(f"domain {name!r} had fingerprint {there}, has {here}")
        return found


def _in_force(now: Snapshot) -> tuple[Vector, Vector, list[Stage]]:
    """Return the weights of the next batch, and base and stages without those that lie behind it."""
    base, stages = now.weights, now.stages
    if not stages:
        return base, base, stages
    begun = [stage.reached(now) >= 0 for stage in stages]
    for stage, has in zip(stages, begun):
        base = stage.weights if has else base
    stages = [stage for stage, has in zip(stages, begun) if not has]
    if not stages or stages[0].ramp + stages[0].reached(now) <= 0:
        return base, base, stages
    upcoming = stages[0]
    done = (upcoming.ramp + upcoming.reached(now)) / upcoming.ramp
    return _normalised(base + done * (upcoming.weights - base)), base, stages


def _moved(stage: Stage, step: int, drawn: int, scale: float, batch_size: int) -> Stage:
    """Return a stage as it stands when the batch size changes at ``step``: those by samples keep their sample."""
    if stage.samples is None or scale == 1:
        return stage
    begins = step + max(-(-(stage.samples - drawn) // batch_size), 0)
    return stage._replace(step=begins, ramp=min(round(stage.ramp * scale), begins - step))


def _with_stage(stages: list[Stage], stage: Stage) -> list[Stage]:
    others = [other for other in stages if (other.step, other.tokens) != (stage.step, stage.tokens)]
    return sorted([*others, stage], key=lambda other: other.step)


def _normalised(weights: Vector) -> Vector:
    """Return weights that sum to 1; math.fsum rounds the same way on every machine."""
    total = math.fsum(weights)
    return weights if abs(total - 1.0) <= 1e-12 else weights / total


def _limits(names: tuple[str, ...], max_epochs: float | Mapping[str, float] | None, on_exhausted: str) -> Vector:
    """Return (D,) epochs, infinite where there is no limit."""
    if on_exhausted not in EXHAUSTION:
        raise InputError(f"on_exhausted must be one of {sorted(EXHAUSTION)}; got {on_exhausted!r}.")
    default = math.inf if on_exhausted == "repeat" else 1.0
    if isinstance(max_epochs, Mapping):
        unknown = sorted(set(max_epochs) - set(names))
        if unknown:
            raise InputError(f"max_epochs names unknown domains {unknown}; the domains are {_names(names)}.")
        limits = np.array([max_epochs.get(name, default) for name in names], np.float64)
    else:
        limits = np.full(len(names), default if max_epochs is None else max_epochs, np.float64)
    if not (limits > 0).all():
        raise InputError(f"max_epochs must be > 0; got {max_epochs}. Leave a domain out by giving it weight 0.")
    return limits


def _sample_limits(max_epochs: Vector, num_samples: Ids) -> Ids | None:
    if np.isinf(max_epochs).all():
        return None
    # 1e-9 of an epoch: 0.1 · 30 is meant to be 3 samples, not 2.
    allowed = np.floor(np.minimum(max_epochs * num_samples + 1e-9 * num_samples, float(_FOREVER)))
    return allowed.astype(np.int64)


def _names(names: Sequence[str], limit: int = 12) -> str:
    return str(list(names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
