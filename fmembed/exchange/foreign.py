"""Vectors that somebody else has made, as they lie in files: NPZ, NPY, Parquet, a Hugging Face
dataset on disk, Lance, faiss.

They are read some rows at a time, whatever their number, and nothing in them is executed: an array
of Python objects, which is a pickle, is refused. Two layouts of an NPZ are known: `embeddings`, and
`listfiles` where there are names; or `X_train`, `y_train`, `X_test`, `y_test` and whatever other
splits there are, with `class_names` where labels are numbers.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

from fmembed.errors import SourceError, SpecError, reason
from fmembed.rows.columns import CONTENT_HASH, NUM_UNITS, RESERVED, ROW_ID, TRUNCATED
from fmembed.sources.types import UnstorableError, stored_type

FORMATS = ("npz", "npy", "parquet", "hf", "lance", "faiss")
LABEL, SPLIT = "label", "split"
# Names that others give to a column of ids, in the order in which they are looked for.
_IDS = (ROW_ID, "id", "listfiles")
_VECTORS = ("embedding", "embeddings", "vector", "vectors")
# Of a table's own columns those that are made anew.
_OURS = (ROW_ID, CONTENT_HASH, NUM_UNITS, TRUNCATED)
_BROKEN = (
    ValueError, OSError, pa.ArrowException, zipfile.BadZipFile, EOFError, RuntimeError,
    OverflowError, KeyError, IndexError,
)  # fmt: skip
# What pandas adds of its own.
_INDEX = re.compile(r"__index_level_\d+__")
# What is read at once.
_BATCH_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Batch:
    """Some rows: ids, None where they have none, or a row has none; vectors (rows, dim) as they
    are; and columns.
    """

    ids: list[str | None] | None
    vectors: npt.NDArray[Any]
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class Foreign:
    """A file of vectors.

    `dtype` is that of its numbers; `columns` what stands beside them, by the types that a table
    keeps them in; `left_out` is what else there is; `read` begins anew each time.
    """

    path: str
    format: str
    num_rows: int
    dim: int
    dtype: np.dtype[Any]
    columns: Mapping[str, pa.DataType]
    read: Callable[[], Iterator[Batch]]
    left_out: tuple[str, ...] = ()


def open_foreign(path: str, column: str | None = None, ids: str | None = None) -> Foreign:
    """Open a file of vectors, or a folder of a dataset.

    Args:
        path: Where.
        column: Which column, or array, holds the vectors; found where there is one.
        ids: Which holds the ids; `row_id`, `id` or `listfiles`, if none.

    Raises:
        SourceError: It is none of these, or holds no vectors, or Python objects.
        SpecError: `column` or `ids` is not in it.
    """
    path = str(Path(path).expanduser())
    found = format_of(path)
    with _reading(path, found):
        opened = _OPEN[found](path, column, ids)

    def read() -> Iterator[Batch]:
        with _reading(path, found):
            yield from opened.read()

    return replace(opened, read=read)


@contextlib.contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    """What libraries raise of a file that is broken, or none of its kind, in a line."""
    try:
        yield
    except FileNotFoundError as e:
        raise SourceError(f"{e.filename or path}: {reason(e)}") from None
    except _BROKEN as e:
        raise SourceError(f"{path}: cannot be read as {kind}: {reason(e)}") from None


def is_foreign(path: str | Path) -> bool:
    """Whether this is a file of vectors, or a folder of them, and so no table."""
    where = Path(path)
    is_folder = where.is_dir() and not (where / "_delta_log").is_dir()
    try:
        return (where.is_file() or is_folder) and bool(format_of(str(path)))
    except SourceError:
        return False


def with_lines(found: Foreign, ids: str | None, label: str | None) -> Foreign:
    """The same with ids or labels of a file of texts, one a line.

    Raises:
        SourceError: It has not as many lines as there are rows.
    """
    lines = {name: _read_lines(given, found) for name, given in ((ROW_ID, ids), (LABEL, label))
             if given is not None}  # fmt: skip

    def read() -> Iterator[Batch]:
        start = 0
        for batch in found.read():
            end = start + len(batch.vectors)
            some = {name: texts[start:end] for name, texts in lines.items()}
            columns = {**batch.columns}
            if LABEL in some:
                columns[LABEL] = pa.array(some[LABEL], pa.string())
            yield Batch(some.get(ROW_ID, batch.ids), batch.vectors, columns)
            start = end

    types = {**found.columns, **({LABEL: pa.string()} if label is not None else {})}
    return replace(found, columns=types, read=read)


def _read_lines(path: str, found: Foreign) -> list[str | None]:
    """The texts of a file, None for an empty line."""
    try:
        raw = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise SourceError(f"{path}: {why}; give a file of texts, one a line") from None
    lines = [line.removesuffix("\r") or None for line in raw.split("\n")]
    if lines[-1] is None:
        lines.pop()
    if len(lines) != found.num_rows:
        raise SourceError(f"{path}: has {len(lines):,} lines; {found.path} {found.num_rows:,} rows")
    return lines


def format_of(path: str) -> str:
    """Which of FORMATS a path is named as.

    Raises:
        SourceError: None.
    """
    where = Path(path)
    marks = ("state.json", "dataset_info.json", "dataset_dict.json")
    if any((where / mark).is_file() for mark in marks):
        return "hf"
    suffix = suffix_of(path)
    if suffix not in FORMATS:
        raise SourceError(
            f"{path}: takes a file of vectors (.npz, .npy, .parquet, .faiss), or a folder that "
            "datasets or Lance has saved (.lance)"
        )
    return suffix


def suffix_of(path: str) -> str:
    """What a path's end says of its format."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return {"pq": "parquet", "index": "faiss"}.get(suffix, suffix)


