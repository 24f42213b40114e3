"""A run's verdict for Prometheus, by Ray's own exporter: `ray_fmembed_run_*`, anew at each commit.

The actors' own counters (`meter.Meter`) tell the same of each process, window by window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

_FIGURES = {
    "wait_share": "Part of the actors' time in which they waited for rows.",
    "padding_waste": "Part of the computed tokens that were padding.",
    "tokens_per_s": "Tokens a second while the model was at work.",
    "mfu": "The model's FLOP/s as a part of a matrix product's on the same device.",
}


class RunMetrics:
    """Gauges of one run, told apart by its id."""

    def __init__(self, run_id: str) -> None:
        self._run = {"run": run_id}
        self._rows = Gauge("fmembed_run_rows", "Rows by what became of them.", ("run", "outcome"))
        self._seconds = Gauge(
            "fmembed_run_seconds", "Seconds summed over a stage's processes.", ("run", "stage")
        )
        self._figures = {
            name: Gauge(f"fmembed_run_{name}", text, ("run",)) for name, text in _FIGURES.items()
        }

    def publish(self, rows: Mapping[str, int], verdict: Mapping[str, Any]) -> None:
        """Set all gauges.

        Args:
            rows: By outcome.
            verdict: What `verdict.judge` makes of the counts so far; empty where no model ran here.
        """
        for outcome, count in rows.items():
            self._rows.set(count, {**self._run, "outcome": outcome})
        for stage, seconds in verdict.get("seconds", {}).items():
            self._seconds.set(seconds, {**self._run, "stage": stage})
        for name, gauge in self._figures.items():
            if verdict.get(name) is not None:
                gauge.set(verdict[name], self._run)
