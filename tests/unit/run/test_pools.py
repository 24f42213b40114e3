"""Which pool an actor is of, what it is given, and what its vectors are held to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.exceptions

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.compute_spec import ComputeSpec, PoolSpec
from fmembed.errors import ModelError, SpecError
from fmembed.rows.outputs import Output
from fmembed.rows.precision import finish
from fmembed.run import capacity, pools
from fmembed.run.faults import explain
from fmembed.run.placement import Estimate, plan_compute
from fmembed.run.plan import Plan, Pool, describe
from fmembed.run.spending import mean_price, price
from fmembed.spec import ModelSpec, RunSpec

OUTPUT = Output("embedding", "mean", None, True, None, "float32")


def pool(low: int, high: int, **more: Any) -> Pool:
    return Pool("cuda", low, high, 1.0, 0.0, 1, **more)


@pytest.mark.parametrize(
    ("kind", "resources", "labels", "is_one"),
    [
        ({"accelerator_type": "T4"}, {"GPU": 1, "accelerator_type:T4": 1}, {}, True),
        ({"accelerator_type": "T4"}, {"GPU": 1, "accelerator_type:L4": 1}, {}, False),
        ({"accelerator_type": "T4"}, {"CPU": 1}, {}, False),
        ({"accelerator_type": "T4"}, {"GPU": 1}, None, True),  # of one that has yet to come
        ({"resources": {"disk": 2}}, {"disk": 2}, {}, True),
        ({"resources": {"disk": 2}}, {"disk": 1}, None, False),
        ({"label_selector": {"zone": "a"}}, {}, {"zone": "a"}, True),
        ({"label_selector": {"zone": "a"}}, {}, {}, False),
        ({"label_selector": {"zone": "a"}}, {}, None, True),
        ({"label_selector": {"zone": "!a"}}, {}, {"zone": "a"}, False),
        ({"label_selector": {"zone": "!a"}}, {}, {}, True),
        ({"label_selector": {"zone": "in(a, b)"}}, {}, {"zone": "b"}, True),
        ({"label_selector": {"zone": "!in(a,b)"}}, {}, {"zone": "b"}, False),
        ({"label_selector": {"zone": "!in(a,b)"}}, {}, {"zone": "c"}, True),
    ],
)
def test_a_node_is_of_a_kind_by_its_accelerator_resources_and_labels(
    kind: dict[str, Any], resources: dict[str, float], labels: Any, is_one: bool
) -> None:
    assert PoolSpec(**kind).is_of(resources, labels) is is_one


def put_nodes(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[dict[str, float], dict[str, str]]]
) -> None:
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": r, "Labels": n} for r, n in nodes]
    )


def test_each_pool_has_the_actors_that_its_nodes_have_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t4 = {"CPU": 4.0, "GPU": 2.0, "accelerator_type:T4": 1.0}
    put_nodes(
        monkeypatch,
        [
            ({"CPU": 16.0, "memory": 2.0**36}, {}), (t4, {}), (t4, {}),
            ({"CPU": 8.0, "GPU": 1.0}, {"kind": "big"}),
        ],
    )  # fmt: skip
    kinds = (
        PoolSpec(accelerator_type="T4", gpus_per_actor=0.5, dtype="float16"),
        PoolSpec(label_selector={"kind": "big"}, actors=(1, 1)),
        PoolSpec(gpus_per_actor=0, actors=2),
    )
    plan = plan_compute(ComputeSpec(pools=kinds), "text", 2**20)
    assert [(p.device, p.min_actors, p.max_actors) for p in plan.pools] == [
        ("cuda", 8, 8), ("cuda", 1, 1), ("cpu", 2, 2)
    ]  # fmt: skip
    assert (plan.min_actors, plan.max_actors) == (11, 11)
    assert plan.window_rows <= 256  # as of a CPU, the slowest
    assert (
        describe(plan) == "8 GPU actors (T4, float16) and 1 GPU actor (kind big) and 2 CPU actors"
    )
    assert plan.pools[0].options == {"num_cpus": 0.0, "num_gpus": 0.5, "accelerator_type": "T4"}
    assert plan.pools[0].shape == {"GPU": 0.5, "accelerator_type:T4": 0.001}
    assert plan.pools[1].options["label_selector"] == {"kind": "big"}
    # One of them alone, as a trial has it, and as ranges are measured.
    one = plan.of(plan.pools[2], num_actors=1)
    assert (one.device, one.max_actors, one.gpus_per_actor) == ("cpu", 1, 0)
    assert one.kinds[0].options["num_gpus"] == 0
    # Who has a part of a GPU keeps to that part of its memory.
    shares = [p.device_options.get("gpu_share") for p in plan.pools]
    assert shares == [0.5, None, None]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"accelerator_type": "T44"}, r"compute.pools.0: no node .* \(accelerator_type T44, 1 GPU"),
        ({"resources": {"disk": 1}}, r"compute.pools.0: no node .* \(disk 1\)"),
        ({"label_selector": {"a": "b"}}, r"compute.pools.0: no node .* \(a: b\)"),
        ({"accelerator_type": "T4", "actors": 2}, "compute.pools.0.actors: 2 asked with accel"),
        (
            {"gpus_per_actor": 2},
            "compute.pools.0.gpus_per_actor: 2 asked, there, or left by the others, are 1",
        ),
    ],
)
def test_a_pool_without_nodes_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], message: str
) -> None:
    put_nodes(monkeypatch, [({"CPU": 4.0, "GPU": 1.0, "accelerator_type:T4": 1.0}, {})])
    monkeypatch.setattr(capacity, "grows", lambda *_: False)
    with pytest.raises(SpecError, match=message):
        plan_compute(ComputeSpec(pools=(PoolSpec(**kind),)))


def test_pools_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    put_nodes(monkeypatch, [({"CPU": 4.0, "GPU": 2.0, "memory": 2.0**36}, {})])
    monkeypatch.setattr(capacity, "grows", lambda *_: False)
    # GPUs that a pool has are none that the next one finds; who says how many comes first.
    both = (PoolSpec(), PoolSpec(actors=1, dtype="float16"))
    assert [p.max_actors for p in plan_compute(ComputeSpec(pools=both)).pools] == [1, 1]
    with pytest.raises(SpecError, match=r"pools.1.actors: 2 asked with 1 GPU each, .* for 1"):
        plan_compute(ComputeSpec(pools=(PoolSpec(actors=1), PoolSpec(actors=2))))
    # So much is left of the CPUs that two tasks have one each, however many pools have the rest.
    cpus = PoolSpec(gpus_per_actor=0, actors=2)
    plan = plan_compute(ComputeSpec(pools=(cpus, cpus, PoolSpec(actors=1))))
    assert [p.cpus_per_actor for p in plan.pools] == [0.5, 0.5, 0.0]
    assert [p.num_threads for p in plan.pools[:2]] == [1, 1]
    # All that has room is asked for, and no more: it is not Ray Data that scales them.
    some = PoolSpec(actors=(1, 8))
    assert plan_compute(ComputeSpec(pools=(some,))).kinds[0].min_actors == 2


@pytest.mark.parametrize(
    ("pools", "gpus"),
    [
        ([{"gpus_per_actor": 1}, {"gpus_per_actor": 0}], 1),
        ([{"gpus_per_actor": 0}], 0),
        ([{"accelerator_type": "T4"}], 1),
        ([{}, {"gpus_per_actor": 0}], "auto"),
        ([{}, {"gpus_per_actor": 0.5}], 0.5),
    ],
)
def test_the_type_that_auto_means_goes_by_the_pools(pools: list[Any], gpus: Any) -> None:
    assert parse({"pools": pools}).compute.first_gpus == gpus


def test_of_what_comes_before_the_first_row_the_time_counts() -> None:
    counted = {
        "actor/pool0-a/load_s": 2.0, "actor/pool0-a/busy_s": 3.0, "actor/pool0-a/tokens": 900.0,
        "actor/pool0-a/peak_flops": 5e9, "batch_tokens/512/given": 1.0, "rows": 7.0,
    }  # fmt: skip
    assert pools._of_loading(counted) == {
        "actor/pool0-a/load_s": 5.0, "actor/pool0-a/peak_flops": 5e9, "batch_tokens/512/given": 1.0
    }  # fmt: skip


def test_windows_of_mixed_pools_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none waits long for the slowest one at the end, be the rows counted or not."""
    put_nodes(monkeypatch, [({"CPU": 4.0, "GPU": 2.0}, {})])
    both = ComputeSpec(pools=(PoolSpec(actors=1), PoolSpec(actors=1)))
    one = ComputeSpec(pools=(PoolSpec(actors=2),))
    for work in (Estimate(1e6, 10, 100_000), Estimate(1e6, 10, None)):
        assert plan_compute(both, "text", 1, work).window_rows == 100_000 // (48 * 2)
    assert plan_compute(one, "text", 1, Estimate(1e6, 10, 100_000)).window_rows == 8192


def test_the_next_actor_is_of_the_pool_that_lacks_most() -> None:
    make = pools.options_of((pool(4, 4, accelerator_type="T4"), pool(2, 2)))
    made = [make() for _ in range(6)]
    numbers = [m["runtime_env"]["env_vars"]["FMEMBED_POOL"] for m in made]
    assert numbers[:2] == ["0", "1"]
    assert Counter(numbers) == {"0": 4, "1": 2}
    assert made[0]["accelerator_type"] == "T4"


def made(vectors: Any, dtype: str = "float32", precision: str = "float32") -> Any:
    output = Output("embedding", "mean", None, True, None, precision)
    low, high = -np.ones(vectors.shape[1]), np.ones(vectors.shape[1])
    stored = finish(output, vectors.astype(np.float32), {"embedding": (low, high)})
    return pools._Made("compute.pools.0", "T4", dtype, pa.table({"embedding": stored.tolist()}))


def check(one: Any, other: Any, least: float | None = None, precision: str = "float32") -> None:
    output = Output("embedding", "mean", None, True, None, precision)
    dim = 64
    ranges = {"embedding": (-np.ones(dim, np.float32), np.ones(dim, np.float32))}
    pools.check(one, other, [output], ranges, least)


@pytest.mark.parametrize(
    ("noise", "dtype", "precision", "agrees"),
    [
        (1e-4, "float32", "float32", True),
        (0.003, "float32", "float32", False),
        (0.003, "bfloat16", "float32", True),
        (0.003, "float16", "float16", True),
        (0.02, "bfloat16", "float32", False),
        (0.002, "float32", "int8", True),
        (0.02, "float32", "int8", False),
        (0.001, "bfloat16", "binary", True),
        (0.1, "float32", "binary", False),
    ],
)
def test_vectors_are_held_to_those_of_others(
    noise: float, dtype: str, precision: str, agrees: bool
) -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(256, 64))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    off = exact + rng.normal(size=exact.shape) * noise
    mine, others = made(off, dtype, precision), made(exact, precision=precision)
    if agrees:
        check(mine, others, precision=precision)
        return
    with pytest.raises(ModelError, match=rf"compute.pools.0 \(T4, {dtype}\): its vectors are not"):
        check(mine, others, precision=precision)
    check(mine, others, least=0.1, precision=precision)


