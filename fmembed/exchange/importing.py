"""Vectors that somebody else has made into a table: in this process, without Ray, in one commit.

Nobody here knows which model made them, so the table says "imported", and nothing that embeds rows
writes to it. All that reads a table takes it: `probe`, `search`, `export`, `verify`.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.errors import RejectedError, SourceError, SpecError, TableError
from fmembed.exchange.foreign import (
    LABEL,
    SPLIT,
    Batch,
    Foreign,
    check_names,
    open_foreign,
    with_lines,
)
from fmembed.result import RunResult
from fmembed.rows.carried import hash_carried
from fmembed.rows.columns import (
    CARRIED,
    CONTENT_HASH,
    DUPLICATE,
    INPUT,
    NUM_UNITS,
    REJECTED_SCHEMA,
    ROW_ID,
    SHARD,
    TRUNCATED,
    TWIN,
    reject,
    row_schema,
)
from fmembed.rows.ids import keys_of
from fmembed.rows.outputs import DEFAULT
from fmembed.spec import RunSpec
from fmembed.table.card import Card, fingerprint
from fmembed.table.files import RUN, WRITE
from fmembed.table.key_rows import KeyRows
from fmembed.table.lock import Lock
from fmembed.table.parts import Written, write_part
from fmembed.table.records import Commit
from fmembed.table.table import Table

# Of the vectors of a part, as they lie in memory while it is written.
_PART_BYTES = 96 * 2**20
_PRECISIONS = {"float16": "float16", "float32": "float32"}
# What a table says in place of a model.
_IMPORTED = "imported"


def import_vectors(
    path: str,
    output: str,
    *,
    column: str | None = None,
    ids: str | None = None,
    label: str | None = None,
    split: str | None = None,
    as_float32: bool = False,
) -> RunResult:
    """Make a table of vectors in a file.

    A row whose vector holds a NaN or an infinity is rejected, and one whose id another row has.
    Vectors are stored as they are: of float64 only those that float32 holds without rounding,
    unless `as_float32` says that they may be rounded.

    Args:
        path: A file of vectors, or a folder of a dataset, as `foreign.open_foreign` takes it.
        output: The table: a folder or URL with nothing there.
        column: Which column or array holds the vectors; found where there is one.
        ids: Which holds the ids, or a file of them: texts, one a line, or of an array alone another
            array. Without one a row's id is the file's name and its number.
        label: Which holds what the probes predict, or a file of it, one a line; `label`, if there
            is one.
        split: Which names the rows of the test split; `split`, if there is one.
        as_float32: Round to float32.

    Raises:
        SourceError: It holds no vectors, or such as no table holds.
        SpecError: A column is named that is not in it.
        TableError: There is something at `output`.
        RejectedError: All rows were rejected.
    """
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    # What is a file is none of the names of what is in the other one.
    id_lines, label_lines = (given if _is_text(given) else None for given in (ids, label))
    found = open_foreign(path, column, None if id_lines else ids)
    found = with_lines(found, id_lines, label_lines)
    label = None if label_lines else label
    check_names(found.columns, path)
    named = {"label": label, "split": split}
    for field, usual in (("label", LABEL), ("split", SPLIT)):
        given = named[field] = named[field] or (usual if usual in found.columns else None)
        if given is not None and given not in found.columns:
            have = ", ".join(found.columns) or "none"
            raise SpecError(f"{field}: no column {given!r} in {path}; it has {have}")
    precision = _precision(found, as_float32)
    card = _card(found, output, named, precision)
    run_id = uuid.uuid4().hex[:12]
    table = Table.open_output(output, card.identity, _IMPORTED)
    with Lock(table.storage, run_id) as lock:
        if table.version() is not None and not table.is_bare():
            raise TableError(f"output: {table.uri} holds rows; give a folder with nothing there")
        commit, written = _write(table, card, _Taken(found, precision, as_float32), run_id, lock)
        causes = Counter[str]()
        for one in written:
            causes.update(one.causes)
        num_embedded = sum(one.num_rows for one in written)
        result = RunResult(
            run_id=run_id,
            started=started,
            table=table.uri,
            version=table.version(),
            fingerprint=card.fingerprint,
            rows_read=num_embedded + sum(causes.values()),
            rows_embedded=num_embedded,
            rows_rejected=sum(causes.values()),
            parts_written=sum(one.part is not None for one in written),
            seconds=round(time.monotonic() - began, 2),
            rows_per_s=round(num_embedded / max(time.monotonic() - began, 1e-9), 2),
            table_rows=num_embedded,
            table_rejected=sum(causes.values()),
            causes=dict(causes),
            kind="import",
        )
        table.put_run(commit, result)
    if not num_embedded and causes:
        raise RejectedError(f"{path}: all {result.rows_read:,} rows were rejected: {dict(causes)}")
    return result


def _is_text(given: str | None) -> bool:
    return given is not None and Path(given).suffix != ".npy" and Path(given).is_file()


def _precision(found: Foreign, as_float32: bool) -> str:
    if as_float32 or found.dtype == np.float64:
        return "float32"
    if found.dtype.name not in _PRECISIONS:
        raise SourceError(
            f"{found.path}: holds {found.dtype}; takes vectors of float16, float32 or float64, as "
            "nobody else knows what whole numbers stand for"
        )
    return _PRECISIONS[found.dtype.name]


def _card(found: Foreign, output: str, named: dict[str, str | None], precision: str) -> Card:
    where = str(Path(found.path).absolute())
    spec = RunSpec.model_validate(
        {
            "source": {"uri": where, "carry": tuple(found.columns), **named},
            "model": {"id": _IMPORTED},
            "output": {"uri": output},
        }
    )
    identity = {
        "model.adapter": None,
        "model.dtype": found.dtype.name,
        "model.max_tokens": None,
        "model.prompt": None,
        "model.revision": _IMPORTED,
        "model.weights": _IMPORTED,
        "preprocess.pieces_are_rows": False,
        # No other file's vectors are of the same space, as far as anybody knows.
        "imported": uuid.uuid4().hex,
    }
    return Card(
        table=uuid.uuid4().hex,
        fingerprint=fingerprint(identity),
        identity=identity,
        outputs={
            DEFAULT: {"pooling": _IMPORTED, "normalize": False, "precision": precision}  # type: ignore[dict-item]
        },
        spec=spec.stored(),
    )


def _write(
    table: Table, card: Card, taken: _Taken, run_id: str, lock: Lock
) -> tuple[Commit, list[Written]]:
    configuration = card.to_configuration()
    written: list[Written] = []
    kept: list[KeyRows] = []
    for number, block in enumerate(taken.blocks()):
        stamp = {**configuration, RUN: run_id, WRITE: str(number)}
        one, keys = write_part(table.uri, [block], (DEFAULT,), stamp)
        written.append(one)
        kept.append(keys)
    if not written:
        raise SourceError(f"{taken.found.path}: there is no row in it")
    lock.check()
    table.claim(card, written[0].schema, run_id)
    table.rows.pin()
    table.rejected.pin()
    held = [(keys, one.held_by) for keys, one in zip(kept, written, strict=True)]
    table.key_files.write(f"{run_id}-000000", held, {0: None})
    rejected = [one.rejected for one in written if one.rejected is not None]
    parts = [one.part for one in written if one.part is not None]
    commit, once = Commit(run=run_id), (run_id, 0)
    if rejected:
        at = table.rejected.commit(rejected, REJECTED_SCHEMA, configuration, once)
        commit = commit.model_copy(update={"rejected": 0, "rejected_version": at})
    if parts:
        at = table.rows.commit(parts, written[0].schema, configuration, once)
        commit = commit.model_copy(update={"rows": 0, "rows_version": at})
    return commit, written


@dataclass(frozen=True)
class _Taken:
    """A file, and how its vectors are stored: `may_round` says that float64 may lose something."""

    found: Foreign
    precision: str
    may_round: bool

    def blocks(self) -> Iterator[pa.Table]:
        """Rows as they are written, a part's at a time."""
        waiting: list[pa.Table] = []
        seen: set[bytes] = set()
        start = num_bytes = 0
        for batch in self.found.read():
            waiting.append(_rows(self.found.path, batch, self._stored(batch.vectors), start, seen))
            start += len(batch.vectors)
            num_bytes += batch.vectors.nbytes
            if num_bytes >= _PART_BYTES:
                yield pa.concat_tables(waiting)
                waiting, num_bytes = [], 0
        if waiting:
            yield pa.concat_tables(waiting)

    def _stored(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.floating[Any]]:
        stored: npt.NDArray[np.floating[Any]] = vectors.astype(self.precision)
        is_lost = (stored != vectors) & np.isfinite(vectors)
        if is_lost.any() and not self.may_round:
            raise SourceError(
                f"{self.found.path}: holds float64, which no table does, and numbers that float32 "
                "would round; --as-float32 rounds them"
            )
        return stored