class _Array:
    """An array in a file, read from its beginning to its end and never whole."""

    def __init__(self, name: str, open_: Callable[[], AbstractContextManager[IO[bytes]]]) -> None:
        self.name, self._open = name, open_
        with open_() as handle:
            self.shape, self._is_fortran, self._stored = _read_header(handle)
        # As this machine has it.
        self.dtype = self._stored.newbyteorder("=")
        if self.dtype.hasobject:
            raise SourceError(
                f"{name}: holds Python objects, which are a pickle and may run code; save it as an "
                "array of numbers or of texts (astype(str))"
            )
        if self._is_fortran and len(self.shape) > 1:
            raise SourceError(f"{name}: is saved column by column; save np.ascontiguousarray of it")

    def read(self, num_rows: int) -> Iterator[npt.NDArray[Any]]:
        """So many rows at a time."""
        each = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with self._open() as handle:
            _read_header(handle)
            for start in range(0, self.shape[0], num_rows):
                num = min(num_rows, self.shape[0] - start)
                content = handle.read(num * each)
                if len(content) < num * each:
                    raise SourceError(f"{self.name}: ends after {start:,} rows and some bytes")
                rows = np.frombuffer(content, self._stored).astype(self.dtype, copy=False)
                yield rows.reshape(num, *self.shape[1:])


def _read_header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(handle)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(handle)
    return found


def _open_npz(path: str, column: str | None, ids: str | None) -> Foreign:
    with zipfile.ZipFile(path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]

    def member(name: str) -> _Array:
        return _Array(f"{path}: {name}", lambda: _open_member(path, f"{name}.npy"))

    splits = [n.removeprefix("X_") for n in names if n.startswith("X_")]
    if column is None and splits and not set(_VECTORS) & set(names):
        if ids is not None:
            raise SpecError(f"ids: {path} is in splits, whose ids are listfiles_{splits[0]}, ...")
        return _open_splits(path, splits, names, member)
    vectors = member(_choose("column", column, _VECTORS, names, path))
    _check_matrix(vectors)
    others = {n: member(n) for n in names if n != vectors.name.rpartition(": ")[2]}
    beside = {n: a for n, a in others.items() if a.shape == vectors.shape[:1] and _is_column(a)}
    named = _find("ids", ids, _IDS, list(beside), path)
    found = _of_arrays(path, "npz", vectors, beside, named)
    return replace(found, left_out=tuple(n for n in others if n not in beside))


