"""An S3 server on loopback, by moto."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def s3_server(bucket: str = "corpus") -> Iterator[tuple[Any, int]]:
    """Run an S3 server with one empty bucket; yield a client and the port. Raises ImportError without moto."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket=bucket)
    try:
        yield client, port
    finally:
        server.stop()


def upload(
    client: Any,
    folder: Path,
    prefix: str,
    bucket: str = "corpus",
    chosen: Callable[[Path], bool] = lambda path: True,
) -> str:
    """Copy the chosen files of a folder to the server; return its URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and chosen(path):
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{bucket}/{prefix}"
