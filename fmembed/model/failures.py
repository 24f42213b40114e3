"""Why a batch failed: for want of memory, by one of its rows, or because the device is broken."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = "out of memory"


def cause_of(error: Exception) -> tuple[str, str]:
    """Why a row cannot be embedded, if it was the only one of its batch: (error, message).

    Raises:
        RuntimeError: Not the rows but the device is at fault: a CUDA context that has failed once
            fails every later call, so the process has to end and Ray starts another.
    """
    message = (str(error).splitlines() or [type(error).__name__])[0]
    # On a CPU the allocator raises a plain RuntimeError.
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in message
    ):
        return OUT_OF_MEMORY, "the row alone does not fit into the device's memory"
    if "CUDA error" in message or "CUBLAS_STATUS" in message:
        raise RuntimeError(f"the GPU failed: {message}") from error
    return "model error", f"{type(error).__name__}: {message}"


def free_memory(device: torch.device) -> None:
    """Give back what a batch that failed has left in the allocator's cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
