"""The token budget of a batch, measured once for a model on a device and remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from fmembed import cache
from fmembed.devices import device_name
from fmembed.model.flops import time_batch
from fmembed.model.forward import Model

# Tokens of a batch by type of device, as torch names it. On a CPU more than 4k were slower (cache);
# a GPU wants many.
DEFAULT = {"cpu": 4096, "cuda": 65536}
# Sounds on a CPU: this divided by the bytes of a number, so 1,024 tokens in float32. Fewer than for
# texts, because the first layers of a speech model make 64 times as many frames. A wav2vec 2.0 of 6
# layers, 384 wide, on two AVX-512 cores, frames/s: float32 4,086 with 1,024 tokens and 3,148 with
# 4,096; bfloat16 5,490 with 1,024, 6,842 with 2,048 and 6,193 with 4,096.
CPU_AUDIO_BYTES = 4096
BUDGETS = {
    "cpu": (1024, 2048, 4096, 8192),
    "cuda": (16384, 32768, 65536, 131072, 262144),
}
# Tokens of the rows that are measured: a paragraph.
ROW_TOKENS = 128
_LIMIT_S, _ROUNDS, _TOLERANCE = 2.0, 3, 0.03
_CACHED = "batch_tokens"


def choose_budget(
    given: int | Literal["auto"] | None, model: Model, gpu_share: float = 1.0
) -> tuple[int, str]:
    """The token budget of a model's batches, and who chose it.

    Args:
        given: By the config: a number, "auto" for what is best for this model on its device, or
            None for the device's default.
        model: Is run to measure it, once for each checkpoint, device and number of threads.
        gpu_share: Of a GPU that it has for itself.

    Returns:
        Tokens of a batch; and given, measured, cached or default.
    """
    kind, checkpoint = model.device.type, model.checkpoint
    default, budgets = DEFAULT[kind], BUDGETS[kind]
    if given and given != "auto":
        return given, "given"
    if kind == "cpu" and checkpoint.modality == "audio":
        item_bytes = getattr(torch, checkpoint.dtype).itemsize
        return CPU_AUDIO_BYTES // item_bytes, "default"
    # A compiled model would compile for each budget; pictures and sounds have sizes of their own,
    # of which a few make a batch.
    if not given or checkpoint.modality != "text" or checkpoint.compile:
        return default, "default"
    # A power of two, as the budgets are, so that rows fill them.
    row_tokens = 2 ** (min(ROW_TOKENS, checkpoint.max_tokens).bit_length() - 1)
    key = {
        "weights": checkpoint.digest,
        "adapter": checkpoint.adapter_digest,
        "family": checkpoint.model_type,
        "attention": model.tower.attention,
        "dtype": checkpoint.dtype,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "row_tokens": row_tokens,
    }
    if gpu_share < 1:
        key["gpu_share"] = gpu_share
    known = (cache.recall(_CACHED, key) or {}).get("batch_tokens")
    if known in budgets:  # what an earlier version may have chosen is none of today's
        return known, "cached"
    row = model.tower.example(row_tokens)
    found = choose(
        budgets, lambda n: time_batch(model, [row] * (n // row_tokens)), default, row_tokens
    )
    cache.remember(_CACHED, key, {"batch_tokens": found or default})
    return (found, "measured") if found else (default, "default")


def choose(
    budgets: Sequence[int],
    measure: Callable[[int], float | None],
    default: int,
    warm_up: int = ROW_TOKENS,
    limit_s: float = _LIMIT_S,
) -> int | None:
    """The smallest budget whose tokens/s are within 3 % of the best.

    It delays the start, so nothing is measured that, at the last batch's rate, would not end in
    time. The best of a few rounds counts, because other processes start at the same time.

    Args:
        budgets: Tokens of a batch, ascending.
        measure: Seconds that a batch of so many tokens takes; None where the model fails on it, as
            for want of memory, and larger ones are not tried.
        default: The budget that has to be measured for the others to mean anything.
        warm_up: Tokens of what is run first, twice: cold, and to know how fast the model is.
        limit_s: Seconds of all batches.

    Returns:
        None where the time is not enough, or the model fails on all.
    """
    best: dict[int, float] = {}
    most, spent_s, rate = max(budgets), 0.0, float("inf")
    for tokens in (warm_up, warm_up, *tuple(budgets) * _ROUNDS):
        if tokens > most:
            continue
        if spent_s + tokens / rate > limit_s:
            if default <= most and default not in best:
                return None
            break
        seconds = measure(tokens)
        if seconds is None:
            most = tokens - 1
            continue
        spent_s += seconds
        rate = tokens / seconds
        best[tokens] = max(best.get(tokens, 0.0), rate)
    rates = {b: best[b] for b in budgets if b in best and b <= most}
    fast = (1 - _TOLERANCE) * max(rates.values(), default=0.0)
    return min((b for b, r in rates.items() if r >= fast), default=None)
