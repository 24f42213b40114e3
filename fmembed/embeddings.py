"""A table as its readers take it: arrays, frames, what is known of it, and how it looks.

`fmembed.open` looks at the log and at what lies beside it; nothing that the table names is opened,
so it is the same for one that was copied or mailed.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.errors import TableError
from fmembed.evaluate.facts import pick_headlines, stored_probes
from fmembed.redaction import redact
from fmembed.rows.columns import PARENT_ID, PIECE, ROW_ID
from fmembed.rows.precision import PRECISIONS, dequantize, ranges_from_lists
from fmembed.rows.vectors import vector_type
from fmembed.spec import OWN_COLUMNS, ProbeName
from fmembed.summary import describe_probe
from fmembed.table.card import Card
from fmembed.table.promoted import find_version
from fmembed.table.reading import read
from fmembed.table.table import Table
from fmembed.table.versions import list_versions
from fmembed.terminal import printable

if TYPE_CHECKING:
    import pandas
    import polars


@dataclass(frozen=True, repr=False)
class Info:
    """What a table tells of itself, without a row of it being read.

    `dims` and `precisions` are by column of vectors; `columns` are the carried ones. `made` is when
    the version was made, `last_run` when the last run on record began and `last_kind` what it was.
    `rows_deleted` were deleted, and no run brings them back. `probes` are as `RunResult.probes`.
    `missing` says what is not there that a run leaves.
    """

    table: str
    version: int
    made: str
    rows: int
    rows_rejected: int
    rows_deleted: int
    num_bytes: int
    parts: int
    modality: str
    dims: dict[str, int]
    precisions: dict[str, str]
    columns: tuple[str, ...]
    model: str
    model_settings: str
    source: str
    input: str
    fingerprint: str
    last_run: str = ""
    last_kind: str = ""
    probes: dict[str, Any] = field(default_factory=dict)
    report: str | None = None
    missing: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The same for people, a line each."""
        yield f"table     {self.table}"
        for column, dim in self.dims.items():
            named = f", column {column}" if len(self.dims) > 1 else ""
            yield f"vectors   {self.rows:,} vectors × {dim:,} {self.precisions[column]}{named}"
        yield f"model     {self.model} ({self.model_settings})"
        yield f"from      {self.source}, column {self.input}"
        yield f"columns   {', '.join(self.columns) or 'none carried'}"
        for name, found in self.probes.items():
            yield from describe_probe(name, found)
        size = f"{self.num_bytes / 2**20:,.1f} MiB in {self.parts:,} parts"
        yield f"version   {self.version}, {_when(self.made)}, {size}"
        if self.rows_rejected:
            yield f"rejected  {self.rows_rejected:,}: fmembed rejected {self.table}"
        if self.rows_deleted:
            yield f"deleted   {self.rows_deleted:,} stay out, until fmembed undelete"
        if self.last_run:
            yield f"last run  {self.last_kind}, {_when(self.last_run)}"
        if self.report:
            yield f"report    {self.report}"
        for what in self.missing:
            yield f"missing   {what}"

    def __repr__(self) -> str:
        return "\n".join(map(printable, self.lines()))

    def _repr_html_(self) -> str:
        return as_html(self.lines())


