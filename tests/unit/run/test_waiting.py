"""What a run says and does while it has not what it has asked for, and of what it gives up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
from ray.data._internal.execution.no_progress_guard import NoProgressGuard
from ray.data.exceptions import ExecutionTimeoutError

from fmembed.errors import SpecError, WaitedError
from fmembed.run import capacity, waiting
from fmembed.run.capacity import Demand, Process
from fmembed.run.faults import ModelDiedError, explain, is_loss
from fmembed.run.plan import Plan, Pool
from fmembed.run.waiting import Watch, watched
from fmembed.telling import Teller


def plan_of(gpus: float, cpus: float = 0.0, pools: tuple[Pool, ...] = ()) -> Plan:
    device = "cuda" if gpus else "cpu"
    return Plan(device, 1, 4, gpus, cpus, 1, 1.0, 1, 256, "auto", pools=pools)


GPUS = plan_of(1.0)


class Cluster:
    """A cluster of which each look is told; and a clock, and what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.said = 0.0, list[str]()
        self.num_waiting, self.impossible, self.cpus = 0, False, 2.0
        self.pool: list[Process] = []
        self.asked: list[Any] = []
        monkeypatch.setattr(capacity, "demand", self.demand)
        monkeypatch.setattr(capacity, "processes", lambda _: self.pool)
        monkeypatch.setattr(capacity, "nodes", lambda: [{"CPU": self.cpus}])

    def demand(self, shape: Any, labels: Any = None) -> Demand:
        self.asked.append(shape)
        return Demand(self.num_waiting, self.impossible)

    def watch(self, wait_s: float | None = None, plan: Any = GPUS) -> Watch:
        teller = Teller()
        teller.say = self.said.append  # type: ignore[method-assign]
        return Watch(plan, "Embed", teller, wait_s, lambda: self.now)

    def has(self, num_alive: int, num_waiting: int) -> None:
        self.num_waiting = num_waiting
        self.pool = [process(str(i), i < num_alive) for i in range(num_alive + num_waiting)]


