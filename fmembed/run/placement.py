"""How a run is spread over a cluster: actors, their threads, the windows they are given.

Decided before the run, from what the cluster has or may come to have, what the model takes and what
is to be done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import ray

from fmembed.checkpoint.opening import Checkpoint
from fmembed.devices import cpu_name
from fmembed.errors import SpecError
from fmembed.inputs import Inputs
from fmembed.rows.columns import INPUT
from fmembed.run import capacity
from fmembed.sources.reading import read_here
from fmembed.sources.shards import sample
from fmembed.sources.source import Source
from fmembed.spec import ComputeSpec, Modality

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
# An autoscaler begins as long after the head at most: it imports Ray.
_PATIENCE_S = 20.0
# The share of a node's memory that the models of its CPU actors may take, and what a process takes
# besides its model.
_MODELS_SHARE, _PROCESS_BYTES = 0.25, 2**29


@dataclass(frozen=True)
class Plan:
    """Who gets which CPUs. `cpus_per_actor` is what Ray reserves, `num_threads` what torch uses.

    `num_workers` is how many tasks can read and preprocess at once. `device_name` is the device's
    kind, as the cluster calls it; empty where it has none.
    """

    device: str
    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    num_threads: int
    cpus_per_task: float
    num_workers: int
    window_rows: int
    batch_tokens: int | Literal["auto"]
    device_name: str = ""


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
        compute = compute.model_copy(update={"gpus_per_actor": 0.0, "actors": 1})
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
    alive, coming = capacity.nodes(), capacity.nodes_to_come()
    nodes: list[capacity.Resources] = [n for n in alive if n.get("CPU", 0) > 0]
    gpus_per_actor = spec.gpus_per_actor
    if gpus_per_actor == "auto":
        gpus_per_actor = float(any(n.get("GPU", 0) for n in [*nodes, *coming]))
    if gpus_per_actor:
        lacks = _count_gpu_actors(nodes, gpus_per_actor) < _least(spec)
        is_bounded = bool(coming) or not capacity.grows(_PATIENCE_S if lacks else 0.0)
        nodes += coming if is_bounded else _like(nodes, gpus_per_actor, spec)
        fit = _count_gpu_actors(nodes, gpus_per_actor)
        num_gpus = sum(n.get("GPU", 0) for n in nodes)
        if is_bounded:
            _check_gpus(spec, gpus_per_actor, num_gpus, fit)
        here = _count_gpu_actors(alive, gpus_per_actor)
        fit = max(min(fit, _count_busy(modality, work)), here, 1)
    num_nodes = max(len(nodes), 1)
    cpus = max(min((int(n["CPU"]) for n in nodes), default=1), 1)
    if not gpus_per_actor:
        memory_bytes = min((n.get("memory", 0) for n in nodes), default=0)
        fit = num_nodes * _count_cpu_actors(cpus, memory_bytes, model_bytes)
        # Two operations a parameter and token; a stored parameter has four bytes at most.
        flop = work.num_tokens * model_bytes / 2 if model_bytes else math.inf
        fit = max(int(min(fit, flop / _CORE_FLOP_PER_S / _START_S)), 1)
    if spec.actors == "auto":
        low = high = fit
    else:
        low, high = (spec.actors, spec.actors) if isinstance(spec.actors, int) else spec.actors
    per_node = math.ceil(high / num_nodes)
    has_bare_node = any(not n.get("CPU", 0) for n in alive)
    num_tasks = 1 if cpus < 3 and has_bare_node else 2
    spare = max(cpus - num_tasks, 0)
    # Ray counts CPUs in steps of 1/10,000.
    per_actor = 0.0 if gpus_per_actor else math.floor(spare / high * 1e4) / 1e4
    num_slots = sum(int(n["CPU"]) for n in nodes)
    if per_actor:  # which together leave a fraction of a CPU on each node that has some of them
        num_slots -= spare + min(high, num_nodes) - 1
    # One CPU is for the task that cuts windows; where only one is left besides, two workers share
    # it: on 2 cores, without a model, one of them read and prepared 3,169 rows/s and two 6,384. Of
    # two nodes each might take a half, and then neither has a whole one left.
    per_task = 0.5 if num_slots <= 2 and num_nodes == 1 else 1.0
    device = "cuda" if gpus_per_actor else "cpu"
    return Plan(
        device=device,
        min_actors=low,
        max_actors=high,
        gpus_per_actor=gpus_per_actor,
        cpus_per_actor=per_actor,
        num_threads=max(cpus // per_node, 1),
        cpus_per_task=per_task,
        num_workers=max(int((num_slots - 1) / per_task), 1),
        window_rows=_choose_window(device, modality, high, work)
        if spec.window_rows == "auto"
        else spec.window_rows,
        batch_tokens=spec.batch_tokens,
    )


def is_blind(plan: Plan) -> bool:
    """Whether no node is there yet of the kind that a plan needs, nor declared."""
    kind = "GPU" if plan.gpus_per_actor else "CPU"
    known = [*capacity.nodes(), *capacity.nodes_to_come()]
    return not any(n.get(kind, 0) for n in known) and capacity.grows()


def describe(plan: Plan) -> str:
    """Who runs the model, in words."""
    kind = "GPU" if plan.device == "cuda" else "CPU"
    how_many = f"{plan.min_actors:,} to " if plan.min_actors < plan.max_actors else ""
    return f"{how_many}{plan.max_actors:,} {kind} {'actors' if plan.max_actors > 1 else 'actor'}"


def _check_gpus(spec: ComputeSpec, gpus_per_actor: float, num_gpus: float, fit: int) -> None:
    if gpus_per_actor > num_gpus:
        raise SpecError(
            f"compute.gpus_per_actor: {gpus_per_actor:g} asked, the cluster has {num_gpus:g}; "
            "set it to 0 for CPUs, or start the GPU nodes first"
        )
    if not fit:
        raise SpecError(
            f"compute.gpus_per_actor: {gpus_per_actor:g} asked, no node of the cluster has so "
            "many; name fewer, or 0 for CPUs"
        )
    if (low := _least(spec)) > fit:
        raise SpecError(
            f"compute.actors: {low} asked with {gpus_per_actor:g} GPU each, the cluster's "
            f"{num_gpus:g} GPUs are enough for {fit}"
        )


def _least(spec: ComputeSpec) -> int:
    """The actors that a run is to have at least."""
    if spec.actors == "auto":
        return 1
    return spec.actors if isinstance(spec.actors, int) else spec.actors[0]


def _like(
    nodes: Sequence[capacity.Resources], gpus_per_actor: float, spec: ComputeSpec
) -> list[capacity.Resources]:
    """Nodes that may come for as many actors as the config asks for, like one that has come."""
    like = next((n for n in nodes if n.get("GPU", 0) >= gpus_per_actor), None)
    if like is None or spec.actors == "auto":
        return []
    high = spec.actors if isinstance(spec.actors, int) else spec.actors[1]
    left = high - _count_gpu_actors(nodes, gpus_per_actor)
    return [like] * math.ceil(max(left, 0) / _count_gpu_actors([like], gpus_per_actor))


def _count_gpu_actors(nodes: Sequence[capacity.Resources], gpus_per_actor: float) -> int:
    """Actors that find their GPUs, each on one node."""
    return sum(int(n.get("GPU", 0) / gpus_per_actor + 1e-9) for n in nodes)


def _count_busy(modality: Modality, work: Estimate) -> int:
    """How many GPUs have some windows each to do, as far as that is known."""
    rows = _choose_window("cuda", modality, 1, replace(work, num_rows=None))
    num_rows: float = math.inf if work.num_rows is None else work.num_rows
    if work.row_tokens is not None:
        num_rows = min(num_rows, work.num_tokens / work.row_tokens)
    return math.ceil(min(num_rows / rows / _MIN_WINDOWS, 1e9))


def _count_cpu_actors(cpus: int, memory_bytes: float, model_bytes: int) -> int:
    """Actors of a node's CPUs, each with as many threads as the others: a divisor, or nearly."""
    models = int(memory_bytes * _MODELS_SHARE / (model_bytes + _PROCESS_BYTES))
    return cpus // math.ceil(cpus / max(min(models, cpus), 1))


def _choose_window(device: str, modality: Modality, num_actors: int, work: Estimate) -> int:
    """Rows of a window: some seconds of an actor's work, and of a small source a few each."""
    num_rows = _WINDOW_ROWS[device][modality]
    if work.row_tokens is not None and modality == "text":
        num_rows = int(_WINDOW_TOKENS[device] / work.row_tokens)
    if work.row_tokens is not None and work.num_rows is not None:
        num_rows = min(num_rows, work.num_rows // (_MIN_WINDOWS * num_actors))
    return min(max(num_rows, _MIN_WINDOW_ROWS), _MAX_WINDOW_ROWS)
