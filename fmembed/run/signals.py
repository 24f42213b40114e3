"""What stops the embed stage."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from fmembed.errors import (
    Interrupted,
)
from fmembed.run.commits import Commits
from fmembed.signals import stop_signals

_KNOCK_S = 1.0


class Signals:
    """What stops a run (preemption, `ray job stop`, a terminal that goes), as `Interrupted`.

    Raised in the driver's main thread.

    An exception that a handler raises is lost where it strikes inside a destructor or a callback,
    of which Ray has many (a run in the tests went on after Ctrl-C). So the signal is sent again
    until somebody says that it was heard; and a commit under way is never torn, it comes after.
    """

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._before: dict[signal.Signals, Any] = {}
        self._knock: threading.Timer | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._stop) for s in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        self.heard()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def heard(self) -> None:
        """Stop sending the signal again."""
        if self._knock is not None:
            self._knock.cancel()

    def _stop(self, signum: int, _: Any) -> None:
        self.heard()
        self._knock = threading.Timer(_KNOCK_S, os.kill, (os.getpid(), signum))
        self._knock.daemon = True
        self._knock.start()
        if not self._commits.is_committing:
            raise Interrupted("interrupted", signum)
