"""What a run would do, take and cost: by what is there, a sample, and what runs have taken before.

Rows are counted, not estimated. What the model sees of them is estimated by a sample; how fast it
is by the runs on record that had a device of the same kind, else by a measurement of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from fmembed.errors import SpecError, TableError
from fmembed.forecast import Forecast, Range
from fmembed.inputs import Inputs
from fmembed.model.embed import Embed
from fmembed.result import RunResult, check_run
from fmembed.rows.found import COPY, EMBED, REJECT, TWIN
from fmembed.run import trial
from fmembed.run.commits import interval_s
from fmembed.run.placement import Plan, place
from fmembed.run.ranges import find_ranges
from fmembed.run.refresh import Foreseen, Refresh
from fmembed.run.stages import stage_options
from fmembed.run.trial import Sampled
from fmembed.run.verdict import COMPARE, SETTLE
from fmembed.run.verdict import EMBED as EMBED_STAGE
from fmembed.table.card import fingerprint
from fmembed.table.files import REJECTED, Part
from fmembed.table.records import read_runs
from fmembed.table.rewriting import Held, plan_rewriting

# Of the rows that the model would see so many are drawn, from so many shards.
_SAMPLE_ROWS, _SAMPLE_SHARDS = 1000, 250
# Rows of a window of a GPU that is not there: as of texts of 256 tokens.
_GPU_WINDOW = 4096
# What an actor takes to begin, where it is to embed nothing and nobody has tried.
_LOAD_S = Range(5.0, 1.0, 30.0)
# Rows that are committed at once, at least: a window of the smallest.
_LEAST_COMMITTED = 16
# Units by modality; of a server's texts nobody else knows the tokens.
_UNITS = {"text": "tokens", "image": "patches", "audio": "sound seconds"}
_TOKENS_PER_CHARACTER = Range(1 / 4, 1 / 6, 1 / 2)
# Runs on record that tell the rate: the newest ones, in which each actor was at work for so long.
_RUNS, _LEAST_S = 5, 2.0
# More than a run has of them.
_MOST_UNITS, _MOST_S = 2**60, 1e10
# How far times are off at least: of the same work on a quiet machine, once and once more.
_MEASURED, _RECORDED, _STARTED, _GUESSED = 0.1, 0.05, 0.3, 0.5
# What a run takes besides Ray's start, the start of its actors and its work: planning, the first
# window's way, the last commit. And bytes a second of parts that are written anew (1.4 GB in 13 s
# by two cores).
_REST_S, _REWRITE_BYTES_PER_S, _COPY_BYTES_PER_S = 4.0, 1.1e8, 5e7


@dataclass(frozen=True)
class _Pace:
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


def make_plan(
    inputs: Inputs, refreshes: bool, allow_removals: int | None, start_s: float
) -> Forecast:
    """Look at the source and the table, and say what a run would do now; nothing is written.

    Args:
        inputs: Of the run.
        refreshes: Whether it is a refresh.
        allow_removals: As for `Refresh`.
        start_s: What it took to start Ray, which the run will do too.

    Raises:
        SpecError: More GPUs are asked for than there are, and no run on record had one.
    """
    line = Refresh(inputs, allow_removals, adds_only=not refreshes)
    seen = line.foresee(_SAMPLE_ROWS, _SAMPLE_SHARDS)
    source, checkpoint = inputs.source, inputs.checkpoint
    num_embed = seen.drawn.fates.get(EMBED, 0)
    numbers = np.unique(seen.drawn.sample.rows.shards).tolist()
    shards = [(i, line.shards[i]) for i in numbers]
    sampled = trial.draw(source, shards, seen.drawn.sample, checkpoint, inputs.spec.preprocess)
    plan = _place(inputs, seen) if num_embed else None
    per_row = _mean(sampled, num_embed, seen.drawn.times)
    units = per_row * (num_embed / _size(inputs))
    notes: list[str] = []
    pace = _find_pace(inputs, plan, seen, sampled, units, start_s, notes) if plan else None
    in_pieces = inputs.spec.preprocess.pieces_are_rows(checkpoint.modality)
    row_bytes = _row_bytes(seen, sampled, pace, in_pieces)
    moves_rows = bool(seen.drawn.fates)
    begin_s = start_s + (_LOAD_S.value if moves_rows else 0) + _REST_S / 2
    if pace is not None:
        begin_s = pace.begin_s
    stages = {"start": Range.exactly(begin_s).within(_STARTED)}
    if refreshes:  # before the work, and without reading after it
        stages["compare"] = Range.exactly(2 * seen.seconds - seen.scan_s).within(_STARTED)
    if pace is not None:
        stages["model"] = pace.work_s
    num_copied = seen.drawn.fates.get(COPY, 0)
    if num_copied and row_bytes is not None:
        stages["copy"] = row_bytes * (num_copied / _COPY_BYTES_PER_S)
    written = None if row_bytes is None and num_embed else _written(inputs, seen, row_bytes, stages)
    rewritten = written.rewritten if written is not None else []
    num_rewritten = sum(held.part.size_bytes for held in rewritten)
    if rewritten:
        stages["rewrite"] = Range.exactly(num_rewritten / _REWRITE_BYTES_PER_S).within(_GUESSED)
    is_known = pace is not None or not num_embed
    seconds = sum(stages.values(), Range.exactly(0)) if is_known else None
    if not (refreshes or num_embed):
        seconds = Range.exactly(0)
    hours = cost = None
    if pace is not None and plan is not None:
        # Of few rows not every actor has a window.
        num_windows = -(-(num_embed + num_copied) // plan.window_rows)
        num_actors = max(min(plan.max_actors, num_windows), 1)
        loads = Range.exactly(pace.load_s).within(_GUESSED) * num_actors
        hours = (pace.work_s * plan.max_actors + loads) * (1 / 3600)
    elif not num_embed:  # what has no vector, or another row's, goes the same way
        hours = _LOAD_S * (1 / 3600) if moves_rows else Range.exactly(0)
    if checkpoint.endpoint is not None:
        cost = _price_tokens(inputs, units)
    elif hours is not None and (price := inputs.spec.compute.price_per_device_hour) is not None:
        cost = hours * price
    share = _share_of_budget(inputs, hours, cost)
    if share is not None and share.low < 1 and plan is not None:
        notes.append(
            f"a budget is looked at when a window of {plan.window_rows:,} rows comes out of the "
            "model: smaller ones, by compute.window_rows, stop a run sooner"
        )
    return Forecast(
        kind="refresh" if refreshes else "embed",
        table=inputs.table.uri,
        version=inputs.table.version(),
        rows_read=seen.rows_read,
        rows_new=seen.counts["new"] if refreshes else num_embed,
        rows_changed=seen.counts["changed"],
        rows_removed=seen.rows_removed,
        rows_withheld=seen.rows_withheld,
        rows_unchanged=seen.counts["unchanged"],
        rows_embedded=num_embed + seen.drawn.num_fanned_out,
        rows_copied=num_copied - seen.drawn.num_fanned_out,
        contents_embedded=num_embed,
        rows_rejected=_rejected(sampled, num_embed) + _certain(seen),
        rows_sampled=sampled.num_rows,
        unit="characters" if checkpoint.endpoint is not None else _UNITS[checkpoint.modality],
        units=units,
        rate=None if pace is None else _inverse(pace.unit_s),
        by="" if pace is None else pace.by,
        seconds=seconds,
        stages={name: round(s.value, 2) for name, s in stages.items()},
        device_hours=hours,
        cost=cost,
        parts_written=None if written is None else written.parts,
        bytes_written=None if written is None else written.num_bytes,
        parts_rewritten=len(rewritten),
        bytes_rewritten=num_rewritten,
        withheld=seen.why_withheld if seen.rows_withheld else "",
        share_of_budget=share,
        compute=asdict(plan) if plan is not None else {},
        notes=tuple(notes),
    )


def _certain(seen: Foreseen) -> int:
    """Rows that reading rejects."""
    return seen.drawn.fates.get(TWIN, 0) + seen.drawn.fates.get(REJECT, 0)


def _place(inputs: Inputs, seen: Foreseen) -> Plan:
    """Where the work goes: on the cluster that is there, or on GPUs like those of earlier runs.

    A plan need not hold the GPUs that it is for: `compute` says how many there will be.
    """
    source, spec = inputs.source, inputs.spec.compute
    try:
        left = replace(source, shards=tuple(source.shards[i] for i in seen.drawn.shards))
        return place(inputs, left)
    except SpecError:
        before = next((r for r in _runs(inputs) if r.compute.get("device") == "cuda"), None)
        if before is None or spec.actors == "auto" or spec.gpus_per_actor == "auto":
            raise
        low, high = (spec.actors,) * 2 if isinstance(spec.actors, int) else spec.actors
        return Plan(
            device="cuda",
            device_name=str(before.compute.get("device_name", "")),
            min_actors=low,
            max_actors=high,
            gpus_per_actor=spec.gpus_per_actor,
            cpus_per_actor=0.0,
            num_threads=1,
            cpus_per_task=1.0,
            num_workers=1,
            window_rows=_GPU_WINDOW,
            batch_tokens=spec.batch_tokens,
        )


def _runs(inputs: Inputs) -> Iterator[RunResult]:
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


def _size(inputs: Inputs) -> int:
    """How many of the units that rows count make one that is shown: of samples a second's."""
    return inputs.checkpoint.rate_hz or 1


