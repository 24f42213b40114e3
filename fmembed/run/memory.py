"""What Ray Data may hold between the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:  # Ray's workers import this module, and need nothing of those
    from fmembed.run.plan import Plan

# What may wait in the object store for each actor: seconds of its work.
_BUFFER_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}
# Ray's own 128 MiB are held several times over: by the task, its output buffer and the store.
_BLOCK_BYTES = 32 * 2**20


def store_bytes(plan: Plan, held_bytes: int) -> int:
    """What Ray Data may hold between the stages: no more than keeps the actors busy.

    By default it fills a half of its object store when reading is faster than the model: the more
    rows, the more memory, up to that. It counts a block against the stage that made it for as long
    as anybody holds it, and half of the whole is for any stage: without room for twice what waits
    to be written, the actors were given nothing to do as soon as a part's worth was waiting, until
    all was read.
    """
    num_bytes = sum(pool.max_actors * _BUFFER_BYTES[pool.device] for pool in plan.kinds)
    return num_bytes + 2 * held_bytes


def bound_memory(plan: Plan) -> None:
    """Bound what the datasets that run from now on may hold."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=store_bytes(plan, 0))


@contextmanager
def moving_bound(plan: Plan) -> Iterator[Callable[[int], None]]:
    """Let the bound of the datasets that run within move with what the driver holds.

    Yields:
        What is called, by the driver's thread, with the bytes that wait to be written. Ray reads
        the bound in another thread: hence a number, and not who holds them.
    """
    context = ray.data.DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    context.custom_execution_callback_classes = [*before, _Bound]
    _Bound.most = store_bytes(plan, 0)

    def move(held_bytes: int) -> None:
        _Bound.most = store_bytes(plan, held_bytes)

    try:
        yield move
    finally:
        _Bound.most = None
        context.custom_execution_callback_classes = before


class _Bound(ExecutionCallback):
    """Moves the bound of a running executor, which Ray Data (2.60) reads once a second.

    And takes the task that cuts windows out of what bounds it: Ray Data would keep a share of the
    CPUs for it as large as that of reading and preparing, which needs nearly all.
    """

    # On the class, because Ray makes the instance itself and pickles the class with its context.
    most: ClassVar[int | None] = None

    def before_execution_starts(self, executor: Any) -> None:
        for operator in executor._topology:
            if operator.name.startswith("StreamingRepartition"):
                operator.throttling_disabled = lambda: True

    def on_execution_step(self, executor: Any) -> None:
        if self.most is not None:
            options = executor._resource_manager._options
            limits = options.resource_limits.copy(object_store_memory=self.most)
            options.resource_limits = limits
