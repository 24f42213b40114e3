"""What stops the embed stage."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType
from typing import Any

from fmembed.errors import Interrupted
from fmembed.run.commits import Commits
from fmembed.signals import stop_signals

_KNOCK_S = 1.0


class Signals:
    """What stops a run (preemption, `ray job stop`, a terminal that goes), as `Interrupted`.

    Raised in the driver's main thread.

    An exception that a handler raises is lost where it strikes inside a destructor or a callback,
    of which Ray has many (a run in the tests went on after Ctrl-C). So the signal is sent again
    until somebody says that it was heard; and a commit under way is never torn, it comes after.
    Where compiled code makes another error of it, `behind` knows.
    """

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._before: dict[signal.Signals, Any] = {}
        self._knock: threading.Timer | None = None
        self._unheard: Interrupted | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._stop) for s in stop_signals()}
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        interrupted = self.behind(error)
        self.heard()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if interrupted is not None and interrupted is not error:
            raise interrupted from None

    def behind(self, error: BaseException | None) -> Interrupted | None:
        """The signal behind an error, which may be one that compiled code has made of it."""
        if isinstance(error, Interrupted):
            return error
        return self._unheard if isinstance(error, Exception) else None

    def heard(self) -> None:
        """Stop sending the signal again."""
        if self._knock is not None:
            self._knock.cancel()
        self._unheard = None

    def _stop(self, signum: int, _: Any) -> None:
        self.heard()
        self._knock = threading.Timer(_KNOCK_S, os.kill, (os.getpid(), signum))
        self._knock.daemon = True
        self._knock.start()
        if not self._commits.is_committing:
            self._unheard = Interrupted("interrupted", signum)
            raise self._unheard
