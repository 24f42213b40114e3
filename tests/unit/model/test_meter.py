"""A clock that adds up, and needs no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from fmembed.model.meter import Meter


def test_windows_add_up() -> None:
    peaks = iter([5.0, 3.0, 9.0, *[1.0] * 20])
    meter = Meter(2.5, lambda: next(peaks), lambda lengths: float(lengths.sum() * 10))
    total: dict[str, float] = {}
    for _ in range(12):
        meter.start()
        with meter.timed("forward_s"):
            meter.batch(np.array([3, 2]), 6)
        meter.batch(np.array([3, 2]), 5)
        for name, value in meter.stop().items():
            total[name] = total.get(name, 0) + value
    own = {name.removeprefix("actor/local/"): value for name, value in total.items()}
    assert (own["windows"], own["load_s"], own["peak_flops"]) == (12, 2.5, 9.0)
    assert (own["tokens"], own["slots"], own["flop"]) == (120, 132, 1200)
    assert len(list(peaks)) == 23 - 4  # measured four times, not for every window
    assert own["wait_s"] >= 0
    assert own["busy_s"] >= own["forward_s"] >= 0


def test_a_stand_in_for_a_model_imports_no_torch() -> None:
    script = (
        "import sys; from types import SimpleNamespace as Given\n"
        "from fmembed.bench.ways import EmbedNothing\n"
        "EmbedNothing(Given(outputs=[]), pieces_are_rows=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
