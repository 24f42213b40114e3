"""Data that a program holds, laid out as files, so that a run reads them as any others.

Ray's tasks read a source shard by shard, some of them twice: a list or a generator is one process's
own, and can be read once. So it is written as Parquet, some rows at a time, for as long as the run.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmembed.errors import SourceError, reason
from fmembed.sources.canonical import to_row_id
from fmembed.sources.source import BadRow
from fmembed.storage import Storage

# Rows of a file; of Python's objects so many are turned into columns at once.
_FILE_ROWS, _FILE_BYTES = 65_536, 64 * 2**20
# The column that numbers rows, where none of theirs is the id.
INDEX = "_index"
# What a format holds as it is, so that a decoder has the same to convert.
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
_TIFF_MODES = ("CMYK", "F", "I", "LAB", "YCbCr")
_TEXT, _PATH, _BYTES = "text", "path", "bytes"


@dataclass(frozen=True)
class Given:
    """What was laid out: fields of `SourceSpec`, by dotted name; and what to call it.

    `ids` are those of its rows in their order; None where they end with the number of the row.
    `has_order` is false of what has none.
    """

    fields: dict[str, Any]
    called: str
    ids: Sequence[str] | None = None
    has_order: bool = True

    def twins(self) -> list[str]:
        """Ids that an earlier row of the data has, one for each row that will be rejected so."""
        seen: set[str] = set()
        return [i for i in self.ids or () if i and (i in seen or seen.add(i))]  # type: ignore[func-returns-value]

    def positions(self, row_ids: Iterable[str]) -> list[int]:
        """Where in the data the rows of some ids are; behind it those that are not in it."""
        if self.ids is None:
            numbers = (row_id.rpartition("#")[2] for row_id in row_ids)
            return [int(n) if n.isdecimal() else sys.maxsize for n in numbers]
        at: dict[str, int] = {}
        for i, row_id in enumerate(self.ids):
            at.setdefault(row_id, i)
        return [at.get(row_id, sys.maxsize) for row_id in row_ids]


def lay_out(data: Any, storage: Storage, fields: Mapping[str, Any]) -> Given:
    """Write data as a source's files.

    Args:
        data: Texts, or dicts of a row each, in a list or from a generator; paths or contents of
            pictures or sounds; a pyarrow, pandas or polars table, or another one that Arrow can
            read; a `datasets` Dataset; a Ray Dataset.
        storage: Where; an empty folder.
        fields: Fields of the config that the user names: `source.id`, where a column is the id.

    Raises:
        SourceError: It is nothing of the kind, or not of one type by column.
    """
    id_column = fields.get("source.id")
    kind = _kind(data)
    if kind == "ray Dataset":
        if id_column is None:
            raise SourceError(
                "source.id: the rows of a Ray Dataset have no order of their own: name a column "
                "whose values stay with them, as id"
            )
        batches = data.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0)
        num_rows, _ = _write(batches, storage, id_column)
        called = f"a ray.data.Dataset of {num_rows:,} rows"
        return replace(_named(storage, id_column, called), has_order=False)
    if kind in ("datasets Dataset", "datasets IterableDataset"):
        return _of_hub(data, storage, kind, id_column)
    if (found := _arrow_tables(data, kind)) is not None:
        tables = found
    elif isinstance(data, Iterable) and not isinstance(data, bytes):
        return _of_objects(data, storage, id_column)
    else:
        raise SourceError(f"data: takes a path, a config, a list, a table or a dataset, got {kind}")
    num_rows, ids = _write(tables, storage, id_column)
    return _named(storage, id_column, f"a {kind.replace(' ', '.')} of {num_rows:,} rows", ids)


def _kind(data: Any) -> str:
    """The package and the class that it is of, or of which its own is a kind; none is imported."""
    kinds = [f"{c.__module__.partition('.')[0]} {c.__name__}" for c in type(data).__mro__]
    return next((kind for kind in kinds if kind in _KNOWN), kinds[0])


_KNOWN = (
    "datasets Dataset", "datasets IterableDataset", "pandas DataFrame", "pandas Series",
    "polars LazyFrame", "polars Series", "ray Dataset",
)  # fmt: skip


def _named(
    storage: Storage,
    id_column: str | None,
    called: str,
    ids: Sequence[str] | None = None,
    **more: Any,
) -> Given:
    fields = {"source.uri": storage.uri, "source.format": "parquet", **more}
    if id_column is None:
        fields.setdefault("source.id", INDEX)
    return Given(fields, called, ids)


def _arrow_tables(data: Any, kind: str) -> Iterator[pa.Table] | None:
    """A table as Arrow's; None where it is none."""
    if kind == "pandas DataFrame":
        if not data.columns.is_unique:
            twice = data.columns[data.columns.duplicated()][0]
            raise SourceError(f"data: two columns of the DataFrame are called {str(twice)!a:.80}")
        try:
            return iter([pa.Table.from_pandas(data, preserve_index=False)])
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise SourceError(f"data: a column of the DataFrame is of several types: {e}") from None
    if kind == "polars LazyFrame":
        data = data.collect()
    if not hasattr(data, "__arrow_c_stream__"):
        return None
    if isinstance(data, pa.ChunkedArray) or kind.endswith("Series"):
        return iter([pa.table({_TEXT: pa.chunked_array(data)})])
    reader = pa.RecordBatchReader.from_stream(data)
    return (pa.Table.from_batches([batch]) for batch in reader)