def _mean(sampled: Sampled, num_rows: int, times: Mapping[int, int] | None) -> Range:
    """Units of a row, with two standard errors to both sides; exact where all rows were drawn.

    Args:
        sampled: What was drawn; what was rejected has none.
        num_rows: Of how many.
        times: How often each shard was drawn, whose rows may be alike; None where rows were drawn
            from all.
    """
    n, units = sampled.num_rows, sampled.units
    if not n:
        return Range.exactly(0)
    if times is None and not sampled.is_cut:
        mean = float(units.mean())
        left = max(1 - n / num_rows, 0.0)
        off = float(units.std()) / math.sqrt(n) * math.sqrt(left)
        return Range(mean, max(mean - 2 * off, 0.0), mean + 2 * off)
    shards, of_shard = np.unique(sampled.shards, return_inverse=True)
    sizes = np.bincount(of_shard)
    means = np.bincount(of_shard, weights=units) / sizes
    weights = sizes if times is None else np.array([times[i] for i in shards.tolist()])
    mean = float((weights * means).sum() / weights.sum())
    off = mean  # of one shard nobody knows
    if len(shards) > 1:
        spread = math.sqrt(float(((weights * (means - mean)) ** 2).sum())) / weights.sum()
        off = 2 * spread * math.sqrt(len(shards) / (len(shards) - 1))
    return Range(mean, max(mean - off, 0.0), mean + off)


