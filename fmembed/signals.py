"""SIGINT, SIGTERM and SIGHUP stop a command; what is committed stays, and it can be resumed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from fmembed.errors import Interrupted

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Time enough to leave Ray, which takes 1.4 s.
_KNOCK_S = 5.0


class Stopped(BaseException):
    """A signal has stopped the command, outside of the embed stage.

    No `Exception`, so that nobody takes it for a failure of what it strikes in. Where it strikes in
    a destructor or a callback it is lost all the same: until it is heard the signal is sent again.
    And compiled code makes other errors of it: Ray's, where it reads a value, a SystemError.
    """

    _knock: ClassVar[threading.Timer | None] = None
    unheard: ClassVar[Stopped | None] = None

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum
        self.heard()
        Stopped.unheard = self
        Stopped._knock = threading.Timer(_KNOCK_S, os.kill, (os.getpid(), signum))
        Stopped._knock.daemon = True
        Stopped._knock.start()

    @staticmethod
    def heard() -> None:
        """Stop sending the signal again."""
        if Stopped._knock is not None:
            Stopped._knock.cancel()
        Stopped.unheard = None


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that stop a command: of a terminal that goes (SIGHUP) not where nohup ignores it."""
    if not hasattr(signal, "SIGHUP") or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGINT, signal.SIGTERM)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def raise_stopped() -> Iterator[None]:
    """Have these signals raise `Stopped` in the main thread, and end the process afterwards."""

    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum)

    def tell(lost: UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Stopped | Interrupted):  # which come again
            before(lost)

    caught, before = stop_signals(), sys.unraisablehook
    for signum in caught:
        signal.signal(signum, stop)
    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = before
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
    # Blocked in this thread alone, so that another thread is given it: noted, for afterwards.
    hangup, came = signal.getsignal(signal.SIGHUP), []
    if is_main and callable(hangup):
        signal.signal(signal.SIGHUP, lambda signum, _: came.append(signum))
    try:
        yield
    except SystemExit as e:
        if e.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        if is_main and callable(hangup):
            signal.signal(signal.SIGHUP, hangup)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if came:
            os.kill(os.getpid(), signal.SIGHUP)
