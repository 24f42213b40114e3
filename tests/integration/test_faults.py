"""What happens to long jobs: kills, signals, a second run, crashes, full and read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import soak
from soak import Bench, Run, Tally


def last_line(run: Run) -> str:
    """The message; there is no traceback before it."""
    assert "Traceback" not in run.messages()
    return run.messages().splitlines()[-1]


def run_to_the_end(bench: Bench, table: Path) -> None:
    run = bench.start(table, None, actors=1)
    assert run.end() == 0, run.messages()
    tally = Tally()
    assert bench.check(table, tally) == []
    assert (tally.lost, tally.twice) == (0, 0)


def test_nothing_is_lost_or_twice_after_kills(bench: Bench, tmp_path: Path) -> None:
    """The soak in small: one kill of each kind, each on a run that was going."""
    rng = random.Random(0)  # noqa: S311
    tally, num_done = Tally(), 0
    with soak.simulated_cluster() as cluster:
        for kind in ("local driver", "actor", "worker", "node"):
            while not tally.kills.get(kind):
                table = tmp_path / f"table{num_done}"
                soak.kill_once(kind, bench, table, cluster, rng.uniform(0.05, 0.4), tally)
                # A run that lost a driver is taken up by the one that loses an actor.
                if bench.num_committed(table) >= len(bench.ids):
                    num_done += 1
                    soak.finish(bench, table, cluster)
                    assert bench.check(table, tally) == [], kind
        if table.name == f"table{num_done}":
            soak.finish(bench, table, cluster)
            assert bench.check(table, tally) == []
    print(tally)
    assert (tally.lost, tally.twice) == (0, 0)
    assert sum(tally.kills.values()) == 4


def test_of_two_runs_with_other_models_one_has_the_table(bench: Bench, tmp_path: Path) -> None:
    tally = Tally()
    soak.race_creators(bench, tmp_path / "table", tally)
    assert (tally.lost, tally.twice, tally.races) == (0, 0, 1)


def test_signals_commit_what_is_finished_and_a_second_run_is_refused(
    bench: Bench, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    num_before = 0
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with bench.held(table) as run:
            second = bench.start(table, None)
            assert second.end() == 1
            assert second.messages().count("\n") == 1
            assert f"pid {run.pid}, started " in last_line(second)
            # As a terminal's Ctrl-C and its end do: to every process of the group, Ray's too.
            is_alone = signum == signal.SIGTERM
            run.send_signal(signum) if is_alone else os.killpg(run.pid, signum)
            assert run.end() == 128 + signum
        assert "interrupted; " in last_line(run)
        assert "the same command resumes" in last_line(run)
        lock = json.loads(max((table / "_lock").iterdir()).read_text())
        assert lock["released"]
        assert num_before < bench.num_committed(table) < len(bench.ids)
        num_before = bench.num_committed(table)
    run_to_the_end(bench, table)


def test_a_crash_on_every_try_ends_with_an_error(bench: Bench, tmp_path: Path) -> None:
    broken = Bench.__new__(Bench)
    broken.__dict__ = {**vars(bench), "folder": tmp_path}
    broken.model = soak.make_counted_model(tmp_path / "model", bench.log, 0, dies=True)
    started = time.monotonic()
    run = broken.start(tmp_path / "table", None)
    assert run.end() == 1
    assert last_line(run).startswith("fmembed: the model's process died 4 times and was given up")
    print(f"gave up after {time.monotonic() - started:.0f} s")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:  # as any user but root; CI has the right
        pytest.skip(f"no right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as f:
        for size in (4096, 64, 1):
            with contextlib.suppress(OSError):
                while True:
                    f.write(b"x" * size)
    assert shutil.disk_usage(disk).free == 0
    return ballast


def test_disk_full_is_a_clear_error_and_a_later_run_completes(bench: Bench, disk: Path) -> None:
    table = disk / "table"
    with bench.held(table) as run:
        ballast = fill(disk)
    assert run.end() == 1
    assert "No space left on device" in last_line(run)
    assert 0 < bench.num_committed(table) < len(bench.ids)
    ballast.unlink()
    run_to_the_end(bench, table)


def test_permission_lost_is_a_clear_error_and_a_later_run_completes(
    bench: Bench, disk: Path
) -> None:
    table = disk / "table"
    with bench.held(table) as run:
        # Not chmod: the tests may run as root, whom it does not stop.
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        assert run.end() == 1
        assert "Read-only file system" in last_line(run)
        assert 0 < bench.num_committed(table) < len(bench.ids)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    run_to_the_end(bench, table)