def _of_hub(data: Any, storage: Storage, kind: str, id_column: str | None) -> Given:
    """A dataset of the library `datasets`, saved as it saves one: with the files that it names."""
    if kind == "datasets IterableDataset":
        return _of_objects(data, storage, id_column)
    if "://" in storage.uri:
        raise SourceError(
            "data: save the dataset (save_to_disk) where all nodes read it, and give its path with "
            "source.format: hf"
        )
    data.save_to_disk(storage.uri)
    fields = {"source.uri": storage.uri, "source.format": "hf"}
    ids = None
    if id_column in data.column_names:
        ids = [_id_of(value) for value in data.with_format(None)[id_column]]
    return Given(fields, f"a datasets.Dataset of {len(data):,} rows", ids)


def _of_objects(data: Iterable[Any], storage: Storage, id_column: str | None) -> Given:
    """Python's own objects, of the kind that the first one is of."""
    numbered = ((i, _content_or_why(given)) for i, given in enumerate(data))
    first = next(numbered, None)
    if first is None:
        raise SourceError("data: there is nothing in it")
    rows = itertools.chain([first], numbered)
    if isinstance(first[1], Path):
        return _of_paths([_checked(each, Path) for each in rows], storage)
    kind: type | None = next((k for k in _COLUMNS if isinstance(first[1], k)), None)
    if kind is None:
        raise SourceError(
            f"data[0]: takes a text, dict, path, bytes or picture, got {type(first[1]).__name__}"
        )
    if kind is str and is_file_name(first[1]):
        raise SourceError(
            f"data[0]: {first[1]!a:.200} is a file here; give files as pathlib.Path, which are "
            "read, and texts as they are"
        )
    to_table = _COLUMNS[kind]
    own_id = None if kind is not Mapping else id_column
    chunks = _chunks(_checked(each, kind) for each in rows)
    tables = (to_table(chunk, start) for start, chunk in chunks)
    num_rows, ids = _write(tables, storage, own_id)
    more = {} if kind is Mapping else {"source.input": _BYTES if kind is bytes else _TEXT}
    return _named(storage, own_id, f"{num_rows:,} {_SEVERAL[kind]}", ids, **more)


