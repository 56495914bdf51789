"""Tables of large indexes are kept from one start to the next, and are only ever a copy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mixer import index
from tests.helpers import assert_same, write_domain


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "_WORTH_KEEPING", 0)
    rows = np.arange(40 * 8, dtype=np.uint16).reshape(40, 8)
    write_domain(tmp_path / "web", rows, samples_per_shard=7, compression="zstd")
    return tmp_path / "web"


def kept(tmp_path):
    return next((tmp_path / "cache").rglob("*.tables"))


def test_kept_tables_are_those_of_the_index_and_spare_its_parse(folder, tmp_path, monkeypatch):
    parsed = index.read_index(folder, "web")
    monkeypatch.setattr(index, "_tables", lambda data: pytest.fail("parsed again"))
    assert_same(dataclasses.asdict(index.read_index(folder, "web")), dataclasses.asdict(parsed))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "other"])
def test_damaged_tables_are_made_again(folder, tmp_path, damage):
    parsed = index.read_index(folder, "web")
    data = kept(tmp_path).read_bytes()
    spoilt = {"flipped": data[:-3] + bytes([data[-3] ^ 4]) + data[-2:], "truncated": data[:600], "empty": b""}
    kept(tmp_path).write_bytes(spoilt.get(damage, b"{}".ljust(2000)))
    assert_same(dataclasses.asdict(index.read_index(folder, "web")), dataclasses.asdict(parsed))
    assert kept(tmp_path).read_bytes() == data


def test_changed_index_is_read_and_not_its_old_tables(folder):
    before = index.read_index(folder, "web")
    write_domain(folder, np.ones((14, 8), np.uint16), samples_per_shard=7, compression="zstd")
    after = index.read_index(folder, "web")
    assert (len(before.samples), len(after.samples)) == (6, 2) and before.fingerprint != after.fingerprint