def process(actor: str, is_alive: bool, deaths: str = "", num_rebuilt: int = 0) -> Process:
    return Process(actor, is_alive, frozenset(d.encode() for d in deaths), num_rebuilt)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_run_says_for_what_it_waits_and_how_long_now_and_then(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.has(0, 4)
    for cluster.now in range(2, 3600):
        watch.look(0)
    assert cluster.said[0] == "waiting for 4 GPUs …"
    assert cluster.said[1:3] == [
        "waiting for 4 GPUs, for 10 min by now …", "waiting for 4 GPUs, for 20 min by now …"
    ]  # fmt: skip
    assert len(cluster.said) == 6
    assert watch.is_waiting
    assert watch.text == "waiting for 4 GPUs, for 60 min"
    cluster.now, _ = 3602, cluster.has(3, 1)
    watch.look(0)
    assert cluster.said[-1] == "waiting for 1 GPU; 3 at work, for 60 min by now …"
    cluster.now, cluster.num_waiting = 3604, 0  # it has its GPU, and is loading
    watch.look(0)
    assert cluster.said[-1] == "all are there, after 60 min …"
    assert (watch.is_waiting, watch.text) == (False, "")


def test_what_is_given_up_at_the_end_has_not_come(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.has(2, 2)
    for cluster.now in range(2, 20):
        watch.look(0)
    cluster.now, _ = 22, cluster.has(2, 0)
    watch.look(0)
    assert cluster.said == ["waiting for 2 GPUs; 2 at work …"]


def test_what_others_wait_for_is_not_said_and_a_short_wait_neither(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.has(4, 0)
    cluster.num_waiting = 7
    for cluster.now in range(2, 100):
        watch.look(0)
    cluster.has(3, 1)
    for cluster.now in range(100, 104):
        watch.look(0)
    cluster.has(4, 0)
    cluster.now = 106
    watch.look(0)
    assert cluster.said == []


def test_a_run_without_a_device_waits_for_as_long_as_it_may(cluster: Cluster) -> None:
    watch = cluster.watch(wait_s=600)
    cluster.has(1, 3)
    for cluster.now in range(2, 5000):  # with one at work it may wait for the others for ever
        watch.look(0)
    cluster.has(0, 4)
    for cluster.now in range(5000, 5600):
        watch.look(0)
    cluster.now = 5604
    with pytest.raises(WaitedError, match=r"compute\.wait_s: no device for 600 s, waiting for 4 G"):
        watch.look(0)


def test_what_no_node_will_ever_have_is_refused(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.has(0, 1)
    cluster.impossible = True
    with pytest.raises(SpecError, match=r"compute\.gpus_per_actor: 1 asked, and no node"):
        watch.look(0)


def test_where_all_nodes_with_cpus_are_gone_it_waits_for_these(cluster: Cluster) -> None:
    plan = replace(plan_of(0.0), cpus_per_task=0.5)
    watch = cluster.watch(plan=plan)
    cluster.has(0, 1)
    watch.look(0)
    assert not watch.is_waiting
    cluster.now, cluster.cpus = 2, 0.0
    watch.look(0)
    assert cluster.asked == [{"CPU": 0.5}]
    assert watch.text == "waiting for CPUs, for 0 s"


def test_an_actor_that_dies_on_every_try_ends_the_run(cluster: Cluster) -> None:
    watch = cluster.watch()
    cluster.pool = [process("a", True, "123"), process("b", True)]
    watch.look(0)
    cluster.now, cluster.pool = 2, [process("a", True, "1234"), process("b", True, "567")]
    watch.look(0)  # the first look knew three of them
    cluster.now, cluster.pool = 4, [process("a", False, "12"), process("b", False, "5678")]
    with pytest.raises(ModelDiedError) as died:
        watch.look(0)
    assert is_loss(died.value)
    assert str(explain(died.value)).startswith("the model's process died 4 times and was given up")


def test_deaths_are_bounded_by_what_is_done_in_between(cluster: Cluster) -> None:
    watch = cluster.watch()
    for n in range(40):
        cluster.now += waiting._LOOK_S
        cluster.pool = [process("a", True, "".join(chr(65 + i) for i in range(n)))]
        watch.look(n)
    # Nor does one count that Ray has started again to compute once more what was lost.
    cluster.now += waiting._LOOK_S
    cluster.pool = [process("a", True, "".join(chr(65 + i) for i in range(44)), num_rebuilt=2)]
    watch.look(n)


def test_rays_guard_against_hangs_is_told_of_waiting_and_of_nothing_else(cluster: Cluster) -> None:
    queues = SimpleNamespace(
        total_enqueued_input_blocks=lambda: 0, total_enqueued_output_blocks=lambda: 0
    )
    topology: Any = dict.fromkeys([Operator("ReadShards"), Operator("MapBatches(Embed)")], queues)
    guard = NoProgressGuard(topology, 1800.0, clock=lambda: cluster.now)
    executor = SimpleNamespace(_topology=topology, _no_progress_guard=guard)
    context = ray.data.DataContext.get_current()
    cluster.has(0, 2)
    with watched(cluster.watch()):
        (look,) = (c() for c in context.custom_execution_callback_classes if c is waiting._Look)
        for cluster.now in range(2, 5000, 10):
            guard.check()
            look.on_execution_step(executor)
        cluster.has(2, 0)
        with pytest.raises(ExecutionTimeoutError):  # noqa: PT012 - the one that is due
            for cluster.now in range(5000, 7000, 10):
                look.on_execution_step(executor)
                guard.check()
        assert cluster.now >= 6790
    assert waiting._Look not in context.custom_execution_callback_classes


class Operator:
    """What Ray's guard and the watch look at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metrics = SimpleNamespace(num_tasks_finished=0, num_outputs_taken=0)

    def has_completed(self) -> bool:
        return False

    def num_active_tasks(self) -> int:
        return 0


def test_of_several_kinds_each_is_said_that_is_waited_for(cluster: Cluster) -> None:
    kinds = (
        Pool("cuda", 1, 2, 1.0, 0.0, 1, accelerator_type="T4"),
        Pool("cuda", 1, 2, 0.5, 0.0, 1, resources={"fast": 1}),
        Pool("cpu", 1, 2, 0.0, 1.0, 1),
    )
    watch = cluster.watch(plan=plan_of(1.0, pools=kinds))
    cluster.has(0, 1)
    cluster.pool = [process(str(i), False) for i in range(3)]
    watch.look(0)
    assert watch.text.startswith(
        "waiting for 1 GPU (T4) and 0.5 GPUs (fast) and room for 1 of the actors"
    )
    assert {"GPU": 1.0, "accelerator_type:T4": 0.001} in cluster.asked
    cluster.now, cluster.impossible = 10, True
    with pytest.raises(SpecError, match="has room for an actor of the kind T4"):
        watch.look(0)
