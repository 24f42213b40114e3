"""Attention over rows packed one after another: each attends to itself alone, nothing is padded.

Registered with transformers under `PACKED`, by its own interface for attention functions.
Legend: B rows of one length, H heads, T tokens of all packed rows, L tokens of one, K dimensions of
a head.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PACKED = "fmembed_packed"

# Scores worked on at once: with MiniLM's heads, 16 rows of 256 tokens and 2 cores with 1 MiB of L2
# each, blocks of 1 to 4 MiB took 7 ms, all at once (25 MiB) 20 ms, torch's fused kernel 12 ms.
_SCORE_BYTES = 2 * 2**20
_MAX_SCORE_BYTES = 32 * 2**20
# What torch's kernel for GPUs takes: from Ampere on, numbers of two bytes, heads of up to 256
# dimensions in steps of 8.
_KERNEL_CAPABILITY, _KERNEL_DTYPES = (8, 0), (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM, _HEAD_DIM_STEP = 256, 8


@functools.cache
def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of this dtype are attended to faster packed than padded: always on a CPU.

    On a GPU where torch's kernel takes them; torch has it as it is used here since 2.11.
    """
    if device.type != "cuda":
        return True
    capable = torch.cuda.get_device_capability(device) >= _KERNEL_CAPABILITY
    return capable and dtype in _KERNEL_DTYPES and has_kernel()


def has_kernel() -> bool:
    """Whether this torch has a kernel for packed rows, on a GPU."""
    return "window_size" in _kernel_options()


@functools.cache
def _kernel_options() -> frozenset[str]:
    """What torch's kernel can be told; nothing where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def register() -> None:
    """Make `attn_implementation=PACKED` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, attend)
    # Which rows see each other follows from their lengths: no mask of T x T is ever made.
    AttentionMaskInterface.register(PACKED, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def attend(
    module: Any,
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each row, as transformers calls it from a layer.

    Args:
        module: The layer; says whether it is causal where `is_causal` does not.
        query_BHTK: Shape (1, H, T, K). Keys and values may have fewer heads.
        key_BHTK: As the query.
        value_BHTK: As the query.
        attention_mask: None, as `_no_mask` makes it.
        scaling: Of the scores; 1 / sqrt(K) by default.
        sliding_window: Tokens to either side that are seen, counting the token itself.
        is_causal: Whether a token sees none after it.
        cu_seq_lens_q: Where the rows begin and the last ends, int32, shape (rows + 1,).
        max_length_q: Length of the longest.

    Returns:
        Shape (1, T, H, K).
    """
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    scaling = query_BHTK.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query_BHTK.shape[1] // key_BHTK.shape[1]
    dim = query_BHTK.shape[-1]
    in_kernel = (
        query_BHTK.is_cuda
        and can_pack(query_BHTK.device, query_BHTK.dtype)
        and dim <= _MAX_HEAD_DIM
        and dim % _HEAD_DIM_STEP == 0
    )
    shares_keys = groups > 1 and in_kernel and "enable_gqa" in _kernel_options()
    if groups > 1 and not shares_keys:
        key_BHTK = key_BHTK.repeat_interleave(groups, dim=1)
        value_BHTK = value_BHTK.repeat_interleave(groups, dim=1)
    if in_kernel:
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if sliding_window is None else sliding_window - 1
        more: dict[str, Any] = {"enable_gqa": True} if shares_keys else {}
        query, key, value = (t[0].transpose(0, 1) for t in (query_BHTK, key_BHTK, value_BHTK))
        found = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(left, 0 if causal else left),
            **more,
        )
        assert isinstance(found, Tensor)
        return found.unsqueeze(0), None
    # Zeros where no row is: nothing reads what is made of them, but NaN is slow.
    out_BTHK = torch.zeros_like(query_BHTK.transpose(1, 2), memory_format=torch.contiguous_format)
    run = functools.partial(_attend, scaling=scaling, window=sliding_window, causal=causal)
    # Rows come sorted by length, so neighbours of one length are a batch without padding.
    lengths, counts = torch.unique_consecutive(cu_seq_lens_q.diff(), return_counts=True)
    start = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        here = slice(start, start + length * count)
        query, key, value = (
            t[0, :, here].reshape(t.shape[1], count, length, -1).transpose(0, 1)
            for t in (query_BHTK, key_BHTK, value_BHTK)
        )
        run(query, key, value, out_BTHK[0, here].view(count, length, *out_BTHK.shape[2:]))
        start = here.stop
    return out_BTHK, None


def _attend(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLK: Tensor,
    out_BLHK: Tensor,
    *,
    scaling: float,
    window: int | None,
    causal: bool,
) -> None:
    num_rows, heads, length, dim = query_BHLK.shape
    bytes_each = heads * length * length * query_BHLK.element_size()
    is_narrow = window is not None and length > window
    # torch's fused kernel on a CPU converts every block of bfloat16 to float32 and back; written
    # out it took half the time at every length tried (16 to 1,024). In float32 the kernel wins.
    if query_BHLK.dtype != torch.bfloat16 or causal or is_narrow or bytes_each > _MAX_SCORE_BYTES:
        mask = _band(length, window, causal, query_BHLK.device) if window and is_narrow else None
        found = scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, mask,
            scale=scaling, is_causal=causal and mask is None,
        )  # fmt: skip
        out_BLHK.copy_(found.transpose(1, 2))
        return
    step = min(max(_SCORE_BYTES // bytes_each, 1), num_rows)
    scores = query_BHLK.new_empty(step * heads, length, length)
    query_BHLK = query_BHLK * scaling
    for start in range(0, num_rows, step):
        query, key, value = (
            t[start : start + step].reshape(-1, length, dim)
            for t in (query_BHLK, key_BHLK, value_BHLK)
        )
        own = scores[: len(query)]
        torch.bmm(query, key.transpose(1, 2), out=own)
        torch.softmax(own, -1, out=own)
        found = torch.bmm(own, value).view(-1, heads, length, dim)
        out_BLHK[start : start + step] = found.transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _band(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Which tokens see which, shape (L, L): those nearer than the window."""
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    return (ahead.abs() < window) & ((ahead <= 0) if causal else True)
