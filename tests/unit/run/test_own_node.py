"""A Ray of this machine alone: what it starts, what it leaves, and Ray as it was before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = """if True:
    import json, psutil, ray
    from ray._private.node import Node
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.stats import _StatsManager
    from fmembed.run.cluster import Cluster

    class Twice:
        def __call__(self, rows):
            return {"id": rows["id"] * 2}

    def names():
        own = [vars(Node)[n] for n in ("start_api_server", "start_monitor", "start_raylet")]
        return [*own, *vars(_StatsManager).values(), streaming_executor.create_cluster_autoscaler]

    before, pool = names(), ray.data.ActorPoolStrategy(size=2)
    for _ in range(2):
        with Cluster(verbose=False) as cluster:
            cluster.connect()
            rows = ray.data.range(100, override_num_blocks=4).map_batches(Twice, compute=pool)
            assert sorted(r["id"] for r in rows.take_all()) == list(range(0, 200, 2))
            children = psutil.Process().children(recursive=True)
            started = [" ".join(c.cmdline()) for c in children]
        _, left = psutil.wait_procs(children, timeout=10)
        assert not left, left
        assert names() == before
    print(json.dumps(started))
"""


def test_a_node_of_ones_own_is_bare_and_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    started = json.loads(done.stdout.splitlines()[-1])
    for needed in ("gcs_server", "raylet", "ray::MapWorker"):
        assert any(needed in line for line in started), started
    for needless in (
        "dashboard.py", "monitor", "StatsActor", "AutoscalingCoordinator", "ActorLocationTracker",
    ):  # fmt: skip
        assert not any(needless in line for line in started), started
