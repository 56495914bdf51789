"""A Google Storage server on loopback, by gcp-storage-emulator."""

from __future__ import annotations

import functools
import http.server
import io
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["gs_server"]


@contextmanager
def gs_server(bucket: str = "corpus") -> Iterator[Any]:
    """Run a server with one empty bucket, which gcsfs finds by ``STORAGE_EMULATOR_HOST``; yield its storage.

    Raises ImportError without the emulator.
    """
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    storage = Storage(use_memory_fs=True)
    create_bucket(bucket, storage)
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with http.server.HTTPServer(("127.0.0.1", 0), functools.partial(_handler(), storage)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield storage
        finally:
            os.environ.pop("STORAGE_EMULATOR_HOST")
            if before is not None:
                os.environ["STORAGE_EMULATOR_HOST"] = before
            server.shutdown()


def _handler() -> type:
    from gcp_storage_emulator.server import RequestHandler

    class Handler(RequestHandler):
        """Adds ``ifGenerationMatch=0``, which refuses to write over an object."""

        def do_POST(self) -> None:
            if "ifGenerationMatch=0" in self.path:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.rfile = io.BytesIO(body)
                bucket, name = self.path.split("/b/")[1].partition("/")[0], re.search(rb'"name": *"([^"]+)"', body)
                if name and name[1].decode() in self.storage.objects.get(bucket, {}):
                    self.send_error(412, "conditionNotMet")
                    return
            super().do_POST()

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
