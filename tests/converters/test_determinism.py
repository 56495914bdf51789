"""What is written depends on neither processes, unit size nor backend: one hash over the tree for all of them."""

from __future__ import annotations

import pytest

from converters import convert
from tests.converters.corpora import tree_hash, write_corpus

PACKINGS: dict[str, dict] = {
    "concat": {"packing": "concat", "tail": "pad", "doc_starts": True},
    "best_fit": {"packing": "best_fit", "sample_ids": True},
    "none": {"packing": "none", "shuffle_seed": 3},
}
# Every pair of values of (processes, unit size, backend, packing) is in one of these.
COVERING = [
    (1, 1500, "gigatoken", "concat"),
    (2, 1500, "hf", "best_fit"),
    (8, 1500, "gigatoken", "none"),
    (2, None, "gigatoken", "concat"),
    (1, None, "gigatoken", "best_fit"),
    (8, None, "hf", "concat"),
    (1, None, "hf", "none"),
    (2, None, "gigatoken", "none"),
    (8, 1500, "gigatoken", "best_fit"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that converts one corpus, and the hashes by one process with tokenizers in units of 4 kB."""
    folder = tmp_path_factory.mktemp("determinism")
    write_corpus(folder / "corpus")
    first = convert([folder / "corpus"], folder / "first", train_tokenizer=400, seq_len=32)
    tokenizer = folder / "first" / str(first.tokenizer.file)
    count = iter(range(1000))

    def hash_of(**options: object) -> str:
        out = folder / f"out{next(count)}"
        convert([folder / "corpus"], out, tokenizer=tokenizer, seq_len=32, shard_size=4000, **options)
        return tree_hash(out)

    return hash_of, {name: hash_of(unit_size=4000, **options) for name, options in PACKINGS.items()}


@pytest.mark.parametrize("workers, unit_size, backend, packing", COVERING)
def test_one_hash_for_all_ways_to_get_there(made, workers, unit_size, backend, packing):
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    hash_of, expected = made
    found = hash_of(workers=workers, unit_size=unit_size, backend=backend, **PACKINGS[packing])
    assert found == expected[packing]


def test_packings_differ(made):
    assert len(set(made[1].values())) == len(PACKINGS)
