"""A shard of a source -> canonical rows (rows.row_schema), whatever the format.

Parsing is ours, because one bad input fails Ray's typed readers: here a bad file, line or value
becomes a rejected row and everything around it is kept.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmembed.rows import (
    ERROR,
    MESSAGE,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    RowIds,
    clean_message,
    keys_of,
    row_schema,
)
from fmembed.spec import Format, Modality, SourceError, SourceSpec
from fmembed.storage import reason

# Formats where each file is a row.
FOLDERS = ("text_folder", "image_folder", "audio_folder")
SAVED_DATASET = ("state.json", "dataset_dict.json")
_CHUNK_ROWS = 1000
# A table of this size is handed on, however few its rows: a sound may be a hundred megabytes.
_CHUNK_BYTES = 16 * 2**20
_SAMPLE_ROWS = 10_000
_SAMPLED_TAR_ROWS = 10
_MAX_MEMBER_BYTES = 2**30
_FETCH_THREADS = 16

# Where a fetched file's content stands in its row, beside the path it was found by.
_FETCHED: Any = object()

# One row as a reader hands it over: its fallback id, and its columns or (error, message).
RawRow = tuple[str, dict[str, Any] | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class File:
    """A file: where it is, and the name that row ids carry (relative to the source's root).

    `revision` is what storage says of its content: an entity tag, else the time of its last change.
    """

    path: str
    name: str
    size: int
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """What one read task reads: files, one file's part, or a saved dataset's part.

    `start` and `stop` are row groups of a Parquet file, rows of a saved dataset, or shards of a
    streamed one; None means all. `first_row` numbers the first row of a Parquet shard. `num_rows`
    is None where only reading tells. `key` changes when the content does: a shard whose key is on
    record as committed is not read again; None where storage does not tell of changes, or where
    each file is a row and its id is enough.
    """

    files: tuple[File, ...] = ()
    start: int | None = None
    stop: int | None = None
    first_row: int = 0
    num_rows: int | None = None
    key: str | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class Source:
    """A source that was found, listed and checked.

    The shards stay on the driver: a task gets its own one, and the rest `without_shards`. `root` is
    the filesystem, and the folder in it, below which the input column's paths are.
    """

    spec: SourceSpec
    format: Format
    fs: Any
    shards: tuple[Shard, ...]
    carried: pa.Schema
    modality: Modality = "text"
    root: tuple[Any, str] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are stored."""
        return sum(f.size for shard in self.shards for f in shard.files)

    @property
    def without_shards(self) -> Source:
        """What reading a shard takes besides the shard."""
        return replace(self, shards=())

    @property
    def num_rows(self) -> int | None:
        """Rows in the shards where that is known without reading them, else None."""
        counts = [shard.num_rows for shard in self.shards]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def file_is_row(self) -> bool:
        """Whether each file is one row, so that its id is known without reading it."""
        return self.format in FOLDERS


def read_shard(
    source: Source, shard: Shard, index: int, committed: RowIds | None = None
) -> Iterator[pa.Table]:
    """Read one shard: tables of up to 1,000 canonical rows, rejected ones among them, and the
    marker row that ends it.

    Args:
        source: What the shard belongs to; its own shards are not looked at.
        shard: What to read.
        index: Which of the source's shards it is, for the rows to say.
        committed: Rows to leave out.
    """
    schema = row_schema(source.carried, source.modality)
    num_rows = num_skipped = 0
    rows: Iterator[RawRow] = itertools.islice(_read_to_the_end(source, shard), shard.max_rows)
    if source.root is not None:
        rows = _fetch(source, rows, source.root)
    for chunk in _chunks(source, rows):
        table = _canonical(source, chunk, index, schema)
        num_rows += table.num_rows
        if committed is not None:
            done = committed.contains(keys_of(table["row_id"].to_pylist()))
            num_skipped += int(done.sum())
            table = table.filter(pa.array(~done))
        if table.num_rows:
            yield table
    marker = {SHARD: index, TOTAL: num_rows, SKIPPED: num_skipped}
    yield pa.Table.from_pylist([marker], schema=schema)


def _read_to_the_end(source: Source, shard: Shard) -> Iterator[RawRow]:
    """Read; what breaks off becomes a rejected row with its cause, and what came before stays.

    Decompressors and parsers raise what they like (zlib.error, zipfile.BadZipFile, ...), so there
    is no list of what to expect.
    """
    if source.format == "hf":
        parts = [(source.spec.hf.split or "data", _read_hf(source, shard))]
    else:
        parts = [(f.name, _READERS[source.format](source, shard, f)) for f in shard.files]
    for name, rows in parts:
        num_rows = 0
        try:
            for row in rows:
                yield row
                num_rows += 1
        except Exception as e:
            error, message = _unreadable(e)
            # Two dots: lines that were left blank have numbers too, so a plain one may be taken.
            row_id = f"{name}#{shard.first_row + num_rows}.." if num_rows or shard.start else name
            yield row_id, (error, f"from row {num_rows} on: {message}" if num_rows else message)


def _chunks(source: Source, rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    num_bytes = 0
    for row_id, row in rows:
        chunk.append((row_id, row))
        if isinstance(row, dict):
            value = row.get(_FETCHED, row.get(source.spec.input))
            if isinstance(value, dict):  # a `datasets` Image or Audio
                value = value.get("bytes")
            num_bytes += len(value) if isinstance(value, str | bytes) else 0
        if len(chunk) == _CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _fetch(source: Source, rows: Iterator[RawRow], root: tuple[Any, str]) -> Iterator[RawRow]:
    """Put the content in place of the paths; a file that cannot be read is its own row's fate."""
    fs, folder = root
    column = source.spec.input

    def fetch(item: RawRow) -> RawRow:
        row_id, row = item
        if isinstance(row, tuple) or row.get(column) is None:
            return item
        path = row[column]
        if not isinstance(path, str):
            message = f"column {column!r}: takes a path, got {type(path).__name__}"
            return row_id, {**row, _FETCHED: _BadRow("wrong type", message)}
        given = path.removeprefix((source.spec.root or "").rstrip("/") + "/")
        if given.startswith("/") or "://" in given or ".." in given.split("/") or "\\" in given:
            message = f"column {column!r}: {given[:200]!a} does not lie below source.root"
            return row_id, {**row, _FETCHED: _BadRow("outside the root", message)}
        try:
            content = fs.cat_file(f"{folder.rstrip('/')}/{given}")
        except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
            return row_id, {**row, _FETCHED: _BadRow(*_unreadable(e))}
        return row_id, {**row, _FETCHED: content}

    # Over a network most of a fetch is waiting.
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        while some := list(itertools.islice(rows, 2 * _FETCH_THREADS)):
            yield from pool.map(fetch, some)


def _canonical(source: Source, chunk: list[RawRow], shard: int, schema: pa.Schema) -> pa.Table:
    spec = source.spec
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for fallback_id, raw in chunk:
        row: dict[str, Any] = {"row_id": fallback_id}
        try:
            if isinstance(raw, tuple):
                raise _BadRow(*raw)
            if spec.id is not None:
                row["row_id"] = _row_id(raw.get(spec.id), spec.id)
            value = raw.get(_FETCHED, raw.get(spec.input))
            if isinstance(value, _BadRow):
                raise value
            if source.modality == "text":
                row["_input"], content = _text(value, spec)
                raw = {**raw, spec.input: row["_input"]}
            else:
                row["_input"] = content = _bytes(value, spec)
            for field in source.carried:
                row[field.name] = _cast(raw.get(field.name), field)
            row["content_hash"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        except _BadRow as e:
            row = {"row_id": row["row_id"], STAGE: "read", ERROR: e.error}
            row[MESSAGE] = clean_message(e.message)
        row[SHARD] = shard
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table(
        [pa.array(v, t) for v, t in zip(columns.values(), schema.types, strict=True)], schema=schema
    )


class _BadRow(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    def __init__(self, error: str, message: str) -> None:
        self.error, self.message = error, message


def _row_id(value: Any, column: str) -> str:
    if value is None or value == "":
        raise _BadRow("null id", f"column {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRow(
            "wrong type",
            f"column {column!r}: takes text or an integer as id, got {type(value).__name__}",
        )
    try:
        return str(value).encode().decode()
    except UnicodeError:
        raise _BadRow("not UTF-8", f"column {column!r}") from None


def _text(value: Any, spec: SourceSpec) -> tuple[str, bytes]:
    """The text and its raw bytes, or the reason why it cannot be embedded."""
    if value is None:
        raise _BadRow("null input", f"column {spec.input!r} is null")
    try:
        if isinstance(value, bytes):
            text, content = value.decode("utf-8", errors=spec.encoding_errors), value
        elif isinstance(value, str):
            text, content = value, value.encode()
        else:
            raise _BadRow(
                "wrong type", f"column {spec.input!r}: takes text, got {type(value).__name__}"
            )
    except UnicodeDecodeError as e:
        raise _BadRow(
            "not UTF-8",
            f"byte {e.object[e.start]:#04x} at position {e.start}; "
            "source.encoding_errors: replace or ignore would keep the row",
        ) from None
    except UnicodeEncodeError as e:
        raise _BadRow("not UTF-8", f"undecodable character at position {e.start}") from None
    if not text.strip():
        raise _BadRow("empty input", f"column {spec.input!r} holds no text")
    return text, content


def _bytes(value: Any, spec: SourceSpec) -> bytes:
    """The bytes of a picture or sound, as a column of bytes or of `datasets` Image or Audio."""
    if isinstance(value, dict):
        # Only the bytes: a path that a row names is never opened.
        value = value.get("bytes")
    if value is None:
        raise _BadRow("null input", f"column {spec.input!r} holds no bytes")
    if not isinstance(value, bytes):
        raise _BadRow(
            "wrong type", f"column {spec.input!r}: takes bytes, got {type(value).__name__}"
        )
    if not value:
        raise _BadRow("empty input", f"column {spec.input!r} holds no byte")
    return value


def _cast(value: Any, field: pa.Field) -> Any:
    if isinstance(value, bytes) and pa.types.is_string(field.type):
        value = value.decode(errors="replace").strip()
    if value is not None and pa.types.is_string(field.type) and not isinstance(value, str):
        value = json.dumps(value, default=str)
    try:
        return pa.scalar(value, field.type).as_py() if value is not None else None
    except (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError):
        raise _BadRow(
            "wrong type", f"column {field.name!r}: {str(value)[:80]!a} is no {field.type}"
        ) from None


# --- formats --------------------------------------------------------------------------------------


def _read_folder(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    row = {source.spec.input: source.fs.cat_file(file.path)}
    if source.spec.label:
        row[source.spec.label] = posixpath.basename(posixpath.dirname(file.name)) or None
    yield file.name, row


def _read_jsonl(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    with source.fs.open(file.path, "rb", compression="infer") as lines:
        for i, line in enumerate(lines):
            if i == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{file.name}#{i}", _parse_json(line, source.spec.encoding_errors)


def _parse_json(line: bytes, encoding_errors: str) -> dict[str, Any] | tuple[str, str]:
    try:
        value = json.loads(line.decode("utf-8", errors=encoding_errors))
    except UnicodeDecodeError as e:
        return "not UTF-8", f"byte {e.object[e.start]:#04x} at position {e.start} of the line"
    except (ValueError, RecursionError) as e:
        return "bad JSON", str(e)
    if not isinstance(value, dict):
        return "bad JSON", f"the line is a {type(value).__name__}, not an object"
    return value


def _read_csv(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    with _open_csv(source, file) as lines:
        reader = csv.reader(lines, delimiter=_delimiter(file), strict=True)
        header = next(reader, [])
        missing = [c for c in (source.spec.input, source.spec.id) if c and c not in header]
        if missing:
            yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        for i in itertools.count():
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as e:
                yield f"{file.name}#{i}", ("bad CSV", f"{e}, near line {reader.line_num}")
                continue
            if values and len(values) != len(header):
                message = f"{len(values)} fields where the header has {len(header)}"
                yield f"{file.name}#{i}", ("bad CSV", message)
            elif values:
                yield f"{file.name}#{i}", dict(zip(header, values, strict=True))


def _open_csv(source: Source, file: File) -> Any:
    # The module's default limit of 131,072 characters a field is below a long article.
    csv.field_size_limit(2**31 - 1)
    # Undecodable bytes become lone surrogates, which only their own row fails on later.
    chosen = source.spec.encoding_errors
    errors = "surrogateescape" if chosen == "strict" else chosen
    return source.fs.open(
        file.path, "rt", compression="infer", encoding="utf-8-sig", errors=errors, newline=""
    )


def _delimiter(file: File) -> str:
    return "\t" if ".tsv" in file.path.lower() else ","


def _read_parquet(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    spec = source.spec
    wanted = list(dict.fromkeys([c for c in (spec.id, spec.input) if c] + list(spec.columns)))
    with source.fs.open(file.path, "rb") as handle:
        parquet = pq.ParquetFile(handle)
        missing = [c for c in wanted if c not in parquet.schema_arrow.names]
        if missing:
            yield file.name, ("unreadable file", f"it has no column {missing[0]!r}")
            return
        first = shard.first_row
        stop = shard.stop if shard.stop is not None else parquet.num_row_groups
        for group in range(shard.start or 0, stop):
            num_rows = parquet.metadata.row_group(group).num_rows
            i = 0
            try:
                for batch in parquet.iter_batches(_CHUNK_ROWS, row_groups=[group], columns=wanted):
                    for row in _batch_rows(batch):
                        yield f"{file.name}#{first + i}", row
                        i += 1
            except (OSError, pa.ArrowException) as e:
                for lost in range(i, num_rows):
                    yield f"{file.name}#{first + lost}", _unreadable(e)
            first += num_rows


def _batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    # A string column may hold bytes that are no UTF-8; as binary each row is judged on its own.
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            large = pa.types.is_large_string(column.type)
            columns[name] = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _read_webdataset(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    """Samples of a tar file: members of one name, a column for each extension.

    Read as a stream: nothing is extracted, so that a member's name is never a path, and a link
    never leads anywhere.
    """
    for i, (key, members) in enumerate(_samples(source, file)):
        row: dict[str, Any] | tuple[str, str] = {"__key__": key, **members}
        for name, value in members.items():
            if isinstance(value, str):
                row = ("unreadable file", f"member {key}.{name}: {value}")
        yield f"{file.name}#{i}", row


def _samples(source: Source, file: File) -> Iterator[tuple[str, dict[str, bytes | str]]]:
    """Key and columns of each sample; a member that cannot be taken is text, saying why."""
    sample: dict[str, bytes | str] = {}
    last = ""
    with (
        source.fs.open(file.path, "rb") as raw,
        tarfile.open(fileobj=raw, mode="r|*") as archive,
    ):
        for member in archive:
            if member.isdir():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, name = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != last and sample:
                yield last, sample
                sample = {}
            last = key
            if not member.isreg():
                sample[name] = "neither a file nor a folder"
            elif member.size > _MAX_MEMBER_BYTES:
                sample[name] = f"{member.size:,} bytes, more than {_MAX_MEMBER_BYTES:,}"
            else:
                content = archive.extractfile(member)
                assert content is not None
                sample[name] = content.read()
    if sample:
        yield last, sample


def _read_hf(source: Source, shard: Shard) -> Iterator[RawRow]:
    prefix = source.spec.hf.split or "data"
    dataset = load_hf(source.spec)
    if source.spec.hf.streaming:
        for s in range(shard.start or 0, shard.stop or 0):
            piece = dataset.shard(num_shards=dataset.num_shards, index=s)
            for i, row in enumerate(piece):
                yield f"{prefix}/{s}#{i}", row
        return
    for start in range(shard.start or 0, shard.stop or 0, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, shard.stop or 0)
        batch = dataset[start:stop]
        for i, values in enumerate(zip(*batch.values(), strict=True)):
            yield f"{prefix}#{start + i}", dict(zip(batch, values, strict=True))


_READERS: dict[str, Callable[[Source, Shard, File], Iterator[RawRow]]] = {
    "text_folder": _read_folder,
    "image_folder": _read_folder,
    "audio_folder": _read_folder,
    "webdataset": _read_webdataset,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def _unreadable(error: Exception) -> tuple[str, str]:
    return "unreadable file", reason(error)


# --- what a file holds --------------------------------------------------------------------------


def file_schema(source: Source, file: File) -> pa.Schema:
    if source.format == "parquet":
        with source.fs.open(file.path, "rb") as handle:
            return pq.read_schema(handle)
    if source.format == "csv":
        # Text as it stands: a guessed integer would turn 01234 into 1234.
        with _open_csv(source, file) as lines:
            header = next(csv.reader(lines, delimiter=_delimiter(file)), [])
        return pa.schema([pa.field(c, pa.string()) for c in header])
    if source.format == "webdataset":
        samples = itertools.islice(_samples(source, file), _SAMPLED_TAR_ROWS)
        names = dict.fromkeys(name for _, members in samples for name in members)
        # What is carried beside the input (cls, txt, json) is text.
        return pa.schema([pa.field(c, pa.string()) for c in ("__key__", *names)])
    rows = itertools.islice(_read_jsonl(source, Shard(), file), _SAMPLE_ROWS)
    objects = []
    try:
        for _, row in rows:
            if isinstance(row, dict):
                objects.append(row)
    except Exception:  # the rest of the file is broken; its rows will be rejected with the cause
        if not objects:
            raise
    if not objects:
        raise ValueError("no JSON object in it")
    return _infer(objects)


def _infer(objects: list[dict[str, Any]]) -> pa.Schema:
    fields = []
    for name in dict.fromkeys(itertools.chain.from_iterable(objects)):
        try:
            type_ = pa.array([o.get(name) for o in objects]).type
        except (pa.ArrowException, UnicodeError, OverflowError):
            type_ = pa.string()
        fields.append(pa.field(name, pa.string() if pa.types.is_null(type_) else type_))
    return pa.schema(fields)


def load_hf(spec: SourceSpec) -> Any:
    """Load a dataset saved to disk, or by hub id; with one split chosen."""
    import datasets

    hf = spec.hf
    try:
        if any((Path(spec.uri) / name).exists() for name in SAVED_DATASET):
            dataset = datasets.load_from_disk(spec.uri)
            if isinstance(dataset, datasets.DatasetDict) and hf.split in dataset:
                dataset = dataset[hf.split]
            if hf.streaming and isinstance(dataset, datasets.Dataset):
                dataset = dataset.to_iterable_dataset(num_shards=1)
        else:
            dataset = datasets.load_dataset(
                spec.uri, hf.name, split=hf.split, revision=hf.revision, streaming=hf.streaming
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise SourceError(f"source.uri: cannot load dataset {spec.uri}: {reason(e)}") from None
    if isinstance(dataset, dict):
        raise SourceError(f"source.hf.split: name one of {', '.join(dataset)}")
    wanted = {c for c in (spec.id, spec.input, *spec.columns) if c}
    if dataset.features and wanted <= set(dataset.features):
        dataset = dataset.select_columns(sorted(wanted))
    for name, feature in (dataset.features or {}).items():
        # Undecoded: decoding is ours, a row at a time, and one bad picture is one rejected row.
        if isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset
