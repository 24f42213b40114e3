"""Recount a table from storage, trusting nothing that the runs said of themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.errors import DamagedError
from fmembed.rows.columns import DUPLICATE, PARENT_ID, ROW_ID
from fmembed.rows.ids import Keys, RowIds, keys_of
from fmembed.rows.precision import PRECISIONS
from fmembed.table.log import ENTRY, FINGERPRINT, PART, Log, Part, what_is_cut
from fmembed.table.parts import REJECTED
from fmembed.table.table import Table

_UNIT_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` counted in storage; `problems` is empty when all is well.

    `notes` are no problems: what other tools have done to the table, and files of others in it.
    Dimension and norms are those of the first column of vectors; quantised ones have no norms.
    """

    table: str
    version: int
    fingerprint: str
    rows: int
    rows_rejected: int
    parts: int
    dim: int
    norm_min: float
    norm_max: float
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(uri: str) -> VerifyResult:
    """Recount a table from storage.

    Checked: every part's checksum, size and row count against the log; ids unique and none both
    embedded and rejected; one dimension; no NaN or infinity; norms (1 where the model normalises,
    never 0); no stray part; and rows read = embedded + rejected + skipped in the last run's record.

    Raises:
        TableError: No table there.
    """
    table = Table.open(uri)
    card = table.card()
    assert card is not None
    problems: list[str] = []
    keys: list[Keys] = []
    parents: list[Keys] = []
    outputs = card.outputs
    dims: dict[str, set[int]] = {}
    norms = {column: [np.empty(0, dtype=np.float32)] for column in outputs}
    parts = table.rows.parts()
    for part in parts:
        rows = _verify_part(part, "", lambda part: table.read_part(part, None), problems)
        if rows is None:
            continue
        _verify_stamp(table.rows, part, "", card.fingerprint, problems)
        keys.append(keys_of(rows[ROW_ID].to_pylist()))
        if PARENT_ID in rows.schema.names:
            parents.append(keys_of(rows[PARENT_ID].to_pylist()))
        for column, output in outputs.items():
            if column not in rows.schema.names or not _holds_vectors(rows.schema.field(column)):
                problems.append(f"{part.path}: {column} does not hold the vectors it promises")
                continue
            vectors = _flatten(rows[column])
            dims.setdefault(column, set()).add(vectors.shape[1])
            num_bad = int((~np.isfinite(vectors)).any(axis=1).sum()) + rows[column].null_count
            if num_bad:
                problems.append(f"{part.path}: {num_bad} vectors are null, NaN or infinite")
            precision = PRECISIONS[output.precision]
            if precision.has_norms:
                norms[column].append(np.linalg.norm(precision.read(vectors, None), axis=1))
    all_keys = np.concatenate([np.empty(0, dtype="S16"), *keys])
    num_rejected = num_both = 0
    known = RowIds(np.concatenate([np.empty(0, dtype="S16"), *(parents or keys)]))
    for part in table.rejected.parts():
        rows = _verify_part(part, REJECTED, table.rejected.read_whole, problems)
        if rows is None:
            continue
        _verify_stamp(table.rejected, part, REJECTED, card.fingerprint, problems)
        num_rejected += rows.num_rows
        unlike = rows.filter(pc.not_equal(rows["error"], DUPLICATE))
        num_both += int(known.contains(keys_of(unlike[ROW_ID].to_pylist())).sum())
    if num_both:
        problems.append(f"{num_both} rows are both embedded and rejected")
    if num_twice := len(all_keys) - len(np.unique(all_keys)):
        problems.append(f"{num_twice} rows repeat a row_id")
    for column, found in dims.items():
        if len(found) > 1:
            problems.append(f"{column}: vectors of several dimensions: {sorted(found)}")
        _verify_norms(column, np.concatenate(norms[column]), outputs[column].normalize, problems)
    first = next(iter(outputs))
    all_norms = np.concatenate(norms[first])
    for log, path in table.strays():
        prefix = REJECTED if log is table.rejected else ""
        problems.append(f"{prefix}{path}: a stray file that no commit names")
    for log, prefix in ((table.rows, ""), (table.rejected, REJECTED)):
        _verify_log(log, prefix, problems)
    problems += [
        f"the log no longer holds what run {run} has committed; --repair takes its parts back"
        for run in table.lost_runs()
    ]
    notes = [
        f"version {e['version']}: {e.get('operation')} by {e.get('engineInfo', 'another tool')}"
        for e in table.rows.history(since=0)
    ]
    notes += [
        f"{p.path}: written by another tool, so it has no checksum of ours"
        for p in parts
        if not PART.fullmatch(p.path)
    ]
    run = table.last_run()
    run = run if isinstance(run, dict) or run is None else {}
    counts: list[str] = []
    _verify_counts(run, len(all_keys), num_rejected, counts)
    changed = run is not None and bool(table.rows.history(since=run.get("version") or 0))
    (notes if changed else problems).extend(counts)
    return VerifyResult(
        table=table.uri,
        version=table.version() or 0,
        fingerprint=card.fingerprint,
        rows=len(all_keys),
        rows_rejected=num_rejected,
        parts=len(parts),
        dim=min(dims.get(first, ()), default=0),
        norm_min=float(all_norms.min(initial=np.inf)) if len(all_norms) else 0.0,
        norm_max=float(all_norms.max(initial=0.0)),
        problems=problems,
        notes=notes,
    )