class Embeddings:
    """A version of a table: its rows, and what is known of them.

    Nothing is read before it is asked for; each call reads from storage, so keep what it gives.
    """

    def __init__(
        self, uri: str | Path, version: int | None = None, *, fingerprint: str | None = None
    ) -> None:
        """Open a table; or of a store the version that is promoted, and no other one later.

        Args:
            uri: The table's folder or URL, or the store's.
            version: Of a table, which version; None for the newest.
            fingerprint: What must have made it, as `Info.fingerprint`, whole or its beginning.

        Raises:
            TableError: No table there, no such version, nothing promoted, or of another
                fingerprint.
        """
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise TableError(f"version: takes a number, got {version!a:.80}")
        found = find_version(uri, version, fingerprint)
        table, version = found.table, found.version
        newest = table.version() or 0
        if version is not None:
            table.check_version(version)
        self._table = Table(table.uri)  # which may be kept for long, and is looked at anew
        self.version = newest if version is None else version
        self._is_newest = self.version == newest
        # Puts rows, of which it is given the ids, in the order of the data that they were made of.
        self._order: Callable[[pa.Table], pa.Table] | None = None
        card = table.card()
        assert card is not None
        self._card: Card = card

    @property
    def uri(self) -> str:
        """Where the table is."""
        return self._table.uri

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(self._table.schema().names)

    @property
    def vectors(self) -> list[str]:
        """The names of the columns of vectors."""
        return list(self._card.outputs)

    def __len__(self) -> int:
        """Rows."""
        return sum(part.num_rows for part in self._table.rows.parts(self.version))

    def in_order(self, order: Callable[[pa.Table], pa.Table]) -> Embeddings:
        """The same, whose rows come in another order.

        Args:
            order: Is given rows with their columns of ids.
        """
        self._order = order
        return self

    def arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows as a pyarrow Table: all columns, or these.

        A table's rows are in no order: their ids say which is which.

        Raises:
            TableError: No such column.
        """
        if self._order is None or columns is None:
            rows = read(self.uri, self.version, columns=None if columns is None else list(columns))
            return rows if self._order is None else self._order(rows)
        names = self._table.rows.schema().names  # of a version without a row too
        ids = [name for name in (ROW_ID, PARENT_ID, PIECE) if name in names]
        wanted = list(dict.fromkeys([*columns, *ids]))
        return self._order(read(self.uri, self.version, columns=wanted)).select(list(columns))

    def pandas(self, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """Rows as a pandas DataFrame; a vector is an array, a view of one that holds them all."""
        return self.arrow(columns).to_pandas()

    def polars(self, columns: Sequence[str] | None = None) -> polars.DataFrame:
        """Rows as a polars DataFrame; a column of vectors is an Array."""
        import polars

        found = polars.from_arrow(self.arrow(columns))
        assert isinstance(found, polars.DataFrame)
        return found

    def ray(self, columns: Sequence[str] | None = None) -> Any:
        """Rows as a Ray Dataset, read where it is consumed; Ray is started if need be."""
        from fmembed.run.cluster import connect

        connect(verbose=False)
        chosen = None if columns is None else list(columns)
        return read(self.uri, self.version, engine="ray", columns=chosen)

    def numpy(
        self, column: str | None = None, *, label: str | None = None, ids: bool = False
    ) -> Any:
        """Vectors as one array, ready for scikit-learn, and a column of labels beside it.

        A table's rows are in no order: their ids say which is which.

        Args:
            column: Which column of vectors; None for the first.
            label: Another column, whose values come in the same order.
            ids: Whether the rows' ids are asked for too.

        Returns:
            Shape (rows, dim), float32, C-contiguous, whatever precision they are stored in; of a
            column with a vector for each token a list of (tokens, dim). With `label` or `ids` a
            tuple: this, and the values, shape (rows,): numbers as they are, all else as objects,
            None where a row has none; and the ids, shape (rows,), objects.

        Raises:
            TableError: No such column, or none of vectors.
        """
        for name, given, kind in (("label", label, str), ("ids", ids, bool)):
            if given is not None and not isinstance(given, kind):
                what = "the name of a column" if kind is str else "True or False"
                raise TableError(f"{name}: takes {what}, got {given!a:.80}")
        column = self.vectors[0] if column is None else column
        if column not in self.vectors:
            raise TableError(
                f"column: {self.uri} has no vectors in {column!r}; it has {', '.join(self.vectors)}"
            )
        beside = [*([label] if label is not None else []), *([ROW_ID] if ids else [])]
        rows = self.arrow(list(dict.fromkeys([column, *beside])))
        vectors = self._floats(rows[column], column)
        return (vectors, *(_values(rows[name]) for name in beside)) if beside else vectors

    def _floats(self, stored: pa.ChunkedArray, column: str) -> Any:
        if self._card.outputs[column].pooling == "tokens":
            return [self._matrix(row.values, column) for row in stored]
        if not len(stored):  # of which the log alone tells, and no length of a vector
            return np.empty((0, _dim(stored.type, self._card, column)), np.float32)
        return np.concatenate([self._matrix(chunk, column) for chunk in stored.chunks])

    def _matrix(self, stored: Any, column: str) -> npt.NDArray[np.float32]:
        while not pa.types.is_fixed_size_list(stored.type):  # pieces of a row, and their tokens
            stored = stored.flatten()
        flat = stored.flatten().to_numpy(zero_copy_only=False)
        matrix = flat.reshape(-1, stored.type.list_size)
        precision, ranges = self._card.outputs[column].precision, self._card.ranges
        return dequantize(matrix, column, precision, ranges_from_lists(ranges))

    @property
    def probes(self) -> dict[str, Any]:
        """What probes of this version have found, as `RunResult.probes`; empty without one."""
        found = stored_probes(self._table, self.version, self._card, get_args(ProbeName))
        return pick_headlines([probe for _, _, probe in found if probe], self._card)

    def info(self) -> Info:
        """What the table tells of itself, and what of it is missing here."""
        table, card = self._table, self._card
        parts = table.rows.parts(self.version)
        there = table.storage.sizes("")
        gone = [part.path for part in parts if part.path not in there]
        left = next((part for part in parts if part.path not in gone), None)
        schema = table.rows.schema() if left is None else table.schema_of(left)
        own = [f.name for f in schema if vector_type(f.type) is None]
        last, probes, missing = table.last_run() if self._is_newest else None, self.probes, []
        if gone:
            missing.append(f"{len(gone):,} of {len(parts):,} parts, as {gone[0]}")
        if self._is_newest and last is None:
            missing.append("a record of its last run (_runs/), which was stopped or is under way")
        elif self._is_newest and table.is_uncounted():
            missing.append("the end of its last run, which was stopped or is under way")
        if not probes:
            missing.append("probes: fmembed probe finds scores")
        if self._is_newest and not table.has_report:
            missing.append("its report (_report.html): fmembed probe writes it")
        limit = (table.version() or 0) - self.version + 1
        made = (v.time for v in list_versions(self.uri, limit) if v.version == self.version)
        return Info(
            table=self.uri,
            version=self.version,
            made=next(made, ""),
            rows=len(self),
            rows_rejected=table.num_rejected(),
            rows_deleted=len(table.deleted.read()),
            num_bytes=sum(part.size_bytes for part in parts),
            parts=len(parts),
            modality=card.modality,
            dims={
                c: _dim(schema.field(c).type, card, c) for c in card.outputs if c in schema.names
            },
            precisions={c: output.precision for c, output in card.outputs.items()},
            columns=tuple(c for c in own if c not in OWN_COLUMNS),
            model=_said(card, "model", "id"),
            model_settings=card.settings,
            source=_said(card, "source", "uri"),
            input=_said(card, "source", "input"),
            fingerprint=card.fingerprint,
            last_run=last.started if last is not None else "",
            last_kind=last.kind if last is not None else "",
            probes=probes,
            report=f"{self.uri}/_report.html" if table.has_report else None,
            missing=tuple(missing),
        )

    def __repr__(self) -> str:
        info = self.info()
        column, dim = next(iter(info.dims.items()), ("", 0))
        scores = [f"{n} {p['value']:.3f}" for n, p in info.probes.items() if "value" in p]
        said = [
            f"{info.rows:,} vectors × {dim:,} {info.precisions.get(column, '')}".rstrip(),
            f"{info.model} ({info.model_settings})",
            f"from {info.source}, column {info.input}",
            *scores,
            f"version {info.version}, {_when(info.made)}",
            *(f"missing: {what}" for what in info.missing),
        ]
        return printable(f"<Embeddings {info.table}: {' · '.join(said)}>")

    def _repr_html_(self) -> str:
        """What a notebook shows: what is known, and the report."""
        return as_html(self.info().lines()) + self.report_html()

    def report_html(self) -> str:
        """The report, folded, for a notebook; empty without one."""
        if not self._table.has_report:
            return ""
        # In a frame without rights: the report is a file that anybody may have made.
        page = html.escape(self._table.storage.get("_report.html").decode(errors="replace"))
        return (
            "<details><summary>report</summary><iframe sandbox='allow-scripts' "
            f"style='width:100%;height:40rem;border:0' srcdoc=\"{page}\"></iframe></details>"
        )


def as_html(lines: Iterable[str]) -> str:
    """Lines for people, each with its name in the first ten characters, as a table."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(line[:10].strip())}</th>"
        f"<td style='text-align:left'>{html.escape(printable(line[10:]))}</td></tr>"
        for line in lines
    )
    return f"<table>{rows}</table>"


def _dim(type_: pa.DataType, card: Card, column: str) -> int:
    found = vector_type(type_)
    if found is None:
        return 0
    return int(found.list_size) * PRECISIONS[card.outputs[column].precision].dims_each


def _said(card: Card, part: str, name: str) -> str:
    """A field of the spec in a table's metadata, whatever somebody has written there."""
    fields = card.spec.get(part)
    return redact(str(fields.get(name, "?")))[:200] if isinstance(fields, dict) else "?"


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found


def _when(time: str) -> str:
    """A time of UTC as people say it: with the day where it is near."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return "at an unknown time"
    days = (datetime.now(UTC).date() - moment.astimezone(UTC).date()).days
    near = {0: "today", 1: "yesterday"}.get(days, f"{days:,} days ago")
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC ({near})"
