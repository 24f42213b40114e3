"""What happens to long jobs: kills, signals, a second run, crashes, full and read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import soak
from soak import Bench, Run, SimulatedCluster, Tally

from fmembed.table.table import Table


def last_line(run: Run) -> str:
    """The message; there is no traceback before it."""
    assert "Traceback" not in run.messages()
    return run.messages().splitlines()[-1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with soak.simulated_cluster() as cluster:
        yield cluster


def run_to_the_end(bench: Bench, table: Path, cluster: SimulatedCluster) -> None:
    run = bench.start(table, cluster.address, actors=1)
    assert run.end() == 0, run.messages()
    check(bench, table)


def check(bench: Bench, table: Path) -> None:
    tally = Tally()
    assert bench.check(table, tally) == []
    assert (tally.lost, tally.twice) == (0, 0)


def test_nothing_is_lost_or_twice_after_kills(
    bench: Bench, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    """The soak in small: a driver is killed, and of the run that takes up its table all else."""
    table = tmp_path / "table"
    with bench.held(table) as run:
        run.kill()
        assert run.end() == -signal.SIGKILL
    num_before = bench.num_committed(table)
    cluster.complete()
    with bench.held(table, cluster.address, actors=2) as run:
        for kind in ("actor", "worker", "node"):
            assert soak.kill(kind, run, cluster), kind
            bench.go_on(run)
    assert run.end() == 0, run.messages()
    assert 0 < num_before < len(bench.ids)
    check(bench, table)


def test_a_refresh_takes_up_what_a_killed_one_has_staged(
    bench: Bench, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    with bench.held(table, verb="refresh") as run:
        run.kill()
        assert run.end() == -signal.SIGKILL
    num_staged, num_before = bench.num_committed(table), bench.num_forwarded()
    assert 0 < num_staged < len(bench.ids)
    assert Table(str(table)).rows.parts() == []
    cluster.complete()
    with bench.held(table, cluster.address, actors=2, verb="refresh") as run:
        for kind in ("actor", "worker", "node"):
            assert soak.kill(kind, run, cluster), kind
            bench.go_on(run)
    assert run.end() == 0, run.messages()
    check(bench, table)
    assert Table(str(table)).version() == 1
    # Of what was staged nothing is computed again; of the rest what the three kills have cost.
    num_redone = bench.num_forwarded() - num_before - (len(bench.ids) - num_staged)
    assert num_redone <= 3 * 2 * 2 * 16 + 128


def test_of_two_runs_with_other_models_one_has_the_table(
    bench: Bench, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    cluster.complete()
    tally = Tally()
    soak.race_creators(bench, tmp_path / "table", cluster.address, tally)
    assert (tally.lost, tally.twice, tally.races) == (0, 0, 1)


def test_signals_commit_what_is_finished_and_a_second_run_is_refused(
    bench: Bench, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    num_before = 0
    for signum in (signal.SIGTERM, signal.SIGINT):  # SIGHUP: test_stopping.py
        with bench.held(table) as run:
            is_alone = signum == signal.SIGTERM
            if is_alone:
                second = bench.start(table, None)
                assert second.end() == 1
                assert second.messages().count("\n") == 1
                assert f"pid {run.pid}, started " in last_line(second)
            # As a terminal's Ctrl-C and its end do: to every process of the group, Ray's too.
            run.send_signal(signum) if is_alone else os.killpg(run.pid, signum)
            assert run.end() == 128 + signum
        assert "interrupted; " in last_line(run)
        assert "the same command resumes" in last_line(run)
        lock = json.loads(max((table / "_lock").iterdir()).read_text())
        assert lock["released"]
        assert num_before < bench.num_committed(table) < len(bench.ids)
        num_before = bench.num_committed(table)
    run_to_the_end(bench, table, cluster)


def test_a_crash_on_every_try_ends_with_an_error(
    bench: Bench, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    broken = Bench.__new__(Bench)
    broken.__dict__ = {**vars(bench), "folder": tmp_path}
    broken.model = soak.make_counted_model(tmp_path / "model", bench.log, 0, dies=True)
    started = time.monotonic()
    run = broken.start(tmp_path / "table", cluster.address, actors=1)
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


def test_a_disk_that_is_full_or_read_only_is_a_clear_error_and_a_later_run_completes(
    bench: Bench, cluster: SimulatedCluster, disk: Path
) -> None:
    table = disk / "table"
    with bench.held(table, cluster.address) as run:
        ballast = fill(disk)
    assert run.end() == 1
    assert "No space left on device" in last_line(run)
    num_before = bench.num_committed(table)
    ballast.unlink()
    with bench.held(table, cluster.address) as run:
        # Not chmod: the tests may run as root, whom it does not stop.
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        assert run.end() == 1
        assert "Read-only file system" in last_line(run)
        assert 0 < num_before < bench.num_committed(table) < len(bench.ids)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    run_to_the_end(bench, table, cluster)
