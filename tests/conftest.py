"""Two facts of the machines that tests run on: where sample data may lie, and a torchvision that cannot load."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    _let_streaming_import()


def _let_streaming_import() -> None:
    """Make ``import streaming`` work beside a CPU build of torch.

    mosaicml-streaming imports torchvision for its vision datasets. PyPI's torchvision is a CUDA build whose operators
    are missing on a CPU torch, and then its registration of shape functions fails. Tests compare with
    mosaicml-streaming, so they stand in for that one module; the product itself does not need it for local shards.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of sample corpora: $DOMAIN_MIXER_DATA, else ../shared/data beside the repository; skips without."""
    folder = Path(os.environ.get("DOMAIN_MIXER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set DOMAIN_MIXER_DATA to run this test")
    return folder
