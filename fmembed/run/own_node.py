"""A Ray of this machine alone, with no more processes than the run's own tasks and actors need.

Ray (2.60) starts eight besides, each a Python that imports Ray: of 20 texts' 13.6 s on two cores
they took three.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
import ray.data
from ray._private import ray_constants, utils
from ray._private.node import Node
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.stats import _StatsManager

from fmembed.terminal import say

# What of Ray Data is replaced as long as the node is there.
_replaced = ExitStack()


def start(verbose: bool, **options: Any) -> None:
    """Start a node for this process, and join it.

    Args:
        verbose: Show Ray's own output.
        options: For `ray.init`.
    """
    import psutil  # Ray has its own, found once it is imported

    before = set(psutil.Process().children(recursive=True))
    try:
        with _on_loopback(), _without_services(verbose):
            # Named, because without an address ray.init joins any cluster that it finds here.
            ray.init("local", include_dashboard=False, num_cpus=_count_cpus(), **options)
    except BaseException:
        # A signal, mostly: Ray ends its own processes when this one ends, and they theirs, which
        # look for them for a minute.
        _kill(set(psutil.Process().children(recursive=True)) - before)
        raise
    _replaced.enter_context(_without_helpers())
    threading.Thread(target=_watch, args=_raylets(), name="watch-raylet", daemon=True).start()


def leave(at_once: bool) -> None:
    """Leave Ray, and end the node if it was started here.

    Args:
        at_once: Whether its processes have nothing left to do: they are not asked to end, as Ray
            (2.60) does one after another, giving each a second.
    """
    _replaced.close()
    node = ray._private.worker._global_node
    if node is None or not at_once:
        ray.shutdown()
        return
    import psutil

    children = []
    for pid in _raylets():
        with suppress(psutil.NoSuchProcess):  # it has ended by itself
            children += psutil.Process(pid).children(recursive=True)
    kill = node.kill_all_processes
    node.kill_all_processes = lambda **options: kill(**{**options, "allow_graceful": False})
    ray.shutdown()
    _kill(children)  # its agents would look for it for a minute


def _raylets() -> tuple[int, ...]:
    """The ids of the processes that run the node's tasks: one."""
    node: Any = ray._private.worker._global_node
    found = node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET, []) if node else []
    return tuple(raylet.process.pid for raylet in found)


def _kill(processes: Iterable[Any]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _watch(pid: int) -> None:
    """Say that the raylet has ended: Ray (2.60) may then end this process, without a word."""
    with suppress(OSError):  # it is gone already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its end is left for Ray to collect
        if ray.is_initialized():  # nobody has left it before
            say(
                "Ray's own process on this machine (raylet) was ended, by the system for want of "
                "memory or by somebody; what is committed stays, the same command resumes"
            )


def _count_cpus() -> int | None:
    """CPUs that a Ray started here is to have: as many as there are, and two at least.

    The task that cuts windows takes one (Ray Data 2.60 lets nobody choose), and one that reads
    another: on a machine of one core a run waited for ever.
    """
    return 2 if utils.get_num_cpus() < 2 else None


@contextmanager
def _replacing(target: Any, **names: Any) -> Iterator[None]:
    before = {name: target.__dict__[name] for name in names}
    for name, other in names.items():
        setattr(target, name, other)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(target, name, own)


def _on_loopback() -> Any:
    """Have a node started meanwhile listen on loopback alone.

    Its processes listen at the node's address, most of them at all addresses; and Ray (2.60) takes
    127.0.0.1 for that address only where it is told that there are no clusters, as it is by default
    on macOS and Windows (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, read when Ray is imported).
    """
    return _replacing(ray_constants, ENABLE_RAY_CLUSTER=False)


@contextmanager
def _without_services(verbose: bool) -> Iterator[None]:
    """Have a node started meanwhile serve nobody but tasks.

    Ray (2.60) starts the dashboard's process though there is to be no dashboard, and waits until it
    answers; one that asks an autoscaler for nodes, which this machine has not; and one that follows
    logs, though nobody is shown them unless `verbose`. It waits until the node's agent listens,
    whose port is one for all nodes of a machine: beside another Ray it tried for 4 s to have it.
    And to see whether there can be an agent it imports here what that would.
    """
    start_raylet = Node.start_raylet

    def on_any_port(node: Node, *arguments: Any, **options: Any) -> None:
        node._ray_params.dashboard_agent_listen_port = 0
        start_raylet(node, *arguments, **options)

    names = ["start_api_server", "start_monitor", *([] if verbose else ["start_log_monitor"])]
    nothing = dict.fromkeys(names, lambda *_, **__: None)
    with (
        _replacing(Node, start_raylet=on_any_port, **nothing),
        _replacing(utils, get_dashboard_dependency_error=lambda: None),  # we require ray[default]
    ):
        yield


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Have Ray Data keep no statistics for a dashboard, ask nobody for nodes, and know where actors
    are without asking.

    Each is an actor; for the first one's start the making of a dataset waits, and the last one
    takes the process that the model's could have begun in.
    """
    nothing = staticmethod(lambda *_, **__: None)
    with (
        _replacing(
            _StatsManager,
            update_execution_metrics=nothing,
            update_iteration_metrics=nothing,
            register_dataset_to_stats_actor=nothing,
            gen_dataset_id_from_stats_actor=staticmethod(lambda: uuid.uuid4().hex),
        ),
        _replacing(streaming_executor, create_cluster_autoscaler=lambda *_, **__: _ThisNode()),
        _replacing(
            actor_pool_map_operator,
            get_or_create_actor_location_tracker=_Nobody,
            get_actor_locations=lambda _: {},  # then each is where it was first seen
        ),
    ):
        yield


class _Nobody:
    """Told where an actor is; it travels to the actor."""

    @property
    def update_actor_location(self) -> _Nobody:
        return self

    def remote(self, *_: Any) -> None:
        """Nothing."""


class _ThisNode(ClusterAutoscaler):
    """Of the resources that there are there will be no more.

    Of CPUs twice as many are said to be there: Ray Data keeps half of them for actors that reserve
    none. How many tasks there may be we say ourselves, and the node itself starts no more.
    """

    def __init__(self) -> None:
        ask: Any = ray.cluster_resources
        found = ask()
        found["CPU"] = 2 * found.get("CPU", 0)
        self._total: ExecutionResources = ExecutionResources.from_resource_dict(found)

    def try_trigger_scaling(self) -> None:
        """Nothing."""

    def on_executor_shutdown(self) -> None:
        """Nothing."""

    def get_total_resources(self) -> ExecutionResources:
        """What Ray has said when the execution began."""
        return self._total
