"""What Ray Data may hold moves with what the driver holds, and only while a run is going."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import ray.data

from fmembed.run.memory import _BUFFER_BYTES, moving_bound, store_bytes
from fmembed.run.plan import Plan


class Limits(SimpleNamespace):
    def copy(self, **changed: Any) -> Limits:
        return Limits(**{**vars(self), **changed})


def step() -> float:
    """What a running executor is bound to after one more step."""
    options = SimpleNamespace(resource_limits=Limits(object_store_memory=1.0, cpu=2))
    executor: Any = SimpleNamespace(_resource_manager=SimpleNamespace(_options=options))
    for callback in ray.data.DataContext.get_current().custom_execution_callback_classes:
        callback().on_execution_step(executor)
    assert options.resource_limits.cpu == 2
    return float(options.resource_limits.object_store_memory)


def test_the_bound_moves_until_the_run_ends() -> None:
    plan = Plan("cpu", 3, 3, 0.0, 0.0, 1, 1.0, 1, 256, "auto")
    alone = 3 * _BUFFER_BYTES["cpu"]
    assert store_bytes(plan, 0) == alone
    with contextlib.suppress(ValueError), moving_bound(plan) as hold:
        assert step() == alone
        hold(1000)
        assert step() == alone + 2000
        hold(0)
        assert step() == alone
        raise ValueError("the run fails")
    assert step() == 1.0
