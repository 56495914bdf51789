"""On loopback: the web by ``http.server``, and a wire before any server that misbehaves as asked."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from converters import locks


def objects(client: Any, prefix: str, bucket: str = "corpus") -> dict[str, bytes]:
    """Return what lies below a prefix, by name."""
    found: dict[str, bytes] = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for row in page.get("Contents", []):
            name = row["Key"].removeprefix(f"{prefix}/")
            found[name] = client.get_object(Bucket=bucket, Key=row["Key"])["Body"].read()
    return found


def local_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_files(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def lock_of_another(**changes: object) -> bytes:
    """Return the lock of another process."""
    facts = {**locks._this_process(), "owner": "another", "pid": os.getppid(), "started": locks._started(os.getppid())}
    return orjson.dumps({**facts, **changes})


class Wire:
    """A TCP proxy. ``cut(number)`` says after how many bytes of answers a connection breaks (None: never)."""

    def __init__(self, port: int) -> None:
        self._target, self._number = port, 0
        self.cut: Callable[[int], int | None] = lambda number: None
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._number += 1
            server = socket.create_connection(("127.0.0.1", self._target))
            limit = self.cut(self._number)
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 16):
                if limit is not None and passed + len(data) > limit:
                    sink.sendall(data[: limit - passed])
                    self.cuts += 1
                    break
                passed += len(data)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
                end.close()
            except OSError:
                pass


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own, which knows no byte ranges."""

    def log_message(self, *arguments: object) -> None:
        pass


class _RangeHandler(_Handler):
    """The same with byte ranges."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


class OddHandler(_RangeHandler):
    """The same in the ways of servers: what to do is the first part of the path, the rest is the file's."""

    requests = 0

    def do_HEAD(self) -> None:
        if not self._answered():
            super().do_HEAD()

    def do_GET(self) -> None:
        if not self._answered():
            super().do_GET()

    def _answered(self) -> bool:
        _, how, file = self.path.split("/")
        type(self).requests += 1
        self.path = f"/{file}"
        if how == "gzip" and "gzip" in self.headers.get("Accept-Encoding", ""):
            data = gzip.compress(Path(self.translate_path(self.path)).read_bytes())
            self._send(200, data, ("Content-Encoding", "gzip"))
        elif how == "moved":
            self._send(302, b"", ("Location", f"/plain/{file}"))
        elif how == "loop":
            self._send(302, b"", ("Location", f"/loop/{file}"))
        elif how == "forbidden" or (how == "busy" and self.requests % 5 < 2):
            self._send(403 if how == "forbidden" else 503, b"no")
        else:
            return False
        return True

    def _send(self, code: int, data: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def web_server(folder: Path, ranges: bool, kind: Any = None) -> Iterator[int]:
    """Serve a folder; yield the port."""
    handler = functools.partial(kind or (_RangeHandler if ranges else _Handler), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
