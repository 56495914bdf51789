"""JSON of another kind, as a person may write it, is one sentence and no traceback."""

from __future__ import annotations

import json

import pytest

from mixer import InputError, Mixture
from mixer.curriculum import load_curriculum
from mixer.manifest import Manifest


@pytest.mark.parametrize("text", ["[]", '"shards"', "3", "null"])
def test_manifest_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest.json holds a JSON \w+, not the object that a manifest is"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("provenance", ["by hand", ["me"], 3, None])
def test_provenance_that_is_no_object_is_refused(tmp_path, provenance):
    (tmp_path / "m.json").write_text(json.dumps({"weights": {"a": 1}, "provenance": provenance}))
    with pytest.raises(InputError, match=r"its provenance is .*, expected an object"):
        Mixture.load(tmp_path / "m.json")


def test_mixture_without_provenance_is_read(tmp_path):
    (tmp_path / "m.json").write_text('{"weights": {"a": 1, "b": 3}}')
    assert Mixture.load(tmp_path / "m.json").weights == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("content", [{"weights": {"a": 1}}, {"stages": [{"from_step": 0, "weights": {"a": 1}}]}])
def test_mixture_file_of_another_version_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(json.dumps({"schema": 2, **content}))
    with pytest.raises(InputError, match=r"m.json has schema 2, this version of domain-mixer reads 1\."):
        load_curriculum(tmp_path / "m.json")
