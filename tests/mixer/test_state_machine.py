"""Anything in any order: weights, restarts on other ranks and batch sizes, ramps, caps, against a ten-line model."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mixer import MixtureLoader
from mixer.order import Order
from tests.helpers import write_shards

SIZES = {"book": 7, "code": 150, "web": 400}
WEIGHTS = st.tuples(*[st.sampled_from([1e-9, 0.01, 0.3, 1.0, 3.0])] * 3)


@functools.cache
def shards():
    return write_shards(Path(tempfile.mkdtemp()), SIZES)


class Model:
    """Each domain gives its order from start to end, as much as the weights ask, never past its cap."""

    def __init__(self, caps):
        self.orders = [Order(3, name, [64] * (size // 64) + [size % 64]) for name, size in SIZES.items()]
        self.taken, self.target, self.caps = [0, 0, 0], np.zeros(3), caps

    def check(self, domain_ids, sample_ids, weights):
        alive = np.array([taken < cap for taken, cap in zip(self.taken, self.caps)])
        self.target += len(domain_ids) * weights * alive / (weights * alive).sum()
        for domain, order in enumerate(self.orders):
            got = sorted(sample_ids[domain_ids == domain].tolist())
            assert got == sorted(order.take(self.taken[domain], len(got)).tolist())
            self.taken[domain] += len(got)
            assert self.taken[domain] <= self.caps[domain]
            if self.taken[domain] == self.caps[domain]:
                self.target[domain] = self.caps[domain]


class Loader(RuleBasedStateMachine):
    @initialize(epochs=st.sampled_from([None, 1.0, 2.5]), batch=st.sampled_from([12, 24]))
    def begin(self, epochs, batch):
        self.options = {"max_epochs": epochs, "on_exhausted": "repeat" if epochs is None else "drop", "seed": 3}
        caps = [10**9 if epochs is None else int(epochs * size + 1e-9) for size in SIZES.values()]
        self.model, self.batch, self.ended = Model(caps), batch, False
        self.start(1, None)

    def start(self, world, state):
        options = {**self.options, "mixture": "uniform", "global_batch_size": self.batch, "world_size": world}
        self.ranks = [MixtureLoader(shards(), rank=rank, **options) for rank in range(world)]
        for rank in self.ranks if state else []:
            rank.load_state_dict(json.loads(json.dumps(state)))

    @rule(weights=WEIGHTS)
    def set_weights(self, weights):
        for rank in self.ranks:
            rank.set_weights(weights)

    @rule(weights=WEIGHTS, steps=st.integers(2, 6), ramp=st.integers(0, 2))
    def schedule(self, weights, steps, ramp):
        for rank in self.ranks:
            rank.schedule(rank.step + steps, weights, ramp=ramp)

    @rule(count=st.integers(1, 5))
    def take(self, count):
        for _ in range(count if not self.ended else 0):
            weights = np.array(list(self.ranks[0].weights.values()))
            parts = [next(iter(rank), None) for rank in self.ranks]
            if parts[0] is None:
                assert all(part is None for part in parts)
                self.ended = True
                return
            ids = [
                np.stack([part[name].numpy() for part in parts], axis=1).ravel()
                for name in ("domain_ids", "sample_ids")
            ]
            self.model.check(*ids, weights)

    @rule(world=st.sampled_from([1, 2, 3, 4, 12]), batch=st.sampled_from([12, 24, 36]), rank=st.integers(0, 11))
    def restart(self, world, batch, rank):
        self.batch, self.ended = batch, False
        self.start(world, self.ranks[rank % len(self.ranks)].state_dict())

    @invariant()
    def ranks_agree(self):
        states = [rank.state_dict() for rank in getattr(self, "ranks", [])]
        assert all(state == states[0] for state in states)

    @invariant()
    def counts_follow_the_weights(self):
        if hasattr(self, "model") and max(self.model.caps) >= 10**9:
            assert np.abs(self.model.target - self.model.taken).max() <= 1.5


TestLoader = Loader.TestCase
TestLoader.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
