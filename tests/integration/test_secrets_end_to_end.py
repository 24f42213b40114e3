"""A source's login and signature are on no disk, no stream and no command line after a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import SENTENCES, run_cli
from web_server import Server, serve

import fmembed

PASSWORD, SIGNATURE = "Zq81canary/p@ss", "Xk92canary+sig="
# What is left of them in any encoding, and what base64 makes of the login.
TRACES = (b"Zq81canary", b"Xk92canary", b"bWU6WnE4MWNhbmFyeS9wQHNz")


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs; its sockets take no long path."""
    folder = Path(tempfile.mkdtemp(prefix="fm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        running.login = f"me:{PASSWORD}"
        page = "<a href='a.jsonl'>a</a> <a href='b.jsonl'>b</a>"
        running.files["/data/"] = page.encode()
        rows = [{"text": f"{SENTENCES[i % 6]} {i}", "topic": "xy"[i % 2]} for i in range(40)]
        lines = [*map(json.dumps, rows), '{"text": null}', "{"]
        running.files["/data/a.jsonl"] = "\n".join(lines).encode()
        # It is there, and is refused to those who read it.
        running.files["/data/b.jsonl"] = b"x"
        running.broken.add("/data/b.jsonl")
        yield running


def url(server: Server, signature: str) -> str:
    host = server.origin.removeprefix("http://")
    server.signatures = {f"sig={signature}"}
    return f"http://me:{quote(PASSWORD, safe='')}@{host}/data/?sig={quote(signature, safe='')}"


def traced(folder: Path) -> list[str]:
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert files
    return [str(p) for p in files if any(t in p.read_bytes() or t in bytes(p) for t in TRACES)]


def command_lines() -> dict[int, bytes]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes()
        except OSError:
            continue  # it has ended
    return found


def test_a_run_leaves_no_trace_of_them(
    server: Server, ray_folder: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    table = tmp_path / "out"
    rest = [
        "--label", "topic", "--model", str(tiny_bert), "--dtype", "float32", "--output", str(table),
        "--set", "output.max_rejected_fraction=0.5", "--set", "probes=[knn]",
    ]  # fmt: skip
    streams = [(tmp_path / name).open("wb") for name in ("stdout", "stderr")]
    command = [sys.executable, "-m", "fmembed.cli", "embed", "--source", url(server, SIGNATURE)]
    run = subprocess.Popen(
        [*command, *rest, "-v"],
        stdout=streams[0], stderr=streams[1], env=os.environ | {"RAY_TMPDIR": str(ray_folder)},
    )  # fmt: skip
    shown: set[bytes] = set()
    own = b""
    while run.poll() is None:
        lines = command_lines()
        # The command's own line holds them until Ray, which would keep it, is started.
        own = lines.pop(run.pid, b"") or own
        shown |= {line for line in lines.values() if any(t in line for t in TRACES)}
        time.sleep(0.5)
    for stream in streams:
        stream.close()
    said = (tmp_path / "stderr").read_text()
    assert run.returncode == 0, said
    assert "43 read, 40 embedded, 3 rejected" in (tmp_path / "stdout").read_text()
    assert b"--source http://127.0.0.1:" in own
    assert not any(t in own for t in TRACES)
    assert shown == set()
    listed = run_cli("rejected", str(table)).stdout
    assert "b.jsonl: 403" in listed
    assert "Zq81" not in listed
    assert "Xk92" not in listed
    assert sorted(fmembed.read(str(table))["row_id"].to_pylist())[0] == "a.jsonl#0"
    assert traced(table) + traced(ray_folder) == []
    assert traced(tmp_path) == []

    # With another signature it is the same source, all of whose rows are done.
    again = run_cli("embed", "--source", url(server, "Xk92canary-two"), *rest)
    assert (again.returncode, again.stdout.startswith("nothing to do")) == (0, True), again.stderr
    assert not any(t.decode() in again.stdout + again.stderr for t in TRACES)
    assert traced(tmp_path) == []
