"""At which rows of a shard a process has died that read it: they are read alone, then rejected."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fmembed.rows.columns import KILLS
from fmembed.sources.formats.base import CHUNK_ROWS, without_input
from fmembed.sources.source import BadRow, RawRow, Rejection, Source

# A row that ends the process alone is tried once more: something else may have ended it.
TRIES = 2


def died_of(why: str) -> Rejection:
    """Why a row is rejected at which, alone, a process has died each time."""
    return KILLS, f"{why}, also with this row alone"


@dataclass(frozen=True)
class Deaths:
    """Rows are counted as they are read, over all files of the shard.

    Args:
        alone: Rows that are handed on one by one, because among them a process has died.
        times: Of those, how often one has ended the process.
        why: What the last one died of.
    """

    alone: range = range(0)
    times: Mapping[int, int] = field(default_factory=dict)
    why: str = ""

    def __bool__(self) -> bool:
        return bool(self.alone)

    def after(self, at: int, why: str) -> Deaths:
        """What is known after a process has died that had handed on all rows before `at`."""
        if at in self.alone:
            return Deaths(self.alone, {**self.times, at: self.times.get(at, 0) + 1}, why)
        return Deaths(range(at, at + CHUNK_ROWS), self.times, why)

    def past(self, source: Source, rows: Iterator[RawRow], at: int) -> Iterator[RawRow]:
        """A file's rows: of one that ends the process its id, and why it is not embedded.

        Args:
            source: What they are from.
            rows: As a format's reader yields them.
            at: What the first one counts as.

        Raises:
            BadRow: The process died again at a row of which no more was asked: nobody can read it.
        """
        for i in itertools.count(at):
            # Between two files nobody knows which one's it is: first the second is left unopened.
            if self.times.get(i, 0) > TRIES + (i > at):
                raise BadRow(*died_of(self.why))
            if (row := next(rows, None)) is None:
                return
            if self.times.get(i, 0) >= TRIES and isinstance(row[1], dict):
                row = row[0], without_input(source, row[1], died_of(self.why))
            yield row
