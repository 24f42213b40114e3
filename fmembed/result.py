"""What a run did and what a probe found: as returned, and as read back from beside a table.

Anybody may have written what lies there: it is checked here, once, before anything is counted on or
shown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict  # pydantic takes the one of typing from 3.12 on

from fmembed.errors import TableError

# For what is read: a later version may say more, which is passed over.
_CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StageTime(TypedDict):
    """Rows that a stage has seen, and seconds that its tasks or actors were at work, summed."""

    rows: int
    busy_s: float


class ActorTime(TypedDict):
    """Seconds of one actor, and what it computed."""

    load_s: float
    wait_s: float
    busy_s: float
    forward_s: float
    copy_s: float
    tokens: float


class Verdict(TypedDict):
    """Where the time of a run went: see `run.verdict.judge`."""

    seconds: dict[str, float]
    actors: dict[str, ActorTime]
    wait_share: float
    padding_waste: float
    tokens_per_s: float
    mfu: float | None
    batch_tokens: dict[str, int]
    advice: str


@dataclass(frozen=True)
class RunResult:
    """What a run did. rows_read = rows_embedded + rows_rejected + rows_skipped.

    `rows_per_s` is over the whole run, start included; `steady_rows_per_s` from when as many
    windows have come out of the model as there are actors to the last commit, without their rows.
    `rows_changed` are those among the skipped ones that the table holds with another content, or
    with other values in the carried columns; `rows_absent` how many more the table has, embedded
    or rejected, than the source.

    Of a refresh `rows_changed` are rows that the new version holds anew, `rows_new` those that it
    did not hold before, `rows_unchanged` those that are as they were; `rows_copied` took the vector
    of another row, or their own with other carried values, and are among the skipped ones, as the
    unchanged ones are; `contents_embedded` are what the model saw. `rows_removed` have left;
    `rows_withheld` would have, and stay, for the reason in `withheld`. `unchanged` says that
    nothing was to be done. None of these is counted by an embedding run. A deletion counts only
    `rows_removed`.

    `pieces_embedded` are the chunks or windows that came of the embedded rows, where each is a row
    of the table; else 0.

    `files_broken` are files of the source that could not be read to their ends, by a refresh.

    Of a table in a store, `promotion` says what has become of the new version: `promoted`, the
    readers get it; `current`, they had it before; `refused` by the gate; or `beside`, as another
    table has taken this one's place. `gate` is what the gate has said.

    `passed_over` counts what lies among the source's files and is not read, by reason.
    `spent` is what the run has cost, `device_hours` and, where the config names a price, `cost`;
    `table_spent` what all runs on record have.
    `verdict` is empty where nothing was embedded. `probes`, `judgement` (whether the vectors are
    any good, and what is wrong, in words), `report`, `usd` and `probe_s`, the seconds that
    evaluation took besides `seconds`, are what evaluation adds; the record beside the table is
    without them.
    """

    __pydantic_config__ = _CHECKED

    run_id: str
    started: str
    table: str
    version: Annotated[int, Field(ge=0)] | None
    fingerprint: str
    rows_read: int = 0
    rows_embedded: int = 0
    rows_rejected: int = 0
    rows_skipped: int = 0
    rows_changed: int = 0
    rows_absent: int = 0
    rows_new: int = 0
    rows_unchanged: int = 0
    rows_removed: int = 0
    rows_withheld: int = 0
    rows_copied: int = 0
    contents_embedded: int = 0
    pieces_embedded: int = 0
    parts_written: int = 0
    parts_rewritten: int = 0
    withheld: str = ""
    kind: Literal["embed", "refresh", "delete", "import"] = "embed"
    unchanged: bool = False
    files_broken: int = 0
    rows_per_s: float = 0.0
    seconds: float = 0.0
    table_rows: int = 0
    table_rejected: int = 0
    num_units: int = 0
    num_truncated: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    usd: float | None = None
    spent: dict[str, float] = field(default_factory=dict)
    table_spent: dict[str, float] = field(default_factory=dict)
    causes: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    steady_rows_per_s: float | None = None
    stages: dict[str, StageTime] = field(default_factory=dict)
    verdict: Verdict | Annotated[dict[str, Any], Field(max_length=0)] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    store: str = ""
    promotion: Literal["", "promoted", "current", "refused", "beside"] = ""
    gate: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    judgement: list[str] = field(default_factory=list)
    report: str | None = None
    probe_s: float = 0.0


_RUN_RESULT = TypeAdapter(RunResult)


_MOST_ROWS = 10**15


class _Record(BaseModel):
    model_config = _CHECKED


class _Interval(_Record):
    # Of accuracies, agreements, and differences of them.
    value: Annotated[float, Field(ge=-1, le=1)]
    low: Annotated[float, Field(ge=-1, le=1)]
    high: Annotated[float, Field(ge=-1, le=1)]
    # Of a baseline made by shuffling; records of earlier versions are without.
    shuffles: int | None = None
    p: float | None = None

    @model_validator(mode="after")
    def _check_chance(self) -> _Interval:
        if (self.shuffles is None) != (self.p is None):
            raise ValueError("takes both the number of shuffles and p, or neither")
        return self


class _Baseline(_Interval):
    # By how much the vectors are better, row for row; records of earlier versions are without.
    difference: _Interval | None = None


class _Score(_Interval):
    metric: str
    k: int | None = None


class _Confusion(_Record):
    classes: list[str]
    counts: list[list[int]]

    @model_validator(mode="after")
    def _check_square(self) -> _Confusion:
        n = len(self.classes)
        if [len(row) for row in self.counts] != [n] * n:
            raise ValueError("takes as many counts as classes, both ways")
        return self


class _Suspicious(_Record):
    row_id: str
    label: str
    predicted: str
    probability: float
    text: str | None = None


class _Figure(_Record):
    name: str
    value: float
    # Of random vectors, as many and as long.
    random: float | None = None


class _Finding(_Record):
    kind: str
    words: str
    rows: list[list[str]]


class _Leaks(_Record):
    num: Annotated[int, Field(ge=1)]
    rows: list[list[str]]
    without: _Interval | None


class _Probe(_Record):
    """What `probes.run_probe` gives, and the column: a headline with all it needs, or findings, or
    a reason.
    """

    probe: str
    version: int
    column: str
    num_train: Annotated[int, Field(ge=0, le=_MOST_ROWS)]
    num_test: Annotated[int, Field(ge=0, le=_MOST_ROWS)]
    seconds: float
    num_classes: int | None = None
    C: float | None = None
    skipped: str | None = None
    scores: list[_Score] = []
    headline: _Score | None = None
    baselines: dict[str, _Baseline | None] = {}
    missing: str | None = None
    # Records of earlier versions are without.
    unlabelled: Annotated[int, Field(ge=0)] = 0
    confusion: _Confusion | None = None
    suspicious: list[_Suspicious] | None = None
    leaks: _Leaks | None = None
    wrong_labels: Annotated[int, Field(ge=0, le=_MOST_ROWS)] | None = None
    num_rows: Annotated[int, Field(ge=0, le=_MOST_ROWS)] | None = None
    figures: list[_Figure] | None = None
    findings: list[_Finding] | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> _Probe:
        given = [part for part in (self.skipped, self.headline, self.findings) if part is not None]
        if len(given) != 1:
            raise ValueError("takes a headline, or findings, or why it was skipped")
        if (self.findings is not None) != (self.probe == "health" and self.skipped is None):
            raise ValueError("takes findings of health, and of nothing else")
        if self.findings is not None and (self.figures is None or self.num_rows is None):
            raise ValueError("takes figures and the number of rows with findings")
        if self.headline is not None and not self.baselines:
            raise ValueError("takes baselines with a headline")
        is_judge = self.probe in ("knn", "linear") and self.headline is not None
        if is_judge and self.baselines.get("majority") is None:
            raise ValueError("takes what the most frequent label reaches")
        return self


def check_run(raw: Any, uri: str) -> RunResult:
    """The record of a run, as it was read from beside a table.

    Args:
        raw: Any JSON.
        uri: Where the table is now: it may have been moved.

    Raises:
        TableError: It is none.
    """
    if isinstance(raw, dict):
        raw = {
            **raw,
            "table": uri,
            "probes": {},
            "judgement": [],
            "report": None,
            "usd": None,
            "gate": {},
        }
    try:
        # As JSON once more: there half of a surrogate pair, which is no UTF-8, is no text.
        return _RUN_RESULT.validate_json(json.dumps(raw))
    except ValidationError as e:
        field = ".".join(str(key) for key in e.errors(include_url=False)[0]["loc"])[:80]
        raise TableError(
            f"table: {uri}: the record of its last run in _runs/ is damaged "
            f"({field or 'no object'}); run fmembed embed again, with the config that made it"
        ) from None


def check_probe(raw: Any, name: str, column: str) -> dict[str, Any] | None:
    """The record of a probe, as `table.Table.get_probe` has read it; None where it is none."""
    try:
        found = _Probe.model_validate_json(json.dumps(raw)).model_dump(exclude_unset=True)
    except ValidationError:
        return None
    return found if (found["probe"], found["column"]) == (name, column) else None
