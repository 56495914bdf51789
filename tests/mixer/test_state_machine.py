"""Anything in any order: weights, restarts on other ranks and batch sizes, ramps, caps, against a ten-line model.

Once for samples of one length, which weights count, and once for samples of different lengths, whose tokens they count.
"""

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
from tests.helpers import write_domain, write_shards

SIZES = {"book": 7, "code": 150, "web": 400}
WEIGHTS = st.tuples(*[st.sampled_from([1e-9, 0.01, 0.3, 1.0, 3.0])] * 3)
LONGEST = 200


def length_of(domain, sample):
    return 1 + (sample * 7919 + domain) % (5, 40, LONGEST)[domain]


@functools.cache
def shards(vary):
    folder = write_shards(Path(tempfile.mkdtemp()), SIZES)
    if vary:
        for d, (name, size) in enumerate(SIZES.items()):
            rows = [{"tokens": np.zeros(length_of(d, i), np.uint16)} for i in range(size)]
            write_domain(folder / name / "train", rows, columns={"tokens": "ndarray:uint16"}, samples_per_shard=64)
        (folder / "manifest.json").unlink()
    return folder


class Model:
    """Each domain gives its order from start to end, as much as the weights ask, never past its cap."""

    def __init__(self, caps, measure):
        self.orders = [Order(3, name, [64] * (size // 64) + [size % 64]) for name, size in SIZES.items()]
        self.taken, self.amount, self.target = [0, 0, 0], np.zeros(3), np.zeros(3)
        self.caps, self.measure = caps, measure

    def check(self, domain_ids, sample_ids, weights):
        before = self.amount.sum()
        for domain, order in enumerate(self.orders):
            got = sorted(sample_ids[domain_ids == domain].tolist())
            assert got == sorted(order.take(self.taken[domain], len(got)).tolist())
            self.taken[domain] += len(got)
            self.amount[domain] += sum(self.measure(domain, sample) for sample in got)
            assert self.taken[domain] <= self.caps[domain]
        self.target += (self.amount.sum() - before) * weights


class Loader(RuleBasedStateMachine):
    vary = False

    @initialize(
        epochs=st.sampled_from([None, 1.0, 2.5]), batch=st.sampled_from([12, 24]), read_ahead=st.sampled_from([0, 0, 3])
    )
    def begin(self, epochs, batch, read_ahead):
        self.options = {"max_epochs": epochs, "on_exhausted": "repeat" if epochs is None else "drop", "seed": 3}
        self.options["read_ahead"] = read_ahead
        caps = [10**9 if epochs is None else int(epochs * size + 1e-9) for size in SIZES.values()]
        self.model = Model(caps, length_of if self.vary else lambda domain, sample: 1)
        self.batch, self.ended = batch, False
        self.start(1, None)

    def start(self, world, state):
        options = {**self.options, "mixture": "uniform", "global_batch_size": self.batch, "world_size": world}
        self.ranks = [MixtureLoader(shards(self.vary), rank=rank, **options) for rank in range(world)]
        for rank in self.ranks if state else []:
            rank.load_state_dict(json.loads(json.dumps(state)))

    @rule(weights=WEIGHTS)
    def set_weights(self, weights):
        for rank in self.ranks:
            rank.set_weights(weights)

    @rule(weights=WEIGHTS, steps=st.integers(5, 9), ramp=st.integers(0, 2))
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
    def amounts_follow_the_weights(self):
        if hasattr(self, "model") and max(self.model.caps) >= 10**9:
            longest = LONGEST if self.vary else 1
            assert np.abs(self.model.target - self.model.amount).max() <= 1.5 * longest


class LoaderOfLengths(Loader):
    vary = True


TestLoader, TestLoaderOfLengths = Loader.TestCase, LoaderOfLengths.TestCase
for _case, _examples in ((TestLoader, 60), (TestLoaderOfLengths, 30)):
    _case.settings = settings(
        max_examples=_examples, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
