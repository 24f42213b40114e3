"""A process of its own for the work on rows that may end it: so it is found out which of them does.

Where a process of Ray's that reads or prepares rows has died on each try (of a codec's bug, or for
memory), the pass is begun again with this between: the process that dies is a child of it, and is
asked for a slice, then for halves of it, down to a row.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import reject
from fmembed.sources.deaths import TRIES, Deaths, died_of
from fmembed.sources.picks import Pick
from fmembed.sources.reading import read_steps
from fmembed.sources.source import Shard, Source

# A child is ended where the node is so short of memory, and it has taken so much: Ray, which ends
# a process of its own at 0.95, would take the parent.
_MOST_MEMORY, _LEAST_GROWTH_BYTES, _LOOK_S = 0.9, 2**29, 0.02
# What preparing imports late, besides this module.
_IMPORTED = (
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.image_processing_auto",
)


class DiedError(Exception):
    """The child has died; the message says of what, as far as that is known."""


class Child:
    """A process that does what it is asked, and may die of it; it ends with this one."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._pid = self._num_bytes = 0

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a module in the child; another one is started where it has died.

        Raises:
            DiedError: It has died.
            Exception: What the function raises; or the child cannot be started.
        """
        why = "its process died"
        pool = self._pool or self._start()
        try:
            done = pool.submit(function, *arguments)
            while not wait([done], _LOOK_S).done:
                if self._takes_all():
                    why = "its process took the last of the node's memory and was ended"
                    os.kill(self._pid, signal.SIGKILL)
                    wait([done])
            return done.result()
        except BrokenProcessPool:
            self.end()
            raise DiedError(why) from None

    def end(self) -> None:
        """End the child, if there is one."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _start(self) -> ProcessPoolExecutor:
        # Forked off a process that has imported what takes seconds and started no thread.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *_IMPORTED])
        pool = ProcessPoolExecutor(1, context, _end_with_parent)
        self._pid = pool.submit(os.getpid).result()
        self._num_bytes = _memory_of(self._pid)
        self._pool = pool
        return pool

    def _takes_all(self) -> bool:
        used: int = get_used_memory()  # type: ignore[no-untyped-call]
        is_short = used > _MOST_MEMORY * get_system_memory()
        return is_short and _memory_of(self._pid) - self._num_bytes > _LEAST_GROWTH_BYTES


def _memory_of(pid: int) -> int:
    """Bytes that a process holds; 0 where it has ended, or the system is no Linux."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _end_with_parent() -> None:
    """In the child: end when this process has, which Ray may kill without a word."""
    parent = parent_process()
    assert parent is not None

    def look() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


# Of each of Ray's processes, because one takes seconds to start; two, because a task may read and
# prepare in turn, and with its child goes how far the reading has come.
_reader, _preparer = Child(), Child()


def read_apart(
    source: Source, shard: Shard, index: int, pick: Pick | None = None
) -> Iterator[pa.Table]:
    """As `reading.read_shard`, in the child; a row at which that dies is rejected.

    Where nothing can be read past it, its file's further rows are lost, and the rejected row says
    so.
    """
    deaths = Deaths()
    num_yielded = 0
    while True:
        at = num_seen = 0
        try:
            _reader.call(_begin, source, shard, index, pick, deaths)
            while (step := _reader.call(_next)) is not None:
                at, table = step
                # After a death all is read again, and comes in the same order.
                new = table.slice(min(max(num_yielded - num_seen, 0), table.num_rows))
                num_seen += table.num_rows
                if new.num_rows:
                    num_yielded += new.num_rows
                    yield new
            return
        except DiedError as e:
            deaths = deaths.after(at, str(e))


_steps: Iterator[tuple[int, pa.Table]]  # in the child


def _begin(*arguments: Any) -> None:
    global _steps
    _steps = read_steps(*arguments)


def _next() -> tuple[int, pa.Table] | None:
    return next(_steps, None)


class PreprocessApart(Preprocess):
    """As `Preprocess`, in the child; a row at which that dies, alone, is rejected."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """As for `Preprocess`."""
        why = ""
        for _ in range(TRIES if rows.num_rows == 1 else 1):
            try:
                # `take`, because of a slice all that it is a slice of would be sent.
                sent = rows.take(np.arange(rows.num_rows))
                return _preparer.call(Preprocess.__call__, self, sent)
            except DiedError as e:
                why = str(e)
        if rows.num_rows == 1:
            return super().__call__(reject(rows, "preprocess", {0: died_of(why)}))
        half = rows.num_rows // 2
        return pa.concat_tables([self(rows.slice(0, half)), self(rows.slice(half))])
