"""How fast a run would go: by runs on record that had devices of the same kind, else by a trial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from fmembed.errors import TableError
from fmembed.forecast import Range
from fmembed.inputs import Inputs
from fmembed.model.embed import Embed
from fmembed.result import RunResult, check_run
from fmembed.run.plan import Plan
from fmembed.run.ranges import find_ranges
from fmembed.run.refresh import Foreseen
from fmembed.run.sampling import Sampled
from fmembed.run.stages import stage_options
from fmembed.run.trial import try_rows
from fmembed.run.verdict import COMPARE, EMBED, SETTLE
from fmembed.sources.source import Source
from fmembed.table.card import fingerprint
from fmembed.table.records import read_runs

# Runs on record that tell it: the newest ones, in which each actor was at work for so long.
_RUNS, _LEAST_S = 5, 2.0
# Rows of the smallest window: batches of fewer are slow.
_LEAST_WINDOW = 16
# More than a run has of them.
_MOST_UNITS, _MOST_S = 2**60, 1e10
# How far it is off at least: of the same work on a quiet machine, once and once more.
MEASURED, RECORDED = 0.1, 0.05
# What a run takes besides Ray's start, the start of its actors and its work: planning, the first
# window's way, the last commit.
REST_S = 4.0
# A cloud takes a spot node back after a notice of 30 s, the shortest there is: a window that takes
# no longer than this is done by then.
_WINDOW_S = 20.0


@dataclass(frozen=True)
class Pace:
    """How fast the work goes.

    `unit_s` are seconds for which an actor holds its device for a unit; `work_s` those that the run
    takes from its first window to its last, `begin_s` those besides, in `load_s` of which each
    actor loads its model. `row_bytes` are what a row of the source takes in a part, None where that
    was not seen.
    """

    unit_s: Range
    work_s: Range
    begin_s: float
    load_s: float
    by: str
    row_bytes: float | None = None


def find_pace(
    inputs: Inputs,
    plan: Plan,
    left: Source,
    seen: Foreseen,
    sampled: Sampled,
    units: Range,
    start_s: float,
    notes: list[str],
    get: Callable[[Any], Any] = ray.get,
) -> Pace | None:
    """How fast the work goes; None where nobody can say, and why is added to the notes.

    Args:
        inputs: Of the run.
        plan: Who gets what.
        left: What there is to read.
        seen: What was found to do.
        sampled: Some of the rows that the model would see.
        units: What it would see of all.
        start_s: What it took to start Ray.
        notes: For people.
        get: Waits for what a trial asks for.
    """
    num_rows = seen.num_embed
    like = [
        r for r in list_runs(inputs) if _is_like(r.compute, plan) and _mean_busy_s(r) >= _LEAST_S
    ]
    if like:
        return _remember(like[:_RUNS], plan, units, unit_size(inputs))
    if inputs.checkpoint.endpoint is not None:
        notes.append("how fast the server answers is known once a run has asked it; it was not")
        return None
    if sampled.rows is None or not sampled.rows.num_rows:
        notes.append("preparing rejects all rows that were drawn; the model was not tried")
        return None
    ranges = find_ranges(inputs, left, plan, Embed, 0, get)
    tried = []
    for pool in plan.kinds:
        one = plan.of(pool)
        checkpoint = pool.run_as(inputs.checkpoint)
        options = stage_options(checkpoint, inputs.spec.preprocess, one, ranges, 0)
        tried.append(try_rows(Embed, checkpoint, options, sampled.rows, one, get))
    first, rates = tried[0], tried[0].rates
    if len(tried) > 1:  # an actor takes for a unit what is the mean of all, by what each does
        weights = [pool.max_actors for pool in plan.kinds]
        rates = np.atleast_1d(np.average([t.rates.mean() for t in tried], weights=weights))
    seconds = 1 / rates * unit_size(inputs)
    unit_s = Range(float(seconds.mean()), float(seconds.min()), float(seconds.max()))
    unit_s = unit_s.within(MEASURED)
    model_s = unit_s * units * (1 / plan.max_actors)
    # Of processes that read and prepare, in all.
    feed_s = seen.scan_s * min(plan.num_workers, len(seen.drawn.shards))
    feed_s += sampled.prepare_s * num_rows
    if plan.device == "cpu":  # which the model's threads would have all to themselves
        work_s = model_s + feed_s / (plan.num_threads * plan.max_actors)
    else:
        fed_s = Range.exactly(feed_s / plan.num_workers).within(MEASURED)
        work_s = max(model_s, fed_s, key=lambda r: r.value)
    begin_s = start_s + first.start_s + REST_S
    return Pace(unit_s, work_s, begin_s, first.load_s, "measured now", first.row_bytes)


def shorten_windows(plan: Plan, inputs: Inputs) -> Plan:
    """Windows that the slowest actor of the last runs has done before its node could be taken.

    Args:
        plan: Who gets what.
        inputs: Of the run; rows of a window that the config names are left as they are.
    """
    if inputs.spec.compute.window_rows != "auto":
        return plan
    rates = [
        rate
        for run in itertools.islice(list_runs(inputs), _RUNS)
        if run.compute.get("device") == plan.device and (rate := _slowest(run))
    ]
    if not rates:
        return plan
    most = max(int(min(rates) * _WINDOW_S), _LEAST_WINDOW)
    return replace(plan, window_rows=min(plan.window_rows, most))


def _slowest(run: RunResult) -> float | None:
    """Rows a second of the slowest actor of a run while it was at work; None where nobody knows."""
    if not _actors(run) or not run.verdict:
        return None
    actors = [a for a in run.verdict["actors"].values() if a["busy_s"] and a.get("tokens", 0) > 0]
    num_tokens = sum(a["tokens"] for a in actors)
    if not num_tokens:
        return None
    row_tokens = num_tokens / run.rows_embedded if run.rows_embedded else math.inf
    rate: float = min(a["tokens"] / a["busy_s"] for a in actors) / row_tokens
    return rate if math.isfinite(rate) and rate > 0 else None


def list_runs(inputs: Inputs) -> Iterator[RunResult]:
    """Runs on record that made vectors as this one does, the newest first."""
    name = fingerprint(inputs.identity)
    for _, raw in read_runs(inputs.table.storage):
        try:
            result = check_run(raw, inputs.table.uri)
        except TableError:  # it says nothing of how fast it was
            continue
        is_counted = 0 < result.num_units < _MOST_UNITS
        if result.fingerprint == name and is_counted and _actors(result):
            yield result


def unit_size(inputs: Inputs) -> int:
    """How many of the units that rows count make one that is shown: of samples a second's."""
    return inputs.checkpoint.rate_hz or 1


