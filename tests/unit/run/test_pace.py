"""What runs on record tell of how fast another one will go."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.run import pace


def test_a_record_that_makes_no_sense_tells_nothing() -> None:
    def actors_of(**actor: float) -> Any:
        whole = {"load_s": 1.0, "wait_s": 1.0, "busy_s": 2.0, **actor}
        return pace._actors(SimpleNamespace(verdict={"actors": {"a": whole}}, stages={}))

    assert actors_of() == [(1.0, 1.0, 2.0)]
    for odd in ({"wait_s": -2.0}, {"busy_s": 0.0}, {"busy_s": 1e308}, {"load_s": -1e-9}):
        assert actors_of(**odd) == []


def test_a_window_is_done_before_a_node_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(device: str, rows: int, **tokens_per_s: float) -> Any:
        actors = {
            name: {"load_s": 1.0, "wait_s": 0.0, "busy_s": 10.0, "tokens": 10 * rate}
            for name, rate in tokens_per_s.items()
        }
        return SimpleNamespace(
            compute={"device": device}, rows_embedded=rows, verdict={"actors": actors}, stages={}
        )

    def window(window_rows: Any = "auto") -> int:
        plan: Any = Planned("cuda", 4096)
        spec = SimpleNamespace(compute=SimpleNamespace(window_rows=window_rows))
        inputs: Any = SimpleNamespace(spec=spec)
        return pace.shorten_windows(plan, inputs).window_rows

    runs: list[Any] = []
    monkeypatch.setattr(pace, "list_runs", lambda _: iter(runs))
    assert window() == 4096
    # 200 rows of 100 tokens; the slower one did 5 rows/s.
    runs += [run("cuda", 200, fast=1500.0, slow=500.0), run("cpu", 1, a=1.0)]
    assert window() == 20 * 5
    assert window(4096) == 4096
    runs.append(run("cuda", 2000, a=200.0, b=200.0))  # of 2 tokens: 100 rows/s
    assert window() == 100
    runs.append(run("cuda", 1, a=500.0))  # a row in 10 s: no fewer than a batch
    assert window() == 16
    runs[:] = [run("cuda", 0, a=500.0)]
    assert window() == 4096


@dataclass(frozen=True)
class Planned:
    device: str
    window_rows: int
