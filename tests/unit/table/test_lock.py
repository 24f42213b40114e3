"""One run at a time: refusals, takeovers, and the races between them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fmembed.errors import LockedError, StorageError
from fmembed.storage import Storage
from fmembed.table.lock import Lock, _machine

QUICK = {"beat_s": 0.05, "expire_s": 0.5}


def held(folder: Path) -> dict[str, Any]:
    found = sorted((folder / "_lock").iterdir())
    assert len(found) == 1
    content: dict[str, Any] = json.loads(found[0].read_text())
    return content


def leave(folder: Path, **owner: Any) -> None:
    """A lock as another machine's run has left it."""
    (folder / "_lock").mkdir(parents=True, exist_ok=True)
    other = {"run": "r0", "host": "far", "machine": "elsewhere", "pid": 7, "started": "then"}
    content = json.dumps({**other, "beats": 3, "released": False, **owner})
    (folder / "_lock" / "00000004.json").write_text(content)


def test_second_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with Lock(storage, "r1", **QUICK) as first:
        owner = held(tmp_path)
        with pytest.raises(LockedError) as refused, Lock(storage, "r2", **QUICK):
            pass
        for word in ("r1", owner["host"], f"pid {owner['pid']}", owner["started"]):
            assert word in str(refused.value)
        first.check()
    assert held(tmp_path)["released"]
    with Lock(storage, "r3", **QUICK):
        assert held(tmp_path)["run"] == "r3"


def test_heartbeat_of_another_machine_refuses(tmp_path: Path) -> None:
    leave(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        beats = 3
        while not stop.wait(0.05):
            beats += 1
            leave(tmp_path, beats=beats)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with (
            pytest.raises(LockedError, match="host far, pid 7"),
            Lock(Storage(str(tmp_path)), "r1", beat_s=0.05, expire_s=30),
        ):
            pass
    finally:
        stop.set()
        other.join()


def test_silent_lock_of_another_machine_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path)
    with Lock(Storage(str(tmp_path)), "r1", **QUICK) as lock:
        assert held(tmp_path)["run"] == "r1"
        lock.check()
    assert "waiting up to 0.5 s" in capsys.readouterr().err


def test_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from fmembed.table.lock import Lock; from fmembed.storage import Storage\n"
        "Lock(Storage(sys.argv[1]), 'dead').__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert held(tmp_path)["run"] == "dead"
    # With the default 30 s of patience this would fail by the test's own time limit.
    with Lock(Storage(str(tmp_path)), "r1"):
        assert held(tmp_path)["run"] == "r1"


def test_a_run_that_was_taken_over_notices_before_it_commits(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with Lock(storage, "sleeper", beat_s=60) as sleeper:
        current = storage.paths("_lock/")[-1]
        content = json.loads(storage.get(current)) | {"machine": "elsewhere"}
        storage.put(current, json.dumps(content).encode())
        taken = pytest.raises(LockedError, match="taken over by run next")
        with Lock(storage, "next", **QUICK), taken:
            sleeper.check()
        with pytest.raises(LockedError):
            sleeper.check()


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    """Racing for a dead run's lock: one holder at a time, and numbers never come twice."""
    leave(tmp_path, released=True)
    inside: list[str] = []
    most: list[int] = []
    refused: list[str] = []
    start = threading.Barrier(8)

    def contend(name: str) -> None:
        start.wait()
        try:
            with Lock(Storage(str(tmp_path)), name, **QUICK) as lock:
                inside.append(name)
                most.append(len(inside))
                lock.check()
                inside.remove(name)
        except LockedError:
            refused.append(name)

    threads = [threading.Thread(target=contend, args=(f"r{i}",)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 8
    assert held(tmp_path)["released"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b"{}", b"\xff", b"[" * 100_000,
        b'{"run": "r", "host": "h", "machine": "m", "pid": "1", "started": "s"}',
        b'{"run": 5, "host": ["h"], "machine": null, "pid": 1e400, "started": {}}',
    ],
)  # fmt: skip
def test_a_forged_lock_is_waited_for_and_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "_lock").mkdir()
    (tmp_path / "_lock" / "00000004.json").write_bytes(content)
    with Lock(Storage(str(tmp_path)), "r1", **QUICK) as lock:
        lock.check()
        assert held(tmp_path)["run"] == "r1"


def test_a_lock_after_which_none_can_come_is_named(tmp_path: Path) -> None:
    leave(tmp_path)
    last = tmp_path / "_lock" / f"{'9' * 18}.json"
    (tmp_path / "_lock" / "00000004.json").rename(last)
    with pytest.raises(StorageError, match=f"{last} is the lock of no run.*delete it"):
        Lock(Storage(str(tmp_path)), "r1", **QUICK).__enter__()
    assert held(tmp_path)["run"] == "r0"


def test_files_of_other_names_are_no_locks(tmp_path: Path) -> None:
    (tmp_path / "_lock").mkdir()
    for name in ("²²²²²²²².json", "9" * 30 + ".json", "x.json", "1.json", "00000001.json.bak"):
        (tmp_path / "_lock" / name).write_text("{}")
    with Lock(Storage(str(tmp_path)), "r1", **QUICK):
        assert (tmp_path / "_lock" / "00000001.json").exists()
    assert len(list((tmp_path / "_lock").iterdir())) == 6


def test_a_pid_that_no_process_can_have_is_dead(tmp_path: Path) -> None:
    leave(tmp_path, machine=_machine(), pid=2**70)
    with Lock(Storage(str(tmp_path)), "r1"):
        assert held(tmp_path)["run"] == "r1"


def test_a_lock_that_storage_does_not_list_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path)
    (tmp_path / "_lock" / "00000004.json").rename(tmp_path / "_lock" / "00000001.json")
    monkeypatch.setattr(Storage, "paths", lambda *_: [])
    with pytest.raises(StorageError, match="neither listed nor created"):
        Lock(Storage(str(tmp_path)), "r1", **QUICK).__enter__()
