"""Mixture files with stages: by step or tokens, with ramps, chained, exact through restarts and other batch sizes."""

from __future__ import annotations

import json

import pytest

from mixer import InputError, Mixture, MixtureLoader
from tests.helpers import assert_resumes, write_shards

A, B = {"code": 1.0, "web": 0.0}, {"code": 0.0, "web": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), {"code": 100, "web": 100})  # samples of 16 tokens


def staged(tmp_path, *stages):
    path = tmp_path / "staged.json"
    path.write_text(json.dumps({"schema": 1, "stages": stages}))
    return path


def web_counts(shards, mixture, count, **options):
    loader = MixtureLoader(shards, mixture=mixture, **{"global_batch_size": 8, **options})
    return [int(batch["domain_ids"].sum()) for _, batch in zip(range(count), loader)]


def test_stages_begin_at_their_batch(shards, tmp_path):
    path = staged(tmp_path, {"from_step": 0, "weights": A}, {"from_step": 3, "weights": B})
    assert web_counts(shards, path, 5) == [0, 0, 0, 8, 8]


def test_stages_begin_after_their_tokens_whatever_the_batch_size(shards, tmp_path):
    path = staged(tmp_path, {"from_tokens": 0, "weights": A}, {"from_tokens": 16 * 24, "weights": B})
    assert web_counts(shards, path, 5) == [0, 0, 0, 8, 8]
    assert web_counts(shards, path, 8, global_batch_size=4) == [0] * 6 + [4] * 2
    assert web_counts(shards, path, 4, global_batch_size=16) == [0, 0, 16, 16]


def test_ramp_moves_there_in_a_straight_line(shards, tmp_path):
    stages = {"from_tokens": 0, "weights": A}, {"from_tokens": 16 * 48, "ramp_tokens": 16 * 32, "weights": B}
    assert web_counts(shards, staged(tmp_path, *stages), 8) == [0, 0, 0, 2, 4, 6, 8, 8]


def test_files_are_chained(shards, tmp_path):
    Mixture(A).save(tmp_path / "a.json")
    Mixture(B, {"rule": "found"}).save(tmp_path / "b.json")
    path = staged(tmp_path, {"from_step": 2, "mixture": "b.json"}, {"from_step": 0, "mixture": "a.json"})
    assert web_counts(shards, path, 4) == [0, 0, 8, 8]


def test_stages_resume_at_every_step(shards, tmp_path):
    path = staged(tmp_path, {"from_step": 0, "weights": A}, {"from_step": 6, "ramp_steps": 4, "weights": B})
    make = lambda: MixtureLoader(shards, mixture=path, global_batch_size=8)  # noqa: E731
    assert_resumes(make, 9, lambda loader: next(iter(loader)))
    # The state wins over the file, as it does over every mixture.
    plain = lambda: MixtureLoader(shards, mixture=A, global_batch_size=8)  # noqa: E731
    assert_resumes(make, 9, lambda loader: next(iter(loader)), remake=plain)


def test_stage_by_tokens_keeps_its_place_when_the_batch_size_changes_on_resume(shards, tmp_path):
    path = staged(tmp_path, {"from_tokens": 0, "weights": A}, {"from_tokens": 16 * 48, "weights": B})
    loader = MixtureLoader(shards, mixture=path, global_batch_size=8)
    for _, _ in zip(range(2), loader):
        pass
    other = MixtureLoader(shards, mixture="uniform", global_batch_size=4)
    other.load_state_dict(loader.state_dict())
    assert [int(batch["domain_ids"].sum()) for _, batch in zip(range(10), other)] == [0] * 8 + [4] * 2


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([], "has no stages"),
        ([{"from_step": 1, "weights": A}], r"begin at \[1\]; the first must begin at 0"),
        ([{"from_step": 0, "weights": A}, {"from_step": 0, "weights": B}], "no two together"),
        (
            [{"from_step": 0, "weights": A}, {"from_tokens": 5, "weights": B}, {"from_step": 9, "weights": A}],
            "one unit",
        ),
        ([{"from_step": 0, "weights": A}, {"from_step": 5, "ramp_steps": 6, "weights": B}], "begins before 0"),
        ([{"weights": A}], "stage 0 needs one of from_step and from_tokens"),
        ([{"from_step": 0}], "one of weights and mixture"),
        ([{"from_step": 0, "ramp_tokens": 1, "weights": A}], "takes ramp_steps, not ramp_tokens"),
        ([{"from_step": 0, "weight": A}], "keys among"),
        ([{"from_step": "soon", "weights": A}], "'soon' is not a start"),
        ([{"from_step": 0, "weights": {"code": 1}}], r"says nothing of the domains \['web'\]"),
        ([{"from_step": 0, "mixture": "nowhere.json"}], "cannot read the mixture"),
    ],
)
def test_unclear_stages_are_refused(shards, tmp_path, stages, text):
    with pytest.raises(InputError, match=text):
        MixtureLoader(shards, mixture=staged(tmp_path, *stages), global_batch_size=8)
