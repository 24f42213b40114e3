"""What a cluster has, what it may have and what waits for it.

All that is asked of Ray's own state (2.60), which has no public door, is asked here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.state
import ray._private.worker
import ray.core.generated.autoscaler_pb2
import ray.core.generated.common_pb2
import ray.core.generated.gcs_pb2
import yaml

from fmembed.compute_spec import parse_selector
from fmembed.startup import joins_cluster

Resources = Mapping[str, float]

# Messages whose classes are made when they are imported.
_AUTOSCALER: Any = ray.core.generated.autoscaler_pb2
_GCS: Any = ray.core.generated.gcs_pb2
_COMMON: Any = ray.core.generated.common_pb2
# Where `ray up` leaves the config of a cluster on its head.
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
# Of what a pool may hold so many nodes are reckoned with at most.
_MOST_NODES = 1000
# Between two looks for an autoscaler that is about to begin.
_LOOK_S = 0.5
# As a request says of a label that its value is none of some.
_NOT_IN = _COMMON.LABEL_OPERATOR_NOT_IN
# The head, as Ray marks it.
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind that an autoscaler starts and ends; `max_nodes` is None without a bound."""

    resources: Resources
    max_nodes: int | None


@dataclass(frozen=True)
class Demand:
    """Requests of one shape that no node has room for; none of this cluster ever has, where it is
    `impossible`.
    """

    num_waiting: int
    impossible: bool


@dataclass(frozen=True)
class Process:
    """A process that an actor has or had: `deaths` are the ids of those that ended on nodes that
    live. A node that goes takes its processes with it, and that says nothing of them.
    """

    actor: str
    is_alive: bool
    deaths: frozenset[bytes]
    num_rebuilt: int


def nodes() -> list[dict[str, float]]:
    """The resources of the nodes that are alive."""
    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return [n["Resources"] for n in alive if n["Alive"]]


def labelled_nodes() -> list[tuple[Resources, Mapping[str, str]]]:
    """The same, each with its labels."""
    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return [(n["Resources"], n.get("Labels") or {}) for n in alive if n["Alive"]]


def nodes_to_come() -> list[Resources]:
    """The resources of the nodes that the declared pools may add to those that are alive.

    A pool without a bound has declared no number: it counts for one node.
    """
    pools = declared_pools()
    here = Counter(_shape(n) for n in nodes()) if pools else Counter[Any]()
    coming: list[Resources] = []
    for pool in pools:
        most = 1 if pool.max_nodes is None else min(pool.max_nodes, _MOST_NODES)
        shape = _shape(pool.resources)
        num_here = min(here[shape], most)
        here[shape] -= num_here
        coming += [pool.resources] * (most - num_here)
    return coming


def declared_pools() -> list[Pool]:
    """The pools of this cluster, as far as it says: by Ray's own record, which some platforms fill,
    else by the config that `ray up` has left on the head, for a driver that runs there.

    KubeRay (1.7) tells neither: there what may come is known by what the config asks for.
    """
    if not ray.is_initialized():
        return []
    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            Pool(dict(g.resources), None if g.max_count < 0 else g.max_count)
            for g in config.node_group_configs
            if g.resources and g.max_count != 0
        ]
    return list(_pools_of_bootstrap()) if joins_cluster() and _is_on_head() else []


def _pools_of_bootstrap() -> Iterator[Pool]:
    try:
        config = yaml.safe_load(_BOOTSTRAP.expanduser().read_text(encoding="utf-8"))
        most = int(config.get("max_workers", 2))
        head = config.get("head_node_type")
        kinds = {k: v for k, v in config["available_node_types"].items() if k != head}
        for kind in kinds.values():
            found = {str(k): float(v) for k, v in kind["resources"].items()}
            number = min(int(kind.get("max_workers", most)), most)
            if number > 0 and all(math.isfinite(v) and v >= 0 for v in found.values()):
                yield Pool(found, number)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return  # it is not for us to say what is wrong with it


def _is_on_head() -> bool:
    here = ray.get_runtime_context().get_node_id()
    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(n["NodeID"] == here and _HEAD in n["Resources"] for n in alive)


def _shape(resources: Resources) -> tuple[float, float]:
    return resources.get("CPU", 0), resources.get("GPU", 0)


def grows(patience_s: float = 0.0) -> bool:
    """Whether an autoscaler (v2) is at work, which adds nodes when they are asked for.

    Args:
        patience_s: For so long it may be about to begin, where nodes are of named groups: then
            somebody manages them, as KubeRay does, who starts it beside the head.
    """
    if not ray.is_initialized():
        return False
    deadline = time.monotonic() + patience_s
    while not (status := _status()).autoscaling_state.autoscaler_state_version:
        named = any(n.ray_node_type_name for n in status.cluster_resource_state.node_states)
        if not named or time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def demand(shape: Resources, labels: Mapping[str, str] | None = None) -> Demand:
    """What waits for nodes with room for it, of one shape.

    Args:
        shape: The resources of a request, those that are nothing left out.
        labels: Its label selector.
    """
    asked = {key: parse_selector(text) for key, text in (labels or {}).items()}

    def is_one(request: Any) -> bool:
        found = {
            c.label_key: (set(c.label_values), c.operator == _NOT_IN)
            for selector in request.label_selectors
            for c in selector.label_constraints
        }
        return dict(request.resources_bundle) == shape and found == asked

    status = _status()
    pending = status.cluster_resource_state.pending_resource_requests
    num_waiting = sum(p.count for p in pending if is_one(p.request))
    never = status.autoscaling_state.infeasible_resource_requests
    return Demand(num_waiting, any(is_one(r) for r in never))


def processes(class_part: str) -> list[Process]:
    """The actors of this job that have an end before them.

    Args:
        class_part: Stands in the names of their classes.
    """
    job = ray._private.worker.global_worker.current_job_id
    accessor = ray._private.state.state._connect_and_get_accessor()
    states = _status().cluster_resource_state.node_states
    gone = (_AUTOSCALER.NodeStatus.DEAD, _AUTOSCALER.NodeStatus.DRAINING)
    living = {n.node_id for n in states if n.status not in gone}
    table: Sequence[bytes] = accessor.get_actor_table(job, None)
    found = []
    for raw in table:
        actor = _GCS.ActorTableData.FromString(raw)
        if class_part not in actor.class_name or actor.state == _GCS.ActorTableData.DEAD:
            continue
        before = actor.previous_incarnations
        found.append(
            Process(
                actor.actor_id.hex(),
                actor.state == _GCS.ActorTableData.ALIVE,
                frozenset(p.worker_id for p in before if p.node_id in living),
                actor.num_restarts_due_to_lineage_reconstruction,
            )
        )
    return found


def _status() -> Any:
    worker: Any = ray._private.worker.global_worker
    raw = worker.gcs_client.get_cluster_status()
    return _AUTOSCALER.GetClusterStatusReply.FromString(raw)