def _rows(
    path: str,
    batch: Batch,
    vectors: npt.NDArray[np.floating[Any]],
    start: int,
    seen: set[bytes],
) -> pa.Table:
    """As the embed stage yields them; `seen` are the keys of ids before these."""
    num, dim = vectors.shape
    ids = batch.ids or [f"{Path(path).name}#{i}" for i in range(start, start + num)]
    carried = pa.table(batch.columns) if batch.columns else pa.table({"": pa.nulls(num)}).select([])
    schema = row_schema(carried.schema)
    content = [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in vectors]
    columns: dict[str, Any] = {
        ROW_ID: pa.array(ids, pa.string()),
        CONTENT_HASH: pa.array(content),
        CARRIED: hash_carried(carried, carried.schema.names) if carried.schema.names else None,
        SHARD: pa.array(np.zeros(num, dtype=np.int32)),
        **{field: carried[field] for field in carried.schema.names},
    }
    made = [
        columns[f.name] if columns.get(f.name) is not None else pa.nulls(num, f.type)
        for f in schema
        if f.name != INPUT
    ]
    rows = pa.table(made, schema=pa.schema([f for f in schema if f.name != INPUT]))
    flat = pa.array(np.ascontiguousarray(vectors).ravel())
    rows = rows.append_column(DEFAULT, pa.FixedSizeListArray.from_arrays(flat, dim))
    rows = rows.append_column(NUM_UNITS, pa.array(np.zeros(num, dtype=np.int32)))
    rows = rows.append_column(TRUNCATED, pa.array(np.zeros(num, dtype=np.bool_)))
    causes = {}
    whole = np.isfinite(vectors).all(axis=1)
    for i, (key, is_whole) in enumerate(zip(keys_of(ids).tolist(), whole.tolist(), strict=True)):
        if not is_whole:
            causes[i] = ("not finite", "its vector holds a NaN or an infinity")
        elif key in seen:
            causes[i] = (DUPLICATE, TWIN)
        else:
            seen.add(key)
    return reject(rows, "write", causes)
