"""What a model's process does with its time; without torch, as a stand-in for a model may be."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fmembed.arrays import Ints

# Windows before which the peak is measured. Each time takes 100 ms of a core; twice as many
# products in twice as many windows cost a run of 1,500 articles 2 % of its rate.
_PEAK_WINDOWS = 4
# The variable that tells an actor of which of several pools it is, by number; and what its name
# here begins with, then that and a hyphen.
POOL, POOL_SIGN = "FMEMBED_POOL", "pool"


class Meter:
    """Seconds, tokens and FLOP of one process; a window's share of them goes into its counts."""

    def __init__(
        self, load_s: float, peak: Callable[[], float], cost: Callable[[Ints], float]
    ) -> None:
        """Start the clock.

        Args:
            load_s: What loading took.
            peak: Measures FLOP/s of a matrix product alone.
            cost: FLOP of the model for rows of these lengths.
        """
        self._name = _actor_name()
        self._cost = cost
        self._load_s, self._peak = load_s, peak
        self._num_windows = 0
        self._peak_flops = 0.0
        self._ended: float | None = None
        self._counts: dict[str, float] = {}
        self._metrics: dict[str, Any] = {}

    def start(self) -> None:
        """A window begins; the time since the last one ended was spent waiting for it."""
        now = time.perf_counter()
        self._counts = {"windows": 1}
        if self._ended is None:
            self._counts["load_s"] = self._load_s
        else:
            self._counts["wait_s"] = now - self._ended
        # More than once, because other processes start at the same time: the first measurement
        # alone gave a third of what later ones did.
        if self._num_windows < _PEAK_WINDOWS:
            found = self._peak()
            # Counts are added up over windows, so report only the rise over the last peak.
            self._counts["peak_flops"] = max(found - self._peak_flops, 0.0)
            self._peak_flops = max(found, self._peak_flops)
        self._num_windows += 1
        self._began = time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's seconds to `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - began)

    def batch(self, lengths: Ints, num_slots: int) -> None:
        """Count a batch that was computed: its rows' tokens, and those that were, with padding."""
        self._add("tokens", int(lengths.sum()))
        self._add("slots", num_slots)
        self._add("flop", self._cost(lengths))

    def stop(self) -> dict[str, float]:
        """The window ends; what is to be stored of it, by `actor/<name>/<figure>`."""
        self._ended = time.perf_counter()
        self._add("busy_s", self._ended - self._began)
        self._publish()
        return {f"actor/{self._name}/{k}": round(v, 4) for k, v in self._counts.items()}

    def _add(self, name: str, value: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + value

    def _publish(self) -> None:
        """The same to Ray, which offers them to Prometheus as `ray_fmembed_<figure>_total`."""
        if self._name == "local":
            return
        from ray.util.metrics import Counter

        for name, value in self._counts.items():
            if name == "peak_flops" or value <= 0:
                continue
            if name not in self._metrics:
                description = _DESCRIPTIONS[name]
                self._metrics[name] = Counter(f"fmembed_{name}", description, ("actor",))
            self._metrics[name].inc(value, {"actor": self._name})


_DESCRIPTIONS = {
    "windows": "Windows of rows embedded.",
    "load_s": "Seconds spent loading the model.",
    "wait_s": "Seconds the model waited for its next window.",
    "busy_s": "Seconds spent on windows.",
    "forward_s": "Seconds of the model's forward pass.",
    "copy_s": "Seconds of copying vectors back.",
    "tokens": "Tokens, patches or frames of the rows.",
    "slots": "The same with padding, as computed.",
    "flop": "Floating-point operations of the model.",
}


def _actor_name() -> str:
    """Short and unique in a cluster, with the pool's number first where it is of one; "local"
    outside Ray's workers.
    """
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "local"
    actor = ray.get_runtime_context().get_actor_id()
    if not actor:
        return "local"
    pool = f"{POOL_SIGN}{os.environ[POOL]}-" if POOL in os.environ else ""
    return f"{pool}{str(actor)[:8]}"
