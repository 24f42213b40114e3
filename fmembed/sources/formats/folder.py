"""A folder of files, each a row."""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fmembed.sources.files import read_whole
from fmembed.sources.formats.base import Format
from fmembed.sources.source import File, RawRow, Shard, Source
from fmembed.storage import tell

# What a folder's name is called where the config leaves that open.
LABEL = "label"
_SAMPLED_FILES, _MOST_CLASSES = 10_000, 1000
# Files of which this was said.
_told: set[str] = set()
# Of one text that looks like a list of texts.
_MANY_LINES, _LOOKED_AT_BYTES = 10, 2**20


def read_folder(source: Source, _: Shard, file: File) -> Iterator[RawRow]:
    content = read_whole(source.fs, file.path, source.most_bytes, file.size)
    row: dict[str, Any] = {source.spec.input: content}
    if source.spec.label:
        row[source.spec.label] = posixpath.basename(posixpath.dirname(file.name)) or None
    yield file.name, row


def has_class_folders(source: Source) -> bool:
    """Whether the files lie in folders of classes: some folders, each of several files.

    Of many files some are looked at, spread over all.
    """
    num_files = sum(len(shard.files) for shard in source.shards)
    files = itertools.chain.from_iterable(shard.files for shard in source.shards)
    sampled = itertools.islice(files, 0, None, max(num_files // _SAMPLED_FILES, 1))
    folders = Counter(posixpath.dirname(file.name) for file in sampled)
    classes = {posixpath.basename(folder) for folder in folders}
    is_class = "" not in classes and len(classes) == len(folders)
    return is_class and 2 <= len(classes) <= min(_MOST_CLASSES, folders.total() // 2)


def folder_schema(source: Source, files: Sequence[File]) -> pa.Schema:
    """The content, by whatever name, and the folder's name as label if there are folders."""
    names = {source.spec.input}
    if len(files) == 1 and files[0].name.lower().endswith((".txt", ".text")):
        _tell_of_lines(source, files[0])
    if any("/" in f.name for f in files):
        names.add(source.spec.label or LABEL)
    return pa.schema([pa.field(name, pa.string()) for name in names])


def _tell_of_lines(source: Source, file: File) -> None:
    """Say of one text of many lines that it is one row: who has one often means its lines."""
    try:
        num_lines = read_whole(source.fs, file.path, _LOOKED_AT_BYTES, file.size).count(b"\n")
    except Exception:  # its row is rejected with the cause, or is none of so many bytes
        num_lines = 0
    is_long = num_lines >= _MANY_LINES or (file.size or 0) > _LOOKED_AT_BYTES
    if is_long and file.path not in _told:
        _told.add(file.path)
        tell(
            f"{file.name} is one row, its whole text: with source.format lines (--format lines) "
            "each line is one"
        )


_PICTURES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".bmp", ".gif", ".webp", ".avif", ".tif",
    ".tiff", ".jp2", ".ppm", ".pgm", ".tga", ".ico",
)  # fmt: skip
_SOUNDS = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64",
)  # fmt: skip

TEXT_FOLDER = Format(
    name="text_folder",
    suffixes=(".txt", ".text", ".md"),
    rows=read_folder,
    schema=folder_schema,
    modality="text",
)
IMAGE_FOLDER = Format(
    name="image_folder",
    suffixes=_PICTURES,
    rows=read_folder,
    schema=folder_schema,
    modality="image",
)
AUDIO_FOLDER = Format(
    name="audio_folder",
    suffixes=_SOUNDS,
    # What soundfile may not decode: each is then a rejected row.
    more_suffixes=(".m4a", ".aac", ".mp4", ".wma", ".webm"),
    rows=read_folder,
    schema=folder_schema,
    modality="audio",
)
