"""Actors of several kinds on one run, on nodes of this machine: see `helpers/faked_pools.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from soak import Fleet, read_vectors

import fmembed
from fmembed.spec import RunSpec
from fmembed.table.table import Table

SCRIPT = Path(__file__).parents[1] / "helpers" / "faked_pools.py"
NUM_ROWS, NUM_FILES = 800, 4
H100 = {"accelerator_type": "H100", "actors": 1}
T4 = {"label_selector": {"kind": "T4"}, "actors": 1, "gpus_per_actor": 1}


@pytest.fixture(scope="module")
def address(any_fleet: Fleet) -> str:
    """Of a cluster with a GPU of each kind."""
    any_fleet.clear()
    for kind in ("H100", "T4", "A10"):
        any_fleet.add(kind)
    return any_fleet.address


@pytest.fixture
def spec(tmp_path: Path, tiny_bert: Path) -> dict[str, Any]:
    rows = [{"key": f"k{i}", "text": f"row {i} of some words"} for i in range(NUM_ROWS)]
    (tmp_path / "in").mkdir()
    for n in range(NUM_FILES):
        write_jsonl(tmp_path / "in" / f"{n}.jsonl", rows[n::NUM_FILES])
    return {
        "source": {"uri": str(tmp_path / "in"), "id": "key"},
        "model": {"id": str(tiny_bert), "dtype": "float32"},
        "output": {"uri": str(tmp_path / "table")},
        "probes": [],
    }


def run(
    spec: dict[str, Any], address: str, folder: Path, verb: str = "embed"
) -> subprocess.CompletedProcess[str]:
    config = folder / "config.yaml"
    config.write_text(json.dumps(spec))  # which is YAML
    environment = os.environ | {
        "RAY_ADDRESS": address, "FAKED_POOLS_LOG": str(folder / "windows.log"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, str(SCRIPT), verb, str(config), "--json"],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_each_pool_draws_windows_at_its_own_speed(
    spec: dict[str, Any], address: str, tmp_path: Path, tiny_bert: Path
) -> None:
    priced = {**T4, "price_per_device_hour": 1}
    spec["compute"] = {"pools": [H100, priced], "price_per_device_hour": 8}
    done = run(spec, address, tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows, ends, begins = Counter[str](), dict[str, float](), list[float]()
    for line in (tmp_path / "windows.log").read_text().splitlines():
        kind, number, began, ended = line.split()
        rows[kind] += int(number)
        ends[kind] = max(ends.get(kind, 0.0), float(ended))
        begins.append(float(began))
    assert sum(rows.values()) == NUM_ROWS + NUM_FILES  # each of which ends with a row of its own
    idle = 1 - (min(ends.values()) - min(begins)) / (max(ends.values()) - min(begins))
    print(f"{result['seconds']:.0f} s, {max(ends.values()) - min(begins):.0f} of them at work")
    print(f"rows {dict(rows)}, the first to end is idle for {idle:.1%} of the run")
    # Four times as fast, it has four times as many, but for what both have at the ends, and for the
    # model's own work, which takes both as long: on a busy machine 6 ms a row beside 10 and 40.
    assert 2 < rows["H100"] / rows["T4"] < 5
    # The vectors are the model's, whoever made them.
    twin = RunSpec.parse({**spec, "compute": {}}).model
    texts = [f"row {i} of some words" for i in range(0, NUM_ROWS, 60)]
    exact = fmembed.encode(texts, model=twin)
    found = read_vectors(tmp_path / "table")
    for i, vector in zip(range(0, NUM_ROWS, 60), exact, strict=True):
        np.testing.assert_allclose(found[f"k{i}"], vector, atol=1e-5)
    # The time of each is on record, and has its own price.
    actors = result["verdict"]["actors"]
    assert sorted(name.partition("-")[0] for name in actors) == ["pool0", "pool1"]
    assert [pool["accelerator_type"] for pool in result["compute"]["pools"]] == ["H100", None]
    hours = {
        name.partition("-")[0]: sum(a[k] for k in ("load_s", "wait_s", "busy_s")) / 3600
        for name, a in actors.items()
    }
    assert result["spent"]["cost"] == pytest.approx(8 * hours["pool0"] + hours["pool1"], rel=0.01)


def test_a_pool_whose_vectors_are_off_is_refused_before_its_first_commit(
    spec: dict[str, Any], address: str, tmp_path: Path
) -> None:
    # Ranges of int8 would be stored with the table, for good.
    spec["model"]["precision"] = "int8"
    spec["compute"] = {"pools": [{"accelerator_type": "A10", "actors": 1}, H100]}
    done = run(spec, address, tmp_path)
    assert done.returncode == 2
    assert "compute.pools.0 (A10, float32): its vectors are not those of a CPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert Table(str(tmp_path / "table")).card() is None


def test_a_kind_that_no_node_is_of_is_said_before_anything_waits(
    spec: dict[str, Any], address: str, tmp_path: Path
) -> None:
    spec["compute"] = {"pools": [H100, {"accelerator_type": "T44"}]}
    done = run(spec, address, tmp_path)
    assert done.returncode == 2
    assert "compute.pools.1: no node of the cluster is of this kind" in done.stderr
    spec["compute"] = {"pools": [{**T4, "actors": 2}]}
    done = run(spec, address, tmp_path)
    assert done.returncode == 2
    assert "compute.pools.0.actors: 2 asked with 1 GPU, kind: T4 each" in done.stderr
