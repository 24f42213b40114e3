"""Who gets which CPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray

from fmembed.compute_spec import ComputeSpec
from fmembed.errors import SpecError
from fmembed.run import capacity
from fmembed.run.capacity import Pool
from fmembed.run.placement import Estimate, is_blind, plan_compute

GIB = 2.0**30


@pytest.mark.parametrize(
    ("cpus", "memory_gib", "model_gib", "actors", "threads"),
    [
        (1, 4, 0.1, 1, 1),
        (2, 16, 0.1, 2, 1),
        (64, 256, 0.1, 64, 1),
        (64, 256, 1.3, 32, 2),  # 35 models fit: 64 CPUs in twos
        (64, 256, 14, 4, 16),
        (8, 16, 14, 1, 8),
        (8, 0, 0.1, 1, 8),
    ],
)
def test_a_cpu_actor_has_as_few_threads_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    memory_gib: float,
    model_gib: float,
    actors: int,
    threads: int,
) -> None:
    _cluster(monkeypatch, [{"CPU": cpus, "memory": memory_gib * GIB}])
    plan = plan_compute(ComputeSpec(), "text", int(model_gib * GIB))
    assert (plan.min_actors, plan.max_actors, plan.num_threads) == (actors, actors, threads)
    assert plan.device == "cpu"
    # CPUs are left to the tasks that feed them, two where there are more.
    left = cpus - plan.max_actors * plan.cpus_per_actor
    assert left >= plan.cpus_per_task * min(cpus, 2)


@pytest.mark.parametrize(
    ("num_tokens", "actors", "threads"), [(1e4, 1, 8), (4e6, 4, 2), (1e9, 8, 1)]
)
def test_no_actor_is_started_for_less_than_it_costs(
    monkeypatch: pytest.MonkeyPatch, num_tokens: float, actors: int, threads: int
) -> None:
    _cluster(monkeypatch, [{"CPU": 8, "memory": 64 * GIB}])
    # 4 million tokens of 750,000 operations each: 60 s of a core.
    plan = plan_compute(ComputeSpec(), "text", 1_500_000, Estimate(num_tokens))
    assert (plan.max_actors, plan.num_threads) == (actors, threads)


def test_every_node_gets_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [{"CPU": 4, "memory": 64 * GIB}] * 3)
    plan = plan_compute(ComputeSpec(), "text", 2**27)
    assert (plan.max_actors, plan.num_threads) == (12, 1)
    assert 0 < plan.max_actors * plan.cpus_per_actor <= 2
    two = plan_compute(ComputeSpec(actors=6))
    assert (two.max_actors, two.num_threads) == (6, 2)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 5, 7, 8, 16, 23, 64, 96])
@pytest.mark.parametrize("actors", ["auto", 1, 2, 5])
def test_a_whole_cpu_is_left_to_cut_windows(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, cpus: int, actors: Any
) -> None:
    _cluster(monkeypatch, [{"CPU": float(cpus), "memory": 1024 * GIB}] * num_nodes)
    plan = plan_compute(ComputeSpec(actors=actors))
    rng = np.random.default_rng(0)
    spread = np.arange(plan.max_actors) % num_nodes
    for where in [spread, 0 * spread, *(rng.integers(0, num_nodes, plan.max_actors)
                                        for _ in range(20))]:  # fmt: skip
        held = np.bincount(where, minlength=num_nodes) * plan.cpus_per_actor
        free = cpus - held + 1e-9
        assert free.min() >= 0
        if plan.num_workers == 1 and cpus * num_nodes < 3:
            continue  # one after the other, as on one CPU
        if plan.cpus_per_task == 1:
            assert np.floor(free).sum() >= plan.num_workers + 1
        else:  # two share one, on the only node
            assert num_nodes == 1
            assert free[0] >= plan.num_workers * plan.cpus_per_task + 1
    # And no more than that is left idle.
    assert plan.num_workers * plan.cpus_per_task >= cpus * num_nodes - max(cpus - 2, 0) - num_nodes


def test_no_actor_is_put_where_there_are_no_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [{"CPU": 2, "memory": 64 * GIB}])
    plan = plan_compute(ComputeSpec())
    assert (plan.max_actors, plan.cpus_per_actor, plan.num_workers) == (2, 0, 2)
    _cluster(monkeypatch, [{"memory": 64 * GIB}, {"CPU": 2, "memory": 64 * GIB}])
    plan = plan_compute(ComputeSpec())
    assert (plan.max_actors, plan.cpus_per_actor, plan.num_workers) == (2, 0.5, 1)


def test_a_gpu_has_one_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [{"CPU": 8, "memory": 64 * GIB, "GPU": 2}, {"CPU": 8, "memory": GIB}])
    plan = plan_compute(ComputeSpec(), "text", 2**34)
    assert (plan.device, plan.max_actors, plan.gpus_per_actor) == ("cuda", 2, 1.0)
    assert plan.cpus_per_actor == 0
    assert plan_compute(ComputeSpec(gpus_per_actor=0.5)).max_actors == 4
    with pytest.raises(SpecError, match=r"compute\.actors: 3 asked with 1 GPU each"):
        plan_compute(ComputeSpec(actors=3))
    with pytest.raises(SpecError, match=r"compute\.gpus_per_actor: 4 asked, the cluster has 2"):
        plan_compute(ComputeSpec(gpus_per_actor=4))


GPU_NODE = {"CPU": 8.0, "memory": 64 * GIB, "GPU": 2.0}
HEAD = {"CPU": 0.0, "memory": 8 * GIB}


def test_gpus_that_may_come_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}])
    _declare(monkeypatch, [Pool({"CPU": 4.0}, 2), Pool(GPU_NODE, 3)])
    plan = plan_compute(ComputeSpec())
    assert (plan.device, plan.min_actors, plan.max_actors, plan.gpus_per_actor) == ("cuda", 6, 6, 1)
    # Six actors on as many GPUs; CPUs read and prepare on all nodes that there may be.
    assert plan.num_workers == 4 + 4 + 3 * 8 - 1
    assert not is_blind(plan)
    assert plan_compute(ComputeSpec(actors=4)).max_actors == 4
    with pytest.raises(SpecError, match=r"compute\.actors: 7 asked with 1 GPU each, .* for 6"):
        plan_compute(ComputeSpec(actors=7))
    with pytest.raises(SpecError, match=r"compute\.gpus_per_actor: 4 asked, no node of"):
        plan_compute(ComputeSpec(gpus_per_actor=4))
    # A node that has come already is none that comes.
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}, GPU_NODE])
    assert plan_compute(ComputeSpec()).max_actors == 6
    assert plan_compute(ComputeSpec(gpus_per_actor=0)).device == "cpu"
    # Nor is there more to come where all have, whatever grows.
    monkeypatch.setattr(capacity, "grows", lambda *_: True)
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}, *[GPU_NODE] * 3])
    with pytest.raises(SpecError, match=r"compute\.actors: 7 asked with 1 GPU each, .* for 6"):
        plan_compute(ComputeSpec(actors=7))


def test_no_more_gpus_are_asked_for_than_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}])
    _declare(monkeypatch, [Pool(GPU_NODE, 50), Pool(GPU_NODE, None)])
    assert plan_compute(ComputeSpec(), "text", 0, Estimate(1e4, 100.0, 100)).max_actors == 1
    assert plan_compute(ComputeSpec(), "text", 0, Estimate(5e7, 100.0)).max_actors == 16
    assert plan_compute(ComputeSpec(), "image", 0, Estimate(196e5, 196.0, 10**5)).max_actors == 25
    # 50 nodes and, of a pool without a bound, one.
    assert plan_compute(ComputeSpec()).max_actors == 102
    # Those that are there are taken.
    _cluster(monkeypatch, [HEAD, *[GPU_NODE] * 4])
    assert plan_compute(ComputeSpec(), "text", 0, Estimate(1e4, 100.0, 100)).max_actors == 8


def test_where_an_autoscaler_does_not_say_what_may_come_the_config_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capacity, "grows", lambda *_: True)
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}])
    assert plan_compute(ComputeSpec()).device == "cpu"
    plan = plan_compute(ComputeSpec(gpus_per_actor=1, actors=4))
    assert (plan.device, plan.min_actors) == ("cuda", 4)
    assert is_blind(plan)
    _cluster(monkeypatch, [HEAD, {"CPU": 4, "memory": GIB}, GPU_NODE])
    plan = plan_compute(ComputeSpec(gpus_per_actor=1, actors=4))
    assert (plan.min_actors, plan.num_workers) == (4, 4 + 8 + 8 - 1)
    assert not is_blind(plan)
    monkeypatch.setattr(capacity, "grows", lambda *_: False)
    with pytest.raises(SpecError, match=r"compute\.actors: 4 asked"):
        plan_compute(ComputeSpec(gpus_per_actor=1, actors=4))


def _declare(monkeypatch: pytest.MonkeyPatch, pools: list[Pool]) -> None:
    monkeypatch.setattr(capacity, "declared_pools", lambda: pools)


def _cluster(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> None:
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1, "GPU": 8}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
