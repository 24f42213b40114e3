"""A web server on loopback that remembers what it was asked, and lists nothing."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    """Files and redirects by path; who asks without login or signature is refused, where set.

    `otherwise` is what any other path holds; None for nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.login: str | None = None
        self.signatures: set[str] = set()
        self.otherwise: bytes | None = None
        self.missing = 404
        self.takes_head = True
        self.broken: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    do_POST = do_GET

    def _answer(self, with_body: bool) -> None:
        server = self.server
        path, _, query = self.path.partition("?")
        server.asked.append((self.command, self.path, self.headers["Authorization"]))
        if not (with_body or server.takes_head):
            return self._send(405, b"", with_body)
        if server.login is not None:
            wanted = "Basic " + base64.b64encode(server.login.encode()).decode()
            if self.headers["Authorization"] != wanted:
                return self._send(401, b"", with_body)
        if server.signatures and not server.signatures & set(map(unquote, query.split("&"))):
            return self._send(403, b"", with_body)
        if path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if path in server.broken and with_body:
            return self._send(403, b"", with_body)
        if path in server.files:
            content, headers, status = server.files[path], {"ETag": '"1"'}, 200
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                start, last = int(part[1]), min(int(part[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
                content, status = content[start : last + 1], 206
            return self._send(status, content, with_body, headers)
        if server.otherwise is not None:
            return self._send(200, server.otherwise, with_body)
        return self._send(server.missing, b"", with_body)

    def _send(
        self, status: int, content: bytes, with_body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        is_page = content.startswith(b"<")
        self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
