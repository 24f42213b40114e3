"""Ray: joined, or started on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.job_config import JobConfig

from fmembed import signals, terminal
from fmembed.errors import FmembedError, reason
from fmembed.redaction import scrub
from fmembed.run import capacity, own_node
from fmembed.run.faults import explain
from fmembed.startup import check_address, joins_cluster
from fmembed.telling import Teller

# Held by the one run that uses Ray in this process: what a run sets of Ray Data, it sets for all.
_busy = threading.Lock()


class Cluster:
    """Ray for as long as a run needs it: joined or started when first asked for, then left."""

    def __init__(self, verbose: bool, teller: Teller | None = None) -> None:
        """Prepare; nothing is started yet.

        Args:
            verbose: Show Ray's own output.
            teller: Says that Ray is started, or joined.
        """
        self._verbose = verbose
        self._say = (teller or Teller(quiet=True)).say
        self._leaves = self._holds = False

    def __enter__(self) -> Cluster:
        return self

    def connect(self) -> None:
        """Join the cluster that RAY_ADDRESS names, or start Ray here; once.

        Raises:
            FmembedError: It cannot be had, or another run of this process has it.
        """
        self._holds = self._holds or _busy.acquire(blocking=False)
        if not self._holds:
            raise FmembedError(
                "another run is under way in this process, which takes one at a time; wait for its "
                "end, or start this one in a process of its own"
            )
        if not ray.is_initialized():
            self._say("joining Ray …" if joins_cluster() else "starting Ray …")
        self._leaves = connect(self._verbose) or self._leaves

    def may_get_gpus(self) -> bool:
        """Whether what was joined declares pools of nodes with GPUs."""
        return any(node.get("GPU", 0) for node in capacity.nodes_to_come())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Leave.

        Raises:
            FmembedError: What the user should read of an error that Ray has raised.
        """
        try:
            if isinstance(error, ray.exceptions.RayError):
                raise explain(error) from (error if self._verbose else None)
        finally:
            if self._leaves:
                own_node.leave(at_once=error is None)
            if self._holds:
                self._holds = False
                _busy.release()


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
        # And in the output, whatever it is told of logs, the tracebacks of errors in tasks.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
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
    try:
        if joins_cluster():
            check_address(os.environ["RAY_ADDRESS"])
            with signals.kept_from_ray(), _without_log_level():
                ray.init(**options)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            with signals.kept_from_ray(), _without_log_level():
                _start_here(verbose, **options)
    except FmembedError:
        raise
    except Exception as e:  # by what failed: RuntimeError, ConnectionError, Ray's own, Exception
        where = "joined (RAY_ADDRESS)" if joins_cluster() else "started on this machine"
        raise FmembedError(
            f"Ray could not be {where}: {reason(e)}; nothing was written by this run, the same "
            "command tries again"
        ) from (e if verbose else None)
    return True


def _start_here(verbose: bool, **options: Any) -> None:
    """Start Ray on this machine, on a slow one with a second try: Ray (2.60) gives its processes
    some seconds to answer each.
    """
    try:
        own_node.start(verbose, **options)
    except Exception as e:
        terminal.say(f"Ray did not start ({reason(e)[:200]}); trying once more")
        with contextlib.suppress(Exception):
            ray.shutdown()
        own_node.start(verbose, **options)


@contextmanager
def _without_log_level() -> Iterator[None]:
    """Leave out the one line that Ray (2.60) writes because its log level is set: that it is."""
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        own = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            said.seek(0)
            for line in said:
                if b"Set ray log level from environment variable" not in line:
                    os.write(2, line)


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
    here = Path(__file__).absolute().parents[1] / "__init__.py"
    config = JobConfig(_py_driver_sys_path=[] if found == str(here) else [str(here.parents[1])])
    config._runtime_env_has_working_dir = lambda: True  # type: ignore[method-assign]
    return config
