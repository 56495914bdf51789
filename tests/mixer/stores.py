"""Stores on this machine for tests of remote shards: S3 behind a proxy that misbehaves on demand, and SFTP."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import paramiko

Fault = tuple[str, float] | None


class Proxy:
    """Pass requests on to an HTTP server, but for those that ``fault(method, path, number)`` spoils.

    It gives None, or a kind and a number: ("delay", seconds), ("status", code), ("cut", bytes of the body before the
    connection is reset), ("short", bytes that are announced and sent as if they were all), ("stall", seconds).
    ``number`` counts the requests of that method and path from 1 on; ``requests`` holds the counts.
    """

    def __init__(self, port: int, fault: Callable[[str, str, int], Fault] = lambda *_: None) -> None:
        self.fault, self.open = fault, True
        self.requests: Counter[tuple[str, str]] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.requests[self.command, self.path] += 1
                kind, amount = proxy.fault(self.command, self.path, proxy.requests[self.command, self.path]) or ("", 0)
                began = time.monotonic()
                while kind in ("stall", "delay") and proxy.open and time.monotonic() - began < amount:
                    time.sleep(0.01)
                if kind == "stall":
                    self.close_connection = True
                elif kind == "status":
                    self.answer(int(amount), {"Content-Length": "0"}, b"")
                else:
                    server = http.client.HTTPConnection("127.0.0.1", port)
                    server.request(self.command, self.path, headers=dict(self.headers))
                    answer = server.getresponse()
                    body, headers = answer.read(), dict(answer.getheaders())
                    server.close()
                    if kind == "short":
                        body = body[: int(amount)]
                        headers = {k: v for k, v in headers.items() if "checksum" not in k.lower()}
                        headers["Content-Length"] = str(len(body))
                    self.answer(answer.status, headers, body[: int(amount)] if kind == "cut" else body)
                    if kind == "cut":  # a reset, not a polite end
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.close_connection = True

            do_HEAD = do_GET

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # clients that gave up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.open = False
        self.server.shutdown()
        self.server.server_close()


class Sftp:
    """Serve a folder by SFTP, to user "corpus" with password "secret"; ``known_hosts`` is the file a client needs."""

    def __init__(self, root: Path, known_hosts: Path) -> None:
        self.root, self.key = root, paramiko.ECDSAKey.generate()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"sftp://corpus:secret@127.0.0.1:{self.port}"
        known_hosts.write_text(f"[127.0.0.1]:{self.port} {self.key.get_name()} {self.key.get_base64()}\n")
        self.transports: list[paramiko.Transport] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(client)
            transport.add_server_key(self.key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, self.root)
            self.transports.append(transport)
            try:
                transport.start_server(server=_Login())
            except (paramiko.SSHException, EOFError):
                pass

    def hang_up(self) -> None:
        """Cut all connections that are open now."""
        for transport in self.transports:
            transport.close()

    def close(self) -> None:
        self.listener.close()
        self.hang_up()


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        return paramiko.AUTH_SUCCESSFUL if (username, password) == ("corpus", "secret") else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def get_allowed_auths(self, username: str) -> str:
        return "password"


class _Files(paramiko.SFTPServerInterface):
    def __init__(self, server: paramiko.ServerInterface, root: Path) -> None:
        super().__init__(server)
        self.root = root

    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(os.stat(self.root / path.lstrip("/")))
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    lstat = stat

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        try:
            file = open(self.root / path.lstrip("/"), "rb")  # noqa: SIM115
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        handle = paramiko.SFTPHandle(flags)
        handle.readfile = file  # type: ignore[attr-defined]
        return handle