def _rejected(sampled: Sampled, num_rows: int) -> Range:
    """Rows that preparing rejects, by the exact interval of their share among those drawn."""
    n, rejected = sampled.num_rows, sampled.num_rejected
    if n >= num_rows:
        return Range.exactly(rejected)
    if not n:  # they have changed since they were counted
        return Range(0, 0, num_rows)
    from scipy.stats import binomtest

    share = binomtest(rejected, n).proportion_ci()
    return Range(rejected / n * num_rows, share.low * num_rows, share.high * num_rows)


def _find_pace(
    inputs: Inputs,
    plan: Plan,
    seen: Foreseen,
    sampled: Sampled,
    units: Range,
    start_s: float,
    notes: list[str],
) -> _Pace | None:
    """How fast the work goes, by runs on record, else by trying it; None where neither can be."""
    like = [r for r in _runs(inputs) if _is_like(r.compute, plan) and _mean_busy_s(r) >= _LEAST_S]
    if like:
        return _remember(like[:_RUNS], plan, units, _size(inputs))
    if inputs.checkpoint.endpoint is not None:
        notes.append("how fast the server answers is known once a run has asked it; it was not")
        return None
    if sampled.rows is None or not sampled.rows.num_rows:
        notes.append("preparing rejects all rows that were drawn; the model was not tried")
        return None
    ranges = find_ranges(inputs, plan, Embed, 0)
    options = stage_options(inputs.checkpoint, inputs.spec.preprocess, plan, ranges, 0)
    tried = trial.try_rows(Embed, inputs.checkpoint, options, sampled.rows, plan)
    seconds = 1 / tried.rates * _size(inputs)
    unit_s = Range(float(seconds.mean()), float(seconds.min()), float(seconds.max()))
    unit_s = unit_s.within(_MEASURED)
    model_s = unit_s * units * (1 / plan.max_actors)
    # Of processes that read and prepare, in all.
    feed_s = seen.scan_s * min(plan.num_workers, len(seen.drawn.shards))
    feed_s += sampled.prepare_s * seen.drawn.fates[EMBED]
    if plan.device == "cpu":  # which the model's threads would have all to themselves
        work_s = model_s + feed_s / (plan.num_threads * plan.max_actors)
    else:
        fed_s = Range.exactly(feed_s / plan.num_workers).within(_MEASURED)
        work_s = max(model_s, fed_s, key=lambda r: r.value)
    begin_s = start_s + tried.start_s + _REST_S
    return _Pace(unit_s, work_s, begin_s, tried.load_s, "measured now", tried.row_bytes)


