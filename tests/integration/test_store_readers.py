"""A store while it is read: a real process reads as often as it can, whatever happens to it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_jsonl
from soak import wait_for
from weeks import Reader, StoreYear

import fmembed
from fmembed import promotion

pytestmark = pytest.mark.slow


def test_a_reader_sees_each_promoted_version_whole_and_nothing_else(
    tmp_path: Path, minilm: Path
) -> None:
    """Through refreshes, kills, a better model, a refused one, rollbacks, deletions, vacuum."""
    noises = {"first": 1.1, "better": 0.7, "worse": 2.2}
    year = StoreYear(tmp_path / "year", str(tmp_path / "store"), str(minilm), 300, noises)
    steps = [("first", 0), ("first", 5), ("better", 12), ("better", 25), ("better", 0)]
    with Reader(year) as reader:
        for name, kill_at in steps:
            reader.allow()
            assert year.refresh(name, kill_at).promotion in ("promoted", "current")
            reader.wait()
            assert year.refresh("worse").promotion == "refused"
            year.change()
        year.promoted = year.previous
        promotion.rollback(year.store)
        year.check()
        reader.wait()
        for table in fmembed.Store.open(year.store).tables():
            fmembed.vacuum(f"{year.store}/tables/{table.name}", keep_days=0, keep_versions=1)
        year.check()
        reader.wait()
        reader.allow()
        assert year.refresh("better").promotion == "promoted"
        reader.wait()
    assert "of 6 versions" in reader.told(num_back=1)


def test_of_two_refreshes_that_start_at_once_one_works_and_one_leaves(
    tmp_path: Path, minilm: Path
) -> None:
    """The other one within ten seconds, with 0, and before it has started Ray."""
    source, store = tmp_path / "in.jsonl", tmp_path / "store"
    write_jsonl(source, [{"key": f"k{i}", "text": f"about {i}"} for i in range(40)])
    command = [
        sys.executable, "-m", "fmembed.cli", "refresh", "--source", str(source), "--id", "key",
        "--model", str(minilm), "--store", str(store), "--set", "probes=[]",
        "--if-locked", "skip",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    began = time.monotonic()
    wait_for(lambda: any(run.poll() is not None for run in runs))
    seconds = time.monotonic() - began
    (left, works) = sorted(runs, key=lambda run: run.poll() is None)
    out, err = left.communicate()
    assert (left.returncode, out) == (0, ""), err
    assert "skipped: output.uri: " in err
    assert "is being written by run" in err
    assert "starting Ray" not in err
    assert seconds < 10
    out, err = works.communicate()
    assert works.returncode == 0, err
    assert "starting Ray" in err
    assert "of 40 contents" in out
    assert "promoted: readers get this version" in out
    assert fmembed.read(store).num_rows == 40
