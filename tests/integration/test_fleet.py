"""Clusters that begin without a GPU, and GPU nodes that come and go: on nodes of this machine.

The GPUs are only said to be there, and the model runs on the CPU: see `helpers/faked_gpu.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from soak import Bench, Fleet, PictureBench, Run, Tally, wait_for

RAY = str(Path(sys.executable).parent / "ray")
# As the provider that starts nodes on this machine calls the first one.
HEAD_ID = "f" * 51 + "00000"
# The head, one with CPUs, and two with a GPU, which go again when they have stood idle for 6 s.
_NUM_NODES = 4


@pytest.fixture(scope="module")
def pictures(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> PictureBench:
    return PictureBench(tmp_path_factory.mktemp("pictures"), num_rows=400, row_s=0.01)


@pytest.fixture
def fleet(any_fleet: Fleet) -> Fleet:
    """With one GPU."""
    any_fleet.clear()
    any_fleet.add()
    return any_fleet


def check(bench: Bench, table: Path) -> None:
    tally = Tally()
    assert bench.check(table, tally) == []
    assert (tally.lost, tally.twice) == (0, 0)


def go_on(runs: dict[Bench, Run]) -> None:
    for bench, run in runs.items():
        bench.go_on(run)


def says(run: Run, text: str) -> None:
    """Wait until a run has said it."""
    wait_for(lambda: text in run.messages() or run.poll() is not None)
    assert text in run.messages(), run.messages()


def test_of_two_jobs_on_nodes_that_come_and_go_nothing_is_lost(
    bench: Bench, pictures: PictureBench, fleet: Fleet, tmp_path: Path
) -> None:
    """Submitted to the cluster, one of texts, which grows to two GPUs, and one of pictures."""
    tables = {bench: tmp_path / "texts", pictures: tmp_path / "pictures"}
    how: dict[str, Any] = {"on_gpus": True, "dashboard": fleet.dashboard}
    with bench.held(tables[bench], actors="[1,2]", **how) as texts:
        fleet.add()
        fleet.add()
        with pictures.held(tables[pictures], actors=1, **how) as other:
            runs = {bench: texts, pictures: other}
            fleet.add()
            fleet.end(fleet.drain(notice_s=2))
            go_on(runs)
            fleet.kill()
            fleet.add()
            go_on(runs)
            fleet.clear()
            for run in runs.values():
                says(run, "waiting for ")
            for _ in range(3):
                fleet.add()
            for run in runs.values():
                says(run, "all are there, after ")
    for one, run in runs.items():
        assert run.end() == 0, run.messages()
        assert "lost a node, actor or worker" not in run.messages()  # nor was it begun anew
        check(one, tables[one])


def test_a_run_that_gives_up_waiting_or_is_stopped_keeps_what_is_finished(
    bench: Bench, fleet: Fleet, tmp_path: Path
) -> None:
    """The window in flight stands still for as long as it is held, and its GPU goes meanwhile."""
    table = tmp_path / "table"
    more = ["compute.wait_s=6"]
    with bench.held(table, fleet.address, actors=1, on_gpus=True, more=more) as run:
        num_before = bench.num_committed(table)
        fleet.kill()
        assert run.end() == 1
    assert "compute.wait_s: no device for 6 s, waiting for 1 GPU; " in run.messages()
    assert num_before <= bench.num_committed(table) < len(bench.ids)
    fleet.add()
    with bench.held(table, fleet.address, actors=1, on_gpus=True) as run:
        fleet.kill()
        says(run, "waiting for 1 GPU")
        stopped = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM
        took_s = time.monotonic() - stopped
    print(f"gone {took_s:.1f} s after SIGTERM")
    assert took_s < 25  # a cloud's shortest notice is 30 s
    assert "interrupted; " in run.messages()
    # The next job takes up what both have left.
    fleet.add()
    run = bench.start(table, fleet.address, actors=1, on_gpus=True)
    assert run.end() == 0, run.messages()
    check(bench, table)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A head with an autoscaler (v2) that starts nodes on this machine, as `ray up` leaves it: of
    GPUs two at most, and none to begin with; its address, and the home of its user.
    """
    from ray._private import services

    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    address = f"{services.node_ip_address_from_perspective()}:{port}"  # type: ignore[no-untyped-call]
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    empty_lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "rsync_filter",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_exclude",
    )  # fmt: skip
    store = {"object_store_memory": 100 * 2**20}
    config = {
        "cluster_name": "fleet", "max_workers": 4, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1, "head_node_type": "ray.head.default",
        "provider": {
            "type": "external", "module": provider, "use_node_id_as_ip": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
            "launch_multiple": True, "head_node_id": HEAD_ID, "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 2, **store}, "node_config": {}, "min_workers": 1,
                    "max_workers": 1},
            "gpu": {"resources": {"CPU": 1, "GPU": 1, **store}, "node_config": {},
                    "min_workers": 0, "max_workers": 2},
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in empty_lists},
    }  # fmt: skip
    home = tmp_path_factory.mktemp("home")
    written = home / "cluster.yaml"
    written.write_text(json.dumps(config))  # which is YAML
    shutil.copy(written, home / "ray_bootstrap_config.yaml")
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled",
        "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    log = home / "head.log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0",
             f"--autoscaling-config={written}", "--include-dashboard=false",
             "--dashboard-agent-listen-port=0", "--object-store-memory=100000000"],
            env=os.environ | environment | {"HOME": str(home)}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: b"ray start --address" in log.read_bytes() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield address, home
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


