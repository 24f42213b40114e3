"""How a process begins."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def joins_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster; else Ray is started on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


@contextmanager
def uncollected() -> Iterator[None]:
    """Import and load without Python's cyclic garbage collector; also a decorator.

    Libraries make a million objects that live as long as the process, and the collector walks all
    of them again and again: without it an actor was ready with MiniLM after 2.7 s instead of 4.4, a
    tokenizer after 1.5 s instead of 2.7. What there is at the end is never walked again either,
    which took an actor half a second later.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
