"""A dataset that was opened: its files, and the shards that read tasks take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa

from fmembed.spec import Format, Modality, SourceSpec

# Why a row is not embedded: the error that is counted, and a message that tells more.
Rejection = tuple[str, str]
# One row as a reader hands it over: its id where no column is the id, and its columns or why not.
# No exception: its traceback would keep what was read of the row.
RawRow = tuple[str, dict[str, Any] | Rejection]


class BrokenOff(NamedTuple):
    """A `Rejection` in place of all rows that a file has from here on."""

    error: str
    message: str


class BadRow(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    """A row, or a file of rows, that is rejected: the two parts of a `Rejection`."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error, self.message = error, message


class File(NamedTuple):
    """A file: where it is, and the name that row ids carry (relative to the source's root).

    `revision` is what storage says of its content: an entity tag, else the time of its last change.
    """

    path: str
    name: str
    size: int
    revision: str = ""


class Mark(NamedTuple):
    """Where in a file a record begins: its first byte, and how many rows and lines come before."""

    byte: int
    row: int
    line: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What one read task reads: files, or a part of one.

    `start` and `stop` are in the format's own unit (row groups of a Parquet file, bytes of lines,
    rows of a saved dataset, shards of a streamed one); None means all. `first_row` numbers the
    first row of such a part. `marks` say where the records of a part begin and end that is cut at
    bytes, None before that is looked for. `num_rows` is None where only reading tells. `key`
    changes when the content does: a shard whose key is on record as committed is not read again;
    None where storage does not tell of changes. `max_rows` cuts a sample short. `size` is what a
    part is of its file, or many files are together, in bytes.
    """

    files: Sequence[File] = ()
    start: int | None = None
    stop: int | None = None
    first_row: int = 0
    num_rows: int | None = None
    marks: tuple[Mark, Mark] | None = None
    key: str | None = None
    max_rows: int | None = None
    size: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, or of the part of one, as they are stored."""
        return sum(file.size for file in self.files) if self.size is None else self.size


@dataclass(frozen=True)
class Source:
    """A source that was found, listed and checked.

    The shards stay on the driver: a task gets its own one, and the rest `without_shards`. `root` is
    the filesystem, and the folder in it, below which the input column's paths are. With
    `file_is_row` a file's name is its row's id.
    `passed_over` counts what lies among its files and is not read, by reason.
    """

    spec: SourceSpec
    format: Format
    fs: Any
    shards: tuple[Shard, ...]
    carried: pa.Schema
    modality: Modality = "text"
    root: tuple[Any, str] | None = None
    file_is_row: bool = False
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files, as they are stored."""
        return sum(shard.num_bytes for shard in self.shards)

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
    def limit(self) -> str:
        """The field that bounds a row's content."""
        return f"source.max_{'text' if self.modality == 'text' else 'media'}_bytes"

    @property
    def most_bytes(self) -> int:
        """What a row's content may hold, in bytes."""
        spec = self.spec
        return spec.max_text_bytes if self.modality == "text" else spec.max_media_bytes
