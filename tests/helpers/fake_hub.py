"""A hub on loopback that holds one checkpoint, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO, COMMIT = "owner/model", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The files of a folder, at one commit; `asked` are the requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        self.asked: list[str] = []
        self.commit = COMMIT

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append(f"{self.command} {path}")
        if path.startswith(f"/api/models/{REPO}/tree/"):
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in server.files.items()
            ]
            self._send(json.dumps(found).encode(), with_body)
        elif path.startswith(f"/api/models/{REPO}"):
            told = {"_id": "1", "id": REPO, "sha": server.commit, "siblings": []}
            self._send(json.dumps(told).encode(), with_body)
        elif path.startswith(f"/{REPO}/resolve/"):
            content = server.files.get(path.split("/", 5)[5])
            if content is None:
                self._send(b"", with_body, 404)
                return
            self._send(content, with_body, etag=_oid(content))
        else:
            self._send(b"", with_body, 404)

    def _send(self, content: bytes, with_body: bool, status: int = 200, etag: str = "") -> None:
        self.send_response(status)
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
