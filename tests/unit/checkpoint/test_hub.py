"""A checkpoint of the hub: resolved once, fetched once a node, whole, then asked for no more."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
from fake_hub import COMMIT, REPO, Hub

from fmembed.checkpoint.opening import Checkpoint

# Each process is as a worker of a node: its cache is the node's.
_OPEN = """
import pickle, sys
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.spec import ModelSpec
found = open_checkpoint(ModelSpec(id=sys.argv[1], dtype="float32"), False)
sys.stdout.buffer.write(pickle.dumps(found))
"""
_LOCATE = """
import pickle, sys
checkpoint = pickle.loads(sys.stdin.buffer.read())
print(checkpoint.folder())
"""


@pytest.fixture(scope="module")
def hub(minilm: Path) -> Iterator[Hub]:
    with fake_hub.serve(minilm) as served:
        yield served


def start(code: str, node: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    names = ("HF_HUB_OFFLINE", "HF_ENDPOINT")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"HF_HOME": str(node), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes], given: bytes = b"") -> bytes:
    out, err = process.communicate(given, timeout=120)
    assert process.returncode == 0, err.decode()[-2000:]
    return out


@pytest.fixture(scope="module")
def checkpoint(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As the driver has found it, who alone knows of the mirror."""
    node = tmp_path_factory.mktemp("head")
    found = pickle.loads(finish(start(_OPEN, node, REPO, HF_ENDPOINT=hub.origin)))  # noqa: S301
    assert isinstance(found, Checkpoint)
    return found


def test_a_name_is_resolved_to_a_commit(hub: Hub, checkpoint: Checkpoint) -> None:
    assert checkpoint.revision == COMMIT
    assert checkpoint.hub == hub.origin


def test_two_processes_of_a_node_fetch_it_once_from_where_the_driver_did(
    hub: Hub, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """And after that nobody is asked: neither for files, nor what the newest commit is."""
    hub.asked.clear()
    given = pickle.dumps(checkpoint)
    both = [start(_LOCATE, tmp_path) for _ in range(2)]
    folders = {finish(process, given) for process in both}
    assert len(folders) == 1
    fetched = Counter(line for line in hub.asked if line.startswith(f"GET /{REPO}/resolve"))
    assert fetched
    assert set(fetched.values()) == {1}, fetched
    hub.asked.clear()
    finish(start(_LOCATE, tmp_path), given)
    assert not hub.asked
    assert not [line for line in hub.asked if "/revision/" in line]


def test_a_download_that_broke_off_is_noticed_and_mended(
    hub: Hub, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    given = pickle.dumps(checkpoint)
    folder = Path(finish(start(_LOCATE, tmp_path), given).decode().strip())
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(os.path.realpath(weights), whole // 2)
    hub.asked.clear()
    finish(start(_LOCATE, tmp_path), given)
    assert weights.stat().st_size == whole
    assert [line for line in hub.asked if line.endswith("model.safetensors")]


def test_one_that_cannot_be_mended_is_refused(
    hub: Hub, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    given = pickle.dumps(checkpoint)
    folder = Path(finish(start(_LOCATE, tmp_path), given).decode().strip())
    os.truncate(os.path.realpath(folder / "model.safetensors"), 10)
    process = start(_LOCATE, tmp_path, HF_HUB_OFFLINE="1")
    _, err = process.communicate(given, timeout=120)
    assert process.returncode
    assert b"ModelError" in err
    assert b"owner/model" in err