def test_one_row_that_is_off_or_missing_is_enough() -> None:
    exact = np.random.default_rng(0).normal(size=(256, 64))
    off = exact.copy()
    off[17] = exact[18]
    with pytest.raises(ModelError, match=r"of 256 rows 1 have a cosine below 0\.9999, the lowest"):
        check(made(off), made(exact))
    rows = made(exact).rows["embedding"].to_pylist()
    rows[3] = None
    lacks = pools._Made("compute.pools.1", "", "float16", pa.table({"embedding": rows}))
    with pytest.raises(ModelError, match=r"the lowest -1\.0000"):
        check(lacks, made(exact))
    check(lacks, lacks)  # a row that neither can embed


def test_where_a_cpu_would_take_too_long_the_first_actor_is_the_measure(
    local_ray: None, tiny_bert: Path
) -> None:
    class Stage:
        """Makes of each row its number, and of a pool in float16 another one."""

        def __init__(self, checkpoint: Any, **options: Any) -> None:
            self._off = checkpoint.dtype == "float16"
            assert options["device"] == "cuda"

        def __call__(self, rows: pa.Table) -> pa.Table:
            vectors = [[1.0, -float(n) if self._off else float(n)] for n in rows["n"].to_pylist()]
            return rows.append_column("embedding", pa.array(vectors))

    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    first = ray.remote(num_cpus=0)(pools._First).remote()
    held_to = pools.Measure(ray.put(pa.table({"n": range(8)})), None, first, None)
    kinds = [pool(1, 1), pool(1, 1, dtype="float16")]
    actor: Any = ray.remote(num_cpus=0)(pools.in_pools(Stage))

    def start(index: int) -> Any:
        told = actor.options(runtime_env={"env_vars": {"FMEMBED_POOL": str(index)}})
        return told.remote(checkpoint, pools=kinds, measure=held_to, ranges={})

    one = start(0)
    rows: Any = ray.get(one.__call__.remote(pa.table({"n": [5]})))
    assert rows["embedding"].to_pylist() == [[1.0, 5.0]]
    again = start(0)
    ray.get(again.__call__.remote(pa.table({"n": [5]})))
    other = start(1)
    with pytest.raises(ray.exceptions.ActorDiedError) as caught:
        ray.get(other.__call__.remote(pa.table({"n": [5]})))
    said = explain(caught.value)
    assert isinstance(said, ModelError)
    assert str(said).startswith(
        "compute.pools.1 (float16): its vectors are not those of compute.pools.0 (float32): "
    )


