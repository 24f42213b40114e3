"""SourceSpec -> ray.data.Dataset of canonical rows (rows.row_schema).

Listing and checking happen on the driver before Ray starts; reading is Ray's (a Datasource with
one read task a shard); parsing is ours (readers.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from fmembed.files import check_regular, is_local
from fmembed.readers import (
    FOLDERS,
    SAVED_DATASET,
    File,
    Shard,
    Source,
    check_saved,
    file_schema,
    is_bounded,
    load_hf,
    read_shard,
)
from fmembed.redaction import split_chain
from fmembed.rows import (
    RESERVED,
    RowIds,
    keys_of,
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
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_MAX_SAMPLED_FILES = 100
_SHARD_BYTES = 64 * 2**20
_SHARD_FILES = 512
# Of files that are rows: what a read task holds at once.
_FOLDER_SHARD_BYTES = 16 * 2**20
# Of more files than these, small ones share a read task, which costs Ray some 20 ms whatever it
# reads, and are not opened before it (a Parquet file's end, from a local disk: 0.3 ms).
_MANY_FILES = 1000
_GROUP_BYTES = 4 * 2**20
# One file in so many ends its group by its name, so that a new file moves no other group's ends.
_GROUP_FILES = 256
_SHOWN_NAMES, _SHOWN_CHARACTERS = 20, 40
_SHARD_ROWS = 50_000


def open_source(spec: SourceSpec, modalities: Sequence[Modality] = ("text",)) -> Source:
    """List the files and check that the named columns are there.

    Args:
        spec: The source part of the config.
        modalities: What the model takes; the input column is text, or bytes of a picture or sound.
            Of several the one that the format or the column's type speaks for.

    Raises:
        SourceError: No such file, an unknown format, an absent column, a reserved name.
    """
    for column in spec.columns:
        if column in RESERVED or column.startswith("_"):
            raise SourceError(
                f"source.carry: {column!r} is a name of the table's own; rename it in the dataset"
            )
    if spec.format == "hf":
        return _open_hf(spec, modalities)
    fs, root, files, is_file = _list_files(spec)
    format_ = spec.format if spec.format != "auto" else _detect_format(spec, fs, root, files)
    if format_ == "hf":
        return _open_hf(spec, modalities)
    if format_ in FOLDERS and format_.removesuffix("_folder") not in modalities:
        raise SourceError(
            f"source.uri: {redact(spec.uri)} is a folder of another kind ({format_}) than "
            f"the model takes, which embeds {' or '.join(modalities)}"
        )
    if not is_file:
        files = [f for f in files if f.name.lower().endswith(_SUFFIXES[format_])]
    if not files:
        raise SourceError(
            f"source.uri: no {format_} file ({', '.join(_SUFFIXES[format_])}) in {redact(spec.uri)}"
        )
    source = Source(spec, format_, fs, (), pa.schema([]), modalities[0], _open_root(spec))
    if format_ in FOLDERS:
        has_folders = any("/" in f.name for f in files)
        available = {spec.input, spec.label or "label"} if has_folders else {spec.input}
        _check_columns(spec, available)
        types = pa.schema([pa.field(c, pa.string()) for c in available])
    else:
        types = _sample_schema(source, files)
        _check_columns(spec, set(types.names))
    modality = _choose_modality(spec, format_, types, modalities)
    carried = _carried_schema(spec, types)
    shards = tuple(_plan_shards(format_, fs, files))
    if not source.file_is_row:
        shards = _with_keys(spec, shards)
    return replace(source, shards=shards, carried=carried, modality=modality)


def _choose_modality(
    spec: SourceSpec, format_: Format, types: pa.Schema, modalities: Sequence[Modality]
) -> Modality:
    if len(modalities) == 1:
        return modalities[0]
    if format_ in FOLDERS:
        return format_.removesuffix("_folder")  # type: ignore[return-value]
    if format_ == "webdataset":
        is_text = spec.input in ("txt", "text", "caption")
    else:
        type_ = types.field(spec.input).type
        is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    if spec.root is not None:
        is_text = False
    return "text" if is_text else next(m for m in modalities if m != "text")


def _open_root(spec: SourceSpec) -> tuple[Any, str] | None:
    if spec.root is None:
        return None
    if "://" not in spec.root and not Path(spec.root).is_dir():
        raise SourceError(f"source.root: no such folder: {spec.root}")
    try:
        fs, folder = _open(spec.root)
        if isinstance(getattr(fs, "fs", None), fsspec.AbstractFileSystem):
            # The checks are of the inner one's links and redirects, which the outer one hides.
            raise ValueError("a root is a folder or one URL, not a cache or folder of another")
        return fs, folder
    except Exception as e:  # by filesystem
        why = spec.conceal(reason(e))
        raise SourceError(f"source.root: cannot read {redact(spec.root)}: {why}") from None


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


def sample(source: Source, num_rows: int, num_shards: int) -> Source:
    """Some of the source, spread over all of it: the beginnings of shards, `num_rows` in all."""
    step = max(len(source.shards) // num_shards, 1)
    chosen = source.shards[::step][:num_shards]
    per_shard = -(-num_rows // max(len(chosen), 1))
    if source.file_is_row:
        files = [f for shard in source.shards for f in shard.files]
        chosen = (Shard(tuple(files[:: max(len(files) // num_rows, 1)][:num_rows])),)
        per_shard = num_rows
    return replace(source, shards=tuple(replace(s, max_rows=per_shard) for s in chosen))


def read_here(source: Source) -> list[pa.Table]:
    """Read all shards in this process: for a few rows."""
    return [t for i, shard in enumerate(source.shards) for t in read_shard(source, shard, i)]


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
    described, shards, num_bytes = source.without_shards, source.shards, source.num_bytes

    # A task is sent what its function holds: one shard, and never the list of all files.
    def read_fn(index: int, shard: Shard) -> Callable[[], Iterator[pa.Table]]:
        def read_blocks() -> Iterator[pa.Table]:
            known = ray.get(committed_ref) if committed_ref is not None else None
            yield from read_shard(described, shard, index, known)

        return read_blocks

    class Shards(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return num_bytes

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, exec_stats=None, input_files=None
            )
            return [ReadTask(read_fn(i, shard), unknown) for i, shard in enumerate(shards)]

    # With more blocks than read tasks Ray splits every block anew (67 pieces in a trial).
    datasource = Shards()  # type: ignore[no-untyped-call]
    dataset: ray.data.Dataset = ray.data.read_datasource(
        datasource, override_num_blocks=len(shards), num_cpus=num_cpus
    )
    return dataset


# --- listing --------------------------------------------------------------------------------------


def _list_files(spec: SourceSpec) -> tuple[Any, str, list[File], bool]:
    """The filesystem, the folder that names are relative to, the files, and whether several could
    be meant: a folder or a glob.
    """
    uri, shown = spec.uri, redact(spec.uri)
    if uri.startswith("package:"):
        uri = resolve_package(uri, "source.uri", SourceError)
    try:
        fs, root = _open(uri)
        # A cache looks for a file in its parent's list, which a web server need not show.
        inner = fs.fs if isinstance(fs, CachingFileSystem) else fs
        is_file = False
        if _is_glob(inner, root):
            found = _followed(inner, inner.glob(root, detail=True))
            root = posixpath.dirname(root[: min(root.find(c) for c in "*?[" if c in root)] + "x")
        elif not (_is_web(root) and root.lower().endswith(_ALL_SUFFIXES)) and inner.isdir(root):
            found = _find(inner, root)
        else:
            is_file = True
            found = _followed(inner, {root: inner.info(root)})
            root = posixpath.dirname(root)
        # A pipe or a link to nothing is listed too: its row is rejected, with its cause.
        listed = (
            File(path, _name(path, root), int(info.get("size") or 0), _revision(info))
            for path, info in found
            if info.get("type") != "directory"
        )
        files = [f for f in listed if not any(p[0] in "._" for p in f.name.split("/") if p)]
    except FileNotFoundError as e:
        status = getattr(e.__cause__, "status", None)
        why = f" (the server answers {status})" if status is not None else ""
        raise SourceError(f"source.uri: no such file or folder: {shown}{why}") from None
    except ImportError as e:
        raise SourceError(f"source.uri: {shown}: {e}") from None
    except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
        raise SourceError(f"source.uri: cannot read {shown}: {spec.conceal(reason(e))}") from None
    files.sort(key=lambda f: f.path)
    if not files:
        raise SourceError(f"source.uri: no file in {shown}")
    return fs, root, files, is_file


def _open(uri: str) -> tuple[Any, str]:
    """As `storage.filesystem`, but a path that is there is opened as it is named, and what a web
    server's URL holds of secrets is in the filesystem alone.
    """
    *caches, inner = split_chain(uri)
    if _is_web(inner) and set(caches) <= {"simplecache", "filecache", "blockcache"}:
        from fmembed.web import open_web

        fs, url = open_web(inner)
        for cache in reversed(caches):  # which keep lists of what they hold
            fs = fsspec.filesystem(cache, fs=fs)
        return fs, url
    path = Path(uri.removeprefix("file://")).expanduser()
    if path.exists():
        return fsspec.filesystem("file"), str(path.absolute())
    return filesystem(uri)


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def _unsigned(uri: str) -> str:
    """A URL that stays the same when its signature is another."""
    if not _is_web(uri):
        return redact(uri)
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_glob(fs: Any, root: str) -> bool:
    if _is_web(root):  # where brackets may be a host's
        return any(c in urlsplit(root).path for c in "*[")
    return any(c in root for c in "*?[") and not fs.exists(root)


def _name(path: str, root: str) -> str:
    """What row ids call a file; of a cached web server's, nothing of its URL's secrets.

    Bytes of a name that are no UTF-8 are written out: `caf\\xe9.txt`.
    """
    if _is_web(path):
        path, root = urlsplit(path).path, urlsplit(root).path
    below = root.rstrip("/") + "/"
    # For 200,000 files relpath takes 3 s.
    name = path[len(below) :] if path.startswith(below) else posixpath.relpath(path, root or "/")
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return name


def _followed(
    fs: Any, found: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What was found, a local link as what it leads to: snapshots of the hub are made of them."""
    for path, info in found.items():
        is_link = info.get("islink") and is_local(fs)
        yield path, _facts(partial(os.stat, path)) if is_link else info


