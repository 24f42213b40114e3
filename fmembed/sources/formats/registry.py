"""The formats of a source."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmembed.errors import SourceError
from fmembed.redaction import redact
from fmembed.sources.files import (
    check_regular,
)
from fmembed.sources.formats.base import SAMPLE_BYTES, SAMPLE_ROWS
from fmembed.sources.formats.csv import CsvLines, delimiter_of, open_csv, read_csv
from fmembed.sources.formats.folder import read_folder
from fmembed.sources.formats.hf import SAVED_DATASET
from fmembed.sources.formats.jsonl import infer_schema, json_lines, parse_json, read_jsonl
from fmembed.sources.formats.parquet import read_parquet
from fmembed.sources.formats.webdataset import (
    SAMPLED_TAR_MEMBERS,
    SAMPLED_TAR_ROWS,
    read_webdataset,
    tar_members,
)
from fmembed.sources.source import File, RawRow, Shard, Source
from fmembed.spec import Format, SourceSpec

if TYPE_CHECKING:
    pass

READERS: dict[str, Callable[[Source, Shard, File], Iterator[RawRow]]] = {
    "text_folder": read_folder,
    "image_folder": read_folder,
    "audio_folder": read_folder,
    "webdataset": read_webdataset,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}


def file_schema(source: Source, file: File) -> pa.Schema:
    check_regular(source.fs, file.path)
    if source.format == "parquet":
        with source.fs.open(file.path, "rb") as handle:
            return pq.read_schema(handle)
    if source.format == "csv":
        # Text as it stands: a guessed integer would turn 01234 into 1234.
        with open_csv(source, file) as handle:
            lines = CsvLines(handle, source.spec.max_text_bytes, delimiter_of(file))
            header = next(csv.reader(lines, delimiter=delimiter_of(file)), [])
        return pa.schema([pa.field(c, pa.string()) for c in header])
    if source.format == "webdataset":
        members = itertools.islice(tar_members(source, file), SAMPLED_TAR_MEMBERS)
        samples = itertools.groupby(members, key=lambda found: found[0])
        names: dict[str, None] = {}
        try:
            for _, sample in itertools.islice(samples, SAMPLED_TAR_ROWS):
                names.update((name, None) for _, name, *_ in sample)
        except Exception:  # as below
            if not names:
                raise
        # What is carried beside the input (cls, txt, json) is text.
        return pa.schema([pa.field(c, pa.string()) for c in ("__key__", *names)])
    objects: list[dict[str, Any]] = []
    num_bytes = 0
    try:
        for _, line in itertools.islice(json_lines(source, file), SAMPLE_ROWS):
            row = parse_json(line, source)
            if isinstance(row, dict):
                objects.append(row)
                num_bytes += len(line) if isinstance(line, bytes) else 0
            if num_bytes > SAMPLE_BYTES:
                break
    except Exception:  # the rest of the file is broken; its rows will be rejected with the cause
        if not objects:
            raise
    if not objects:
        raise ValueError("no JSON object in it")
    return infer_schema(objects, source.spec.wanted)


SUFFIXES: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "text_folder": (".txt", ".md"),
    "image_folder": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    "audio_folder": (".wav", ".flac", ".ogg", ".mp3"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
ALL_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)


def detect_format(spec: SourceSpec, fs: Any, root: str, files: list[File]) -> Format:
    if any(f.name in SAVED_DATASET for f in files) and fs.isdir(root):
        return "hf"
    names = [f.name.lower() for f in files]
    counts = {name: sum(n.endswith(suffixes) for n in names) for name, suffixes in SUFFIXES.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise SourceError(
            f"source.format: cannot tell the format of {redact(spec.uri)}; "
            f"name one of {', '.join([*SUFFIXES, 'hf'])}"
        )
    return best  # type: ignore[return-value]
