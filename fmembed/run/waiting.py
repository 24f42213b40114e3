"""A run that has not what it has asked for waits and says so; one whose model ends its own process
each time is given up.

`StreamingExecutor._no_progress_guard` is Ray's internal (2.60): after half an hour in which nothing
moved it ends an execution, whatever that waits for. Here it is told of waiting, so that what it
ends is a hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from fmembed.errors import SpecError, WaitedError
from fmembed.run import capacity
from fmembed.run.faults import MAX_ACTOR_RESTARTS, ModelDiedError
from fmembed.run.plan import Plan, Pool
from fmembed.telling import Teller, duration

# Between two looks at the cluster: one costs the head some milliseconds.
_LOOK_S = 2.0
# It is said once it has waited so long, and then as often; where the number is another, sooner.
_FIRST_S, _EVERY_S, _CHANGED_S = 5.0, 600.0, 60.0


@dataclass(frozen=True)
class _Wanted:
    """Actors of a kind that no node has room for; `kind` is None for the tasks that feed them."""

    kind: Pool | None
    number: int
    impossible: bool

    def words(self) -> str:
        """What is waited for."""
        if self.kind is None:
            return "CPUs"
        name = f" ({self.kind.name})" if self.kind.name else ""
        number = self.number * self.kind.gpus_per_actor
        if not number:
            return f"room for {self.number:,} of the actors{name}"
        return f"{number:g} {'GPU' if number == 1 else 'GPUs'}{name}"

    def check(self) -> None:
        """Refuse what can never be.

        Raises:
            SpecError: No node of this cluster will ever have it.
        """
        if not self.impossible:
            return
        if self.kind is not None and self.kind.name:
            raise SpecError(
                f"compute.pools: no node that this cluster's autoscaler may start has room for an "
                f"actor of the kind {self.kind.name}; leave the pool out, or give it such nodes"
            )
        gpus = self.kind.gpus_per_actor if self.kind is not None else 0
        raise SpecError(
            f"compute.gpus_per_actor: {gpus:g} asked, and no node that this cluster's "
            "autoscaler may start has so many; name fewer, 0 for CPUs, or give it such nodes"
        )


class Watch:
    """Looks at what the actors of a run wait for, and at how often their processes have died."""

    def __init__(
        self,
        plan: Plan,
        stage: str,
        teller: Teller,
        wait_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            plan: What each actor is given.
            stage: Stands in the names of the actors' classes.
            teller: Says what is waited for.
            wait_s: So long a run waits without anybody at work; None for ever.
            clock: In seconds.
        """
        # Pools of one shape are one to Ray's scheduler.
        both = ((kind.shape.items(), kind.label_selector.items()) for kind in plan.kinds)
        shapes = [(frozenset(shape), frozenset(labels)) for shape, labels in both]
        self._kinds = [k for i, k in enumerate(plan.kinds) if shapes.index(shapes[i]) == i]
        self._task = {"CPU": plan.cpus_per_task}
        self._stage, self._teller, self._wait_s, self._clock = stage, teller, wait_s, clock
        self._looked = -_LOOK_S
        self._since: float | None = None
        self._idle_since: float | None = None
        self._said: tuple[float, str] | None = None
        self._num_done, self._num_asked = -1, 0
        self._before: dict[str, capacity.Process] = {}
        self.text = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has less than it has asked for."""
        return self._since is not None

    def get(self, ref: Any) -> Any:
        """`ray.get` of a task that asks for what an actor does.

        Raises:
            WaitedError: It has waited for longer than it may.
            SpecError: No node of this cluster will ever have what it asks for.
            ray.exceptions.RayError: The task's own.
        """
        while not ray.wait([ref], timeout=_LOOK_S)[0]:
            self._take_note(self._demand(), num_alive=0, num_asked=1)
        self._take_note([], num_alive=1, num_asked=1)
        return ray.get(ref)

    def look(self, num_done: int) -> None:
        """Look at the cluster, unless that was just done.

        Args:
            num_done: Windows that have come out of the model.

        Raises:
            WaitedError: It has waited for longer than it may.
            SpecError: No node of this cluster will ever have what it asks for.
            ModelDiedError: An actor's process has died too often since a window came out of any.
        """
        now = self._clock()
        if now < self._looked + _LOOK_S:
            return
        self._looked = now
        pool = capacity.processes(self._stage)
        self._check_deaths(pool, num_done)
        num_alive = sum(process.is_alive for process in pool)
        self._take_note(self._demand(), num_alive, len(pool))

    def _demand(self) -> list[_Wanted]:
        found = []
        for kind in self._kinds:
            if not kind.shape and not kind.label_selector:
                continue
            demand = capacity.demand(kind.shape, kind.label_selector)
            if demand.num_waiting:
                found.append(_Wanted(kind, demand.num_waiting, demand.impossible))
        if not found and not any(n.get("CPU", 0) for n in capacity.nodes()):
            tasks = capacity.demand(self._task)
            found = [_Wanted(None, tasks.num_waiting, tasks.impossible)]
        return found

    def _check_deaths(self, pool: list[capacity.Process], num_done: int) -> None:
        """Bound deaths by what is done in between, and not by their number: a pool that loses nodes
        all day goes on as long as windows come out of it.
        """
        if num_done != self._num_done:
            self._num_done, self._before = num_done, {p.actor: p for p in pool}
        for process in pool:
            before = self._before.get(process.actor)
            deaths, num_rebuilt = process.deaths, process.num_rebuilt
            if before is not None:
                deaths, num_rebuilt = deaths - before.deaths, num_rebuilt - before.num_rebuilt
            # Ray starts an actor once more, too, to compute again what was lost with a node.
            if len(deaths) - num_rebuilt > MAX_ACTOR_RESTARTS:
                raise ModelDiedError("each time on a node that lives")

    def _take_note(self, demand: list[_Wanted], num_alive: int, num_asked: int) -> None:
        now = self._clock()
        left, wanted = max(num_asked - num_alive, 0), list[_Wanted]()
        for one in demand:
            if number := min(one.number, left):
                wanted.append(replace(one, number=number))
                left -= number
        for one in wanted:
            one.check()
        if not wanted:
            # At its end a run gives up what it waits for, and then none of it has come.
            has_come = num_asked >= self._num_asked
            if self._said is not None and self._since is not None and has_come:
                self._teller.say(f"all are there, after {duration(now - self._since)} …")
            self._since = self._idle_since = self._said = None
            self.text = ""
            return
        self._since = now if self._since is None else self._since
        self._num_asked = num_asked
        what = " and ".join(one.words() for one in wanted)
        self.text = f"waiting for {what}, for {duration(now - self._since)}"
        if num_alive:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._wait_s is not None and self._idle_since is not None \
                and now - self._idle_since >= self._wait_s:  # fmt: skip
            raise WaitedError(
                f"compute.wait_s: no device for {self._wait_s:g} s, waiting for {what}"
            )
        at_work = f"; {num_alive:,} at work" if num_alive else ""
        self._say(now, what, f"waiting for {what}{at_work}")

    def _say(self, now: float, what: str, text: str) -> None:
        """At first, where the number is another one, and now and then."""
        assert self._since is not None
        if self._said is None:
            if now - self._since < _FIRST_S:
                return
        else:
            at, before = self._said
            if now - at < (_EVERY_S if what == before else _CHANGED_S):
                return
            text += f", for {duration(now - self._since)} by now"
        self._said = now, what
        self._teller.say(f"{text} …")


def see_node(plan: Plan, watch: Watch) -> None:
    """Wait for the first node of the kind that a plan needs."""
    task = ray.remote(num_cpus=0, num_gpus=plan.gpus_per_actor, max_retries=-1)
    if not plan.gpus_per_actor:
        task = ray.remote(num_cpus=plan.cpus_per_task, max_retries=-1)
    watch.get(task(_nothing).remote())


def _nothing() -> None:
    pass


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Have a watch look while the datasets that are run within are executed."""
    context = ray.data.DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    context.custom_execution_callback_classes = [*before, _Look]
    _Look.watch = watch
    try:
        yield
    finally:
        _Look.watch = None
        left = context.custom_execution_callback_classes
        context.custom_execution_callback_classes = [c for c in left if c is not _Look]


class _Look(ExecutionCallback):
    """Looks at each step of a running executor, which it takes ten times a second or more."""

    # On the class, because Ray makes the instance itself and pickles the class with its context.
    watch: ClassVar[Watch | None] = None

    def on_execution_step(self, executor: Any) -> None:
        watch = self.watch
        if watch is None:
            return
        operators = executor._topology or ()
        done = (o.metrics.num_tasks_finished or 0 for o in operators if watch._stage in o.name)
        watch.look(sum(done))
        if watch.is_waiting:
            guard = executor._no_progress_guard
            guard._last_progress_time = guard._clock()