def content_of(picture: Any) -> Any:
    """A picture of Pillow's, or of uint8 numbers, as a file's bytes, which decode to the same
    pixels; all else as it is.

    Its orientation goes with it, if it has one: it is turned as its file would be.

    Raises:
        BadRow: It is none.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not is_picture(picture) or not picture.size:
            raise BadRow(
                "wrong type",
                "an array is a picture as uint8 of shape (height, width) or (height, width, 1, 3 "
                f"or 4), got {picture.dtype} of shape {picture.shape}",
            )
        from PIL import Image

        # One colour is none, for Pillow.
        is_grey = picture.ndim == 3 and picture.shape[2] == 1
        picture = Image.fromarray(picture[:, :, 0] if is_grey else picture)
    if not is_picture(picture):
        return picture
    try:
        return _to_file(picture)
    except Exception as e:  # what it was opened from is damaged, mostly
        raise BadRow("corrupt image", f"Pillow cannot read it: {reason(e)}") from None


def _to_file(picture: Any) -> bytes:
    mode = picture.mode
    file, exif = io.BytesIO(), picture.getexif()
    if mode in _TIFF_MODES:
        # Not as what it was opened from is compressed, which may be with loss.
        picture.save(file, "TIFF", exif=exif, compression="raw")
    else:
        with_alpha = "LA" if mode == "La" else "RGBA" if "a" in mode.lower() else "RGB"
        kept = picture if mode in _PNG_MODES else picture.convert(with_alpha)
        kept.save(file, "PNG", compress_level=1, exif=exif)
    return file.getvalue()


def is_picture(given: Any) -> bool:
    """Whether something is one picture: of Pillow's, or an array that has the shape of one."""
    if isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        return given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
    # Pillow is not imported for it: who has a picture has done so.
    return any(c.__module__ == "PIL.Image" and c.__name__ == "Image" for c in type(given).__mro__)


def _content_or_why(given: Any) -> Any:
    """A picture's file; of one that cannot be read what its row is rejected for, as if it were
    that.
    """
    try:
        return content_of(given)
    except BadRow as e:
        if e.error == "wrong type":
            raise SourceError(f"data: {e.message}") from None
        return f"no picture: {e.message}".encode()


def is_file_name(text: str) -> bool:
    """Whether a text is the path of a file here: then hardly what is to be embedded."""
    return len(text) < 4096 and os.path.isfile(text)  # which says no of what is no path


def _checked(each: tuple[int, Any], kind: type) -> Any:
    """One of the rest, which is of the first one's kind, or nothing; a run rejects that one."""
    i, given = each
    if given is not None and not isinstance(given, kind):
        raise SourceError(
            f"data[{i}]: takes a {_KINDS[kind]}, as the first one, got {type(given).__name__}"
        )
    return given


_KINDS: dict[type, str] = {str: "text", bytes: "bytes", Path: "path", Mapping: "dict"}
_SEVERAL: dict[type, str] = {str: "texts", bytes: "contents of files", Mapping: "dicts"}


def _texts(chunk: list[str | None], _: int) -> pa.Table:
    # As bytes, so that one that is no UTF-8 is a rejected row and no error of all.
    raw = [None if t is None else t.encode("utf-8", "surrogatepass") for t in chunk]
    column = pa.array(raw, pa.large_binary())
    try:
        return pa.table({_TEXT: column.cast(pa.large_string())})
    except pa.ArrowInvalid:
        return pa.table({_TEXT: column})


def _contents(chunk: list[bytes | None], _: int) -> pa.Table:
    return pa.table({_BYTES: pa.array(chunk, pa.large_binary())})


def _dicts(chunk: list[Mapping[str, Any] | None], start: int) -> pa.Table:
    rows = [row or {} for row in chunk]
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[str(name)] = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
            raise SourceError(
                f"data: the values of {str(name)!a:.80} in rows {start:,} to "
                f"{start + len(rows) - 1:,} are not of one type: {reason(e)}"
            ) from None
    return pa.table(columns)


