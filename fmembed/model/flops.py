"""What a device can compute in a second, and what a model takes of it.

Legend: FLOP are floating-point operations, an addition and a multiplication being two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fmembed.arrays import Ints
from fmembed.model.attention import has_kernel
from fmembed.model.failures import cause_of, free_memory
from fmembed.model.linear import FusedLinear, fused_dtypes
from fmembed.rows.pieces import Piece

if TYPE_CHECKING:
    from fmembed.model.forward import Model

_CPU_SIZE, _CUDA_SIZE, _REPEATS = 1024, 8192, 4
# Tokens of the longer of the two texts whose FLOP are counted.
_COUNTED_TOKENS = 64


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

    def packed(query: Any, *_: Any, **__: Any) -> int:
        length, heads, dim = query  # of one row
        return int(2 * 2 * heads * length**2 * dim)

    # The kernels for CPUs are not among those that torch counts, nor, in all versions, packed ones.
    own: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        own[torch.ops.mkldnn._linear_pointwise] = product
    if has_kernel():
        own[torch.ops.torch_attn._varlen_attn] = packed
    return FlopCounterMode(display=False, custom_mapping=own)


def synchronize(device: torch.device) -> None:
    """Wait for what was sent to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
