"""A Ray of this machine alone: what it starts, what it leaves, and Ray as it was before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fmembed.errors import FmembedError
from fmembed.run import cluster as cluster_module
from fmembed.run.cluster import Cluster

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


KILLED = """if True:
    import psutil, threading
    from fmembed.run.cluster import Cluster

    with Cluster(verbose=False) as cluster:
        cluster.connect()
        mine = psutil.Process().children(recursive=True)
        (raylet,) = [c for c in mine if c.name() == "raylet"]
        raylet.kill()
        (watch,) = [t for t in threading.enumerate() if t.name == "watch-raylet"]
        watch.join(30)
"""


def test_a_node_that_is_killed_is_told() -> None:
    """Ray may end this process then, without a word of its own."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, check=False, timeout=100
    )
    assert "fmembed: Ray's own process on this machine (raylet) was ended" in done.stderr


STOPPED = """if True:
    import psutil, ray._private.node, signal, os, threading
    from fmembed.run.cluster import connect

    # As soon as the last of the node's processes is there, and before ray.init has come back.
    start = ray._private.node.Node.start_raylet

    def start_and_stop(node, *given, **options):
        start(node, *given, **options)
        seen.extend(psutil.Process().children(recursive=True))
        raise KeyboardInterrupt

    seen = []
    ray._private.node.Node.start_raylet = start_and_stop
    try:
        connect(verbose=False)
    except KeyboardInterrupt:
        pass
    assert seen
    _, left = psutil.wait_procs(seen, timeout=10)
    print([" ".join(c.cmdline()) for c in left])
"""


def test_a_start_that_is_stopped_leaves_no_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "[]\n"


def test_one_run_at_a_time_in_a_process() -> None:
    first, second = Cluster(verbose=False), Cluster(verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "connect", lambda _: False)
        with first:
            first.connect()
            first.connect()  # the same one again, for its probes
            with pytest.raises(FmembedError, match="another run is under way in this process"):
                second.connect()
        with second:
            second.connect()