def _verify_part(
    part: Part, prefix: str, read: Callable[[Part], pa.Table], problems: list[str]
) -> pa.Table | None:
    try:
        return read(part)
    except DamagedError as e:
        problems.append(f"{prefix}{e.what}")
        return None


def _verify_stamp(log: Log, part: Part, prefix: str, fingerprint: str, problems: list[str]) -> None:
    stamp = log.read_stamp(part.path)
    if stamp.get(FINGERPRINT, fingerprint) != fingerprint:
        problems.append(f"{prefix}{part.path}: made by another model or setting than the table's")


def _verify_log(log: Log, prefix: str, problems: list[str]) -> None:
    entries = filter(ENTRY.fullmatch, sorted(log.storage.sizes("_delta_log/")))
    cut = ((path, what_is_cut(log.storage.get(path))) for path in entries)
    problems += [f"{prefix}{path} {why}" for path, why in cut if why]


def _holds_vectors(field: pa.Field) -> bool:
    type_ = field.type
    while pa.types.is_list(type_):
        type_ = type_.value_type
    return bool(pa.types.is_fixed_size_list(type_))


def _flatten(column: pa.ChunkedArray) -> Any:
    """All vectors of a column, those of tokens one after another; shape (vectors, dim)."""
    flat = column.combine_chunks()
    while pa.types.is_list(flat.type):
        flat = flat.flatten()
    dim = flat.type.list_size
    return flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _verify_norms(column: str, norms: Any, normalized: bool, problems: list[str]) -> None:
    if num_zero := int((norms == 0).sum()):
        problems.append(f"{column}: {num_zero} vectors are all zero")
    if normalized and (num_off := int((np.abs(norms - 1) > _UNIT_NORM_TOLERANCE).sum())):
        problems.append(
            f"{column}: {num_off} vectors have not the length 1 that the model promises"
        )


def _verify_counts(run: Any, rows: int, rejected: int, problems: list[str]) -> None:
    if run is None:
        problems.append("no run has finished on this table")
        return
    names = ("rows_read", "rows_embedded", "rows_rejected", "rows_skipped")
    if not all(isinstance(run.get(n), int) for n in (*names, "table_rows", "table_rejected")):
        problems.append("the record of the last run is damaged")
        return
    counted = run["rows_embedded"] + run["rows_rejected"] + run["rows_skipped"]
    if run["rows_read"] != counted:
        problems.append(
            f"the last run read {run['rows_read']} rows, "
            f"but embedded, rejected and skipped {counted}"
        )
    for what, have in (("table_rows", rows), ("table_rejected", rejected)):
        if run[what] != have:
            problems.append(
                f"{what} was {run[what]} when the last run ended, is {have}; if a later run was "
                "stopped, run the same command again"
            )