@contextlib.contextmanager
def _open_member(path: str, name: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as handle:
        yield handle


def _open_splits(
    path: str, splits: list[str], names: list[str], member: Callable[[str], _Array]
) -> Foreign:
    """The layout that has an array of vectors and one of labels for each split."""
    parts = {split: member(f"X_{split}") for split in splits}
    labels = {split: member(f"y_{split}") for split in splits if f"y_{split}" in names}
    for split, array in parts.items():
        _check_matrix(array)
        if split in labels and labels[split].shape != array.shape[:1]:
            raise SourceError(
                f"{path}: y_{split} has the shape {labels[split].shape}, and X_{split} has "
                f"{array.shape[0]:,} rows; a label a row is needed"
            )
    dims = {array.shape[1] for array in parts.values()}
    dtypes = {array.dtype for array in parts.values()}
    if len(dims) > 1 or len(dtypes) > 1:
        raise SourceError(f"{path}: its X_ arrays are of unlike lengths of vectors, or types")
    beside = {s: member(f"listfiles_{s}") for s in splits if f"listfiles_{s}" in names}
    for split, array in beside.items():
        if array.shape != parts[split].shape[:1]:
            raise SourceError(f"{path}: listfiles_{split} has not an id for each row of X_{split}")
    classes = None
    if "class_names" in names:
        array = member("class_names")
        if len(array.shape) != 1 or not array.shape[0]:
            raise SourceError(f"{path}: class_names has the shape {array.shape}; takes a name each")
        told_names = np.concatenate(list(array.read(10_000)))
        classes = [_as_text(name, "class_names", path) for name in told_names.tolist()]

    def read() -> Iterator[Batch]:
        for split, array in parts.items():
            num = _rows_at_once(array)
            told = labels[split].read(num) if split in labels else iter(())
            files = beside[split].read(num) if split in beside else iter(())
            start = 0
            for vectors in array.read(num):
                rows, own = next(told, None), next(files, None)
                named = None if rows is None else _names(rows, classes, f"{path}: y_{split}")
                numbered = [f"{split}#{i}" for i in range(start, start + len(vectors))]
                yield Batch(
                    _as_ids(numbered if own is None else own.tolist(), path),
                    vectors,
                    {
                        LABEL: pa.nulls(len(vectors), pa.string()) if named is None else named,
                        SPLIT: pa.array([split] * len(vectors)),
                    },
                )
                start += len(vectors)

    num_rows = sum(array.shape[0] for array in parts.values())
    columns = {LABEL: pa.string(), SPLIT: pa.string()}
    return Foreign(path, "npz", num_rows, dims.pop(), dtypes.pop(), columns, read)


def _names(labels: npt.NDArray[Any], classes: list[str] | None, where: str) -> pa.Array:
    """Labels as texts; numbers are places among the names of classes, where there are some, and -1
    is none.
    """
    if classes is None:
        return pa.array([_as_text(label, "labels", where) for label in labels.tolist()])
    if labels.dtype.kind not in "iufb":
        return pa.array([_as_text(label, "labels", where) for label in labels.tolist()])
    places = labels.astype(np.int64)
    wrong = labels[(places != labels) | (places < -1) | (places >= len(classes))]
    if len(wrong):
        raise SourceError(f"{where}: names class {wrong[0]}; class_names has {len(classes)}")
    return pa.array([None if i < 0 else classes[i] for i in places.tolist()], pa.string())


def _as_text(value: Any, what: str, path: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise SourceError(f"{path}: {what} hold bytes that are no UTF-8") from None
    return str(value)


def _as_ids(values: list[Any], path: str) -> list[str | None]:
    """Ids as texts: texts, bytes of UTF-8 and whole numbers; None stays."""
    for value in values:
        is_id = value is None or isinstance(value, str | bytes | int)
        if not is_id or isinstance(value, bool):
            raise SourceError(
                f"{path}: its ids hold {value!r:.40}, of type {type(value).__name__}; takes texts "
                "or whole numbers (--ids NAME names another column)"
            )
    return [None if value is None else _as_text(value, "ids", path) for value in values]


def _open_npy(path: str, column: str | None, ids: str | None) -> Foreign:
    if column is not None:
        raise SpecError(f"column: {path} is one array, and has no columns")
    vectors = _open_array(Path(path))
    _check_matrix(vectors)
    beside = {}
    lies = Path(ids) if ids is not None else ids_beside(path)
    if ids is not None or lies.is_file():
        beside["ids"] = _open_array(lies)
        if beside["ids"].shape != vectors.shape[:1]:
            raise SourceError(
                f"{lies}: has {beside['ids'].shape} ids for {vectors.shape[0]:,} rows"
            )
    return _of_arrays(path, "npy", vectors, beside, "ids" if beside else None)


def _open_array(where: Path) -> _Array:
    def open_() -> IO[bytes]:
        return where.open("rb")

    return _Array(str(where), open_)


def ids_beside(path: str) -> Path:
    """Where the ids of a file lie that has no room for them."""
    return Path(f"{path}.ids.npy")


def _of_arrays(
    path: str, kind: str, vectors: _Array, beside: Mapping[str, _Array], ids: str | None
) -> Foreign:
    def read() -> Iterator[Batch]:
        num = _rows_at_once(vectors)
        streams = {name: array.read(num) for name, array in beside.items()}
        for rows in vectors.read(num):
            found = {name: next(stream) for name, stream in streams.items()}
            named = None if ids is None else _as_ids(found[ids].tolist(), path)
            columns = {n: _to_arrow(found[n], n, path) for n in types}
            yield Batch(named, rows, columns)

    types = {n: _type_of(a.dtype) for n, a in beside.items() if n != ids}
    return Foreign(path, kind, vectors.shape[0], vectors.shape[1], vectors.dtype, types, read)


def _is_column(array: _Array) -> bool:
    return array.dtype.kind in "USbiufM"


def _type_of(dtype: np.dtype[Any]) -> pa.DataType:
    return pa.string() if dtype.kind in "US" else pa.from_numpy_dtype(dtype)


def _to_arrow(values: npt.NDArray[Any], name: str, path: str) -> pa.Array:
    if values.dtype.kind in "US":
        return pa.array([_as_text(v, name, path) for v in values.tolist()], pa.string())
    return pa.array(values)


def _rows_at_once(array: _Array) -> int:
    return max(_BATCH_BYTES // (array.shape[1] * array.dtype.itemsize), 1)


def _check_matrix(array: _Array) -> None:
    if len(array.shape) != 2 or not array.shape[1]:
        raise SourceError(f"{array.name}: has the shape {array.shape}; takes rows of vectors")


def _open_parquet(path: str, column: str | None, ids: str | None) -> Foreign:
    with pq.ParquetFile(path) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(20_000)

    return _of_arrow(path, "parquet", schema, num_rows, batches, column, ids)


def _open_hf(path: str, column: str | None, ids: str | None) -> Foreign:
    import datasets

    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        raise SourceError(f"{path}: has splits: {', '.join(loaded)}; give the folder of one")
    dataset = loaded.with_format("arrow")

    def batches() -> Iterator[pa.RecordBatch]:
        for table in dataset.iter(20_000):
            yield from table.combine_chunks().to_batches()

    return _of_arrow(path, "hf", dataset.features.arrow_schema, len(dataset), batches, column, ids)


def _open_lance(path: str, column: str | None, ids: str | None) -> Foreign:
    lance = extra("lance", "lance", path)
    dataset = lance.dataset(path)
    return _of_arrow(
        path, "lance", dataset.schema, dataset.count_rows(),
        lambda: dataset.to_batches(batch_size=20_000, batch_readahead=1, fragment_readahead=1),
        column, ids,
    )  # fmt: skip


def _open_faiss(path: str, column: str | None, ids: str | None) -> Foreign:
    if column is not None:
        raise SpecError(f"column: {path} is an index, and has no columns")
    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such file")
    faiss = extra("faiss", "faiss", path)
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    inner = faiss.downcast_index(index.index) if hasattr(index, "id_map") else index
    if not isinstance(inner, faiss.IndexFlat):
        raise SourceError(
            f"{path}: is no flat index ({type(inner).__name__}), and may hold no more than what is "
            "near a vector; give a flat one"
        )
    lies = Path(ids) if ids is not None else ids_beside(path)
    named = _open_array(lies) if ids is not None or lies.is_file() else None
    if named is not None and named.shape != (index.ntotal,):
        raise SourceError(f"{lies}: has {named.shape} ids for {index.ntotal:,} vectors")

    def read() -> Iterator[Batch]:
        num = max(_BATCH_BYTES // (4 * index.d), 1)
        stream = named.read(num) if named is not None else iter(())
        for start in range(0, index.ntotal, num):
            vectors = inner.reconstruct_n(start, min(num, index.ntotal - start))
            found = next(stream, None)
            yield Batch(None if found is None else _as_ids(found.tolist(), path), vectors, {})

    return Foreign(path, "faiss", index.ntotal, index.d, np.dtype(np.float32), {}, read)


def extra(module: str, extra: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise SourceError(f"{path}: needs the extra: pip install 'fmembed[{extra}]'") from None


def _of_arrow(
    path: str,
    kind: str,
    schema: pa.Schema,
    num_rows: int,
    batches: Callable[[], Iterable[pa.RecordBatch]],
    column: str | None,
    ids: str | None,
) -> Foreign:
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise SourceError(f"{path}: has two columns {twice[0]!r}; give them names of their own")
    lists = [f.name for f in schema if _is_vector(f.type)]
    held = _choose("column", column, _VECTORS, lists, path)
    named = _find("ids", ids, _IDS, [n for n in schema.names if n != held], path)
    beside = [f for f in schema if f.name not in (held, named)]
    kept = [
        f for f in beside
        if f.name not in _OURS and not _is_vector(f.type) and not _INDEX.fullmatch(f.name)
    ]  # fmt: skip
    types = {f.name: f.type for f in kept}
    is_ours = named == ROW_ID
    dtype = np.dtype(schema.field(held).type.value_type.to_pandas_dtype())
    dim = next((_matrix(b.column(held), path, held).shape[1] for b in batches() if b.num_rows), 0)
    if not dim:
        raise SourceError(f"{path}: there is no row in it")

    def read() -> Iterator[Batch]:
        for batch in batches():
            if not batch.num_rows:
                continue
            vectors = _matrix(batch.column(held), path, held)
            found = None if named is None else _as_ids(batch.column(named).to_pylist(), path)
            yield Batch(found, vectors, {name: batch.column(name) for name in types})

    # A part of our own export is made anew, and not left out.
    left = tuple(f.name for f in beside if f not in kept and not (is_ours and f.name in _OURS))
    return Foreign(path, kind, num_rows, dim, dtype, types, read, left)


def _is_vector(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_of(type_) for is_of in kinds) and pa.types.is_floating(type_.value_type)


def _matrix(column: pa.Array, path: str, name: str) -> npt.NDArray[Any]:
    """A column of lists as an array, shape (rows, dim)."""
    if column.null_count:
        raise SourceError(f"{path}: {name} holds rows without a vector; leave them out")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(flat.reshape(-1, column.type.list_size))
    lengths = np.diff(column.offsets.to_numpy())
    if len(set(lengths.tolist())) > 1:
        raise SourceError(f"{path}: {name} holds vectors of unlike lengths, {lengths.min()} to "
                          f"{lengths.max()}")  # fmt: skip
    return np.asarray(flat.reshape(len(column), -1))


def _choose(what: str, given: str | None, usual: Iterable[str], names: list[str], path: str) -> str:
    """The column that is meant: the one that is given, a usual one, or the only one."""
    found = _find(what, given, usual, names, path)
    if found is not None:
        return found
    if len(names) == 1:
        return names[0]
    have = ", ".join(names[:20]) or "none that holds vectors"
    raise SourceError(f"{path}: which column holds the vectors? --column NAME; it has {have}")


def _find(
    what: str, given: str | None, usual: Iterable[str], names: list[str], path: str
) -> str | None:
    if given is not None and given not in names:
        have = ", ".join(names[:20]) or "none"
        raise SpecError(f"{what}: no {given!r} in {path}; it has {have}")
    return given or next((name for name in usual if name in names), None)


def take(found: Foreign, names: Iterable[str] | None) -> Foreign:
    """The same with some of its columns, or all, in the types that a table keeps them in.

    Args:
        found: A file.
        names: Of columns.

    Raises:
        SpecError: There is no such column.
        SourceError: A table has no room for one.
    """
    chosen = list(found.columns) if names is None else list(dict.fromkeys(names))
    if absent := [name for name in chosen if name not in found.columns]:
        have = ", ".join(found.columns) or "none"
        raise SpecError(f"columns: no {absent[0]!r} in {found.path}; it has {have}")
    other = "leave it out: --columns names others"
    if taken := [n for n in chosen if n.lower() in RESERVED or n.startswith("_")]:
        raise SourceError(f"{found.path}: a table has a column {taken[0]!r} of its own; {other}")
    lower = [name.lower() for name in chosen]
    if alike := [name for name in chosen if lower.count(name.lower()) > 1]:
        raise SourceError(
            f"{found.path}: a table does not tell the columns {alike[0]} and {alike[1]} apart; "
            f"{other}"
        )
    types = {}
    for name in chosen:
        try:
            types[name] = stored_type(found.columns[name])
        except UnstorableError as e:
            raise SourceError(
                f"{found.path}: a table has no type for the column {name} ({e}); {other}"
            ) from None

    def read() -> Iterator[Batch]:
        for batch in found.read():
            columns = {n: _as_type(batch.columns[n], n, found.path, t) for n, t in types.items()}
            yield replace(batch, columns=columns)

    return replace(found, columns=types, read=read)


def _as_type(values: pa.Array, name: str, path: str, type_: pa.DataType) -> pa.Array:
    try:
        return values if values.type == type_ else values.cast(type_)
    except pa.ArrowException as e:
        raise SourceError(
            f"{path}: the column {name} does not fit into a table: {reason(e)}; leave it out: "
            "--columns names others"
        ) from None


_OPEN: dict[str, Callable[[str, str | None, str | None], Foreign]] = {
    "npz": _open_npz,
    "npy": _open_npy,
    "parquet": _open_parquet,
    "hf": _open_hf,
    "lance": _open_lance,
    "faiss": _open_faiss,
}
