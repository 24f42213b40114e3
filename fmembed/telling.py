"""What a run says while it goes, on stderr: what it has begun to do, and how far it has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from fmembed import terminal

# A job's log grows by some lines an hour; a notebook is looked at.
_EVERY_S, _IN_NOTEBOOK_S = 30.0, 5.0


def every_s() -> float:
    """Seconds from a line that says how far a run has come to the next."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return _IN_NOTEBOOK_S if hasattr(shell, "kernel") else _EVERY_S


class Teller:
    """Says what is begun, each with the time of day, the first one of a day with the date."""

    def __init__(self, quiet: bool = False) -> None:
        """Prepare.

        Args:
            quiet: Say nothing.
        """
        self.quiet = quiet
        self._day = ""
        # How a line is printed: while bars are drawn, above them.
        self.print: Callable[[str], None] = _print

    def say(self, text: str) -> None:
        """Print one line."""
        if self.quiet:
            return
        now = datetime.now()
        day = f"{now:%Y-%m-%d} "
        self.print(f"{day if day != self._day else ''}{now:%H:%M} {terminal.printable(text)}")
        self._day = day


def _print(line: str) -> None:
    print(line, file=terminal.stderr_to_draw_on())


class Pulse:
    """Says how far a run has come, where nothing is drawn: every half minute a line."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._say, self._clock = say, clock
        self._last = self._began = clock()
        self._first: tuple[float, int] | None = None  # when the first rows had come, and how many

    def beat(
        self,
        read: int,
        embedded: int,
        kept: int,
        fate: str,
        total: float | None,
        is_exact: bool,
        waits: str = "",
    ) -> None:
        """Take note of how far it has come, and say so if it is time.

        Args:
            read: Rows that were read and prepared.
            embedded: Rows that have come out of the model.
            kept: Rows that a kill does not cost any more.
            fate: What they are: committed.
            total: Rows there will be; None where nobody knows yet.
            is_exact: Whether that is known, or likely.
            waits: What it waits for, and how long by now, in words.
        """
        now = self._clock()
        if self._first is None and embedded:
            self._first = now, embedded
        if now - self._last < every_s():
            return
        self._last = now
        if not embedded:
            self._say(f"{waits or 'the model is being loaded'} · {read:,} rows read")
            return
        of = share = left = ""
        if total:
            of = f" of {'' if is_exact else 'about '}{max(total, embedded):,.0f}"
            share = f" ({min(embedded / total, 1):.0%})".replace("%", " %")
        rate = self._rate(now, embedded)
        if total and rate:
            left = f" · {duration(max(total - embedded, 0) / rate)} left"
        rows_s = f" · {rate:,.0f} rows/s" if rate >= 10 else f" · {rate:,.1f} rows/s"
        if waits:
            left = f" · {waits}"
        self._say(f"embedded {embedded:,}{of}{share}{rows_s}{left} · {fate} {kept:,}")

    def _rate(self, now: float, embedded: int) -> float:
        """Rows a second, once the model is at work."""
        assert self._first is not None
        since, before = self._first
        if now - since < 1:
            return embedded / max(now - self._began, 1e-9)
        return (embedded - before) / (now - since)


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