def _is_like(compute: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a run had devices of the same kind; of CPUs, with as many threads an actor."""
    names = ["device", "device_name", *(["num_threads"] if plan.device == "cpu" else [])]
    if not all(compute.get(name) == getattr(plan, name) for name in names):
        return False
    # Of several pools the mean of an actor is by how many each of them has.
    return list(compute.get("pools", [])) == [asdict(pool) for pool in plan.pools]


def _actors(run: RunResult) -> list[tuple[float, float, float]]:
    """Of each actor of a run the seconds for which it was loading, waiting and at work; of those
    that ask a server the sum, as Ray counts it. None where that makes no sense.
    """
    found = [(0.0, 0.0, run.stages[EMBED]["busy_s"])] if EMBED in run.stages else []
    if run.verdict:
        actors = run.verdict["actors"].values()
        found = [(a["load_s"], a["wait_s"], a["busy_s"]) for a in actors]
    # Anybody may have written the record.
    is_sane = all(0 <= seconds < _MOST_S for actor in found for seconds in actor)
    return found if is_sane and sum(busy_s for *_, busy_s in found) > 0 else []


def _mean_busy_s(run: RunResult) -> float:
    return float(np.mean([busy_s for *_, busy_s in _actors(run)]))


def _remember(runs: Sequence[RunResult], plan: Plan, units: Range, size: int) -> Pace:
    """The pace of runs on record."""
    unit_s, begin_s, loads_s = [], [], []
    for run in runs:
        actors = _actors(run)
        held_s = sum(wait_s + busy_s for _, wait_s, busy_s in actors)
        unit_s.append(held_s / run.num_units * size)
        compared = (run.stages[name]["busy_s"] for name in (COMPARE, SETTLE) if name in run.stages)
        begin_s.append(max(min(run.seconds, _MOST_S) - held_s / len(actors) - sum(compared), 0.0))
        loads_s.append(sum(load_s for load_s, *_ in actors) / len(actors))
    both = Range(float(np.median(unit_s)), min(unit_s), max(unit_s)).within(RECORDED)
    number = "a run" if len(runs) == 1 else f"{len(runs)} runs"
    return Pace(
        both, both * units * (1 / plan.max_actors), float(np.median(begin_s)),
        float(np.median(loads_s)), f"by {number} on record",
    )  # fmt: skip
