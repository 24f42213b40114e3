"""The model tried on a few prepared rows, where no run has told how fast it is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from fmembed.checkpoint.opening import Checkpoint
from fmembed.rows.columns import NUM_UNITS
from fmembed.rows.counts import sum_counts
from fmembed.run.faults import MAX_ACTOR_RESTARTS
from fmembed.run.plan import Plan
from fmembed.table.parts import write_part

# For so long at most.
_TRIAL_S = 8.0
# Windows that each actor is given at least; the first one it is not timed by.
_WINDOWS, _LEAST_WINDOW = 8, 8


@dataclass(frozen=True)
class Tried:
    """What a model did with some rows, in as many actors as a node has of them.

    `rates` are units a second of one actor while all were at work, a figure for each actor.
    `start_s` is what it took until all had loaded the model, `load_s` what one took for that alone;
    `row_bytes` what a row of the source takes in a part.
    """

    rates: npt.NDArray[np.float64]
    start_s: float
    load_s: float
    row_bytes: float | None


def try_rows(
    stage: type,
    checkpoint: Checkpoint,
    options: dict[str, Any],
    rows: pa.Table,
    plan: Plan,
    get: Callable[[Any], Any] = ray.get,
) -> Tried:
    """Give rows to the model, for some seconds, in the actors of one node.

    Args:
        stage: As `stages.apply` takes it.
        checkpoint: The model.
        options: As `stages.stage_options` says them.
        rows: As preparing yields them; at least one.
        plan: Who gets what.
        get: Waits for the first actor.
    """
    alive: list[Any] = ray.nodes()  # type: ignore[no-untyped-call]
    num_nodes = max(sum(n["Alive"] and n["Resources"].get("CPU", 0) > 0 for n in alive), 1)
    # Of GPUs one is enough: they do not share what they compute with.
    num_actors = 1 if plan.gpus_per_actor else -(-plan.min_actors // num_nodes)
    # In any order: rows of one shard are more alike than those that a window has.
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(rows.num_rows)))
    most = max(rows.num_rows // _WINDOWS, _LEAST_WINDOW)
    window_rows = min(plan.window_rows, most)
    given = ray.put(rows)
    asked = plan.kinds[0].options
    actor: Any = ray.remote(max_restarts=MAX_ACTOR_RESTARTS, **asked)(_Actor)
    began = time.perf_counter()
    actors = [actor.remote(stage, checkpoint, options) for _ in range(num_actors)]
    loads = [a.load_s.remote() for a in actors]
    get(loads[0])
    load_s: list[float] = ray.get(loads)
    start_s = time.perf_counter() - began
    columns = [o.column for o in checkpoint.outputs]
    what = (given, window_rows, columns, _TRIAL_S)
    refs = [a.embed.remote(i, *what) for i, a in enumerate(actors)]
    found: list[tuple[float, float | None]] = ray.get(refs)
    rates = np.array([rate for rate, _ in found])
    return Tried(rates, start_s, sum(load_s) / len(load_s), found[0][1])


class _Actor:
    """An actor of the model stage that is not Ray Data's."""

    def __init__(self, stage: type, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._stage = stage(checkpoint, **options)
        self._load_s = time.perf_counter() - began

    def load_s(self) -> float:
        """What loading has taken."""
        return self._load_s

    def embed(
        self, first: int, rows: pa.Table, window_rows: int, columns: Sequence[str], seconds: float
    ) -> tuple[float, float | None]:
        """Embed windows for some seconds.

        Args:
            first: Which to begin with.
            rows: Of which.
            window_rows: Rows of each.
            columns: The columns of vectors.
            seconds: How many, if there are so many windows.

        Returns:
            Units a second, and bytes of a row in a part.
        """
        windows = [rows.slice(at, window_rows) for at in range(0, rows.num_rows, window_rows)]
        windows = windows[first % len(windows) :] + windows[: first % len(windows)]
        done = [self._stage(windows[0])]  # what comes first takes longer
        began, busy_s, num_units = time.perf_counter(), 0.0, 0
        for window in windows[1:] or windows:
            started = time.perf_counter()
            embedded = self._stage(window)
            took = time.perf_counter() - started
            counted = sum_counts(embedded).items()
            # Without what is done in the first windows only.
            busy_s += sum(s for name, s in counted if name.endswith("/busy_s")) or took
            num_units += int(np.sum(window[NUM_UNITS].to_numpy(), dtype=np.int64))
            done.append(embedded)
            if time.perf_counter() - began > seconds:
                break
        with tempfile.TemporaryDirectory() as folder:
            written, _ = write_part(folder, done[-len(windows) :], columns)
        num_bytes = written.part.size_bytes / written.num_rows if written.part else None
        return num_units / busy_s, num_bytes
