"""What a run would do, take and cost: by what is there, a sample, and what runs have taken before.

Rows are counted, not estimated. What the model sees of them is estimated by a sample (sampling.py);
how fast it is by runs on record or a trial (pace.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from fmembed.errors import SpecError
from fmembed.forecast import Forecast, Range
from fmembed.inputs import Inputs
from fmembed.model.embed import Embed
from fmembed.run import sampling
from fmembed.run.commits import interval_s
from fmembed.run.pace import (
    MEASURED,
    RECORDED,
    REST_S,
    Pace,
    find_pace,
    list_runs,
    unit_size,
)
from fmembed.run.placement import place
from fmembed.run.plan import Plan
from fmembed.run.refresh import Foreseen, Refresh
from fmembed.run.sampling import Sampled
from fmembed.run.spending import mean_price
from fmembed.run.waiting import Watch, watched
from fmembed.sources.source import Source
from fmembed.table.files import REJECTED, Part
from fmembed.table.rewriting import Held, plan_rewriting
from fmembed.telling import Teller

# Of the rows that the model would see so many are drawn, from so many shards.
_SAMPLE_ROWS, _SAMPLE_SHARDS = 1000, 250
# Units by modality; of a server's texts nobody else knows the tokens.
_UNITS = {"text": "tokens", "image": "patches", "audio": "sound seconds"}
_TOKENS_PER_CHARACTER = Range(1 / 4, 1 / 6, 1 / 2)
# Rows of a window of a GPU that is not there, as of texts of 256 tokens; and those that are
# committed at once at least, a window of the smallest.
_GPU_WINDOW, _LEAST_COMMITTED = 4096, 16
# What an actor takes to begin, where it is to embed nothing and nobody has tried.
_LOAD_S = Range(5.0, 1.0, 30.0)
# How far times are off that are measured before the run, and such that are reckoned.
_STARTED, _GUESSED = 0.3, 0.5
# Bytes a second of parts that are written anew (1.4 GB in 13 s by two cores), and of copies.
_REWRITE_BYTES_PER_S, _COPY_BYTES_PER_S = 1.1e8, 5e7


def make_plan(
    inputs: Inputs,
    refreshes: bool,
    allow_removals: int | None,
    start_s: float,
    teller: Teller | None = None,
) -> Forecast:
    """Look at the source and the table, and say what a run would do now; nothing is written.

    Args:
        inputs: Of the run.
        refreshes: Whether it is a refresh.
        allow_removals: As for `Refresh`.
        start_s: What it took to start Ray, which the run will do too.
        teller: Says what a trial of the model waits for.

    Raises:
        SpecError: More GPUs are asked for than there are, and no run on record had one.
    """
    line = Refresh(inputs, allow_removals, adds_only=not refreshes)
    seen = line.foresee(_SAMPLE_ROWS, _SAMPLE_SHARDS)
    drawn, checkpoint, notes = seen.drawn, inputs.checkpoint, list[str]()
    left = replace(inputs.source, shards=tuple(line.shards[i] for i in drawn.shards))
    numbers = np.unique(drawn.sample.rows.shards).tolist()
    some = [(i, line.shards[i]) for i in numbers]
    sampled = sampling.draw(left, some, drawn.sample, checkpoint, inputs.spec.preprocess)
    a_row = sampled.units_of_a_row(seen.num_embed, drawn.times)
    units = a_row * (seen.num_embed / unit_size(inputs))
    plan = pace = None
    if seen.num_embed:
        plan = _place(inputs, left)
        watch = Watch(
            plan, Embed.__name__, teller or Teller(quiet=True), inputs.spec.compute.wait_s
        )
        with watched(watch):
            pace = find_pace(inputs, plan, left, seen, sampled, units, start_s, notes, watch.get)
    row_bytes = _row_bytes(inputs, seen, sampled, pace)
    stages = _stages(seen, pace, row_bytes, start_s)
    written = _written(inputs, seen, row_bytes, stages)
    if written is not None and written.rewritten:
        rewrite_s = written.num_rewritten / _REWRITE_BYTES_PER_S
        stages["rewrite"] = Range.exactly(rewrite_s).within(_GUESSED)
    hours = _device_hours(seen, plan, pace)
    cost = _cost(inputs, units, hours, plan)
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
        rows_new=seen.counts["new"] if refreshes else seen.num_embed,
        rows_changed=seen.counts["changed"],
        rows_removed=seen.rows_removed,
        rows_withheld=seen.rows_withheld,
        rows_unchanged=seen.counts["unchanged"],
        rows_embedded=seen.num_embed + drawn.num_fanned_out,
        rows_copied=seen.num_copies - drawn.num_fanned_out,
        contents_embedded=seen.num_embed,
        rows_rejected=sampled.rejected(seen.num_embed) + seen.num_rejected,
        rows_sampled=sampled.num_rows,
        unit="characters" if checkpoint.endpoint is not None else _UNITS[checkpoint.modality],
        units=units,
        rate=None if pace is None else _inverse(pace.unit_s),
        by="" if pace is None else pace.by,
        seconds=_sum(stages) if pace is not None or not seen.num_embed else None,
        stages={name: round(s.value, 2) for name, s in stages.items()},
        device_hours=hours,
        cost=cost,
        parts_written=None if written is None else written.parts,
        bytes_written=None if written is None else written.num_bytes,
        parts_rewritten=0 if written is None else len(written.rewritten),
        bytes_rewritten=0 if written is None else written.num_rewritten,
        withheld=seen.why_withheld if seen.rows_withheld else "",
        share_of_budget=share,
        compute=asdict(plan) if plan is not None else {},
        notes=tuple(notes),
    )


def _place(inputs: Inputs, left: Source) -> Plan:
    """Where the work goes: on the cluster that is there, or on GPUs like those of earlier runs.

    A plan need not hold the GPUs that it is for: `compute` says how many there will be.
    """
    spec = inputs.spec.compute
    before = next((r for r in list_runs(inputs) if r.compute.get("device") == "cuda"), None)
    try:
        plan = place(inputs, left)
        # Of GPUs that have yet to come nobody says the kind: it is that of the last ones.
        if plan.device == "cuda" and not plan.device_name and before is not None:
            return replace(plan, device_name=str(before.compute.get("device_name", "")))
        return plan
    except SpecError:
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


def _stages(
    seen: Foreseen, pace: Pace | None, row_bytes: Range | None, start_s: float
) -> dict[str, Range]:
    """Seconds of what a run does one after another."""
    if seen.adds_only and not seen.moves_rows:
        return {}
    begin_s = start_s + REST_S / 2 + (_LOAD_S.value if seen.loads_model else 0.0)
    if pace is not None:
        begin_s = pace.begin_s
    stages = {"start": Range.exactly(begin_s).within(_STARTED)}
    if not seen.adds_only:  # before the work, and without reading after it
        stages["compare"] = Range.exactly(2 * seen.seconds - seen.scan_s).within(_STARTED)
    if pace is not None:
        stages["model"] = pace.work_s
    if seen.num_copies and row_bytes is not None:
        stages["copy"] = row_bytes * (seen.num_copies / _COPY_BYTES_PER_S)
    return stages


def _sum(stages: Mapping[str, Range]) -> Range:
    return sum(stages.values(), Range.exactly(0))


def _device_hours(seen: Foreseen, plan: Plan | None, pace: Pace | None) -> Range | None:
    if not seen.num_embed:
        return _LOAD_S * (1 / 3600) if seen.loads_model else Range.exactly(0)
    if pace is None or plan is None:
        return None
    # Of few rows not every actor has a window.
    num_windows = math.ceil((seen.num_embed + seen.num_copies) / plan.window_rows)
    loads = Range.exactly(pace.load_s).within(_GUESSED) * min(plan.max_actors, num_windows)
    return (pace.work_s * plan.max_actors + loads) * (1 / 3600)


def _cost(inputs: Inputs, units: Range, hours: Range | None, plan: Plan | None) -> Range | None:
    """Money: of a server by its tokens, else by the hours."""
    if inputs.checkpoint.endpoint is not None:
        return _price_tokens(inputs, units)
    price = inputs.spec.compute.price_per_device_hour
    if plan is not None:
        price = mean_price(inputs.spec, plan)
    return None if hours is None or price is None else hours * price


def _inverse(value: Range) -> Range:
    return Range(1 / value.value, 1 / value.high, 1 / value.low)


def _row_bytes(inputs: Inputs, seen: Foreseen, sampled: Sampled, pace: Pace | None) -> Range | None:
    """What a row of the source takes in a part: by the table's parts, else by what was tried."""
    parts = [h.part for h in seen.held if not h.path.startswith(REJECTED)]
    num_rows = sum(part.num_rows for part in parts)
    if num_rows:  # of the table, of which a row of the source may have several
        in_pieces = inputs.spec.preprocess.pieces_are_rows(inputs.checkpoint.modality)
        has_pieces = in_pieces and len(sampled.num_pieces)
        pieces = float(sampled.num_pieces.mean()) if has_pieces else 1.0
        return Range.exactly(sum(p.size_bytes for p in parts) / num_rows * pieces).within(RECORDED)
    if pace is not None and pace.row_bytes is not None:
        return Range.exactly(pace.row_bytes).within(MEASURED)
    return None