@pytest.fixture
def autoscaled(head: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """As its user, when no GPU is there."""
    address, home = head
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    wait_for(lambda: not any(list_nodes(address).values()))
    return address


def list_nodes(address: str) -> dict[bytes, float]:
    """All nodes that there have ever been, and the GPUs that each of them has by now."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reply = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    reply.ParseFromString(GcsClient(address=address).get_cluster_status())
    nodes = reply.cluster_resource_state.node_states
    return {n.node_id: n.total_resources.get("GPU", 0) for n in nodes}


def test_a_run_begins_without_a_gpu_and_a_refresh_that_finds_nothing_asks_for_none(
    bench: Bench, autoscaled: str, tmp_path: Path
) -> None:
    table = tmp_path / "table"
    more = ["compute.gpus_per_actor=auto"]
    assert not any(list_nodes(autoscaled).values())
    run = bench.start(table, autoscaled, verb="refresh", on_gpus=True, more=more)
    assert run.end() == 0, run.messages()
    assert "loading the model, 2 GPU actors …" in run.messages()
    came = list_nodes(autoscaled)
    assert len(came) == _NUM_NODES
    check(bench, table)
    num_forwarded = bench.num_forwarded()
    run = bench.start(table, autoscaled, verb="refresh", on_gpus=True, more=more)
    assert run.end() == 0, run.messages()
    assert "waiting for" not in run.messages()
    assert bench.num_forwarded() == num_forwarded
    assert set(list_nodes(autoscaled)) == set(came)
    # More than the pools may ever have is said before anything waits.
    run = bench.start(tmp_path / "other", autoscaled, actors=3, on_gpus=True)
    assert run.end() == 2
    assert "compute.actors: 3 asked with 1 GPU each" in run.messages()
    assert set(list_nodes(autoscaled)) == set(came)


def test_where_nobody_says_what_may_come_the_first_node_shows_it(
    bench: Bench, autoscaled: str, tmp_path: Path
) -> None:
    """As on KubeRay: the driver sees an autoscaler, and no list of its groups."""
    table, before = tmp_path / "table", list_nodes(autoscaled)
    Path("~/ray_bootstrap_config.yaml").expanduser().unlink()
    run = bench.start(table, autoscaled, actors=2, on_gpus=True)
    assert run.end() == 0, run.messages()
    assert "loading the model, 2 GPU actors …" in run.messages()
    assert len(list_nodes(autoscaled)) == len(before) + 2
    check(bench, table)
    more = ["compute.gpus_per_actor=4"]
    run = bench.start(tmp_path / "other", autoscaled, actors=1, on_gpus=True, more=more)
    assert run.end() == 2
    assert "compute.gpus_per_actor: 4 asked, and no node that" in run.messages()
