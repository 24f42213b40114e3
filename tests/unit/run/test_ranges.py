"""The ranges of int8 are measured, whatever a row of the sample does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from fmembed.run import ranges


def find(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[bool]:
    """Whether each try was apart, of tries that end so."""
    tries: list[bool] = []
    left = iter(errors)

    def measure(*_: Any, apart: bool) -> Any:
        tries.append(apart)
        if error := next(left, None):
            raise error
        return {}

    monkeypatch.setattr(ranges, "_measure", measure)
    monkeypatch.setattr(ranges, "_in_need", lambda _: ["embedding"])
    inputs: Any = SimpleNamespace(table=SimpleNamespace(card=lambda: None))
    ranges.find_ranges(inputs, inputs, inputs, object, 0)
    return tries


def test_after_a_task_that_died_on_each_try_the_sample_is_read_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find(monkeypatch) == [False]
    assert find(monkeypatch, ray.exceptions.WorkerCrashedError()) == [False, True]
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        find(monkeypatch, *[ray.exceptions.WorkerCrashedError()] * 2)
    with pytest.raises(ray.exceptions.RayActorError):
        find(monkeypatch, ray.exceptions.RayActorError())
