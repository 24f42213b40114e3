"""What a model's process does with its time, and how near it comes to what the device can do.

Legend: FLOP are floating-point operations, an addition and a multiplication being two.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fmembed.arrays import Ints
from fmembed.model.failures import cause_of, free_memory
from fmembed.model.linear import FusedLinear, fused_dtypes
from fmembed.rows.pieces import Piece

if TYPE_CHECKING:
    from fmembed.model.forward import Model

_CPU_SIZE, _CUDA_SIZE, _REPEATS = 1024, 8192, 4
# Tokens of the longer of the two texts whose FLOP are counted.
_COUNTED_TOKENS = 64
# Windows before which the peak is measured. Each time takes 100 ms of a core; twice as many
# products in twice as many windows cost a run of 1,500 articles 2 % of its rate.
_PEAK_WINDOWS = 4


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
    """Short and unique in a cluster; "local" outside Ray's workers."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "local"
    actor = ray.get_runtime_context().get_actor_id()
    return str(actor)[:8] if actor else "local"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of a few: what the model can hope for.

    On a CPU by torch's own product and by oneDNN's, which on an AMD EPYC had 1.6 times the rate of
    the other in float32.
    """
    size = _CUDA_SIZE if device.type == "cuda" else _CPU_SIZE
    a = torch.randn(size, size, device=device).to(dtype)
    products: list[Callable[[Tensor], Tensor]] = [a.matmul]
    if device.type == "cpu" and dtype in fused_dtypes():
        products.append(FusedLinear(nn.Linear(size, size, bias=False, dtype=dtype), gelu=False))
    best = 0.0
    for product in products * _REPEATS:
        began = time.perf_counter()
        product(a)
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


@torch.inference_mode()
def time_batch(model: Model, pieces: list[Piece]) -> float | None:
    """Seconds that a batch takes; None where the model fails on it."""
    began = time.perf_counter()
    try:
        model.forward(pieces)
        synchronize(model.device)
        return time.perf_counter() - began
    except Exception as e:
        cause_of(e)
    free_memory(model.device)
    return None


def count_flop(model: Model) -> Callable[[Ints], float]:
    """The model's FLOP for rows of given lengths; 0 where they cannot be counted.

    Two runs are counted. Matrix products and convolutions grow with the length, attention with its
    square: two lengths tell both factors.
    """
    longest = min(model.checkpoint.max_tokens, _COUNTED_TOKENS)
    try:
        if model.checkpoint.compile:
            return lambda _: 0.0
        points = [_count_run(model, n) for n in (max(longest // 2, 1), longest)]
    except Exception:  # what an operator says that cannot be counted
        return lambda _: 0.0
    (short, short_flop), (long, long_flop) = points
    linear, square = long_flop / long, 0.0
    # Pictures and sounds have one length, whatever is asked for.
    if model.checkpoint.modality == "text" and short != long:
        square = max((long_flop / long - short_flop / short) / (long - short), 0.0)
        linear -= square * long

    def cost(lengths: Ints) -> float:
        return float(linear * lengths.sum() + square * (lengths.astype(float) ** 2).sum())

    return cost


@torch.inference_mode()
def _count_run(model: Model, num_tokens: int) -> tuple[int, int]:
    """Run one row of about so many tokens; how many they were, and its FLOP."""
    with _counter() as counter:
        example = model.tower.example(num_tokens)
        model.forward([example])
    length = int(model.lengths([example], np.zeros(1, dtype=np.int64))[0])
    return length, counter.get_total_flops()


def _counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def product(inputs: Any, weights: Any, *_: Any, **__: Any) -> int:
        return int(2 * math.prod(inputs) * weights[0])

    # The kernels for CPUs are not among those that torch counts.
    own: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        own[torch.ops.mkldnn._linear_pointwise] = product
    return FlopCounterMode(display=False, custom_mapping=own)


def synchronize(device: torch.device) -> None:
    """Wait for what was sent to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
