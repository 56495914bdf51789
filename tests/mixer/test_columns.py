"""Other columns come with the tokens they belong to, decoded; document boundaries in the forms that attention wants."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mixer import InputError, MixtureLoader, mds
from mixer.boundaries import cu_seqlens, position_ids
from tests.helpers import assert_same, row_of, write_domain

COLUMNS = {
    "tokens": "ndarray:uint16:16",
    "doc_starts": "ndarray:uint16",
    "loss": "ndarray:float16:3",
    "n": "uint32",
    "text": "str",
    "score": "float64",
    "blob": "pkl",
}


def sample(domain, i):
    return {
        "tokens": row_of(domain, i, 16),
        "doc_starts": np.arange(0, 16, i % 5 + 3, dtype=np.uint16),
        "loss": np.full(3, i, np.float16),
        "n": i,
        "text": f"{domain} {i}",
        "score": i / 7,
        "blob": pickle.dumps(i),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for domain, count in (("code", 70), ("web", 130)):
        write_domain(folder / domain / "train", [sample(domain, i) for i in range(count)], columns=COLUMNS)
    return folder


def test_columns_belong_to_the_samples_that_the_ids_name(shards):
    names = ["text", "n", "loss", "score", "doc_starts"]
    loader = MixtureLoader(shards, mixture="uniform", global_batch_size=8, columns=names)
    for _, batch in zip(range(20), loader):
        assert batch["n"].dtype == torch.int64 and batch["loss"].dtype == torch.float16
        assert batch["loss"].shape == (8, 3) and isinstance(batch["text"], list)
        for i, (domain, index) in enumerate(zip(batch["domain_ids"], batch["sample_ids"].tolist())):
            expected = sample(loader.domains[domain], index)
            assert batch["text"][i] == expected["text"] and batch["n"][i] == index and batch["score"][i] == index / 7
            np.testing.assert_array_equal(batch["input_ids"][i].numpy(), expected["tokens"])
            np.testing.assert_array_equal(batch["loss"][i].numpy(), expected["loss"])
            np.testing.assert_array_equal(batch["doc_starts"][i], expected["doc_starts"])


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["title"], r"'code' has no columns \['title'\]"),
        (["blob"], "as pickle"),
        ("text", r"names of columns in a list; got 'text'\. Write \['text'\]"),
    ],
)
def test_unknown_and_unsafe_columns_are_refused(shards, columns, text):
    with pytest.raises(InputError, match=text):
        MixtureLoader(shards, global_batch_size=8, columns=columns)


def test_position_ids_count_from_each_document(shards):
    loader = MixtureLoader(shards, global_batch_size=8, columns=["doc_starts"], transform=position_ids)
    batch = next(iter(loader))
    assert batch["position_ids"].shape == (8, 16) and "doc_starts" not in batch
    for row, index in zip(batch["position_ids"].tolist(), batch["sample_ids"].tolist()):
        assert row == [place % (index % 5 + 3) for place in range(16)]


def test_cu_seqlens_cut_the_flat_batch_where_documents_begin(shards):
    loader = MixtureLoader(shards, global_batch_size=4, columns=["doc_starts"], transform=cu_seqlens)
    batch = next(iter(loader))
    edges = [16 * i + start for i, s in enumerate(batch["sample_ids"].tolist()) for start in range(0, 16, s % 5 + 3)]
    assert batch["cu_seqlens"].tolist() == [*edges, 64] and batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == max(np.diff([*edges, 64]))


@pytest.mark.parametrize(("form", "name"), [(position_ids, "position_ids"), (cu_seqlens, "cu_seqlens")])
def test_boundaries_are_those_of_each_ranks_own_rows_with_and_without_workers(shards, form, name):
    def of(rank, world, **options):
        loader = MixtureLoader(
            shards, global_batch_size=8, columns=["doc_starts"], transform=form, rank=rank, world_size=world, **options
        )
        return [batch for _, batch in zip(range(6), loader)]

    for rank in range(2):
        plain = of(rank, 2)
        assert_same(of(rank, 2, num_workers=2), plain)
        for batch in plain:
            starts = [range(0, 16, index % 5 + 3) for index in batch["sample_ids"].tolist()]
            edges = [16 * row + start for row, of_row in enumerate(starts) for start in of_row]
            if name == "cu_seqlens":
                assert batch[name].tolist() == [*edges, 64]
            else:
                assert (batch[name].flatten() == 0).nonzero().flatten().tolist() == edges
    if name == "position_ids":
        for whole, *parts in zip(of(0, 1), of(0, 2), of(1, 2)):
            for rank, part in enumerate(parts):
                assert_same(part, {key: value[rank::2] for key, value in whole.items()})


def test_padding_is_a_document_of_its_own():
    batch = {
        "input_ids": torch.zeros(2, 6),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        "doc_starts": [np.array([0, 3]), np.array([0])],
    }
    assert position_ids(batch)["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert cu_seqlens(batch)["cu_seqlens"].tolist() == [0, 3, 4, 6, 12]


def test_boundaries_need_their_column():
    with pytest.raises(InputError, match=r"columns=\['doc_starts'\]"):
        position_ids({"input_ids": torch.zeros(1, 4)})


@pytest.mark.parametrize(
    "encoding",
    ["str", "bytes", "int", "json", "str_int", "str_float", "float32", "ndarray", "ndarray:int32", "ndarray:uint8:2,3"],
)
def test_decoding_is_the_inverse_of_encoding(encoding):
    array = np.arange(6, dtype={"ndarray:int32": np.int32}.get(encoding, np.uint8)).reshape(2, 3)
    value = {"str": "é", "bytes": b"x", "json": {"a": [1]}, "float32": 0.5, "str_float": 0.1}.get(encoding, 7)
    value = array if encoding.startswith("ndarray") else value
    raw = mds.encode_shard({"a": encoding, "b": "str"}, [{"a": value, "b": "other"}] * 2)
    got, other = mds.sample_values(memoryview(raw), 1, {"a": encoding, "b": "str"}, ["a", "b"])
    np.testing.assert_array_equal(got, value)
    assert other == "other"
