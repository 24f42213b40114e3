"""SourceSpec -> ray.data.Dataset of canonical rows (rows.row_schema).

Listing and checking happen on the driver before Ray starts; reading is Ray's (a Datasource with
one read task a shard); parsing is ours, because one bad input fails Ray's typed readers: here a
bad file, line or value becomes a rejected row and everything around it is kept.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmembed.rows import (
    ERROR,
    MESSAGE,
    RESERVED,
    SHARD,
    SKIPPED,
    STAGE,
    TOTAL,
    RowIds,
    clean_message,
    keys_of,
    row_schema,
)
from fmembed.spec import Format, Modality, SourceError, SourceSpec, redact, resolve_package
from fmembed.storage import filesystem, reason

if TYPE_CHECKING:
    import ray.data

_SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "text_folder": (".txt", ".md"),
    "image_folder": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    "audio_folder": (".wav", ".flac", ".ogg", ".mp3"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
_FOLDERS = ("text_folder", "image_folder", "audio_folder")
_SAVED_DATASET = ("state.json", "dataset_dict.json")
_CHUNK_ROWS = 1000
_SAMPLE_ROWS = 10_000
_MAX_SAMPLED_FILES = 100
_SAMPLED_TAR_ROWS = 10
_MAX_MEMBER_BYTES = 2**30
_SHARD_BYTES = 64 * 2**20
_SHARD_FILES = 512
_SHARD_ROWS = 50_000

# One row as a reader hands it over: its fallback id, and its columns or (error, message).
RawRow = tuple[str, dict[str, Any] | tuple[str, str]]


@dataclass(frozen=True)
class File:
    """A file: where it is, and the name that row ids carry (relative to the source's root).

    `revision` is what storage says of its content: an entity tag, else the time of its last change.
    """

    path: str
    name: str
    size: int
    revision: str = ""


@dataclass(frozen=True)
class Shard:
    """What one read task reads: files, or one file's part.

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


@dataclass(frozen=True)
class Source:
    """A source that was found, listed and checked."""

    spec: SourceSpec
    format: Format
    fs: Any
    shards: tuple[Shard, ...]
    carried: pa.Schema
    modality: Modality = "text"

    @property
    def num_rows(self) -> int | None:
        """Rows in the shards where that is known without reading them, else None."""
        counts = [shard.num_rows for shard in self.shards]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def file_is_row(self) -> bool:
        """Whether each file is one row, so that its id is known without reading it."""
        return self.format in _FOLDERS


def open_source(spec: SourceSpec, modality: Modality = "text") -> Source:
    """List the files and check that the named columns are there.

    Args:
        spec: The source part of the config.
        modality: What the model takes; the input column is text, or bytes of a picture or sound.

    Raises:
        SourceError: No such file, an unknown format, an absent column, a reserved name.
    """
    for column in spec.columns:
        if column in RESERVED or column.startswith("_"):
            raise SourceError(
                f"source.carry: {column!r} is a name of the table's own; rename it in the dataset"
            )
    if spec.format == "hf":
        return _open_hf(spec, modality)
    fs, root, files = _list_files(spec)
    format_ = spec.format if spec.format != "auto" else _detect_format(spec, fs, root, files)
    if format_ == "hf":
        return _open_hf(spec, modality)
    if format_ in _FOLDERS and format_ != f"{modality}_folder":
        raise SourceError(
            f"source.uri: {spec.uri} is a folder of another kind ({format_}) than the model takes, "
            f"which embeds {modality}"
        )
    if len(files) > 1 or fs.isdir(root):
        files = [f for f in files if f.path.lower().endswith(_SUFFIXES[format_])]
    if not files:
        raise SourceError(
            f"source.uri: no {format_} file ({', '.join(_SUFFIXES[format_])}) in {spec.uri}"
        )
    source = Source(spec, format_, fs, (), pa.schema([]), modality)
    if format_ in _FOLDERS:
        has_folders = any("/" in f.name for f in files)
        available = {spec.input, spec.label or "label"} if has_folders else {spec.input}
        _check_columns(spec, available)
        types = pa.schema([pa.field(c, pa.string()) for c in available])
    else:
        types = _sample_schema(source, files)
        _check_columns(spec, set(types.names))
    carried = _carried_schema(spec, types)
    shards = tuple(_plan_shards(format_, fs, files))
    if not source.file_is_row:
        shards = _with_keys(spec, shards)
    return replace(source, shards=shards, carried=carried)


def skip_committed(
    source: Source, committed: RowIds, whole_shards: Mapping[str, int]
) -> tuple[Source, int]:
    """Drop what needs no second reading, before anything is read.

    Args:
        source: What `open_source` found.
        committed: Ids of committed and rejected rows; where a file is a row its name is its id.
        whole_shards: Key to rows of the shards that are committed whole.

    Returns:
        The source without them, and the number of rows left out.
    """
    if source.file_is_row:
        if not len(committed):
            return source, 0
        files = [f for shard in source.shards for f in shard.files]
        done = committed.contains(keys_of(f.name for f in files))
        left = [f for f, is_done in zip(files, done, strict=True) if not is_done]
        shards = tuple(_plan_shards(source.format, source.fs, left))
        return replace(source, shards=shards), int(done.sum())
    rows = [whole_shards.get(shard.key or "") for shard in source.shards]
    shards = tuple(s for s, n in zip(source.shards, rows, strict=True) if n is None)
    return replace(source, shards=shards), sum(n for n in rows if n is not None)


def read(
    source: Source, committed: RowIds | None = None, num_cpus: float = 1.0
) -> ray.data.Dataset:
    """Read the shards as Ray Data blocks of `rows.row_schema(source.carried)`.

    Args:
        source: What `open_source` found.
        committed: Rows to leave out; the marker row that ends a shard says how many.
        num_cpus: What Ray reserves for a read task.
    """
    import ray
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    committed_ref = ray.put(committed) if committed is not None and len(committed) else None

    def read_fn(index: int) -> Callable[[], Iterator[pa.Table]]:
        def read_blocks() -> Iterator[pa.Table]:
            known = ray.get(committed_ref) if committed_ref is not None else None
            yield from read_shard(source, index, known)

        return read_blocks

    class Shards(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return sum(f.size for shard in source.shards for f in shard.files)

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, exec_stats=None, input_files=None
            )
            return [ReadTask(read_fn(i), unknown) for i in range(len(source.shards))]

    # With more blocks than read tasks Ray splits every block anew (67 pieces in a trial).
    shards = Shards()  # type: ignore[no-untyped-call]
    dataset: ray.data.Dataset = ray.data.read_datasource(
        shards, override_num_blocks=len(source.shards), num_cpus=num_cpus
    )
    return dataset


def read_shard(source: Source, index: int, committed: RowIds | None = None) -> Iterator[pa.Table]:
    """Read one shard: tables of up to 1,000 canonical rows, rejected ones among them, and the
    marker row that ends it.
    """
    schema = row_schema(source.carried, source.modality)
    num_rows = num_skipped = 0
    rows = _read_to_the_end(source, source.shards[index])
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
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
    num_rows = 0
    try:
        for row in _READERS[source.format](source, shard):
            yield row
            num_rows += 1
    except Exception as e:
        name = shard.files[0].name if shard.files else (source.spec.hf.split or "data")
        error, message = _unreadable(e)
        row_id = f"{name}#{shard.first_row + num_rows}" if num_rows or shard.start else name
        yield row_id, (error, f"from row {num_rows} on: {message}" if num_rows else message)


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
            value = raw.get(spec.input)
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


# --- readers: a shard -> raw rows -----------------------------------------------------------------


def _read_folder(source: Source, shard: Shard) -> Iterator[RawRow]:
    for file in shard.files:
        row: dict[str, Any] | tuple[str, str]
        try:
            row = {source.spec.input: source.fs.cat_file(file.path)}
        except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
            row = _unreadable(e)
        else:
            if source.spec.label:
                row[source.spec.label] = posixpath.basename(posixpath.dirname(file.name)) or None
        yield file.name, row


def _read_jsonl(source: Source, shard: Shard) -> Iterator[RawRow]:
    (file,) = shard.files
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


def _read_csv(source: Source, shard: Shard) -> Iterator[RawRow]:
    (file,) = shard.files
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


def _read_parquet(source: Source, shard: Shard) -> Iterator[RawRow]:
    (file,) = shard.files
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


def _read_webdataset(source: Source, shard: Shard) -> Iterator[RawRow]:
    """Samples of a tar file: members of one name, a column for each extension.

    Read as a stream: nothing is extracted, so that a member's name is never a path, and a link
    never leads anywhere.
    """
    (file,) = shard.files
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
    dataset = _load_hf(source.spec)
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


_READERS: dict[str, Callable[[Source, Shard], Iterator[RawRow]]] = {
    "text_folder": _read_folder,
    "image_folder": _read_folder,
    "audio_folder": _read_folder,
    "webdataset": _read_webdataset,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "hf": _read_hf,
}


def _unreadable(error: Exception) -> tuple[str, str]:
    return "unreadable file", reason(error)


# --- listing --------------------------------------------------------------------------------------


def _list_files(spec: SourceSpec) -> tuple[Any, str, list[File]]:
    uri = spec.uri
    if uri.startswith("package:"):
        uri = resolve_package(uri, "source.uri", SourceError)
    try:
        fs, root = filesystem(uri)
        if any(c in root for c in "*?["):
            found = fs.glob(root, detail=True)
            root = posixpath.dirname(root[: min(root.find(c) for c in "*?[" if c in root)] + "x")
        elif fs.isdir(root):
            found = fs.find(root, detail=True)
        else:
            found = {root: fs.info(root)}
            root = posixpath.dirname(root)
    except FileNotFoundError:
        raise SourceError(f"source.uri: no such file or folder: {spec.uri}") from None
    except ImportError as e:
        raise SourceError(f"source.uri: {spec.uri}: {e}") from None
    except (OSError, ValueError) as e:
        raise SourceError(f"source.uri: cannot read {spec.uri}: {reason(e)}") from None
    files = [
        File(path, posixpath.relpath(path, root), int(info.get("size") or 0), _revision(info))
        for path, info in sorted(found.items())
        if info.get("type") == "file"
    ]
    files = [f for f in files if not any(p.startswith((".", "_")) for p in f.name.split("/"))]
    if not files:
        raise SourceError(f"source.uri: no file in {spec.uri}")
    return fs, root, files


def _revision(info: Mapping[str, Any]) -> str:
    # By the names that local files, obstore, and other fsspec filesystems use.
    for name in ("e_tag", "ETag", "etag", "mtime", "last_modified", "LastModified", "updated"):
        if info.get(name) is not None:
            return str(info[name])
    return ""


def _with_keys(spec: SourceSpec, shards: Iterable[Shard], revision: str = "") -> tuple[Shard, ...]:
    """Name each shard after all that decides which rows it yields."""
    settings = spec.model_dump(mode="json", exclude={"label", "split", "carry"})
    settings["uri"] = redact(spec.uri)

    def key(shard: Shard) -> str | None:
        revisions = [f.revision for f in shard.files] or [revision]
        if not all(revisions):
            return None
        files = [(f.name, f.size, f.revision) for f in shard.files]
        content = json.dumps([settings, revision, files, shard.start, shard.stop])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    return tuple(replace(shard, key=key(shard)) for shard in shards)


def _detect_format(spec: SourceSpec, fs: Any, root: str, files: list[File]) -> Format:
    if any(f.name in _SAVED_DATASET for f in files) and fs.isdir(root):
        return "hf"
    counts = {
        name: sum(f.path.lower().endswith(suffixes) for f in files)
        for name, suffixes in _SUFFIXES.items()
    }
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise SourceError(
            f"source.format: cannot tell the format of {spec.uri}; "
            f"name one of {', '.join([*_SUFFIXES, 'hf'])}"
        )
    return best  # type: ignore[return-value]


def _check_columns(spec: SourceSpec, available: set[str]) -> None:
    named = {"source.input": spec.input, "source.id": spec.id}
    named |= {"source.label": spec.label, "source.split": spec.split}
    named |= {f"source.carry[{i}]": c for i, c in enumerate(spec.carry)}
    for field, column in named.items():
        if column is not None and column not in available:
            has = ", ".join(sorted(available)) or "none"
            raise SourceError(f"{field}: no column {column!r} in {spec.uri}; it has {has}")


def _carried_schema(spec: SourceSpec, types: pa.Schema) -> pa.Schema:
    """The carried columns' types, as near as Delta Lake can store them."""
    fields = []
    for column in spec.columns:
        type_ = types.field(column).type
        if pa.types.is_dictionary(type_):
            type_ = type_.value_type
        if pa.types.is_unsigned_integer(type_):
            type_ = pa.int64()
        elif pa.types.is_float16(type_):
            type_ = pa.float32()
        elif pa.types.is_timestamp(type_):
            type_ = pa.timestamp("us", type_.tz)
        elif pa.types.is_date(type_):
            type_ = pa.date32()
        elif pa.types.is_null(type_) or pa.types.is_large_string(type_):
            type_ = pa.string()
        fields.append(pa.field(column, type_))
    return pa.schema(fields)


def _sample_schema(source: Source, files: list[File]) -> pa.Schema:
    """The columns and types of the first file that has all that is named.

    Of the first readable one where none has, so that the message can say what there is.
    """
    named = {source.spec.input, source.spec.id, *source.spec.columns} - {None}
    first: pa.Schema | None = None
    problem = ""
    for file in files[:_MAX_SAMPLED_FILES]:
        try:
            types = _file_schema(source, file)
        except Exception as e:  # what decompressors and parsers raise, by format
            problem = f"{file.name}: {reason(e)}"
            continue
        if named <= set(types.names):
            return types
        first = types if first is None else first
        problem = problem or f"{file.name} has no row"
    if first is None or not first.names:
        raise SourceError(
            f"source.uri: no readable {source.format} file in {source.spec.uri}: {problem}"
        )
    return first


def _file_schema(source: Source, file: File) -> pa.Schema:
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
    rows = itertools.islice(_read_jsonl(source, Shard((file,))), _SAMPLE_ROWS)
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


def _plan_shards(format_: Format, fs: Any, files: list[File]) -> Iterator[Shard]:
    if format_ in _FOLDERS:
        group: list[File] = []
        for file in files:
            group.append(file)
            if len(group) == _SHARD_FILES or sum(f.size for f in group) >= _SHARD_BYTES:
                yield Shard(tuple(group), num_rows=len(group))
                group = []
        if group:
            yield Shard(tuple(group), num_rows=len(group))
    elif format_ == "parquet":
        with ThreadPoolExecutor(16) as pool:
            for shards in pool.map(lambda f: _plan_row_groups(fs, f), files):
                yield from shards
    else:
        yield from (Shard((file,)) for file in files)


def _plan_row_groups(fs: Any, file: File) -> list[Shard]:
    """Cut a Parquet file at row groups, about 64 MiB or 50,000 rows a shard."""
    try:
        with fs.open(file.path, "rb") as handle:
            metadata = pq.read_metadata(handle)
    except (OSError, pa.ArrowException):
        return [Shard((file,))]  # the read task finds the same and rejects it with its cause
    shards: list[Shard] = []
    start = first_row = num_rows = num_bytes = 0
    for i in range(metadata.num_row_groups):
        num_rows += metadata.row_group(i).num_rows
        num_bytes += metadata.row_group(i).total_byte_size
        last = i + 1 == metadata.num_row_groups
        if num_rows and (num_rows >= _SHARD_ROWS or num_bytes >= _SHARD_BYTES or last):
            shards.append(Shard((file,), start, i + 1, first_row, num_rows))
            start, first_row, num_rows, num_bytes = i + 1, first_row + num_rows, 0, 0
    return shards


def _open_hf(spec: SourceSpec, modality: Modality) -> Source:
    if Path(spec.uri).exists():  # workers have another working folder
        spec = spec.model_copy(update={"uri": str(Path(spec.uri).resolve())})
    dataset = _load_hf(spec)
    if spec.hf.streaming:
        features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
        shards = [Shard(start=i, stop=i + 1) for i in range(dataset.num_shards)]
        types = dataset.features.arrow_schema if dataset.features else None
    else:
        features, types = dataset.features, dataset.features.arrow_schema
        shards = [
            Shard(start=i, stop=stop, num_rows=stop - i)
            for i in range(0, len(dataset), _SHARD_ROWS)
            for stop in (min(i + _SHARD_ROWS, len(dataset)),)
        ]
    _check_columns(spec, set(features))
    carried = _carried_schema(spec, types or pa.schema([(c, pa.string()) for c in spec.columns]))
    # A streamed dataset does not say when it has changed.
    revision = "" if spec.hf.streaming else str(dataset._fingerprint)
    return Source(spec, "hf", None, _with_keys(spec, shards, revision), carried, modality)


def _load_hf(spec: SourceSpec) -> Any:
    """Load a dataset saved to disk, or by hub id; with one split chosen."""
    import datasets

    hf = spec.hf
    try:
        if any((Path(spec.uri) / name).exists() for name in _SAVED_DATASET):
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
