"""The gate: whether a version may take the place of the one that a store's readers get.

Both are read back from storage, and compared on the same rows; each check says in words what it
found. A version without one before it is only looked at for what is wrong whatever it is for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray

from fmembed import probes
from fmembed.evaluate.checks import Check, Question, Side, compare
from fmembed.evaluate.sample import check_rows, read_card, to_floats
from fmembed.probes import paired
from fmembed.rows.columns import CONTENT_HASH, ROW_ID
from fmembed.rows.vectors import vector_type
from fmembed.spec import GateSpec, RunSpec
from fmembed.table.card import Card
from fmembed.table.files import Part
from fmembed.table.reading import list_labelled, rows_of, sample
from fmembed.table.store import Pointer
from fmembed.table.table import Table

# Rows that are compared: with so many two models that are as good, and err on other rows, pass a
# margin of 0.01 (tools/gate_rates.py).
_MAX_ROWS = probes.MAX_ROWS


@dataclass(frozen=True)
class _Side:
    """One version, and the rows of it that are compared."""

    table: Table
    version: int
    card: Card
    parts: list[Part]
    rows_rejected: int
    rows: pa.Table

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)


def run_gate(table: Table, version: int, over: tuple[Table, Pointer] | None, spec: RunSpec) -> Any:
    """Look at a version, and compare it with what is promoted.

    Args:
        table: The candidate's.
        version: Which.
        over: The table that is promoted, and the pointer to its version; None where nothing is.
        spec: Names the limits, the label, the split and the probes.

    Returns:
        JSON: `passed`; `over`, the table and the version that it was compared with, None where
        there was none; `checks`, each as `Check`; `words`, why it was refused, or what was found;
        `seconds`.

    Raises:
        TableError: A table is not as a run writes it.
    """
    began = time.monotonic()
    card = read_card(table)
    schema = _schema_of(table, version)
    old = None if over is None else (over[0], over[1].version, read_card(over[0]))
    old_schema = None if old is None else _schema_of(old[0], old[1])
    checks = list(_compare_columns(schema, old_schema, card, old[2] if old else None, spec.gate))
    columns = [c for c in card.pooled if c in schema.names]
    shared = columns
    if old is not None and old_schema is not None:
        shared = [c for c in columns if c in old[2].pooled and c in old_schema.names]
    named = [spec.source.label, spec.source.split]
    named = [n for n in named if n and n in schema.names]
    task: Any = ray.remote(num_cpus=1, max_retries=3)
    rows, _ = ray.get(task(sample).remote(table.uri, [*named, *columns], _MAX_ROWS, None, version))
    check_rows(table, rows, columns)
    new_side = _Side(table, version, card, table.rows.parts(version), table.num_rejected(), rows)
    old_side = None
    if old is not None and over is not None and old_schema is not None:
        there = [n for n in named if n in old_schema.names]
        ids = rows[ROW_ID].to_pylist()
        found = ray.get(task(rows_of).remote(old[0].uri, old[1], [*there, *shared], ids))
        check_rows(old[0], found, shared)
        parts = old[0].rows.parts(old[1])
        old_side = _Side(old[0], old[1], old[2], parts, over[1].rows_rejected, found)
    checks += _count(new_side, old_side, spec)
    arrays = None if old_side is None else _arrays(old_side, spec, shared)
    question = _question(new_side, old_side, spec, columns)
    checks += ray.get(task(compare).remote(question, _arrays(new_side, spec, columns), arrays))
    refused = [check for check in checks if check.passed is False]
    if refused:
        words = "; ".join(check.words for check in refused)
    else:
        told = [check.words for check in checks if check.passed is None or check.figures]
        words = "; ".join(told) or "nothing is wrong"
    return {
        "passed": not refused,
        "over": None if over is None else {"table": over[1].table, "version": over[1].version},
        "checks": [asdict(check) for check in checks],
        "words": words,
        "seconds": round(time.monotonic() - began, 2),
    }


def _schema_of(table: Table, version: int) -> pa.Schema:
    parts = table.rows.parts(version)
    return table.schema_of(parts[0]) if parts else pa.schema([])


def _compare_columns(
    schema: pa.Schema,
    old_schema: pa.Schema | None,
    card: Card,
    old_card: Card | None,
    gate: GateSpec,
) -> Iterator[Check]:
    if not schema.names:
        yield Check("rows", False, "it has no row")
    for column in sorted(set(card.outputs) & set(schema.names) - set(card.pooled)):
        yield Check("tokens", None, f"{column} has a vector for each token, at which nobody looked")
    if old_schema is None or old_card is None or not schema.names:
        return
    if gone := [name for name in old_schema.names if name not in schema.names]:
        have = ", ".join(name[:80] for name in gone[:5])
        yield Check("columns", False, f"readers lose the columns {have}")
    for column in old_card.outputs:
        if column not in schema.names or column not in old_schema.names:
            continue
        before, now = (vector_type(s.field(column).type) for s in (old_schema, schema))
        dims = [None if type_ is None else type_.list_size for type_ in (before, now)]
        kinds = [c.outputs[column].precision for c in (old_card, card) if column in c.outputs]
        if dims[0] == dims[1] and len(set(kinds)) == 1:
            continue
        words = (
            f"vectors of {column} are {dims[1]} numbers of {kinds[-1]}, those of the promoted "
            f"version {dims[0]} of {kinds[0]}"
        )
        if gate.same_dim:
            yield Check(
                "dimension", False,
                f"{words}: no index takes both (gate.same_dim: false, where readers can)",
            )  # fmt: skip
        else:
            yield Check("dimension", None, words)


def _count(new: _Side, old: _Side | None, spec: RunSpec) -> Iterator[Check]:
    """What is counted of all rows."""
    gate = spec.gate
    num_read = new.num_rows + new.rows_rejected
    share = new.rows_rejected / max(num_read, 1)
    last = new.table.last_run()
    num_broken = 0 if last is None else last.files_broken
    if num_broken and (old is None or old.card.fingerprint != new.card.fingerprint):
        yield Check(
            "files", False,
            f"{num_broken:,} files of the source cannot be read to their ends, and it lacks what "
            "is in them",
        )  # fmt: skip
    figures = {"rejected": share}
    if old is None:
        yield Check(
            "rejected", spec.output.allows(new.rows_rejected, num_read),
            f"{share:.1%} of the rows are rejected", figures,
        )  # fmt: skip
        return
    before = old.rows_rejected / max(old.num_rows + old.rows_rejected, 1)
    yield Check(
        "rejected", share <= before + gate.max_rejected_increase,
        f"{share:.1%} of the rows are rejected, of the promoted version {before:.1%}",
        {**figures, "before": before},
    )  # fmt: skip
    # What was deleted is no loss; and what has left one table with a refresh was allowed to
    # (run/removals.py).
    kept = max(old.num_rows - len(new.table.deleted.read()), 1)
    lost = max(1 - new.num_rows / kept, 0.0)
    words = f"{new.num_rows:,} rows, of the promoted version {old.num_rows:,}"
    is_enough = lost <= gate.max_lost_fraction
    if not is_enough:
        words += f" (gate.max_lost_fraction = {gate.max_lost_fraction})"
    is_same = old.table.uri == new.table.uri
    yield Check("rows", None if is_same else is_enough, words, {"lost": lost})


def _question(new: _Side, old: _Side | None, spec: RunSpec, columns: list[str]) -> Question:
    outputs = {column: new.card.outputs[column] for column in columns}
    exact = ("float32", "float16")
    return Question(
        gate=spec.gate,
        probes=tuple(name for name in spec.probes if name in paired.JUDGES),
        same_model=old is not None and old.card.fingerprint == new.card.fingerprint,
        precisions={column: output.precision for column, output in outputs.items()},
        normalized=frozenset(c for c, o in outputs.items() if o.normalize and o.precision in exact),
    )


def _arrays(side: _Side, spec: RunSpec, columns: list[str]) -> Side:
    rows, label, split = side.rows, spec.source.label, spec.source.split
    labels = None
    if label is not None and label in rows.column_names:
        is_labelled = list_labelled(rows[label])
        both = zip(rows[label].to_pylist(), is_labelled, strict=True)
        labels = [value if is_one else None for value, is_one in both]
    has_split = split is not None and split in rows.column_names
    return Side(
        ids=rows[ROW_ID].to_pylist(),
        hashes=rows[CONTENT_HASH].to_pylist(),
        labels=labels,
        splits=rows[split].to_pylist() if has_split else None,
        vectors={column: to_floats(rows, column, side.card) for column in columns},
    )
