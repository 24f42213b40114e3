"""SIGINT, SIGTERM and SIGHUP stop a command; what is committed stays, and it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """A signal has stopped the command, outside of the embed stage.

    No `Exception`, so that nobody takes it for a failure of what it strikes in.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that stop a command: of a terminal that goes (SIGHUP) not where nohup ignores it."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGINT, signal.SIGTERM)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def raise_stopped() -> Iterator[None]:
    """Have these signals raise `Stopped` in the main thread meanwhile, and end the process after.

    A second one ends it at once.
    """

    def stop(signum: int, _: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    caught = stop_signals()
    for signum in caught:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in caught:
            signal.signal(signum, signal.SIG_DFL)


@contextmanager
def kept_from_ray() -> Iterator[None]:
    """Start or join Ray with the signals' handlers as they are.

    Ray (2.60) sets one for SIGTERM that exits with 15. Its processes must outlive a terminal that
    goes, since what is to be committed lies with them: SIGHUP is blocked while they are started, as
    Ray itself does with SIGINT, and what comes meanwhile comes afterwards.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit as e:
        if e.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
