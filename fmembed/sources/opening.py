"""SourceSpec -> ray.data.Dataset of canonical rows (rows.row_schema).

Listing and checking happen on the driver before Ray starts; reading is Ray's (a Datasource with
one read task a shard); parsing is ours (readers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from fmembed.errors import SourceError, reason
from fmembed.redaction import redact
from fmembed.rows.columns import RESERVED
from fmembed.rows.ids import RowIds
from fmembed.sources.formats.base import is_bounded
from fmembed.sources.formats.hf import SAVED_DATASET, check_saved, load_hf
from fmembed.sources.formats.parquet import SHARD_ROWS
from fmembed.sources.formats.registry import SUFFIXES, detect_format, file_schema
from fmembed.sources.listing import list_files, open_fs
from fmembed.sources.reading import read_shard
from fmembed.sources.shards import plan_shards, with_keys
from fmembed.sources.source import FOLDERS, File, Shard, Source
from fmembed.spec import Format, Modality, SourceSpec

if TYPE_CHECKING:
    import ray.data

_MAX_SAMPLED_FILES = 100
_SHOWN_NAMES, _SHOWN_CHARACTERS = 20, 40


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
    fs, root, files, is_file = list_files(spec)
    format_ = spec.format if spec.format != "auto" else detect_format(spec, fs, root, files)
    if format_ == "hf":
        return _open_hf(spec, modalities)
    if format_ in FOLDERS and format_.removesuffix("_folder") not in modalities:
        raise SourceError(
            f"source.uri: {redact(spec.uri)} is a folder of another kind ({format_}) than "
            f"the model takes, which embeds {' or '.join(modalities)}"
        )
    if not is_file:
        files = [f for f in files if f.name.lower().endswith(SUFFIXES[format_])]
    if not files:
        raise SourceError(
            f"source.uri: no {format_} file ({', '.join(SUFFIXES[format_])}) in {redact(spec.uri)}"
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
    shards = tuple(plan_shards(format_, fs, files))
    if not source.file_is_row:
        shards = with_keys(spec, shards)
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
        fs, folder = open_fs(spec.root)
        if isinstance(getattr(fs, "fs", None), fsspec.AbstractFileSystem):
            # The checks are of the inner one's links and redirects, which the outer one hides.
            raise ValueError("a root is a folder or one URL, not a cache or folder of another")
        return fs, folder
    except Exception as e:  # by filesystem
        why = spec.conceal(reason(e))
        raise SourceError(f"source.root: cannot read {redact(spec.root)}: {why}") from None


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
            for i in range(0, len(dataset), SHARD_ROWS)
            for stop in (min(i + SHARD_ROWS, len(dataset)),)
        ]
    _check_columns(spec, set(features))
    carried = _carried_schema(spec, types or pa.schema([(c, pa.string()) for c in spec.columns]))
    # A streamed dataset does not say when it has changed.
    revision = "" if spec.hf.streaming else str(dataset._fingerprint)
    known = types or pa.schema([(c, pa.binary()) for c in features])
    modality = _choose_modality(spec, "hf", known, modalities)
    keyed = with_keys(spec, shards, revision)
    return Source(spec, "hf", None, keyed, carried, modality, _open_root(spec))
