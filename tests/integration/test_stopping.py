"""A run that is stopped before or after the embed stage ends soon, and in one line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import write_jsonl

import fmembed


def has_started_ray(run: psutil.Process, _: Path) -> bool:
    for child in run.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that looks for Ray ends at once
            if child.name() == "gcs_server":
                return True
    return False


def has_committed(_: psutil.Process, table: Path) -> bool:
    return any((table / "_runs").glob("*.json"))


@pytest.mark.parametrize(
    ("when", "signum"),
    [
        (has_started_ray, signal.SIGTERM),
        (has_started_ray, signal.SIGHUP),
        (has_committed, signal.SIGTERM),
    ],
)
def test_a_run_is_stopped_outside_of_the_embed_stage(
    when: Callable[[psutil.Process, Path], bool],
    signum: signal.Signals,
    tmp_path: Path,
    tiny_bert: Path,
) -> None:
    rows = [{"text": f"words {i}", "label": "ab"[i % 2]} for i in range(200)]
    source, table = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    command = [
        sys.executable, "-m", "fmembed.cli", "embed", "--source", str(source), "--label", "label",
        "--model", str(tiny_bert), "--dtype", "float32", "--output", str(table),
    ]  # fmt: skip
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        driver = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
        )
    run = psutil.Process(driver.pid)
    while not when(run, table):
        assert driver.poll() is None, errors.read_text()
        time.sleep(0.02)
    ray = run.children(recursive=True)
    os.kill(driver.pid, signum)
    assert driver.wait(timeout=60) == 128 + signum, errors.read_text()
    said = errors.read_text().splitlines()
    # Not Ray's, nor what was begun.
    said = [
        s
        for s in said
        if "logging.cc" not in s and not re.match(r"([0-9-]{10} )?\d\d:\d\d .* …$", s)
    ]
    assert said == ["fmembed: interrupted; what is committed stays, the same command resumes"]
    # Nothing of Ray is left behind.
    _, alive = psutil.wait_procs(ray, timeout=30)
    assert alive == []
    if when is has_committed:
        assert fmembed.read(str(table)).num_rows == 200
        assert fmembed.verify(str(table)).problems == []