def test_each_pool_has_its_price() -> None:
    compute = {
        "price_per_device_hour": 4, "budget": {"cost": 100},
        "pools": [{"actors": 1}, {"actors": 3, "price_per_device_hour": 1}],
    }  # fmt: skip
    spec = parse(compute)
    counts = {"actor/pool0-a/busy_s": 3600.0, "actor/pool1-b/load_s": 1800.0, "windows": 3.0}
    assert price(spec, counts) == {"device_hours": 1.5, "cost": 4.5}
    plan = Plan("cuda", 4, 4, 1, 0, 1, 1, 1, 16, "auto", pools=(pool(1, 1), pool(3, 3)))
    assert mean_price(spec, plan) == (4 + 3) / 4
    with pytest.raises(SpecError, match="takes a price"):
        parse({**compute, "price_per_device_hour": None})


def parse(compute: dict[str, Any]) -> RunSpec:
    return RunSpec.parse(
        {
            "source": {"uri": "in"}, "model": {"id": "m"}, "output": {"uri": "out"},
            "compute": compute,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        ({"pools": [{"accelerator": "T4"}]}, "compute.pools.0.accelerator: unknown key"),
        ({"pools": [{"actors": 0}]}, "compute.pools.0.actors: takes a number of at least 1"),
        ({"pools": [{"resources": {"GPU": 1}}]}, "compute.pools.0.resources: GPU is gpus_per_"),
        ({"pools": [{"label_selector": {"a": "in(b"}}]}, "takes for each label a value"),
        ({"pools": [{"label_selector": {"bad key!": "b"}}]}, "takes names of labels as Kubern"),
        ({"pools": [{"label_selector": {"": "b"}}]}, "takes names of labels as Kubernetes has"),
        ({"pools": [{"label_selector": {"a": "-x"}}]}, "takes for each label a value"),
        ({"pools": [{"label_selector": {"a": "b" * 64}}]}, "takes for each label a value"),
        ({"pools": [{"resources": {"object_store_memory": 1}}]}, "object_store_memory is Ray's"),
        ({"pools": [{"resources": {"a": 1e-5}}]}, "takes for each resource a part of one, 0.0001"),
        ({"pools": [{"actors": True}]}, "compute.pools.0.actors: takes a number of at least 1"),
        ({"actors": 10**30}, "compute.actors: takes at most 100,000"),
        ({"pools": [{}], "actors": 2}, "compute: takes pools, each with its actors, or actors"),
        ({"pools": {"a": 1}}, "compute.pools: takes a list"),
        (
            {"min_agreement": 0.9},
            "compute: min_agreement is what pools are held to; there are none",
        ),
        ({"gpus_per_actor": 1.5}, "compute.gpus_per_actor: takes a part of one GPU, or a whole"),
    ],
)
def test_what_a_config_says_wrong_of_pools_is_told(compute: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(compute)
    assert message in str(caught.value)
