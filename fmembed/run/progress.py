"""What a run shows while it goes: on a terminal a bar a stage, elsewhere a line now and then.

`ExecutionCallback` and `StreamingExecutor._topology` are Ray's internals (2.60); there is no public
way to count rows by operator while a dataset streams.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from rich import progress as bars
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fmembed import terminal
from fmembed.run.stages import READER
from fmembed.run.verdict import EMBED, READ, WRITE
from fmembed.run.waiting import Watch
from fmembed.sources.source import Source
from fmembed.telling import Pulse, Teller


@dataclass
class Stage:
    """Rows that left a stage, and the seconds its tasks or actors were at work, summed."""

    rows: int = 0
    busy_s: float = 0.0


class Progress:
    """Counts by stage, fed by Ray Data's executor and by the driver; drawn on a terminal."""

    def __init__(self, teller: Teller) -> None:
        """Start counting.

        Args:
            teller: Says how far the run has come, where stderr is no terminal to draw on. If it is
                quiet, nothing is drawn either.
        """
        self._teller = teller
        self.stages = {name: Stage() for name in (READ, EMBED, WRITE)}
        # Rows to come, where known before they are read; bytes of the first n shards.
        self._num_rows: int | None = None
        self._num_bytes = [0]
        self._lock = threading.Lock()
        stream = terminal.stderr_to_draw_on()
        self._bars = bars.Progress(
            TextColumn("{task.description:<17}"),
            BarColumn(),
            TextColumn("{task.completed:>10,.0f} rows"),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(file=stream),
            disable=teller.quiet or not stream.isatty(),
            # What others print would come back as they wrote it.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks = {name: self._bars.add_task(name, total=None) for name in self.stages}
        self._pulse = None if teller.quiet or stream.isatty() else Pulse(teller.say)
        self._kept, self._fate = 0, ""
        self._watch: Watch | None = None

    def __enter__(self) -> Progress:
        self._print, self._teller.print = self._teller.print, self._print_above
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        self._teller.print = self._print

    def _print_above(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line on stderr, above what is drawn, quiet or not."""
        self._print_above(f"fmembed: {terminal.printable(text)}")

    def keep(self, num_rows: int, fate: str) -> None:
        """Set how many rows a kill does not cost any more, and what they are: committed."""
        self._kept, self._fate = num_rows, fate

    def set(self, name: str, rows: int, busy_s: float) -> None:
        """Set a stage's totals."""
        with self._lock:
            self.stages[name] = Stage(rows, busy_s)
        self._bars.update(self._tasks[name], completed=rows)

    def expect(self, source: Source) -> None:
        """Draw how far a pass over a source has come, from here on."""
        self._num_rows = source.num_rows
        sizes = (shard.num_bytes for shard in source.shards)
        self._num_bytes = [0, *itertools.accumulate(sizes)]
        self.foresee(0, is_read=False)

    def foresee(self, num_shards: int, is_read: bool) -> None:
        """Set how many rows there will be: as many as were read, once all are; until then, where
        the source does not tell, as many as the bytes of the shards that were read make likely.

        Args:
            num_shards: So many were read, of those that were begun first.
            is_read: Whether all were.
        """
        rows = self.stages[READ].rows
        total: float | None = rows if is_read else self._num_rows
        if total is None and (done := self._num_bytes[min(num_shards, len(self._num_bytes) - 1)]):
            total = max(rows * self._num_bytes[-1] / done, rows)
        for task in self._tasks.values():
            self._bars.update(task, total=total)
        if self._pulse is not None:
            read, embedded = self.stages[READ].rows, self.stages[EMBED].rows
            is_exact = is_read or self._num_rows is not None
            waits = self._watch.text if self._watch is not None else ""
            self._pulse.beat(read, embedded, self._kept, self._fate, total, is_exact, waits)

    def watch(self, operators: Mapping[str, str], watch: Watch | None = None) -> None:
        """Follow the datasets that run from now on.

        Args:
            operators: What stands in the name of a Ray Data operator, to the stage that it is.
            watch: Knows what is waited for.
        """
        self._watch = watch
        _Counter.progress, _Counter.operators = self, dict(operators)
        context = ray.data.DataContext.get_current()
        others = [c for c in context.custom_execution_callback_classes if c is not _Counter]
        context.custom_execution_callback_classes = [*others, _Counter]


class _Counter(ExecutionCallback):
    """Takes the row counts of a running executor's operators."""

    # On the class, because Ray makes the instance itself and pickles the class with its context.
    progress: ClassVar[Progress | None] = None
    operators: ClassVar[dict[str, str]] = {}

    def on_execution_step(self, executor: Any) -> None:
        if self.progress is None:
            return
        operators = list(executor._topology or ())
        # A task of reading is a shard, and ends with its marker row, which is no row of the source.
        # Behind it some markers are still on their way: there fewer are shown until they are out.
        markers = sum(o.metrics.num_tasks_finished or 0 for o in operators if READER in o.name)
        is_read = bool(operators)
        read_s = 0.0  # of tasks that read and do not prepare
        for operator in operators:
            stage = next((s for part, s in self.operators.items() if part in operator.name), None)
            metrics = operator.metrics
            busy_s = metrics.block_generation_time or 0.0
            if stage is None and READER in operator.name:
                read_s = busy_s
            if stage is not None:
                is_read = is_read and (stage != READ or operator.has_execution_finished())
                busy_s += read_s if stage == READ else 0.0
                rows = metrics.row_outputs_taken or 0
                self.progress.set(stage, max(rows - markers, 0), busy_s)
        self.progress.foresee(markers, is_read)

    def after_execution_succeeds(self, executor: Any) -> None:
        self.on_execution_step(executor)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:>8,.1f} rows/s" if speed else " " * 15)
