"""What runs on record tell of how fast another one will go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fmembed.run import pace


def test_a_record_that_makes_no_sense_tells_nothing() -> None:
    def actors_of(**actor: float) -> Any:
        whole = {"load_s": 1.0, "wait_s": 1.0, "busy_s": 2.0, **actor}
        return pace._actors(SimpleNamespace(verdict={"actors": {"a": whole}}, stages={}))

    assert actors_of() == [(1.0, 1.0, 2.0)]
    for odd in ({"wait_s": -2.0}, {"busy_s": 0.0}, {"busy_s": 1e308}, {"load_s": -1e-9}):
        assert actors_of(**odd) == []
