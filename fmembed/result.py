"""What a run did, as it is returned, printed, put on record and reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run did. rows_read = rows_embedded + rows_rejected + rows_skipped.

    `rows_per_s` is over the whole run, start included; `steady_rows_per_s` from when as many
    windows have come out of the model as there are actors to the last commit, without their rows.
    """

    run_id: str
    started: str
    table: str
    version: int | None
    fingerprint: str
    rows_read: int = 0
    rows_embedded: int = 0
    rows_rejected: int = 0
    rows_skipped: int = 0
    rows_per_s: float = 0.0
    seconds: float = 0.0
    table_rows: int = 0
    table_rejected: int = 0
    num_units: int = 0
    num_truncated: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    usd: float | None = None
    causes: dict[str, int] = field(default_factory=dict)
    steady_rows_per_s: float | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    report: str | None = None
