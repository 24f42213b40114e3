"""What the stages count, summed as rows travel."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Mapping

import pyarrow as pa

# What the stages counted, as JSON: on the first row of each block or window, else null.
COUNTS = "_counts"
# How the names of those counts begin that are seconds for which a stage's processes were at work.
SECONDS = "seconds/"


def sum_counts(rows: pa.Table) -> dict[str, float]:
    """What the stages counted of these rows, summed."""
    counts: dict[str, float] = collections.defaultdict(float)
    said = rows[COUNTS].drop_null().to_pylist() if COUNTS in rows.schema.names else []
    for name, count in itertools.chain.from_iterable(json.loads(s).items() for s in said):
        counts[name] += count
    return dict(counts)


def add_counts(rows: pa.Table, counts: Mapping[str, float]) -> pa.Table:
    """Put counts on the first row, beside what was counted of these rows before.

    A figure that was counted before is replaced: each stage has names of its own.
    """
    return with_counts(rows, {**sum_counts(rows), **counts})


def with_counts(rows: pa.Table, counts: Mapping[str, float]) -> pa.Table:
    """Put counts on the first row, in place of what was counted there before; of no row, none."""
    said = pa.array([json.dumps(counts), *[None] * (rows.num_rows - 1)], pa.string())
    if COUNTS in rows.schema.names:
        rows = rows.drop_columns([COUNTS])
    return rows.append_column(COUNTS, said.slice(0, rows.num_rows))
