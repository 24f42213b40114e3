"""A version of a table as a file that others read, some rows at a time."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib import format as npy

from fmembed.errors import FmembedError, SpecError, TableError, reason
from fmembed.exchange.foreign import FORMATS, extra, ids_beside, suffix_of
from fmembed.rows.columns import ROW_ID
from fmembed.rows.precision import PRECISIONS, dequantize, ranges_from_lists
from fmembed.rows.vectors import vector_type
from fmembed.spec import OWN_COLUMNS
from fmembed.table.card import Card
from fmembed.table.table import Table

# Rows that are written at once, by the bytes of their vectors.
_BATCH_BYTES = 32 * 2**20
_TEXTS_AT_ONCE, _MAX_TEXT_BYTES = 1000, 2 * 2**30


@dataclass(frozen=True)
class Exported:
    """What was written: `dtype` is that of the vectors, `files` all that belong together."""

    table: str
    version: int
    format: str
    files: tuple[str, ...]
    rows: int
    dim: int
    dtype: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """The rows of a version, in the order in which it is read."""

    table: Table
    version: int
    card: Card
    column: str
    columns: tuple[str, ...]
    dim: int
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return sum(part.num_rows for part in self.table.rows.parts(self.version))

    def read(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """Some at a time: ids and columns, and vectors of shape (rows, dim)."""
        num = max(_BATCH_BYTES // (self.dim * 4), 1)
        output = self.card.outputs[self.column]
        pieces = (
            piece.select([ROW_ID, *self.columns, self.column])
            for part in self.table.rows.parts(self.version)
            for piece in self.table.read_pieces(part)
        )
        for rows in pieces:
            for start in range(0, rows.num_rows, num):
                some = rows.slice(start, num)
                flat = some[self.column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                vectors = flat.reshape(some.num_rows, -1)
                if PRECISIONS[output.precision].arrow not in (pa.float16(), pa.float32()):
                    ranges = ranges_from_lists(self.card.ranges)
                    vectors = dequantize(vectors, self.column, output.precision, ranges)
                yield some.drop_columns([self.column]), vectors

    def texts(self, column: str) -> Iterator[list[str | None]]:
        """One column alone, as texts."""
        for part in self.table.rows.parts(self.version):
            values = self.table.read_part(part, [column])[column].to_pylist()
            if any(isinstance(value, bytes) for value in values):
                raise SpecError(f"columns: {column} holds bytes, which this format has no room for")
            yield [None if value is None else str(value) for value in values]


def export(
    uri: str | Path,
    path: str,
    to: str | None = None,
    *,
    column: str | None = None,
    columns: Sequence[str] | None = None,
    version: int | None = None,
    label: str | None = None,
    split: str | None = None,
) -> Exported:
    """Write a version's vectors, ids and columns to a file, or a folder of a dataset.

    Vectors are written as they are stored; int8 and binary ones as the numbers that they stand for,
    in float32. A file that is there is replaced at the end, or not at all.

    Args:
        uri: The table.
        path: Where to.
        to: One of `foreign.FORMATS`; else as the path ends.
        column: Of the vectors; the table's first, if none.
        columns: What to write beside ids and vectors; all, if none.
        version: Which; the newest, if none.
        label: With `split`, an NPZ gets the layout `X_train, y_train, X_test, y_test, class_names`,
            an X and a y for each value of `split`.
        split: See `label`.

    Raises:
        SpecError: No such format, or column, or place.
        TableError: No table there, or one without a row.
        FmembedError: It cannot be written there, or not in that format.
    """
    table = Table.open(uri)
    rows = _rows(table, column, columns, version)
    kind = to or suffix_of(path) or "hf"
    if kind not in FORMATS:
        raise SpecError(f"--to: takes one of {', '.join(FORMATS)}, got {kind!r}")
    where = _checked(path)
    if where.is_dir() and kind not in ("hf", "lance"):
        raise SpecError(f"{path} is a folder; give a file to write")
    if label is not None and label == split:
        raise SpecError(f"label and split: both name {label}")
    if (label is None) != (split is None) or (split is not None and kind != "npz"):
        raise SpecError("label and split: an NPZ takes both, for a layout of splits, or neither")
    if label is not None and split is not None:
        _check_columns(rows, table, (label, split))
    try:
        if label is not None and split is not None:
            files = _write_splits(rows, where, label, split)
        else:
            files = _WRITE[kind](rows, where)
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as e:
        # A full disk, or a column that a format's own library has no room for.
        raise FmembedError(f"{path}: cannot be written as {kind}: {reason(e)}") from None
    return Exported(
        table.uri, rows.version, kind, tuple(map(str, files)), len(rows), rows.dim,
        rows.dtype.name, rows.columns,
    )  # fmt: skip


def _checked(path: str) -> Path:
    """Where a path leads to, if something may be written there.

    Raises:
        SpecError: Its folder is not there, it is neither a file nor a folder, or lies in a table.
    """
    where = Path(path).expanduser().absolute()
    try:
        where = where.resolve() if where.is_symlink() else where
    except (OSError, ValueError) as e:
        raise SpecError(f"{path!a:.80}: {reason(e)}") from None
    if not where.parent.is_dir():
        raise SpecError(f"{path}: there is no folder {where.parent}")
    if where.exists() and not (where.is_file() or where.is_dir()):
        raise SpecError(f"{path}: is no file; give one to write, or a folder")
    if inside := [
        p for p in where.parents if p.name == "_delta_log" or (p / "_delta_log").is_dir()
    ]:
        raise SpecError(f"{path}: lies in a table, {inside[-1]}; give another place")
    return where


def _rows(
    table: Table, column: str | None, columns: Sequence[str] | None, version: int | None
) -> _Rows:
    card, newest = table.card(), table.version()
    assert card is not None
    at = newest if version is None else version
    if at is not None:
        table.check_version(at)
    if at is None or not table.rows.parts(at):
        raise TableError(f"table: {table.uri} has no row to write")
    schema = table.schema()
    held = column or next(iter(card.pooled), None)
    if held is None or held not in card.pooled:
        have = ", ".join(card.pooled) or "none with one vector a row"
        raise SpecError(f"column: {held!r} holds no vectors of rows; the table has {have}")
    others = [
        f.name for f in schema
        if f.name not in OWN_COLUMNS and vector_type(f.type) is None
    ]  # fmt: skip
    chosen = tuple(others if columns is None else columns)
    precision = PRECISIONS[card.outputs[held].precision]
    dim = schema.field(held).type.list_size * precision.dims_each
    dtype = np.dtype(np.float16 if precision.arrow == pa.float16() else np.float32)
    found = _Rows(table, at, card, held, chosen, dim, dtype)
    _check_columns(found, table, chosen)
    return found


def _check_columns(rows: _Rows, table: Table, names: Sequence[str]) -> None:
    schema = table.schema()
    have = [f.name for f in schema if vector_type(f.type) is None and f.name != ROW_ID]
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise SpecError(f"columns: names {twice[0]!r} twice")
    if missing := [name for name in names if name not in have]:
        raise SpecError(f"columns: no {missing[0]!r} in {rows.table.uri}; it has {', '.join(have)}")


class _Draft:
    """A file that takes the place of another at the end, or not at all."""

    def __init__(self, where: Path) -> None:
        self._where = where
        handle, name = tempfile.mkstemp(prefix=f".{where.name}.", dir=where.absolute().parent)
        os.close(handle)
        self.path = Path(name)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.path.chmod(0o666 & ~_umask())
            self.path.replace(self._where)
        else:
            self.path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_npz(rows: _Rows, where: Path) -> list[Path]:
    """`embeddings`, `listfiles` with the ids, and an array for each column."""
    if taken := [name for name in rows.columns if name in ("embeddings", "listfiles")]:
        raise SpecError(f"columns: an NPZ has an array {taken[0]!r} of its own; leave it out")
    with _Draft(where) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "embeddings") as out:
            _put_vectors(out, len(rows), rows.dim, rows.dtype, (v for _, v in rows.read()))
        with _member(archive, "listfiles") as out:
            _put_texts(out, len(rows), lambda: rows.texts(ROW_ID))
        for column in rows.columns:
            with _member(archive, column) as out:
                _put_column(out, rows, column)
    return [where]


def _write_splits(rows: _Rows, where: Path, label: str, split: str) -> list[Path]:
    """`X_` and `y_` for each split, labels as places among `class_names` (-1 for none), and
    `listfiles_` with the ids.
    """
    splits: dict[str, int] = {}
    classes: set[str] = set()
    for names, labels in zip(rows.texts(split), rows.texts(label), strict=True):
        for name in names:
            splits[name or ""] = splits.get(name or "", 0) + 1
        classes.update(label for label in labels if label is not None)
    place = {name: i for i, name in enumerate(sorted(classes))}
    if bad := [name for name in splits if not name.isidentifier()]:
        raise SpecError(f"split: {split} holds {bad[0]!r}, which can be no part of an array's name")
    both = _Rows(rows.table, rows.version, rows.card, rows.column, (label, split), rows.dim,
                 rows.dtype)  # fmt: skip

    def of(name: str) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        for some, vectors in both.read():
            mine = pc.equal(some[split].cast(pa.string()).fill_null(""), name)
            yield some.filter(mine), vectors[np.asarray(mine, dtype=np.bool_)]

    with _Draft(where) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        for name, num in splits.items():
            with _member(archive, f"X_{name}") as out:
                _put_vectors(out, num, rows.dim, rows.dtype, (v for _, v in of(name)))
            with _member(archive, f"y_{name}") as out:
                npy.write_array_header_1_0(out, _header((num,), np.dtype(np.int64)))
                for some, _ in of(name):
                    codes = [-1 if v is None else place[str(v)] for v in some[label].to_pylist()]
                    out.write(np.array(codes, dtype=np.int64).tobytes())
            with _member(archive, f"listfiles_{name}") as out:
                ids = functools.partial(_ids_of, of, name)
                _put_texts(out, num, ids)
        with _member(archive, "class_names") as out:
            _put_texts(out, len(place), lambda: [sorted(classes)])
    return [where]


def _ids_of(of: Callable[[str], Iterator[tuple[pa.Table, Any]]], split: str) -> Iterator[list[str]]:
    for some, _ in of(split):
        yield some[ROW_ID].to_pylist()


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    descr = npy.dtype_to_descr(dtype)
    return {"descr": descr, "fortran_order": False, "shape": shape}


def _put_vectors(
    out: IO[bytes], num: int, dim: int, dtype: np.dtype[Any], vectors: Iterator[npt.NDArray[Any]]
) -> None:
    npy.write_array_header_1_0(out, _header((num, dim), dtype))
    for some in vectors:
        out.write(np.ascontiguousarray(some, dtype).tobytes())


def _put_texts(out: IO[bytes], num: int, texts: Callable[[], Any]) -> None:
    """Texts as numpy has them, all as long as the longest, and empty for none; they are looked
    through twice.
    """
    longest = 1
    for some in texts():
        longest = max(longest, *(len(text or "") for text in some), 1)
        if odd := [text for text in some if text and text.endswith("\0")]:
            raise SpecError(
                f"{odd[0]!a:.40} ends in a NUL, which NumPy drops; --to parquet keeps it"
            )
    if num * longest * 4 > _MAX_TEXT_BYTES:
        raise SpecError(
            f"columns: NumPy makes all texts as long as the longest, of {longest:,} characters: "
            "leave that column out (--columns), or write it --to parquet"
        )
    dtype = np.dtype(f"<U{longest}")
    npy.write_array_header_1_0(out, _header((num,), dtype))
    for some in texts():
        for start in range(0, len(some), _TEXTS_AT_ONCE):
            few = [text or "" for text in some[start : start + _TEXTS_AT_ONCE]]
            out.write(np.array(few, dtype).tobytes())


def _put_column(out: IO[bytes], rows: _Rows, column: str) -> None:
    """Numbers as they are where none is missing, anything else as texts."""
    type_ = rows.table.schema().field(column).type
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_)
    if not is_number or _has_null(rows, column):
        _put_texts(out, len(rows), lambda: rows.texts(column))
        return
    dtype = np.dtype(type_.to_pandas_dtype())
    npy.write_array_header_1_0(out, _header((len(rows),), dtype))
    for part in rows.table.rows.parts(rows.version):
        out.write(rows.table.read_part(part, [column])[column].to_numpy().astype(dtype).tobytes())


def _has_null(rows: _Rows, column: str) -> bool:
    parts = rows.table.rows.parts(rows.version)
    return any(rows.table.read_part(part, [column])[column].null_count for part in parts)


def _write_npy(rows: _Rows, where: Path) -> list[Path]:
    """The vectors; their ids beside them."""

    def write(draft: Path) -> None:
        with draft.open("wb") as out:
            _put_vectors(out, len(rows), rows.dim, rows.dtype, (v for _, v in rows.read()))

    return _write_both(rows, where, write)


def _write_both(rows: _Rows, where: Path, write: Callable[[Path], None]) -> list[Path]:
    """Vectors and the file of their ids: at no time one of them with another one's."""
    beside = ids_beside(str(where))
    with _Draft(where) as draft, _Draft(beside) as ids:
        write(draft)
        with ids.open("wb") as out:
            _put_texts(out, len(rows), lambda: rows.texts(ROW_ID))
        where.unlink(missing_ok=True)
    return [where, beside]


