"""Recount a table from storage, trusting nothing that the runs said of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmembed.errors import DamagedError, TableError
from fmembed.rows.columns import DUPLICATE, PARENT_ID, ROW_ID
from fmembed.rows.ids import Keys, RowIds, keys_of
from fmembed.rows.precision import PRECISIONS
from fmembed.rows.vectors import vector_type
from fmembed.table.card import FINGERPRINT, Card
from fmembed.table.files import PART, REJECTED, Part
from fmembed.table.log import ENTRY, Log, what_is_cut
from fmembed.table.table import Table

_UNIT_NORM_TOLERANCE = 1e-3
_NO_KEYS: Keys = np.empty(0, dtype="S16")


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


def verify(uri: str | Path) -> VerifyResult:
    """Recount a table from storage.

    Checked: every part's checksum, size and row count against the log; ids unique and none both
    embedded and rejected; keys those of the parts' rows; one dimension; no NaN or infinity; norms
    (1 where the model normalises, never 0); no stray part; and rows read = embedded + rejected +
    skipped in the last run's record.

    Raises:
        TableError: No table there.
    """
    table = Table.open(uri, is_still=True)
    card = table.card()
    assert card is not None
    problems: list[str] = []
    embedded = _Embedded(card)
    parts = table.rows.parts()
    for part, rows in _read_parts(table.rows, parts, table, card, problems):
        problems += embedded.add(part, rows)
    num_rejected = num_both = 0
    known = embedded.read_ids()
    rejected = table.rejected.parts()
    for _, rows in _read_parts(table.rejected, rejected, table, card, problems):
        num_rejected += rows.num_rows
        unlike = rows.filter(pc.not_equal(rows["error"], DUPLICATE))
        num_both += int(known.contains(keys_of(unlike[ROW_ID].to_pylist())).sum())
    if num_both:
        problems.append(f"{num_both} rows are both embedded and rejected")
    problems += embedded.problems()
    problems += _list_strays(table)
    problems += [*_list_wrong_keys(table), *_list_deleted(table, known)]
    problems += [*_list_cut(table.rows, ""), *_list_cut(table.rejected, REJECTED)]
    problems += [
        f"the log no longer holds what run {run} has committed; --repair takes its parts back"
        for run in table.lost_runs()
    ]
    notes = [*_list_foreign(table, parts), *_list_aside(table)]
    wrong, since = _compare_record(table, embedded.num_rows, num_rejected)
    changed = since is not None and bool(table.rows.history(since=since))
    (notes if changed else problems).extend(wrong)
    norms = embedded.norms_of_first()
    return VerifyResult(
        table=table.uri,
        version=table.version() or 0,
        fingerprint=card.fingerprint,
        rows=embedded.num_rows,
        rows_rejected=num_rejected,
        parts=len(parts),
        dim=embedded.dim_of_first(),
        norm_min=float(norms.min(initial=np.inf)) if len(norms) else 0.0,
        norm_max=float(norms.max(initial=0.0)),
        problems=problems,
        notes=notes,
    )


class _Embedded:
    """What the parts of embedded rows hold, counted a part at a time."""

    def __init__(self, card: Card) -> None:
        self._outputs = card.outputs
        self._first = next(iter(card.outputs))
        self._keys: list[Keys] = [_NO_KEYS]
        self._parents: list[Keys] = []
        self._dims: dict[str, set[int]] = {}
        self._norms = {column: [np.empty(0, dtype=np.float32)] for column in card.outputs}

    def add(self, part: Part, rows: pa.Table) -> list[str]:
        """Count a part; what is wrong with it."""
        self._keys.append(keys_of(rows[ROW_ID].to_pylist()))
        if PARENT_ID in rows.schema.names:
            self._parents.append(keys_of(rows[PARENT_ID].to_pylist()))
        problems = []
        for column, output in self._outputs.items():
            names = rows.schema.names
            if column not in names or vector_type(rows.schema.field(column).type) is None:
                problems.append(f"{part.path}: {column} does not hold the vectors it promises")
                continue
            vectors = _flatten(rows[column])
            self._dims.setdefault(column, set()).add(vectors.shape[1])
            num_bad = int((~np.isfinite(vectors)).any(axis=1).sum()) + rows[column].null_count
            if num_bad:
                problems.append(f"{part.path}: {num_bad} vectors are null, NaN or infinite")
            precision = PRECISIONS[output.precision]
            if precision.has_norms:
                norms = np.linalg.norm(precision.read(vectors, None), axis=1)
                self._norms[column].append(norms)
        return problems

    @property
    def num_rows(self) -> int:
        return sum(map(len, self._keys))

    def read_ids(self) -> RowIds:
        """Ids of the rows of the source that are embedded: where pieces are rows, their parents."""
        return RowIds(np.concatenate([_NO_KEYS, *(self._parents or self._keys)]))

    def problems(self) -> list[str]:
        """What is wrong with the parts taken together."""
        problems = []
        if num_twice := self.num_rows - len(np.unique(np.concatenate(self._keys))):
            problems.append(f"{num_twice} rows repeat a row_id")
        for column, dims in self._dims.items():
            if len(dims) > 1:
                problems.append(f"{column}: vectors of several dimensions: {sorted(dims)}")
            norms = np.concatenate(self._norms[column])
            problems += _check_norms(column, norms, self._outputs[column].normalize)
        return problems

    def dim_of_first(self) -> int:
        return min(self._dims.get(self._first, ()), default=0)

    def norms_of_first(self) -> Any:
        return np.concatenate(self._norms[self._first])


def _read_parts(
    log: Log, parts: list[Part], table: Table, card: Card, problems: list[str]
) -> Iterator[tuple[Part, pa.Table]]:
    """Parts with their rows; one that cannot be read is left out, and said in `problems`."""
    prefix = _prefix(table, log)
    for part in parts:
        try:
            rows = log.files.read_whole(part) if prefix else table.read_part(part, None)
        except DamagedError as e:
            problems.append(f"{prefix}{e.what}")
            continue
        stamp = log.files.read_stamp(part.path)
        if stamp.get(FINGERPRINT, card.fingerprint) != card.fingerprint:
            problems.append(
                f"{prefix}{part.path}: made by another model or setting than the table's"
            )
        yield part, rows


def _prefix(table: Table, log: Log) -> str:
    """The folder of a log in its table."""
    return REJECTED if log is table.rejected else ""


def _list_strays(table: Table) -> list[str]:
    return [
        f"{_prefix(table, log)}{path}: a stray file that no commit names"
        for log, path in table.strays()
    ]


def _list_aside(table: Table) -> list[str]:
    """Parts whose rows are in no version: what is well may be less than there was."""
    num_parts = sum("/part-" in path for path in table.storage.walk("_quarantine/"))
    return [
        f"{num_parts:,} parts lie in _quarantine/; what they held is missing here until the same "
        "fmembed embed, or a refresh, has embedded it again"
    ] if num_parts else []  # fmt: skip


def _list_deleted(table: Table, known: RowIds) -> list[str]:
    try:
        num_back = int(known.contains(table.deleted.read().ids).sum())
    except TableError as e:
        return [str(e)]
    if not num_back and table.deleted.was_stopped:
        return [
            "a delete was stopped before its end; the same one, or fmembed refresh, finishes it"
        ]
    return [
        f"{num_back:,} rows are on the list of those that were deleted; fmembed refresh, or the "
        "same fmembed delete, takes them out"
    ] if num_back else []  # fmt: skip


def _list_wrong_keys(table: Table) -> list[str]:
    """Rows are known by their keys: where those are wrong, a run leaves out what is not done."""
    try:
        wrong = table.known().find_wrong()
    except (DamagedError, TableError):
        return []  # said of the part, or the list, already
    return [
        f"{path}: not the keys of its parts' rows; --repair has them made anew" for path in wrong
    ]


def _list_cut(log: Log, prefix: str) -> list[str]:
    entries = filter(ENTRY.fullmatch, sorted(log.storage.sizes("_delta_log/")))
    cut = ((path, what_is_cut(log.storage.get(path))) for path in entries)
    return [f"{prefix}{path} {why}" for path, why in cut if why]


def _list_foreign(table: Table, parts: list[Part]) -> list[str]:
    """What other tools have done to the table."""
    notes = [
        f"version {e['version']}: {e.get('operation')} by {e.get('engineInfo', 'another tool')}"
        for e in table.rows.history(since=0)
    ]
    notes += [
        f"{p.path}: written by another tool, so it has no checksum of ours"
        for p in parts
        if not PART.fullmatch(p.path)
    ]
    return notes


def _flatten(column: pa.ChunkedArray) -> Any:
    """All vectors of a column, those of tokens one after another; shape (vectors, dim)."""
    flat = column.combine_chunks()
    while pa.types.is_list(flat.type):
        flat = flat.flatten()
    dim = flat.type.list_size
    return flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _check_norms(column: str, norms: Any, normalized: bool) -> list[str]:
    problems = []
    if num_zero := int((norms == 0).sum()):
        problems.append(f"{column}: {num_zero} vectors are all zero")
    if normalized and (num_off := int((np.abs(norms - 1) > _UNIT_NORM_TOLERANCE).sum())):
        problems.append(
            f"{column}: {num_off} vectors have not the length 1 that the model promises"
        )
    return problems


def _compare_record(table: Table, rows: int, rejected: int) -> tuple[list[str], int | None]:
    """Hold the last run's record to itself and to what was counted.

    Returns:
        What is wrong, and the version that the record speaks of, None without one.
    """
    try:
        run = table.last_run()
    except TableError:
        return ["the record of the last run is damaged"], table.counted_version
    if run is None:
        return ["no run has finished on this table; run the same command again"], None
    wrong = []
    counted = run.rows_embedded + run.rows_rejected + run.rows_skipped
    if run.rows_read != counted:
        wrong.append(
            f"the last run read {run.rows_read} rows, but embedded, rejected and skipped {counted}"
        )
    for what, said, have in (
        ("table_rows", run.table_rows, rows),
        ("table_rejected", run.table_rejected, rejected),
    ):
        if said != have:
            wrong.append(
                f"{what} was {said} when the last run ended, is {have}; if a later run was "
                "stopped, run the same command again"
            )
    return wrong, run.version or 0