_COLUMNS: dict[type, Callable[[list[Any], int], pa.Table]] = {
    str: _texts, bytes: _contents, Mapping: _dicts,
}  # fmt: skip


def _of_paths(paths: list[Path | None], storage: Storage) -> Given:
    """Files that a run reads where they are: their paths, below the folder that holds them all."""
    real = [None if p is None else str(p.absolute()) for p in paths]
    root = os.path.commonpath([os.path.dirname(p) for p in real if p is not None])
    below = [None if p is None else os.path.relpath(p, root) for p in real]
    table, ids = pa.table({_PATH: pa.array(below, pa.string())}), None
    num_rows, _ = _write(iter([table]), storage, None)
    more = {"source.input": _PATH, "source.root": root}
    if len(set(below)) == len(below) and None not in below:
        more["source.id"], ids = _PATH, [str(path) for path in below]
    return _named(storage, None, f"{num_rows:,} paths", ids, **more)


def _chunks(rows: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Rows of about a file, and the number of the first."""
    first, chunk, size = 0, [], 0
    for row in rows:
        chunk.append(row)
        values = row.values() if isinstance(row, Mapping) else [row]
        size += sum(len(v) for v in values if isinstance(v, str | bytes))
        if len(chunk) == _FILE_ROWS or size >= _FILE_BYTES:
            yield first, chunk
            first, chunk, size = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def _write(
    tables: Iterable[pa.Table], storage: Storage, id_column: str | None
) -> tuple[int, list[str] | None]:
    """Write tables, a file each or several; how many rows they have, and their ids, if they have
    any.
    """
    first, schemas, ids = 0, {}, None if id_column is None else list[str]()
    for table in tables:
        per_row = table.nbytes // max(table.num_rows, 1) + 1
        step = min(max(_FILE_BYTES // per_row, 1), _FILE_ROWS)
        for start in range(0, table.num_rows, step):
            rows = _storable(table.slice(start, step))
            if ids is not None and id_column in rows.column_names:
                ids += map(_id_of, rows[id_column].to_pylist())
            if id_column is None:
                if INDEX in rows.column_names:
                    raise SourceError(f"data: it has a column {INDEX}; name the id, or rename it")
                numbers = pa.array(range(first, first + rows.num_rows), pa.int64())
                rows = rows.append_column(INDEX, numbers)
            path = f"rows-{first:012}.parquet"
            schemas[path] = rows.schema
            _put(storage, path, rows)
            first += rows.num_rows
    if not first:
        raise SourceError("data: there is no row in it")
    _unify(storage, schemas)
    return first, ids


def _id_of(value: Any) -> str:
    try:
        return to_row_id(value, "")
    except BadRow:  # its row is rejected
        return ""


def _put(storage: Storage, path: str, rows: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    storage.put(path, sink.getbuffer())


def _unify(storage: Storage, schemas: Mapping[str, pa.Schema]) -> None:
    """Give all files the columns of all, each of a type that holds all of its values.

    What a column holds is known when its last row is: it may begin with nothing, or whole numbers.
    """
    try:
        whole = pa.unify_schemas(list(schemas.values()), promote_options="permissive")
        for path, schema in schemas.items():
            if schema.equals(whole):
                continue
            rows = pq.read_table(pa.BufferReader(storage.get(path)))
            columns = [
                rows[f.name].cast(f.type) if f.name in schema.names
                else pa.nulls(rows.num_rows, f.type)
                for f in whole
            ]  # fmt: skip
            _put(storage, path, pa.table(columns, schema=whole))
    except pa.ArrowException as e:
        raise SourceError(f"data: a column is of several types: {reason(e)}") from None


def _storable(rows: pa.Table) -> pa.Table:
    """Views, which polars has, as what they are views of."""
    for i, field in enumerate(rows.schema):
        as_plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
        if (plain := as_plain.get(field.type)) is not None:
            rows = rows.set_column(i, field.name, rows[field.name].cast(plain))
    return rows
