"""What a run shows while it goes: one line a stage. The only place that looks into Ray Data.

`ExecutionCallback` and `StreamingExecutor._topology` are Ray's internals (2.60); there is no public
way to count rows by operator while a dataset streams.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
import ray.data
from ray._private import ray_constants
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.job_config import JobConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fmembed import signals, terminal
from fmembed.redaction import scrub

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


def connect(verbose: bool) -> bool:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine.

    Ray's own noise is off unless `verbose`.

    Returns:
        Whether Ray was started or joined here, and so is this run's to leave.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours are drawn
    context.print_on_execution_start = verbose
    if not verbose:
        # Its errors too: it logs tracebacks of what the driver is told and handles.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=r"ray\.data\.")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if ray.is_initialized():
        return False
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    shown = [scrub(argument) for argument in sys.orig_argv]
    if shown != sys.orig_argv:
        # Ray keeps the command of each job, and tells it to all who ask.
        ray._raylet.setproctitle(" ".join(shown))  # type: ignore[attr-defined]
    options: dict[str, Any] = {
        "job_config": _job_config(),
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
    }
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        with signals.kept_from_ray():
            ray.init(**options)
        return True
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with signals.kept_from_ray(), _on_loopback():
        # Named, because without an address ray.init joins any cluster it finds on the machine.
        ray.init("local", include_dashboard=False, **options)
    return True


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have a node started meanwhile listen on loopback alone.

    Its processes listen at the node's address, most of them at all addresses; and Ray (2.60) takes
    127.0.0.1 for that address only where it is told that there are no clusters, as it is by default
    on macOS and Windows (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, read when Ray is imported).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _job_config() -> JobConfig:
    """Where this job's workers import from: what is installed, PYTHONPATH, and a job's working dir.

    Ray (2.60) puts the script's folder and the current one before all of these, unless the job has
    a working dir of its own: data lies there, and a numpy.py among it would be run. Where this
    package itself is not installed, the folder that holds it is named.
    """
    # Asked of a fresh interpreter: what this one's path holds by now (Ray itself puts a folder
    # before all others) says nothing of where a worker looks.
    find = "import importlib.util as u; s = u.find_spec('fmembed'); print(s and s.origin)"
    found = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-P", "-c", find], capture_output=True, text=True, check=False
    ).stdout.strip()
    here = Path(__file__).absolute().with_name("__init__.py")
    config = JobConfig(_py_driver_sys_path=[] if found == str(here) else [str(here.parents[1])])
    config._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign]
    return config
