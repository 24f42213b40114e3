"""What a run shows while it goes: one line a stage. The only place that looks into Ray Data.

`ExecutionCallback` and `StreamingExecutor._topology` are Ray's internals (2.60); there is no public
way to count rows by operator while a dataset streams.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fmembed import terminal

READ, EMBED, WRITE = "read, preprocess", "embed", "write, commit"


@dataclass
class Stage:
    """Rows that left a stage, and the seconds its tasks or actors were at work, summed."""

    rows: int = 0
    busy_s: float = 0.0


class Stages:
    """Counts by stage, fed by Ray Data's executor and by the driver; drawn on a terminal."""

    def __init__(self, num_rows: int | None, quiet: bool) -> None:
        """Start counting.

        Args:
            num_rows: Rows to come, None where only reading tells.
            quiet: Draw nothing. Nothing is drawn either where stderr is no terminal.
        """
        self.stages = {name: Stage() for name in (READ, EMBED, WRITE)}
        self.store_bytes: int | None = None
        self._lock = threading.Lock()
        stream = terminal.stderr_to_draw_on()
        self._progress = Progress(
            TextColumn("{task.description:<17}"),
            BarColumn(),
            TextColumn("{task.completed:>10,.0f} rows"),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(file=stream),
            disable=quiet or not stream.isatty(),
            # What others print would come back as they wrote it.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks = {name: self._progress.add_task(name, total=num_rows) for name in self.stages}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line on stderr, above what is drawn."""
        line = f"fmembed: {terminal.printable(text)}"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def set(self, name: str, rows: int, busy_s: float) -> None:
        """Set a stage's totals."""
        with self._lock:
            self.stages[name] = Stage(rows, busy_s)
        self._progress.update(self._tasks[name], completed=rows)

    def watch(self, context: ray.data.DataContext) -> None:
        """Follow the datasets that run under this context."""
        _Counter.stages = self
        context.custom_execution_callback_classes = [_Counter]

    def read(self, executor: Any) -> None:
        """Take the row counts of a running executor's operators, and bound its object store.

        Ray Data reads that bound once a second.
        """
        if self.store_bytes is not None:
            options = executor._resource_manager._options
            limits = options.resource_limits.copy(object_store_memory=self.store_bytes)
            options.resource_limits = limits
        for operator in executor._topology or ():
            if "Embed" in operator.name:
                name = EMBED
            elif "Preprocess" in operator.name:
                name = READ
            else:
                continue
            metrics = operator.metrics
            self.set(name, metrics.row_outputs_taken or 0, metrics.block_generation_time or 0.0)


class _Counter(ExecutionCallback):
    # On the class, because Ray makes the instance itself and pickles the class with its context.
    stages: ClassVar[Stages | None] = None

    def on_execution_step(self, executor: Any) -> None:
        if self.stages is not None:
            self.stages.read(executor)

    def after_execution_succeeds(self, executor: Any) -> None:
        self.on_execution_step(executor)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:>8,.1f} rows/s" if speed else " " * 15)