def _tables(rows: _Rows) -> Iterator[pa.Table]:
    for some, vectors in rows.read():
        flat = pa.array(np.ascontiguousarray(vectors, rows.dtype).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, rows.dim)
        yield some.append_column(rows.column, column).combine_chunks()


def _write_parquet(rows: _Rows, where: Path) -> list[Path]:
    with _Draft(where) as draft:
        tables = _tables(rows)
        first = next(tables)
        with pq.ParquetWriter(draft, first.schema, compression="zstd", use_dictionary=False) as out:
            out.write_table(first)
            for table in tables:
                out.write_table(table)
    return [where]


def _write_hf(rows: _Rows, where: Path) -> list[Path]:
    """As `datasets.load_from_disk` takes it."""
    import datasets

    _check_folder(where)
    with tempfile.TemporaryDirectory(prefix=f".{where.name}.", dir=where.absolute().parent) as name:
        kept = Path(name) / "rows.parquet"
        _write_parquet(rows, kept)
        with _no_bars(datasets):
            made = datasets.Dataset.from_parquet(str(kept), cache_dir=f"{name}/cache")
            made.save_to_disk(f"{name}/saved")
        Path(f"{name}/saved").replace(where)
    return [where]


@contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    had_bars = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _write_lance(rows: _Rows, where: Path) -> list[Path]:
    lance = extra("lance", "lance", str(where))
    _check_folder(where)
    tables = _tables(rows)
    first = next(tables)

    def batches() -> Iterator[pa.RecordBatch]:
        yield from first.to_batches()
        for table in tables:
            yield from table.to_batches()

    draft = where.with_name(f".{where.name}.half")
    shutil.rmtree(draft, ignore_errors=True)
    lance.write_dataset(batches(), str(draft), schema=first.schema)
    draft.replace(where)
    return [where]


def _check_folder(where: Path) -> None:
    if where.exists():
        raise SpecError(f"{where}: is there already; give a folder that is not")


def _write_faiss(rows: _Rows, where: Path) -> list[Path]:
    """A flat index of inner products, numbered from 0 in the order of the ids beside it."""
    faiss = extra("faiss", "faiss", str(where))
    index = faiss.IndexFlatIP(rows.dim)
    for _, vectors in rows.read():
        index.add(np.ascontiguousarray(vectors, np.float32))
    return _write_both(rows, where, lambda draft: faiss.write_index(index, str(draft)))


_WRITE: dict[str, Callable[[_Rows, Path], list[Path]]] = {
    "npz": _write_npz,
    "npy": _write_npy,
    "parquet": _write_parquet,
    "hf": _write_hf,
    "lance": _write_lance,
    "faiss": _write_faiss,
}