def _find(fs: Any, root: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All that is no folder below one, with its path; links to folders are not followed.

    On a local disk ourselves: fsspec's dozen facts of each of 200,000 files take 206 MB and 3 s,
    and a folder that it may not read it leaves out without a word.
    """
    if not isinstance(fs, LocalFileSystem):
        yield from fs.find(root, detail=True).items()
        return
    folders = [root]
    while folders:
        # What goes while we look, as another program's temporary files do, was not there.
        folder = folders.pop()
        with contextlib.suppress(FileNotFoundError), _scan(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "_")):  # left out by its name, with all below it
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                facts = _facts(entry.stat)
                if "mtime" in facts or entry.is_symlink():
                    yield entry.path, facts


def _facts(look: Callable[[], os.stat_result]) -> Mapping[str, Any]:
    """Of a file, or of what a link leads to."""
    try:
        facts = look()
    except OSError:  # to nothing, or round in circles: reading says which
        return {"type": "other"}
    kind = "directory" if stat.S_ISDIR(facts.st_mode) else "file"
    return {"type": kind, "size": facts.st_size, "mtime": facts.st_mtime}


def _scan(folder: str) -> Any:
    try:
        return os.scandir(folder)
    except PermissionError as e:
        raise PermissionError(e.errno, f"{e.strerror}: {folder}") from None


def _revision(info: Mapping[str, Any]) -> str:
    # By the names that local files, obstore, and other fsspec filesystems use.
    for name in (
        "e_tag", "ETag", "etag", "mtime", "last_modified", "LastModified", "Last-Modified",
        "updated",
    ):  # fmt: skip
        if info.get(name) is not None:
            return str(info[name])
    return ""


def _with_keys(spec: SourceSpec, shards: Iterable[Shard], revision: str = "") -> tuple[Shard, ...]:
    """Name each shard after all that decides which rows it yields."""
    # The limits only reject, and what was rejected is on record as such.
    limits = {"max_text_bytes", "max_media_bytes"}
    settings = spec.model_dump(mode="json", exclude={"label", "split", "carry", "caption", *limits})
    settings["uri"] = _unsigned(spec.uri)
    settings["root"] = _unsigned(spec.root) if spec.root else None

    def key(shard: Shard) -> str | None:
        revisions = [f.revision for f in shard.files] or [revision]
        if not all(revisions):
            return None
        files = [(f.name, f.size, f.revision) for f in shard.files]
        content = json.dumps([settings, revision, files, shard.start, shard.stop])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    return tuple(replace(shard, key=key(shard)) for shard in shards)


def _detect_format(spec: SourceSpec, fs: Any, root: str, files: list[File]) -> Format:
    if any(f.name in SAVED_DATASET for f in files) and fs.isdir(root):
        return "hf"
    names = [f.name.lower() for f in files]
    counts = {
        name: sum(n.endswith(suffixes) for n in names) for name, suffixes in _SUFFIXES.items()
    }
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise SourceError(
            f"source.format: cannot tell the format of {redact(spec.uri)}; "
            f"name one of {', '.join([*_SUFFIXES, 'hf'])}"
        )
    return best  # type: ignore[return-value]


def _check_columns(spec: SourceSpec, available: set[str]) -> None:
    named = {"source.input": spec.input, "source.id": spec.id}
    named |= {"source.label": spec.label, "source.split": spec.split}
    named |= {"source.caption": spec.caption}
    named |= {f"source.carry[{i}]": c for i, c in enumerate(spec.carry)}
    for field, column in named.items():
        if column is not None and column not in available:
            has = _some(sorted(available)) or "none"
            where = redact(spec.uri)
            raise SourceError(f"{field}: no column {column!r} in {where}; it has {has}")


def _some(names: Sequence[str]) -> str:
    """Names for a message: of a million the first few, each cut."""
    shown = [n if len(n) <= _SHOWN_CHARACTERS else f"{n[:_SHOWN_CHARACTERS]}..." for n in names]
    more = len(names) - _SHOWN_NAMES
    return ", ".join(shown[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _carried_schema(spec: SourceSpec, types: pa.Schema) -> pa.Schema:
    """The carried columns' types, as near as Delta Lake can store them; else JSON's text."""
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
        elif pa.types.is_null(type_) or pa.types.is_large_string(type_) or not is_bounded(type_):
            type_ = pa.string()
        fields.append(pa.field(column, type_))
    return pa.schema(fields)


def _sample_schema(source: Source, files: list[File]) -> pa.Schema:
    """The columns and types of the first file that has all that is named.

    Of the first readable one where none has, so that the message can say what there is.
    """
    named = set(source.spec.wanted)
    first: pa.Schema | None = None
    problem = ""
    for file in files[:_MAX_SAMPLED_FILES]:
        try:
            types = file_schema(source, file)
        except Exception as e:  # what decompressors and parsers raise, by format
            problem = f"{file.name}: {source.spec.conceal(reason(e))}"
            continue
        if named <= set(types.names):
            return types
        first = types if first is None else first
        problem = problem or f"{file.name} has no row"
    if first is None or not first.names:
        raise SourceError(
            f"source.uri: no readable {source.format} file in {redact(source.spec.uri)}: {problem}"
        )
    return first


def _plan_shards(format_: Format, fs: Any, files: list[File]) -> Iterator[Shard]:
    if format_ in FOLDERS:
        for group in _group(files, _FOLDER_SHARD_BYTES):
            yield Shard(group, num_rows=len(group))
        return
    small: list[File] = []
    if len(files) > _MANY_FILES:
        small = [f for f in files if f.size < _GROUP_BYTES]
        files = [f for f in files if f.size >= _GROUP_BYTES]
    if format_ == "parquet":
        with ThreadPoolExecutor(16) as pool:
            for shards in pool.map(lambda f: _plan_row_groups(fs, f), files):
                yield from shards
    else:
        yield from (Shard((file,)) for file in files)
    yield from (Shard(group) for group in _group(small, _GROUP_BYTES, by_name=True))


def _group(
    files: Iterable[File], most_bytes: int, by_name: bool = False
) -> Iterator[tuple[File, ...]]:
    """Neighbours, up to 512 files or about so many bytes; `by_name` also ends groups by hash."""
    group: list[File] = []
    num_bytes = 0
    for file in files:
        group.append(file)
        num_bytes += file.size
        is_end = (
            by_name and zlib.crc32(file.name.encode(errors="surrogateescape")) % _GROUP_FILES == 0
        )
        if is_end or len(group) == _SHARD_FILES or num_bytes >= most_bytes:
            yield tuple(group)
            group, num_bytes = [], 0
    if group:
        yield tuple(group)


def _plan_row_groups(fs: Any, file: File) -> list[Shard]:
    """Cut a Parquet file at row groups, about 64 MiB or 50,000 rows a shard."""
    try:
        check_regular(fs, file.path)
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


def _open_hf(spec: SourceSpec, modalities: Sequence[Modality]) -> Source:
    if Path(spec.uri).exists():  # workers have another working folder
        spec = spec.model_copy(update={"uri": str(Path(spec.uri).resolve())})
    if any((Path(spec.uri) / name).exists() for name in SAVED_DATASET):
        check_saved(Path(spec.uri))
    dataset = load_hf(spec)
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
    known = types or pa.schema([(c, pa.binary()) for c in features])
    modality = _choose_modality(spec, "hf", known, modalities)
    keyed = _with_keys(spec, shards, revision)
    return Source(spec, "hf", None, keyed, carried, modality, _open_root(spec))
