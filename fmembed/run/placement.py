"""How a run is spread over a cluster: actors, their threads, the windows they are given.

Decided before the run, from what the cluster has or may come to have, what the model takes and what
is to be done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import ray

from fmembed.checkpoint.opening import Checkpoint
from fmembed.compute_spec import ComputeSpec, PoolSpec
from fmembed.devices import cpu_name
from fmembed.errors import SpecError
from fmembed.inputs import Inputs
from fmembed.rows.columns import INPUT
from fmembed.run import capacity
from fmembed.run.plan import Plan, Pool
from fmembed.sources.reading import read_here
from fmembed.sources.shards import sample
from fmembed.sources.source import Source
from fmembed.spec import Modality

# Rows in a window, which an actor sorts by length and cuts into batches: a few seconds of its work,
# so that none idles long at the end.
_WINDOW_ROWS = {
    "cpu": {"text": 256, "image": 64, "audio": 32},
    "cuda": {"text": 4096, "image": 1024, "audio": 256},
}
# Texts: this many tokens a window, their length estimated from the first rows. A window costs Ray
# 16 ms, which short rows felt (147 us a row in windows of 256, 81 in windows of 4,096).
_WINDOW_TOKENS = {"cpu": 2**15, "cuda": 2**20}
_MIN_WINDOW_ROWS, _MAX_WINDOW_ROWS = 16, 2**13
_CHARACTERS_PER_TOKEN = 4
_SAMPLE_ROWS = 64
# Patches of 16 pixels in a picture of 224, and frames of 20 ms in ten seconds of sound.
_ROW_TOKENS = {"image": 196, "audio": 500}
# What a core computes in float32, and how long it is busy before an actor begins: imports, mostly.
_CORE_FLOP_PER_S, _START_S = 5e10, 15.0
# Windows for each actor at least: with fewer the last ones leave some of them idle.
_MIN_WINDOWS = 4
# And where they are of several pools: at the end the others wait for the two windows that the
# slowest has. Of two actors, one four times as fast as the other, that is 7 % of the run.
_MIN_MIXED_WINDOWS = 48
# An autoscaler begins as long after the head at most: it imports Ray.
_PATIENCE_S = 20.0
# The share of a node's memory that the models of its CPU actors may take, and what a process takes
# besides its model.
_MODELS_SHARE, _PROCESS_BYTES = 0.25, 2**29


@dataclass(frozen=True)
class Estimate:
    """What is to be embedded, as far as it can be known before it is read.

    `row_tokens` are the tokens, patches or frames of a row, `num_rows` is None where only reading
    tells how many there are.
    """

    num_tokens: float = math.inf
    row_tokens: float | None = None
    num_rows: int | None = None


def estimate_work(source: Source, checkpoint: Checkpoint, in_chunks: bool) -> Estimate:
    """Estimate by the first texts, or by what a picture or ten seconds of sound usually make."""
    row_tokens: float | None = _ROW_TOKENS.get(checkpoint.modality)
    if checkpoint.endpoint is not None or checkpoint.pads_text:
        row_tokens = None
    elif checkpoint.modality == "text":
        rows = pa.concat_tables(read_here(sample(source, _SAMPLE_ROWS, 1)))
        most = math.inf if in_chunks else checkpoint.max_tokens
        texts = [t for t in rows[INPUT].to_pylist() if t is not None]
        lengths = [min(len(t) / _CHARACTERS_PER_TOKEN + 2, most) for t in texts]
        row_tokens = sum(lengths) / len(lengths) if lengths else None
    if row_tokens is None:
        return Estimate(num_rows=source.num_rows)
    if source.num_rows is not None:
        return Estimate(row_tokens * source.num_rows, row_tokens, source.num_rows)
    return Estimate(source.num_bytes / _CHARACTERS_PER_TOKEN or math.inf, row_tokens)


def place(inputs: Inputs, left: Source, sees_model: bool = True) -> Plan:
    """Where the work on what is left of a source goes: a server's is one actor that asks it.

    Args:
        inputs: What the config says.
        left: Of the source.
        sees_model: Whether the model is to see any row; else no device is asked for.

    Raises:
        SpecError: More GPUs are asked for than there are.
    """
    spec, checkpoint = inputs.spec, inputs.checkpoint
    work = estimate_work(left, checkpoint, spec.preprocess.chunk_tokens is not None)
    compute = spec.compute
    if not sees_model:
        compute = compute.model_copy(update={"gpus_per_actor": 0.0, "actors": 1, "pools": ()})
    plan = plan_compute(compute, checkpoint.modality, checkpoint.num_bytes(), work)
    if checkpoint.endpoint is not None:
        plan = replace(plan, device="cpu", min_actors=1, max_actors=1, gpus_per_actor=0.0)
    return replace(plan, device_name=_name_device(plan.device))


def _name_device(device: str) -> str:
    """What kind of device the actors will have: a GPU's as Ray names it, or a node's CPU."""
    if device == "cpu":
        name: str = ray.get(ray.remote(num_cpus=0)(cpu_name).remote())
        return name
    nodes = [*capacity.nodes(), *capacity.nodes_to_come()]
    resources, prefix = {r for n in nodes for r in n}, "accelerator_type:"
    return ", ".join(sorted(r.removeprefix(prefix) for r in resources if r.startswith(prefix)))


def plan_compute(
    spec: ComputeSpec,
    modality: Modality = "text",
    model_bytes: int = 0,
    work: Estimate | None = None,
) -> Plan:
    """Split the cluster's CPUs and GPUs between actors and tasks so that both can run.

    Actors that reserve every CPU starve the reads that feed them, and Ray then waits for ever. So
    actors reserve so little that two CPUs are left to the tasks wherever Ray puts them, be it all
    on the one node that is left after the others died (a soak hung in just that way). They are
    asked to spread, and the model's threads use all CPUs: reading and tokenising text take a few
    percent of what a model takes. On nodes of two CPUs or one nothing is left to reserve, and where
    there is a node without CPUs, which an actor that reserves none might be put on, one task has to
    do.

    On CPUs an actor has one thread, if a node's memory holds so many models, else as few as it
    holds: threads of one process wait for each other at the end of every product, whenever one of
    them was interrupted. On 2 cores, MiniLM in float32 over 500 articles, runs in turn: 17.5
    articles/s by two actors of one thread, 12.2 by one actor of two (medians of 3). But no actor is
    started for less work than starting it takes.

    Of GPUs those count that may come, too. All actors are asked for at once: Ray Data begins with
    the first one that has its GPU, and what the others wait for is what an autoscaler goes by. It
    is not asked for more nodes than keep busy for some windows each. Where an autoscaler does not
    say what it may start, there will be as many GPUs as the config asks for.

    Args:
        spec: What the config says.
        modality: Of the source.
        model_bytes: What the weights of one actor take.
        work: What is to be done; None for much.

    Raises:
        SpecError: More GPUs are asked for than there are, or may come.
    """
    work = work or Estimate()
    cluster = _Cluster(
        [
            _Node(n, labels, dict(n))
            for n, labels in capacity.labelled_nodes()
            if n.get("CPU", 0) > 0
        ],
        [_Node(n, None, dict(n)) for n in capacity.nodes_to_come()],
        is_declared=bool(capacity.declared_pools()),
        has_bare_node=any(not n.get("CPU", 0) for n in capacity.nodes()),
    )
    one = PoolSpec(actors=spec.actors, gpus_per_actor=spec.gpus_per_actor)
    kinds = dict(enumerate(spec.pools or (one,)))
    planned: dict[int, tuple[Pool, int, Sequence[capacity.Resources]]] = {}
    # Who says how many comes before who takes what is left.
    for i in sorted(kinds, key=lambda i: (kinds[i].actors == "auto", i)):
        field = f"compute.pools.{i}." if spec.pools else "compute."
        planned[i] = _plan_pool(field, kinds[i], cluster, modality, model_bytes, work)
    both = _share_cpus([planned[i] for i in kinds], cluster)
    pools = [pool for pool, *_ in both]
    nodes = [*(n.resources for n in cluster.alive), *(n for *_, more in both for n in more)]
    num_slots = sum(int(n["CPU"]) for n in nodes)
    for pool, num_nodes, _ in both:
        if pool.cpus_per_actor:
            # Which together leave a fraction of a CPU on each node that has some of them.
            num_slots -= math.ceil(pool.cpus_per_actor * pool.max_actors - 1e-3)
            num_slots -= min(pool.max_actors, num_nodes) - 1
    # One CPU is for the task that cuts windows; where only one is left besides, two workers share
    # it: on 2 cores, without a model, one of them read and prepared 3,169 rows/s and two 6,384. Of
    # two nodes each might take a half, and then neither has a whole one left.
    per_task = 0.5 if num_slots <= 2 and len(nodes) <= 1 else 1.0
    if spec.pools:  # all are asked for at once: Ray Data's own scaling knows one shape of actors
        pools = [replace(pool, min_actors=pool.max_actors) for pool in pools]
    first, high = pools[0], sum(pool.max_actors for pool in pools)
    slowest = "cpu" if any(pool.device == "cpu" for pool in pools) else "cuda"
    return Plan(
        device=first.device,
        min_actors=sum(pool.min_actors for pool in pools),
        max_actors=high,
        gpus_per_actor=first.gpus_per_actor,
        cpus_per_actor=first.cpus_per_actor,
        num_threads=first.num_threads,
        cpus_per_task=per_task,
        num_workers=max(int((num_slots - 1) / per_task), 1),
        window_rows=_choose_window(slowest, modality, high, work, is_mixed=len(pools) > 1)
        if spec.window_rows == "auto"
        else spec.window_rows,
        batch_tokens=spec.batch_tokens,
        pools=tuple(pools) if spec.pools else (),
    )


@dataclass(frozen=True)
class _Node:
    """What a node has, its labels (None where it has yet to come), and what no pool has by now."""

    resources: capacity.Resources
    labels: Mapping[str, str] | None
    free: dict[str, float]


@dataclass(frozen=True)
class _Cluster:
    """Nodes with CPUs; those that may come, and whether it says so, be they all there by now; and
    whether there is a node without a CPU.
    """

    alive: Sequence[_Node]
    coming: Sequence[_Node]
    is_declared: bool
    has_bare_node: bool


def _plan_pool(
    field: str,
    spec: PoolSpec,
    cluster: _Cluster,
    modality: Modality,
    model_bytes: int,
    work: Estimate,
) -> tuple[Pool, int, Sequence[capacity.Resources]]:
    """The actors of one kind, on how many nodes they may be, and those of these that may come.

    What they take of the nodes is free no more.

    Raises:
        SpecError: There are too few nodes of that kind, and no more may come.
    """
    found = [n for n in cluster.alive if spec.is_of(n.resources, n.labels)]
    coming = [n for n in cluster.coming if spec.is_of(n.resources, None)]
    nodes = [n.free for n in found]
    gpus = spec.gpus_per_actor
    if gpus == "auto":
        has_gpus = any(n.resources.get("GPU", 0) for n in [*found, *coming])
        gpus = float(has_gpus or (spec.accelerator_type is not None and not nodes))
    needs = {"GPU": gpus} if gpus else {}
    needs |= spec.resources
    here = _count_actors(nodes, needs)
    more: Sequence[dict[str, float]] = ()
    is_bounded = True
    if needs or spec.is_some:
        lacks = here < _least(spec) if needs else not nodes
        is_bounded = cluster.is_declared or not capacity.grows(_PATIENCE_S if lacks else 0.0)
        more = [n.free for n in coming] if is_bounded else _like(nodes, needs, spec)
        nodes += more
        if is_bounded:
            _check_nodes(field, spec, gpus, needs, nodes)
    num_nodes = max(len(nodes), 1)
    cpus = max(min((int(n["CPU"]) for n in nodes), default=1), 1)
    room = _count_actors(nodes, needs)
    if gpus:
        fit = max(min(room, _count_busy(modality, work)), here, 1)
    else:
        memory_bytes = min((n.get("memory", 0) for n in nodes), default=0)
        fit = num_nodes * _count_cpu_actors(cpus, memory_bytes, model_bytes)
        fit = min(fit, room) if needs else fit
        busy_s = cpu_seconds(work.num_tokens, model_bytes) if model_bytes else math.inf
        fit = max(int(min(fit, busy_s / _START_S)), 1)
    if spec.actors == "auto":
        low = high = fit
    elif isinstance(spec.actors, int):
        low = high = spec.actors
    else:
        low, high = spec.actors
        if field != "compute.":
            high = max(low, min(high, fit if is_bounded or not gpus else high))
    _take(nodes, needs, high)
    pool = Pool(
        device="cuda" if gpus else "cpu",
        min_actors=low,
        max_actors=high,
        gpus_per_actor=gpus,
        cpus_per_actor=0.0,
        num_threads=max(cpus // math.ceil(high / num_nodes), 1),
        accelerator_type=spec.accelerator_type,
        resources=spec.resources,
        label_selector=spec.label_selector,
        dtype=spec.dtype,
    )
    return pool, len(nodes), more


def _take(nodes: Sequence[dict[str, float]], needs: capacity.Resources, number: int) -> None:
    """Take what so many actors need of nodes that have it free."""
    for node in nodes:
        count = min(_count_actors([node], needs), number)
        number -= count
        for name, amount in needs.items() if count else ():
            node[name] -= count * amount


def _share_cpus(
    planned: Sequence[tuple[Pool, int, Sequence[capacity.Resources]]], cluster: _Cluster
) -> list[tuple[Pool, int, Sequence[capacity.Resources]]]:
    """Have actors on CPUs reserve what is left to all of them, and have the threads for it.

    All pools of them are taken to be on the same nodes: which those are Ray decides.
    """
    number = sum(pool.max_actors for pool, *_ in planned if pool.device == "cpu")
    cpus = max(min((int(n.resources["CPU"]) for n in cluster.alive), default=1), 1)
    num_tasks = 1 if cpus < 3 and cluster.has_bare_node else 2
    spare = max(cpus - num_tasks, 0)
    shared = []
    for pool, num_nodes, more in planned:
        if pool.device == "cpu":
            pool = replace(
                pool,
                # Ray counts CPUs in steps of 1/10,000.
                cpus_per_actor=math.floor(spare / number * 1e4) / 1e4,
                num_threads=max(cpus // math.ceil(number / max(num_nodes, 1)), 1),
            )
        shared.append((pool, num_nodes, more))
    return shared


def is_blind(plan: Plan) -> bool:
    """Whether no node is there yet of the kind that a plan needs, nor declared.

    Who names pools has told the kinds, and is not waited for.
    """
    if plan.pools:
        return False
    kind = "GPU" if plan.gpus_per_actor else "CPU"
    known = [*capacity.nodes(), *capacity.nodes_to_come()]
    return not any(n.get(kind, 0) for n in known) and capacity.grows()


def _check_nodes(
    field: str,
    spec: PoolSpec,
    gpus: float,
    needs: capacity.Resources,
    nodes: Sequence[capacity.Resources],
) -> None:
    fit = _count_actors(nodes, needs) if needs else len(nodes)
    if spec.is_some and not fit:
        raise SpecError(
            f"{field.rstrip('.')}: no node of the cluster is of this kind ({spec.words(gpus)}); "
            "start such nodes first, or leave the pool out"
        )
    num_gpus = sum(n.get("GPU", 0) for n in nodes)
    if gpus > num_gpus:
        have = "the cluster has" if field == "compute." else "there, or left by the others, are"
        raise SpecError(
            f"{field}gpus_per_actor: {gpus:g} asked, {have} {num_gpus:g}; "
            "set it to 0 for CPUs, or start the GPU nodes first"
        )
    if not fit:
        raise SpecError(
            f"{field}gpus_per_actor: {gpus:g} asked, no node of the cluster has so many; name "
            "fewer, or 0 for CPUs"
        )
    if needs and (low := _least(spec)) > fit:
        each, have = f"{gpus:g} GPU", f"{num_gpus:g} GPUs"
        if spec.is_some:
            each, have = spec.words(gpus), "nodes of this kind"
        raise SpecError(
            f"{field}actors: {low} asked with {each} each, the cluster's {have} are enough for "
            f"{fit}"
        )


def _least(spec: PoolSpec) -> int:
    """The actors that a run is to have at least."""
    if spec.actors == "auto":
        return 1
    return spec.actors if isinstance(spec.actors, int) else spec.actors[0]


def _like(
    nodes: Sequence[capacity.Resources], needs: capacity.Resources, spec: PoolSpec
) -> list[dict[str, float]]:
    """Nodes that may come for as many actors as the config asks for, like one that has come."""
    like = next((n for n in nodes if needs and _count_actors([n], needs)), None)
    if like is None or spec.actors == "auto":
        return []
    high = spec.actors if isinstance(spec.actors, int) else spec.actors[1]
    left = high - _count_actors(nodes, needs)
    number = math.ceil(max(left, 0) / _count_actors([like], needs))
    return [dict(like) for _ in range(number)]


def _count_actors(nodes: Sequence[capacity.Resources], needs: capacity.Resources) -> int:
    """Actors that find what each of them needs, on one node; 0 where they need nothing."""
    if not needs:
        return 0
    return sum(
        min(int(n.get(name, 0) / amount + 1e-9) for name, amount in needs.items()) for n in nodes
    )


def _count_busy(modality: Modality, work: Estimate) -> int:
    """How many GPUs have some windows each to do, as far as that is known."""
    rows = _choose_window("cuda", modality, 1, replace(work, num_rows=None))
    num_rows: float = math.inf if work.num_rows is None else work.num_rows
    if work.row_tokens is not None:
        num_rows = min(num_rows, work.num_tokens / work.row_tokens)
    return math.ceil(min(num_rows / rows / _MIN_WINDOWS, 1e9))


def cpu_seconds(num_tokens: float, model_bytes: int) -> float:
    """What tokens take a core, in float32.

    Two operations a parameter and token; a stored parameter has four bytes at most.
    """
    return num_tokens * model_bytes / 2 / _CORE_FLOP_PER_S


def _count_cpu_actors(cpus: int, memory_bytes: float, model_bytes: int) -> int:
    """Actors of a node's CPUs, each with as many threads as the others: a divisor, or nearly."""
    models = int(memory_bytes * _MODELS_SHARE / (model_bytes + _PROCESS_BYTES))
    return cpus // math.ceil(cpus / max(min(models, cpus), 1))


def _choose_window(
    device: str, modality: Modality, num_actors: int, work: Estimate, is_mixed: bool = False
) -> int:
    """Rows of a window: some seconds of an actor's work, and of a small source a few each, or more
    where one actor may be several times as fast as another.
    """
    least = _MIN_MIXED_WINDOWS if is_mixed else _MIN_WINDOWS
    num_rows = _WINDOW_ROWS[device][modality]
    if work.row_tokens is not None and modality == "text":
        num_rows = int(_WINDOW_TOKENS[device] / work.row_tokens)
    known = work.num_rows
    if known is None and is_mixed and work.row_tokens is not None and work.num_tokens < math.inf:
        known = int(work.num_tokens / work.row_tokens)
    if work.row_tokens is not None and known is not None:
        num_rows = min(num_rows, known // (least * num_actors))
    return min(max(num_rows, _MIN_WINDOW_ROWS), _MAX_WINDOW_ROWS)
