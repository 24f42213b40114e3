"""How much memory all processes of a run hold at once."""

from __future__ import annotations

import os
import subprocess
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

_MARK = "FMEMBED_BENCH"
# Walking the pages of all processes takes some 30 ms, which is not to be felt by what is measured.
_SAMPLE_EVERY_S = 1.0


def run_measured(command: list[str], environment: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Run a command to its end.

    Args:
        command: What to run.
        environment: Variables besides those of this process.

    Returns:
        What it printed, and peaks in bytes: `total` of all its processes at once (driver, Ray's
        own, workers, actors), `driver` of the first one, `worker` of the largest other one. Memory
        is the proportional set size: shared pages count once. `driver_rss` is the first one's own
        account of its peak (VmHWM), in which they count whole.

    Raises:
        SystemExit: It failed.
    """
    mark = uuid.uuid4().hex
    run = subprocess.Popen(  # noqa: S603 - our own command
        command, env={**os.environ, **environment, _MARK: mark}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    peaks = {"total": 0, "driver": 0, "worker": 0, "driver_rss": 0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_EVERY_S):
            held = {int(p.name): _pss_bytes(p) for p in _processes(mark)}
            peaks["total"] = max(peaks["total"], sum(held.values()))
            peaks["driver"] = max(peaks["driver"], held.pop(run.pid, 0))
            peaks["driver_rss"] = max(peaks["driver_rss"], _high_water_bytes(run.pid))
            peaks["worker"] = max(peaks["worker"], *held.values(), 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        stdout, stderr = run.communicate()
    finally:
        ended.set()
        watcher.join()
    if run.returncode:
        last = "\n".join(stderr.splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} failed with exit code {run.returncode}:\n{last}")
    return stdout, peaks


def _processes(mark: str) -> list[Path]:
    """All processes of a run: Ray hands its environment down to every one of them."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(process)
        except OSError:  # ended, or another user's
            continue
    return found


def _pss_bytes(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith("Pss:")), 0)


def _high_water_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(x.split()[1]) for x in lines if x.startswith("VmHWM:")), 0)
