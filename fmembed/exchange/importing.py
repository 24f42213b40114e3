"""Vectors that somebody else has made into a table: in this process, without Ray, in one commit.

Nobody here knows which model made them, so the table says "imported", and nothing that embeds rows
writes to it. All that reads a table takes it: `probe`, `search`, `export`, `verify`.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
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
    open_foreign,
    take,
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
    table_schema,
)
from fmembed.rows.ids import keys_of
from fmembed.rows.outputs import DEFAULT
from fmembed.spec import RunSpec
from fmembed.storage import tell
from fmembed.table.card import IMPORTED, Card, fingerprint
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
    columns: Sequence[str] | None = None,
    label: str | None = None,
    split: str | None = None,
    as_float32: bool = False,
) -> RunResult:
    """Make a table of vectors in a file.

    A row is rejected whose vector holds a NaN or an infinity, that has no id where others have one,
    or whose id another row has. What was left out of the file is said. A killed import leaves a
    table without rows, and the same command begins anew. Vectors are stored as they are: of float64
    only those that float32 holds without rounding, unless `as_float32` says that they may be
    rounded.

    Args:
        path: A file of vectors, or a folder of a dataset, as `foreign.open_foreign` takes it.
        output: The table: a folder or URL with nothing there.
        column: Which column or array holds the vectors; found where there is one.
        ids: Which holds the ids, or a file of them: texts, one a line, or of an array alone another
            array. Without one a row's id is the file's name and its number.
        columns: Which others to take; all, if none.
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
    found = with_lines(take(found, columns), id_lines, label_lines)
    label = None if label_lines else label
    if found.left_out:
        tell(f"not taken from {path}: {', '.join(found.left_out)}")
    named = {"label": label, "split": split}
    for field, usual in (("label", LABEL), ("split", SPLIT)):
        given = named[field] = named[field] or (usual if usual in found.columns else None)
        if given is not None and given not in found.columns:
            have = ", ".join(found.columns) or "none"
            raise SpecError(f"{field}: no column {given!r} in {path}; it has {have}")
    precision = _precision(found, as_float32)
    settings = [column, ids, columns, named, as_float32]
    card = _card(found, output, named, precision, settings)
    run_id = uuid.uuid4().hex[:12]
    _check_free(output)
    table = Table.open_output(output, card.identity, _IMPORTED)
    with Lock(table.storage, run_id) as lock:
        _check_free(output)
        taken = _Taken(found, precision, as_float32)
        card = table.claim(card, _schema(taken), run_id)
        table.clean_up(card.identity, run_id, retry_rejected=True)  # what a killed one has left
        try:
            commit, written = _write(table, card, taken, run_id, lock)
        except BaseException:
            table.remove_strays(run_id)
            raise
        causes = Counter[str]()
        for one in written:
            causes.update(one.causes)
        num_embedded = sum(one.num_rows for one in written)
        seconds = time.monotonic() - began
        result = RunResult(
            run_id=run_id,
            started=started,
            table=table.uri,
            version=table.version(),
            fingerprint=card.fingerprint,
            rows_read=num_embedded + causes.total(),
            rows_embedded=num_embedded,
            rows_rejected=causes.total(),
            parts_written=sum(one.part is not None for one in written),
            seconds=round(seconds, 2),
            rows_per_s=round(num_embedded / max(seconds, 1e-9), 2),
            table_rows=num_embedded,
            table_rejected=causes.total(),
            causes=dict(causes),
            kind="import",
        )
        table.put_run(commit, result)
    return result


def _check_free(output: str) -> None:
    """Refuse a table that was imported before: what it holds is not added to."""
    table = Table(output)
    card = table.card() if table.version() is not None else None
    if card is not None and card.is_imported and table.rows.parts():
        raise TableError(f"output: {table.uri} holds rows; give a folder with nothing there")


def _is_text(given: str | None) -> bool:
    where = Path(given or "")
    is_named = bool(where.suffix) or len(where.parts) > 1
    return given is not None and is_named and where.suffix != ".npy" and where.is_file()


def _precision(found: Foreign, as_float32: bool) -> str:
    if as_float32 or found.dtype == np.float64:
        return "float32"
    if found.dtype.name not in _PRECISIONS:
        raise SourceError(
            f"{found.path}: holds {found.dtype}; takes vectors of float16, float32 or float64, as "
            "nobody else knows what whole numbers stand for"
        )
    return _PRECISIONS[found.dtype.name]


def _card(
    found: Foreign,
    output: str,
    named: dict[str, str | None],
    precision: str,
    settings: Sequence[Any],
) -> Card:
    path = Path(found.path).absolute()
    where, now = str(path), path.stat()
    source = [where, now.st_size, now.st_mtime_ns, found.num_rows, *settings]
    spec = RunSpec.model_validate(
        {
            "source": {
                "uri": where,
                "input": "text" if "text" in found.columns else "vectors",
                "carry": tuple(found.columns),
                **named,
            },
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
        # No other file's vectors are of the same space, as far as anybody knows; and the same
        # command on the same file is the same table.
        IMPORTED: hashlib.blake2b(repr(source).encode(), digest_size=16).hexdigest(),
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
    table.rows.pin()
    table.rejected.pin()
    for number, block in enumerate(taken.blocks()):
        stamp = {**configuration, RUN: run_id, WRITE: str(number)}
        one, keys = write_part(table.uri, [block], (DEFAULT,), stamp)
        written.append(one)
        kept.append(keys)
    if not written:
        raise SourceError(f"{taken.found.path}: there is no row in it")
    if not any(one.part is not None for one in written):
        causes = sum((Counter(one.causes) for one in written), Counter[str]())
        told = ", ".join(f"{num:,} {cause}" for cause, num in causes.items())
        raise RejectedError(f"{taken.found.path}: all rows were rejected: {told}")
    lock.check()
    held = [(keys, one.held_by) for keys, one in zip(kept, written, strict=True)]
    table.key_files.write(f"{run_id}-000000", held, {0: None})
    rejected = [one.rejected for one in written if one.rejected is not None]
    parts = [one.part for one in written if one.part is not None]
    commit, once = Commit(run=run_id), (run_id, 0)
    if rejected:
        at = table.rejected.commit(rejected, REJECTED_SCHEMA, configuration, once)
        commit = commit.model_copy(update={"rejected": 0, "rejected_version": at})
    at = table.rows.commit(parts, written[0].schema, configuration, once)
    return commit.model_copy(update={"rows": 0, "rows_version": at}), written


def _schema(taken: _Taken) -> pa.Schema:
    """The columns of the table."""
    vector = pa.list_(pa.from_numpy_dtype(np.dtype(taken.precision)), taken.found.dim)
    carried = pa.schema(list(taken.found.columns.items()))
    return table_schema(carried, [pa.field(DEFAULT, vector)])


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
        with np.errstate(over="ignore"):  # infinity, and so a rejected row
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
    places = [f"{Path(path).name}#{i}" for i in range(start, start + num)]
    given = batch.ids or places
    ids = [place if name is None else name for name, place in zip(given, places, strict=True)]
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
        if given[i] is None:
            causes[i] = ("no id", "others have one; this row's is null, or an empty line")
        elif not is_whole:
            told = "its vector holds a NaN, an infinity, or more than fits into its type"
            causes[i] = ("not finite", told)
        elif key in seen:
            causes[i] = (DUPLICATE, TWIN)
        else:
            seen.add(key)
    return reject(rows, "write", causes)
