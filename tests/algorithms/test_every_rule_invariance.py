"""What should make no difference to the weights makes none, for every row of the catalogue, in Composer.

Splits over ranks: ``test_domain_reweighting_ranks.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.rules import UPDATE_RULES
from tests.algorithms.every_rule import Run, assert_equal_runs, fitting_rules, weights_of_every_rule
from tests.algorithms.test_rules_shared import ORDERED
from tests.algorithms.tiny import DOMAINS, Loader


@pytest.fixture(scope="module")
def whole() -> Run:
    return weights_of_every_rule()


def test_every_row_takes_part(whole: Run) -> None:
    assert set(UPDATE_RULES) - {"preset"} <= set(fitting_rules(DOMAINS)) == set(whole[0])
    moved = [name for name in whole[0] if any(np.ptp(step[name]) > 1e-9 for step in whole)]
    assert len(moved) > 30, "most of them move, or nothing is tested"


@pytest.mark.parametrize("micro", [5, 1])
def test_micro_batches(micro: int, whole: Run) -> None:
    assert_equal_runs(weights_of_every_rule(micro=micro), whole)


class Reordered(Loader):
    """The same samples, with the domains numbered in another order."""

    names = ("web", "books", "code")

    def __iter__(self) -> Any:
        places = torch.tensor([self.names.index(name) for name in DOMAINS])
        return ({**part, "domain_ids": places[part["domain_ids"]]} for part in super().__iter__())

    @property
    def domains(self) -> tuple[str, ...]:
        return self.names

    @property
    def weights(self) -> dict[str, float]:
        return {name: super(Reordered, self).weights[name] for name in self.names}


def test_order_of_domains(whole: Run) -> None:
    run = weights_of_every_rule(loader=Reordered(), names=Reordered.names)
    places = [Reordered.names.index(name) for name in DOMAINS]
    straight = [{name: step[name] for name in step if name not in ORDERED} for step in whole]
    back = [{name: step[name][places] for name in step if name not in ORDERED} for step in run]
    rounded = {"doremi:official"}  # adds float32 numbers, in the order of the domains
    strict = [{name: step[name] for name in step if name not in rounded} for step in back]
    assert_equal_runs(strict, straight)
    for one, other in zip(back, straight):
        np.testing.assert_allclose(one["doremi:official"], other["doremi:official"], atol=1e-6)


def test_resuming_at_every_step(whole: Run, tmp_path: Path) -> None:
    weights_of_every_rule(save_folder=str(tmp_path), save_interval="1ba")
    for step in (1, 2, 3):
        rest = weights_of_every_rule(load_path=str(tmp_path / f"ep0-ba{step}-rank0.pt"))
        assert_equal_runs(rest, whole[step:], exact=0.0, in_float32=0.0)
