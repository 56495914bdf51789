"""Servers for the tests of remote inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.converters.servers import Wire
from tests.s3 import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Any, int]]:
    """An S3 server: a client and the port."""
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with s3_server() as server:
        yield server


@pytest.fixture
def wire(s3: tuple[Any, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The wire to that server, which conversions go through."""
    wire = Wire(s3[1])
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    yield wire
    wire.close()
