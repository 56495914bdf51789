"""What is written depends on neither processes, engine, unit size, backend nor kills: one hash over the tree."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converters import convert, engines
from mixer.errors import DataError
from tests.converters.corpora import tree_hash, write_corpus
from tests.converters.ray_cluster import ray_cluster

PACKINGS: dict[str, dict] = {
    "concat": {"packing": "concat", "tail": "pad", "doc_starts": True},
    "best_fit": {"packing": "best_fit", "sample_ids": True},
    "none": {"packing": "none", "shuffle_seed": 3},
}
# Every pair of values of (processes, unit size, backend, packing) is in one of these. The last number says after how
# many tasks it is stopped once, and goes on (0: never).
COVERING = [
    (1, 1500, "gigatoken", "concat", 3),
    (2, 1500, "hf", "best_fit", 9),
    (8, 1500, "gigatoken", "none", 0),
    (2, None, "gigatoken", "concat", 3),
    (1, None, "gigatoken", "best_fit", 9),
    (8, None, "hf", "concat", 0),
    (1, None, "hf", "none", 3),
    (2, None, "gigatoken", "none", 9),
    (8, 1500, "gigatoken", "best_fit", 0),
]


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Stop a conversion when so many tasks, of tokenising and packing together, are done."""
    run, done = engines.local, itertools.count(1)

    def stopping(*arguments: Any) -> Iterator[Any]:
        for result in run(*arguments):
            yield result
            if next(done) == after:
                raise DataError("stopped here")

    engines.ENGINES["local"] = stopping
    try:
        yield
    finally:
        engines.ENGINES["local"] = run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that converts one corpus, and the hashes by one process with tokenizers in units of 4 kB."""
    folder = tmp_path_factory.mktemp("determinism")
    write_corpus(folder / "corpus")
    first = convert([folder / "corpus"], folder / "first", train_tokenizer=400, seq_len=32)
    tokenizer = folder / "first" / str(first.tokenizer.file)
    count = itertools.count()

    def hash_of(by: Callable[..., Any] = convert, stop_after: int = 0, **options: object) -> str:
        out = folder / f"out{next(count)}"
        given = {"tokenizer": tokenizer, "seq_len": 32, "shard_size": 4000, **options}
        if stop_after:
            with interrupted(stop_after), pytest.raises(DataError, match="stopped here"):
                by(folder / "corpus", out, **given)
        by(folder / "corpus", out, **given)
        return tree_hash(out)

    return hash_of, {name: hash_of(unit_size=4000, **options) for name, options in PACKINGS.items()}


@pytest.mark.parametrize("workers, unit_size, backend, packing, stop_after", COVERING)
def test_one_hash_for_all_ways_to_get_there(made, workers, unit_size, backend, packing, stop_after):
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    hash_of, expected = made
    given = {"workers": workers, "unit_size": unit_size, "backend": backend, **PACKINGS[packing]}
    found = hash_of(stop_after=stop_after, **given)
    assert found == expected[packing]


@pytest.fixture(scope="module")
def by_ray() -> Iterator[Callable[..., None]]:
    with ray_cluster() as convert_by_ray:
        yield convert_by_ray


# Each processes, unit size and backend with the Ray engine.
BY_RAY = [(1, 1500, "hf", "concat"), (2, None, "gigatoken", "best_fit")]


@pytest.mark.parametrize("workers, unit_size, backend, packing", BY_RAY)
def test_ray_gives_the_hash_of_the_local_engine(made, by_ray, workers, unit_size, backend, packing):
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    hash_of, expected = made
    given = {"workers": workers, "unit_size": unit_size, "backend": backend, **PACKINGS[packing]}
    assert hash_of(by_ray, **given) == expected[packing]


WAYS = [("local", 0), ("local", 3), ("local", 9), ("ray", 0)]  # engine, and after how many tasks it is stopped once
WHOLE = list(itertools.product((1, 2, 8), WAYS, (1500, 4000, None), ("hf", "gigatoken"), PACKINGS))


@pytest.mark.skipif(not os.environ.get("DOMAIN_MIXER_NIGHTLY"), reason="takes ten minutes; set DOMAIN_MIXER_NIGHTLY=1")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers, way, unit_size, backend, packing", WHOLE)
def test_every_way_to_get_there(made, request, workers, way, unit_size, backend, packing):
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    hash_of, expected = made
    by = request.getfixturevalue("by_ray") if way[0] == "ray" else convert
    given = {"workers": workers, "unit_size": unit_size, "backend": backend, **PACKINGS[packing]}
    assert hash_of(by, stop_after=way[1], **given) == expected[packing]


def test_packings_differ(made):
    assert len(set(made[1].values())) == len(PACKINGS)


def test_another_machine_writes_the_same_bytes(tmp_path: Path) -> None:
    """Neither where the inputs lie nor when they were written counts; the literal comes from another machine."""
    here, there = tmp_path / "corpus", tmp_path / "mounted" / "deep" / "corpus"
    shutil.copytree(write_corpus(here), there)
    for path in there.rglob("*"):
        os.utime(path, (1, 1))
    given = {"tokenizer": "bytes", "seq_len": 64, "compression": None, "doc_starts": True, "sample_ids": True}
    for corpus, name in ((here, "first"), (there, "second")):
        convert(corpus, tmp_path / name, **given)
    assert tree_hash(tmp_path / "first") == tree_hash(tmp_path / "second")
    (tmp_path / "first" / "manifest.json").unlink()  # names the version of the converter
    assert tree_hash(tmp_path / "first") == "9628dcc512959bcecd4394a8ad983ef2a17d266c6c24afc254a1deb8cb1c31e0"