@dataclass(frozen=True)
class _Written:
    """Parts that a run would write; and those of now that it would write anew."""

    parts: Range
    num_bytes: Range
    rewritten: Sequence[Held]

    @property
    def num_rewritten(self) -> int:
        """Bytes of the latter."""
        return sum(held.part.size_bytes for held in self.rewritten)


def _written(
    inputs: Inputs, seen: Foreseen, row_bytes: Range | None, stages: Mapping[str, Range]
) -> _Written | None:
    """None where nobody knows what a row takes."""
    if row_bytes is None and seen.num_embed:
        return None
    output, num_rows = inputs.spec.output, seen.num_embed + seen.num_copies
    num_bytes = (row_bytes or Range.exactly(0)) * num_rows
    # A part is written when it is full, and at each commit.
    full = max(math.ceil(num_bytes.value / output.part_bytes), min(num_rows, 1))
    num_commits = _count_commits(output.commit_every_s, stages["model"]) if "model" in stages else 1
    num_commits = min(num_commits, max(num_rows // _LEAST_COMMITTED, 1))
    num_new = max(full, num_commits if num_rows else 0) + bool(seen.num_copies)
    new = [
        Held(f"new-{i}", Part("", int(num_bytes.value / num_new), num_rows // num_new), 1, 1)
        for i in range(num_new)
    ]
    is_rejecting = bool(seen.num_rejected)
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
    runs = [r for r in list_runs(inputs) if r.counts.get("endpoint_tokens")]
    share = _TOKENS_PER_CHARACTER
    if runs:
        tokens = sum(r.counts["endpoint_tokens"] for r in runs)
        share = Range.exactly(tokens / sum(r.num_units for r in runs)).within(RECORDED)
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
