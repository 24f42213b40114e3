"""Reading a table: the committed rows and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import pyarrow as pa
import pyarrow.compute as pc

from fmembed.errors import TableError, reason
from fmembed.rows.columns import CONTENT_HASH, ROW_ID
from fmembed.table.files import Part
from fmembed.table.promoted import Found, find_version, read_found
from fmembed.table.table import Table

if TYPE_CHECKING:
    import ray.data


@overload
def read(
    uri: str | Path,
    version: int | None = ...,
    *,
    columns: list[str] | None = ...,
    fingerprint: str | None = ...,
) -> pa.Table: ...
@overload
def read(
    uri: str | Path,
    version: int | None = ...,
    *,
    engine: Literal["arrow"],
    columns: list[str] | None = ...,
    fingerprint: str | None = ...,
) -> pa.Table: ...
@overload
def read(
    uri: str | Path,
    version: int | None = ...,
    *,
    engine: Literal["ray"],
    columns: list[str] | None = ...,
    fingerprint: str | None = ...,
) -> ray.data.Dataset: ...


def read(
    uri: str | Path,
    version: int | None = None,
    *,
    engine: Literal["arrow", "ray"] = "arrow",
    columns: list[str] | None = None,
    fingerprint: str | None = None,
) -> Any:
    """Read the committed rows of a table, and nothing else; of a store what is promoted.

    Args:
        uri: The table, or the store.
        version: Of a table, which version; None for the newest.
        engine: "arrow" for a pyarrow Table, "ray" for a Ray Dataset.
        columns: Only these.
        fingerprint: What must have made it, as `Info.fingerprint`, whole or its beginning.

    Raises:
        TableError: No table there, no such version, nothing promoted, or of another fingerprint.
    """
    if engine not in ("arrow", "ray"):
        raise TableError(f"engine: takes arrow or ray, got {engine!a:.80}")
    if isinstance(columns, str):
        raise TableError(f"columns: takes a list of names, got {columns!a:.80}")
    return read_found(
        lambda: find_version(uri, version, fingerprint), lambda found: _read(found, engine, columns)
    )


def _read(found: Found, engine: Literal["arrow", "ray"], columns: list[str] | None) -> Any:
    table, version, uri = found.table, found.version, found.table.uri
    newest = table.version()
    if version is not None:
        table.check_version(version)
    names = table.rows.schema().names
    if absent := [c for c in columns or () if c not in names]:
        raise TableError(f"columns: {uri} has no {absent[0]!r}; it has {', '.join(names)}")
    parts = table.rows.parts(version)
    if version is not None and version != newest:
        # What no newest version holds, a vacuum takes away, and nothing can mend that.
        old = set(parts) - set(table.rows.parts())
        if any(table.storage.size_bytes(part.path) is None for part in old):
            raise TableError(
                f"version: parts of version {version} of {uri} are gone, as by another tool's "
                f"vacuum; the newest is {newest}"
            )
    if engine == "ray":
        return _read_by_ray(table, parts, columns)
    if not parts:
        return _empty(table, columns)
    rows = [table.read_part(p, columns) for p in parts]
    try:
        # Another tool may have added columns, which the older parts lack.
        return pa.concat_tables(rows, promote_options="default")
    except pa.ArrowException as e:
        raise TableError(
            f"table: another tool has changed the columns of {uri}, and its parts do not fit "
            f"together: {reason(e)}"
        ) from None


def _empty(table: Table, columns: list[str] | None) -> pa.Table:
    empty = table.rows.schema().empty_table()
    return empty.select(columns) if columns is not None else empty


def _read_by_ray(table: Table, parts: list[Part], columns: list[str] | None) -> Any:
    """Not by Ray's own reader of Parquet, which checks no checksum."""
    import ray.data

    if not parts:
        return ray.data.from_arrow(_empty(table, columns))
    uri = table.uri

    def read_one(batch: dict[str, Any]) -> pa.Table:
        return Table(uri).read_part(parts[int(batch["id"][0])], columns)

    numbers = ray.data.range(len(parts), override_num_blocks=len(parts))
    return numbers.map_batches(read_one, batch_size=1)


def sample(
    uri: str | Path,
    columns: list[str],
    max_rows: int,
    label: str | None,
    version: int | None = None,
) -> tuple[pa.Table, int]:
    """Read a fixed sample: the rows with the smallest content hashes.

    Memory is bounded by one part and the sample, whatever the table's size.

    Args:
        uri: The table.
        columns: What to read besides row_id and content_hash.
        max_rows: Size of the sample.
        label: Leave out rows without a label in this column: null, blank text, or NaN.
        version: Of this version; None for the newest.

    Returns:
        Rows in the order of their row ids; and how many of the table have no label.
    """
    table = Table.open(uri)
    wanted = list(dict.fromkeys([ROW_ID, CONTENT_HASH, *columns]))
    chosen: pa.Table | None = None
    num_unlabelled = 0
    for part in table.rows.parts(version):
        rows = table.read_part(part, wanted)
        if label is not None:
            labelled = rows.filter(_is_labelled(rows[label]))
            num_unlabelled += rows.num_rows - labelled.num_rows
            rows = labelled
        chosen = rows if chosen is None else pa.concat_tables([chosen, rows])
        if chosen.num_rows > max_rows:
            order = pc.sort_indices(
                chosen, sort_keys=[("content_hash", "ascending"), (ROW_ID, "ascending")]
            )
            chosen = chosen.take(order[:max_rows])
    if chosen is None:
        return read(uri, version, columns=wanted), 0
    return chosen.take(pc.sort_indices(chosen, sort_keys=[(ROW_ID, "ascending")])), num_unlabelled


def rows_of(uri: str | Path, version: int, columns: list[str], ids: list[str]) -> pa.Table:
    """The rows of a version with these ids; memory as of `sample`.

    Args:
        uri: The table.
        version: Which.
        columns: What to read besides row_id and content_hash.
        ids: Which rows; those that the version does not have are passed over.
    """
    table = Table.open(uri)
    wanted = list(dict.fromkeys([ROW_ID, CONTENT_HASH, *columns]))
    among, found = pa.array(ids, pa.string()), []
    for part in table.rows.parts(version):
        rows = table.read_part(part, wanted)
        found.append(rows.filter(pc.is_in(rows[ROW_ID], value_set=among)))
    return pa.concat_tables(found) if found else read(uri, version, columns=wanted)


def list_labelled(labels: pa.ChunkedArray) -> list[bool]:
    """Whether each row has a label: it is neither null, nor blank, nor NaN."""
    return [bool(is_one) for is_one in _is_labelled(labels).to_pylist()]


def _is_labelled(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_string(labels.type):
        named = pc.not_equal(pc.utf8_trim_whitespace(labels), "")
    elif pa.types.is_floating(labels.type):
        named = pc.invert(pc.is_nan(labels))
    else:
        return labels.is_valid()
    return pc.fill_null(named, False)