def _is_like(compute: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a run had devices of the same kind; of CPUs, with as many threads an actor."""
    names = ["device", "device_name", *(["num_threads"] if plan.device == "cpu" else [])]
    return all(compute.get(name) == getattr(plan, name) for name in names)


def _actors(run: RunResult) -> list[tuple[float, float, float]]:
    """Of each actor of a run the seconds for which it was loading, waiting and at work; of those
    that ask a server the sum, as Ray counts it. None where that makes no sense.
    """
    found = [(0.0, 0.0, run.stages[EMBED_STAGE]["busy_s"])] if EMBED_STAGE in run.stages else []
    if run.verdict:
        actors = run.verdict["actors"].values()
        found = [(a["load_s"], a["wait_s"], a["busy_s"]) for a in actors]
    # Anybody may have written the record.
    is_sane = all(0 <= seconds < _MOST_S for actor in found for seconds in actor)
    return found if is_sane and sum(busy_s for *_, busy_s in found) > 0 else []


def _mean_busy_s(run: RunResult) -> float:
    return float(np.mean([busy_s for *_, busy_s in _actors(run)]))


def _remember(runs: Sequence[RunResult], plan: Plan, units: Range, size: int) -> _Pace:
    """The pace of runs on record."""
    unit_s, begin_s, loads_s = [], [], []
    for run in runs:
        actors = _actors(run)
        held_s = sum(wait_s + busy_s for _, wait_s, busy_s in actors)
        unit_s.append(held_s / run.num_units * size)
        compared = (run.stages[name]["busy_s"] for name in (COMPARE, SETTLE) if name in run.stages)
        begin_s.append(max(min(run.seconds, _MOST_S) - held_s / len(actors) - sum(compared), 0.0))
        loads_s.append(sum(load_s for load_s, *_ in actors) / len(actors))
    both = Range(float(np.median(unit_s)), min(unit_s), max(unit_s)).within(_RECORDED)
    number = "a run" if len(runs) == 1 else f"{len(runs)} runs"
    return _Pace(
        both, both * units * (1 / plan.max_actors), float(np.median(begin_s)),
        float(np.median(loads_s)), f"by {number} on record",
    )  # fmt: skip


def _inverse(value: Range) -> Range:
    return Range(1 / value.value, 1 / value.high, 1 / value.low)


def _row_bytes(
    seen: Foreseen, sampled: Sampled, pace: _Pace | None, in_pieces: bool
) -> Range | None:
    """What a row of the source takes in a part: by the table's parts, else by what was tried."""
    parts = [h.part for h in seen.held if not h.path.startswith(REJECTED)]
    num_rows = sum(part.num_rows for part in parts)
    if num_rows:  # of the table, of which a row of the source may have several
        has_pieces = in_pieces and len(sampled.num_pieces)
        pieces = float(sampled.num_pieces.mean()) if has_pieces else 1.0
        return Range.exactly(sum(p.size_bytes for p in parts) / num_rows * pieces).within(_RECORDED)
    if pace is not None and pace.row_bytes is not None:
        return Range.exactly(pace.row_bytes).within(_MEASURED)
    return None


@dataclass(frozen=True)
class _Written:
    """Parts that a run would write; and those of now that it would write anew."""

    parts: Range
    num_bytes: Range
    rewritten: Sequence[Held]


def _written(
    inputs: Inputs, seen: Foreseen, row_bytes: Range | None, stages: Mapping[str, Range]
) -> _Written:
    output = inputs.spec.output
    num_rows = seen.drawn.fates.get(EMBED, 0) + seen.drawn.fates.get(COPY, 0)
    num_bytes = (row_bytes or Range.exactly(0)) * num_rows
    # A part is written when it is full, and at each commit.
    full = max(math.ceil(num_bytes.value / output.part_bytes), min(num_rows, 1))
    num_commits = _count_commits(output.commit_every_s, stages["model"]) if "model" in stages else 1
    num_commits = min(num_commits, max(num_rows // _LEAST_COMMITTED, 1))
    num_new = max(full, num_commits if num_rows else 0) + bool(seen.drawn.fates.get(COPY, 0))
    new = [
        Held(f"new-{i}", Part("", int(num_bytes.value / num_new), num_rows // num_new), 1, 1)
        for i in range(num_new)
    ]
    is_rejecting = bool(_certain(seen))
    rewritten: list[Held] = []
    num_parts = num_new + is_rejecting
    if not seen.adds_only:
        rejected = [h for h in seen.held if h.path.startswith(REJECTED)]
        rows = [h for h in seen.held if not h.path.startswith(REJECTED)]
        for some in ([*rows, *new], rejected):
            for group in plan_rewriting(some, output.part_bytes):
                old = [h for h in group if not h.path.startswith("new-")]
                rewritten += old
                num_bytes += sum(h.num_bytes for h in old)
                num_parts += 1 - (len(group) - len(old))
    most = max(num_parts, full + is_rejecting) + (1 if num_rows else 0)
    return _Written(Range(num_parts, min(full, num_parts), most), num_bytes, rewritten)


def _count_commits(every_s: float | Literal["auto"], work_s: Range) -> int:
    """How often a run commits while it goes."""
    if every_s != "auto":
        return max(math.ceil(work_s.value / every_s), 1)
    at_s, count = 0.0, 1
    while (at_s := at_s + interval_s(every_s, at_s)) < work_s.value:
        count += 1
    return count


def _price_tokens(inputs: Inputs, characters: Range) -> Range | None:
    """What a server asks for texts, by how many tokens it has counted before in how many
    characters.
    """
    assert inputs.checkpoint.endpoint is not None
    price = inputs.checkpoint.endpoint.usd_per_million_tokens
    if price is None:
        return None
    runs = [r for r in _runs(inputs) if r.counts.get("endpoint_tokens")]
    share = _TOKENS_PER_CHARACTER
    if runs:
        tokens = sum(r.counts["endpoint_tokens"] for r in runs)
        share = Range.exactly(tokens / sum(r.num_units for r in runs)).within(_RECORDED)
    return characters * share * (price / 1e6)


def _share_of_budget(inputs: Inputs, hours: Range | None, cost: Range | None) -> Range | None:
    """How much of the work the budget pays for."""
    budget = inputs.spec.compute.budget
    both = ((budget.device_hours, hours), (budget.cost, cost))
    shares = [
        Range(*(min(limit / most, 1.0) if most else 1.0
                for most in (needed.value, needed.high, needed.low)))
        for limit, needed in both
        if limit is not None and needed is not None
    ]  # fmt: skip
    return min(shares, key=lambda s: s.value, default=None)
