"""What a process of an actor keeps and frees."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have glibc keep what the last batch freed for the next one.

    By default it hands every tensor of over a few MiB back to the system and asks for it anew, page
    by page: 2,000 page faults an article, and with none 108 articles/s where there were 85.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)


def bound_kernels() -> None:
    """Have oneDNN, and torch's layer above it, keep the kernels of fewer shapes than 1,024 each.

    Both are read when the first kernel is made. Sentences have hundreds of shapes: in bfloat16 a
    process of MiniLM grew from 0.9 to 1.8 GiB over 16,000 of them and went on growing. Over 24,000,
    with 64 it grew from 893 to 937 MiB at 493 rows/s, with 16 from 856 to 876 MiB at 475, and all
    of that with the first few thousand.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
