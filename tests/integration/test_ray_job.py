"""`ray job submit` on a real head node with token authentication."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, write_jsonl

RAY = str(Path(sys.executable).parent / "ray")
ENTRY = f"{sys.executable} jobs/embed.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node's client environment; the node is ended by its own process group."""
    folder = tmp_path_factory.mktemp("ray")
    port, dashboard = free_port(), free_port()
    env = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    started = {k: v for k, v in env.items() if k != "RAY_ADDRESS"}
    # --block keeps all of the node below one process, which is what ends it.
    log = (folder / "head.log").open("wb")
    node = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         "--include-dashboard=true", "--num-cpus=2", "--dashboard-agent-listen-port=0"],
        env=started, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not _listed(env):
            assert node.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield env
    finally:
        # A node's processes are one group of their own; `ray stop` would end other nodes as well.
        # Not SIGTERM: 20 s after it some were still there.
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        log.close()


def _listed(env: dict[str, str]) -> bool:
    return subprocess.run([RAY, "job", "list"], env=env, capture_output=True).returncode == 0


def submit(head: dict[str, str], job_id: str, config: Path, cwd: Path) -> int:
    return subprocess.run(
        [RAY, "job", "submit", "--submission-id", job_id, "--working-dir", ".", "--",
         *ENTRY.split(), str(config)],
        env=head, cwd=cwd, capture_output=True, timeout=300, check=False,
    ).returncode  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a user submits: the project's folder, without its environment and data."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("fmembed", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_submitted_job(
    head: dict[str, str], checkout: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    source = write_jsonl(
        tmp_path / "in.jsonl", [{"text": f"text {i}", "topic": "ab"[i % 2]} for i in range(50)]
    )
    config = {
        "source": {"uri": str(source), "label": "topic"},
        "model": {"id": str(tiny_bert), "dtype": "float32"},
        "output": {"uri": str(tmp_path / "out")},
    }
    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump(config))
    assert submit(head, "good", good, checkout) == 0
    logs = subprocess.run(
        [RAY, "job", "logs", "good"], env=head, capture_output=True, text=True, check=True
    ).stdout
    assert "50 read, 50 embedded, 0 rejected" in logs
    assert str(tmp_path / "out") in logs

    config["source"]["label"] = "topik"
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(config))
    assert submit(head, "bad", bad, checkout) != 0
    code = "from ray.job_submission import JobSubmissionClient as C; import sys; " \
        "print(C(sys.argv[1]).get_job_info('bad').driver_exit_code)"  # fmt: skip
    info = subprocess.run(
        [sys.executable, "-c", code, head["RAY_ADDRESS"]],
        env=head, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert info.stdout.strip() == "2"
