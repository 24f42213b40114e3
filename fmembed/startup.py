"""How a process begins."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from fmembed.errors import FmembedError, SpecError, reason

_ANSWER_S = 10.0


def joins_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster; else Ray is started on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def check_address(address: str) -> None:
    """Make sure that somebody listens at host:port; Ray (2.60) tries for minutes.

    Raises:
        SpecError: It is a dashboard's, which `ray job submit` goes by.
        FmembedError: Nobody does.
    """
    if address.lower().startswith(("http://", "https://")):
        raise SpecError(
            f"RAY_ADDRESS: {address} is a dashboard's, for ray job submit; a run joins a cluster "
            "by host:port (6379, if it was not chosen), and starts Ray here where it is unset"
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as e:
        raise FmembedError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({reason(e)}); start it, name "
            "another, or unset RAY_ADDRESS to run on this machine"
        ) from None


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
