"""A real HTTP server that speaks OpenAI's embeddings protocol, with the faults that servers have.

`python tests/helpers/fake_endpoint.py PORT_FILE` runs one in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

DIM = 8
REFUSED = "refuse this"
NAN = "make this NaN"


def vector_of(text: str, dim: int = DIM) -> list[float]:
    """The vector of a text: the same whatever request it came in."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).normal(size=dim).astype(np.float32).tolist()


class Server(ThreadingHTTPServer):
    """`faults` are taken one a request, and done before what was asked for; then none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[Any] = []
        self.lock = threading.Lock()
        self.num_requests = self.num_now = self.num_most = 0
        self.authorizations: set[str | None] = set()
        self.hold: threading.Barrier | None = None
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.num_requests += 1
            server.num_now += 1
            server.num_most = max(server.num_most, server.num_now)
            server.authorizations.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else None
        try:
            if server.hold is not None:
                server.hold.wait(timeout=30)
            self._answer(body, fault)
        finally:
            with server.lock:
                server.num_now -= 1

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        texts = body["input"]
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": f"fault {fault}"}}, {"Retry-After": "0"})
        if fault == "hang":
            self.server.stopping.wait(60)
            return None
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if any(REFUSED in text for text in texts):
            return self._send(400, {"error": {"message": "a text is not allowed"}})
        dim = body.get("dimensions") or DIM
        data = [
            {"object": "embedding", "index": i, "embedding": vector_of(text, dim)}
            for i, text in enumerate(texts)
        ]
        for item, text in zip(data, texts, strict=True):
            if NAN in text:
                item["embedding"][0] = float("nan")
        if fault == "reordered":
            data.reverse()
        elif fault == "short":
            data.pop()
        elif fault == "twice":
            data[-1]["index"] = 0
        elif fault == "out of range":
            data[0]["index"] = len(texts)
        elif fault == "no numbers":
            data[0]["embedding"] = ["a"] * dim
        elif fault == "another length":
            data[0]["embedding"] = [0.5] * (dim + 1)
        elif fault == "no JSON":
            return self._send(200, None)
        usage = {"prompt_tokens": sum(map(len, texts)), "total_tokens": sum(map(len, texts))}
        return self._send(200, {"object": "list", "data": data, "model": "m", "usage": usage})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = b"<html>" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    with Server() as running:
        Path(sys.argv[1]).write_text(running.url)
        running.serve_forever()
