"""What a run would do and cost, as `fmembed plan` says it before anything is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Range:
    """What something will be, most likely, and between what it will be 19 times in 20."""

    value: float
    low: float
    high: float

    def __mul__(self, other: Range | float) -> Range:
        """The product; of two ranges, as if both were off to the same side at once."""
        if isinstance(other, Range):
            return Range(self.value * other.value, self.low * other.low, self.high * other.high)
        return Range(self.value * other, self.low * other, self.high * other)

    def __add__(self, other: Range | float) -> Range:
        """The sum, in the same way."""
        if isinstance(other, Range):
            return Range(self.value + other.value, self.low + other.low, self.high + other.high)
        return Range(self.value + other, self.low + other, self.high + other)

    def within(self, share: float) -> Range:
        """The same, at least so far to both sides, as a share of it."""
        low, high = self.value * (1 - share), self.value * (1 + share)
        return Range(self.value, min(self.low, low), max(self.high, high))

    @classmethod
    def exactly(cls, value: float) -> Range:
        """No more and no less."""
        return cls(value, value, value)


@dataclass(frozen=True)
class Forecast:
    """What a run would do now, and cost.

    The `rows_...` and `contents_embedded` are counts, as in `RunResult`, of what reading the source
    tells; of these rows preparing may reject some, `rows_rejected` in all, of which those that
    reading rejects are certain. `units` are what the model sees, named by `unit`: tokens, patches,
    sound seconds, or a server's characters. `seconds` is what the run takes on the cluster that was
    planned for, `compute`, of which `stages` are parts; `device_hours` and `cost` are as in
    `RunResult.spent`. `bytes_written` are those of `parts_written`; `bytes_rewritten` of parts that
    are written anew. What cannot be known is None, and `notes` say why.

    `rate` is units a second that one actor computes; `by` says whether runs on record or a
    measurement tell it. `share_of_budget` is the part of the work that `compute.budget` pays for.
    """

    kind: Literal["embed", "refresh"]
    table: str
    version: int | None
    rows_read: int = 0
    rows_new: int = 0
    rows_changed: int = 0
    rows_removed: int = 0
    rows_withheld: int = 0
    rows_unchanged: int = 0
    rows_embedded: int = 0
    rows_copied: int = 0
    contents_embedded: int = 0
    rows_rejected: Range = Range(0, 0, 0)
    rows_sampled: int = 0
    unit: str = ""
    units: Range = Range(0, 0, 0)
    rate: Range | None = None
    by: str = ""
    seconds: Range | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    device_hours: Range | None = None
    cost: Range | None = None
    parts_written: Range | None = None
    bytes_written: Range | None = None
    parts_rewritten: int = 0
    bytes_rewritten: int = 0
    withheld: str = ""
    share_of_budget: Range | None = None
    compute: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_nothing(self) -> bool:
        """Whether the run would find nothing to do."""
        moves = self.rows_new + self.rows_changed + self.rows_removed + self.rows_withheld
        return not (moves or self.rows_rejected.high)


def lines(forecast: Forecast) -> Iterator[str]:
    """What a run would do, a line each, for people."""
    f = forecast
    name = "a refresh" if f.kind == "refresh" else "an embedding run"
    yield f"plan      of {name} of {f.table}; nothing was written"
    if f.is_nothing:
        yield f"nothing to do: all {f.rows_read:,} rows are done"
        return
    names = ["new", "changed", "unchanged", *(["removed"] if f.kind == "refresh" else [])]
    counts = ", ".join(f"{getattr(f, f'rows_{n}'):,} {n}" for n in names)
    yield f"rows      {f.rows_read:,} in the source; {counts}, {_counted(f.rows_rejected)} rejected"
    if f.rows_withheld:
        yield f"withheld  {f.rows_withheld:,} rows that should leave would stay: {f.withheld}"
    if f.contents_embedded:
        copies = f"; {f.rows_copied:,} take a vector that is there" if f.rows_copied else ""
        yield f"embed     {f.rows_embedded:,} rows, of {f.contents_embedded:,} contents{copies}"
        yield f"units     {_counted(f.units)} {f.unit}, by {f.rows_sampled:,} rows"
    if f.rate is not None:
        device = f.compute.get("device_name") or f.compute.get("device", "")
        yield f"rate      {_counted(f.rate)} {f.unit}/s for an actor on {device}, {f.by}"
    if f.seconds is not None:
        parts = ", ".join(f"{n} {s:,.1f}" for n, s in f.stages.items())
        yield f"time      {_time(f.seconds)}: seconds, {parts}"
    if f.device_hours is not None:
        num_actors = f.compute.get("max_actors", 1)
        yield f"devices   {_figure(f.device_hours)} hours, of {num_actors:,} actors"
    if f.cost is not None:
        yield f"cost      {_figure(f.cost)} of the price's currency"
    if f.parts_written is not None and f.bytes_written is not None:
        size = _figure(f.bytes_written * (1 / 2**20))
        yield (
            f"parts     {_counted(f.parts_written)} written, of {size} MiB; {f.parts_rewritten:,} "
            f"of {f.bytes_rewritten / 2**20:,.1f} MiB written anew"
        )
    if f.share_of_budget is not None:
        share = f.share_of_budget
        yield (
            f"budget    is enough for {share.value:.0%} of it [{share.low:.0%}, {share.high:.0%}]"
        )
    for note in f.notes:
        yield f"note      {note}"


def _counted(value: Range) -> str:
    if value.low == value.high:
        return f"{value.value:,.0f}"
    return f"{value.value:,.0f} [{value.low:,.0f}, {value.high:,.0f}]"


def _figure(value: Range) -> str:
    return f"{value.value:,.4g} [{value.low:,.4g}, {value.high:,.4g}]"


def _time(value: Range) -> str:
    return f"{_clock(value.value)} [{_clock(value.low)}, {_clock(value.high)}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:,.1f} s"
