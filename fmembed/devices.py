"""What this machine computes with."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (avx512_bf16 or amx), from /proc/cpuinfo."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


# What NVIDIA's driver shows on Linux, in a sandbox with a /proc of its own, and under Windows' own
# Linux.
_CUDA_SIGNS = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"), Path("/dev/dxg"))


def sees_cuda_driver() -> bool:
    """Whether NVIDIA's driver is here, whatever torch can do with it."""
    return any(sign.exists() for sign in _CUDA_SIGNS)


def has_cuda() -> bool:
    if not sees_cuda_driver():
        return False
    import torch

    return torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """What this machine's CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
