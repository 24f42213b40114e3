"""Datasets of the library `datasets`: saved to disk, or by hub id."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from fmembed.errors import SourceError, reason
from fmembed.redaction import redact
from fmembed.sources.files import read_whole
from fmembed.sources.formats.base import CHUNK_ROWS, FETCHED, Format, Opened, rejection
from fmembed.sources.formats.parquet import SHARD_ROWS, batch_rows
from fmembed.sources.formats.unfolding import has_compressed_buffers
from fmembed.sources.source import File, RawRow, Rejection, Shard, Source
from fmembed.spec import SourceSpec

_SAVED = ("state.json", "dataset_dict.json")


def open_hf(spec: SourceSpec) -> Opened:
    """Load a dataset and cut it: at rows, or into the shards that a streamed one has.

    Raises:
        SourceError: There is none, or it cannot be read.
    """
    if Path(spec.uri).exists():  # workers have another working folder
        spec = spec.model_copy(update={"uri": str(Path(spec.uri).resolve())})
    if _is_saved(spec):
        _check_saved(Path(spec.uri))
    dataset = load_hf(spec)
    # A streamed dataset does not say when it has changed.
    revision = "" if spec.hf.streaming else str(dataset._fingerprint)
    whole = (File(spec.uri, spec.hf.split or "data", 0, revision),)
    if spec.hf.streaming:
        shards = [Shard(whole, i, i + 1) for i in range(dataset.num_shards)]
    else:
        shards = []
        for start in range(0, len(dataset), SHARD_ROWS):
            stop = min(start + SHARD_ROWS, len(dataset))
            shards.append(Shard(whole, start, stop, num_rows=stop - start))
    if spec.hf.streaming and not dataset.features:  # only a row tells its columns, and no types
        names: dict[str, Any] = next(iter(dataset), {})
        return Opened(spec, pa.schema([(name, pa.null()) for name in names]), shards)
    schema: pa.Schema = dataset.features.arrow_schema
    for name in _class_names(dataset):
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
    return Opened(spec, schema, shards, revision)


def read_hf(source: Source, shard: Shard, whole: File) -> Iterator[RawRow]:
    dataset = load_hf(source.spec)
    # A table may have the numbers, if it was made when they were not named.
    numbers = {f.name for f in source.carried if not pa.types.is_string(f.type)}
    classes = {n: names for n, names in _class_names(dataset).items() if n not in numbers}
    fetch = _fetcher(source)
    for row_id, row in _read(dataset, source, shard, whole):
        if isinstance(row, tuple):
            yield row_id, row
            continue
        for name, names in classes.items():
            code = row.get(name)
            if isinstance(code, int):  # -1 stands for no label
                row[name] = names[code] if 0 <= code < len(names) else None
        value = row.get(source.spec.input)
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            row[FETCHED] = fetch(value["path"])
        yield row_id, row


def _class_names(dataset: Any) -> dict[str, list[str]]:
    """The names behind the numbers of each column of classes."""
    features = dataset.features or {}
    return {name: f.names for name, f in features.items() if getattr(f, "names", None)}


def _fetcher(source: Source) -> Callable[[str], bytes | Rejection]:
    """How to read a file that a row names instead of holding it: in the dataset's own folder, or,
    of one from the hub, in the caches that it was downloaded to.
    """
    import datasets
    import huggingface_hub.constants

    uri = source.spec.uri
    caches = (huggingface_hub.constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
    roots = [os.path.realpath(root) for root in ((uri,) if os.path.isdir(uri) else caches)]
    local = fsspec.filesystem("file")

    def fetch(path: str) -> bytes | Rejection:
        real = os.path.realpath(os.path.join(roots[0], path))
        if not any(real.startswith(os.path.join(root, "")) for root in roots):
            return "outside the root", f"{path[:200]!a} does not lie in the dataset's folder"
        try:
            return read_whole(local, real, source.most_bytes)
        except Exception as e:
            return rejection(e, source)

    return fetch


def _read(dataset: Any, source: Source, shard: Shard, whole: File) -> Iterator[RawRow]:
    # As Arrow holds it on disk: a row's size is looked at before it becomes Python's.
    if not source.spec.hf.streaming:
        stored = dataset.with_format("arrow")
        i, end = shard.start or 0, shard.stop or 0
        for start in range(i, end, CHUNK_ROWS):
            for row in _whole_rows(stored[start : min(start + CHUNK_ROWS, end)], source):
                yield f"{whole.name}#{i}", row
                i += 1
        return
    is_saved = _is_saved(source.spec)
    for s in range(shard.start or 0, shard.stop or 0):
        piece = dataset.shard(num_shards=dataset.num_shards, index=s)
        rows: Iterator[dict[Any, Any] | Rejection] = map(dict, piece)
        if is_saved:
            tables = piece.with_format("arrow").iter(CHUNK_ROWS)
            rows = itertools.chain.from_iterable(_whole_rows(t, source) for t in tables)
        for i, row in enumerate(rows):
            yield f"{whole.name}/{s}#{i}", row


def _whole_rows(table: pa.Table, source: Source) -> Iterator[dict[Any, Any] | Rejection]:
    """A table's rows; those are rejected whose values lie outside of the file.

    It is mapped as it stands on disk, without a checksum: a text's place was believed, and one
    flipped bit in it ended the process.
    """
    for batch in table.to_batches():
        yield from _whole_batch(batch, source)


def _whole_batch(batch: pa.RecordBatch, source: Source) -> Iterator[dict[Any, Any] | Rejection]:
    try:
        for column in batch.columns:
            _check_places(column)
    except pa.ArrowInvalid as e:
        if batch.num_rows == 1:
            yield "unreadable file", f"the row is damaged: {reason(e)}"
            return
        half = batch.num_rows // 2
        yield from _whole_batch(batch.slice(0, half), source)
        yield from _whole_batch(batch.slice(half), source)
    else:
        yield from batch_rows(batch, source)


def _check_places(column: pa.Array) -> None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as e:
        if "UTF8" not in str(e):  # which each row is judged by on its own
            raise


def load_hf(spec: SourceSpec) -> Any:
    """Load a dataset saved to disk, or by hub id; with one split chosen.

    Raises:
        SourceError: There is none, or it cannot be read.
    """
    import datasets

    hf = spec.hf
    _check_data_files(Path(spec.uri))
    try:
        if _is_saved(spec):
            dataset = datasets.load_from_disk(spec.uri)
            if isinstance(dataset, datasets.DatasetDict) and hf.split in dataset:
                dataset = dataset[hf.split]
            # A format that it was saved with (torch, numpy, pandas, ...) makes tensors of values.
            dataset = dataset.with_format(None)
            if hf.streaming and isinstance(dataset, datasets.Dataset):
                dataset = dataset.to_iterable_dataset(num_shards=1)
        else:
            dataset = datasets.load_dataset(
                spec.uri, hf.name, split=hf.split, revision=hf.revision, streaming=hf.streaming,
                cache_dir=_own_cache(spec.uri),
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as e:
        why = spec.conceal(reason(e))
        raise SourceError(f"source.uri: cannot load dataset {redact(spec.uri)}: {why}") from None
    if isinstance(dataset, dict):
        raise SourceError(f"source.hf.split: name one of {', '.join(dataset)}")
    wanted = set(spec.wanted)
    if dataset.features and wanted <= set(dataset.features):
        dataset = dataset.select_columns(sorted(wanted))
    for name, feature in (dataset.features or {}).items():
        # Left undecoded: we decode row by row, so that one bad picture is one rejected row.
        undecoded = _undecoded(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _own_cache(uri: str) -> str | None:
    """Where a local folder is unfolded to: a place of its own, which changes with its files.

    `datasets` (5.2) calls it by the folder's last name and what its card says, so that of two
    folders of one name the second had the first one's rows.
    """
    if not os.path.isdir(uri):
        return None
    import datasets

    digest = hashlib.blake2b(os.fsencode(os.path.realpath(uri)), digest_size=16)
    for folder, folders, files in os.walk(uri):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):  # a link to nothing
                facts = os.stat(path)
                digest.update(os.fsencode(f"\0{path}\0{facts.st_size}\0{facts.st_mtime_ns}"))
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f"fmembed-{digest.hexdigest()}")


def _undecoded(feature: Any) -> Any:
    """A feature that leaves bytes as they are, and opens no path that a row names."""
    if hasattr(feature, "decode"):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):
        length = {"length": feature.length} if hasattr(feature, "length") else {}
        return type(feature)(_undecoded(feature.feature), **length)
    return feature


def _is_saved(spec: SourceSpec) -> bool:
    return any((Path(spec.uri) / name).exists() for name in _SAVED)


def _check_saved(folder: Path) -> None:
    """Refuse a saved dataset of which a small file would unfold to much, or lies elsewhere.

    Once for each run: it looks into every record batch.

    Raises:
        SourceError: Compressed buffers, which `datasets` never writes; a name with a folder; no
            list of files.
    """
    try:
        _check_splits(folder)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as e:
        raise SourceError(f"source.uri: cannot load dataset {folder}: {reason(e)}") from None


def _check_splits(folder: Path) -> None:
    try:
        told = json.loads((folder / _SAVED[1]).read_bytes())["splits"]
    except FileNotFoundError:
        told = [""]
    for split in told:
        state = json.loads((folder / split / _SAVED[0]).read_bytes())
        for name in [split, *(entry["filename"] for entry in state["_data_files"])]:
            if "/" in name or name == "..":
                raise SourceError(
                    f"source.uri: {folder} has {name[:200]!a} read, which is not in the folder"
                )
        for entry in state["_data_files"]:
            path = folder / split / entry["filename"]
            if has_compressed_buffers(str(path)):
                raise SourceError(
                    f"source.uri: buffers of {path} are compressed and would be unfolded all at "
                    "once; save the dataset with `datasets` itself"
                )


def _check_data_files(folder: Path) -> None:
    """Refuse a local dataset whose card has files read that are not in its folder.

    Raises:
        SourceError: It names such a file, or a server.
    """
    card = folder / "README.md"
    if not card.is_file():
        return
    import huggingface_hub

    try:
        text = card.read_text(encoding="utf-8")
        made: Any = huggingface_hub.DatasetCard(text, ignore_metadata_errors=True)
        told = made.data.to_dict()
    except Exception as e:  # by version: a YAML error, or of its own
        raise SourceError(f"source.uri: {card} cannot be read: {reason(e)}") from None
    left = [told.get("configs")]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (
            "://" in value or "::" in value or value.startswith(("/", "~")) or ".." in value
        ):
            raise SourceError(
                f"source.uri: {card} has {value[:200]!a} read, which is not in the dataset's folder"
            )


HF = Format(name="hf", suffixes=(), rows=read_hf, open=open_hf, markers=_SAVED)
