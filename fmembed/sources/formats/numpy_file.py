"""NumPy's files: an array of texts or pictures, or several of one length, a row each step."""

from __future__ import annotations

import contextlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fmembed.sources.formats.base import READ_BYTES, Format, over_files, without_input
from fmembed.sources.given import content_of
from fmembed.sources.source import BadRow, File, RawRow, Shard, Source

_TEXTS, _NUMBERS = "US", "biuf"


class _Refusal(NamedTuple):
    """Why a step has no value."""

    error: str
    message: str


@dataclass
class _Array:
    """An array that is read a step of its first axis at a time, as its bytes come."""

    handle: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_input: bool

    @property
    def is_picture(self) -> bool:
        """Whether each step is one: height, width, and one, three or four colours, or none."""
        has_shape = len(self.shape) == 3 or (len(self.shape) == 4 and self.shape[3] in (1, 3, 4))
        return self.is_input and self.dtype == np.uint8 and has_shape

    def type(self) -> pa.DataType:
        """Of its column."""
        if self.is_picture:
            return pa.large_binary()
        if self.dtype.kind in _TEXTS:
            found = pa.string()
        elif self.dtype.kind in "mM":
            found = pa.timestamp("us") if self.dtype.kind == "M" else pa.duration("us")
        else:
            found = pa.from_numpy_dtype(self.dtype)
        for _ in self.shape[1:]:
            found = pa.list_(found)
        return found

    def rows(self) -> Iterator[Any]:
        """Each step: a text, a number, a picture's file, or lists."""
        shape = self.shape[1:]
        row_bytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        step = max(READ_BYTES // max(row_bytes, 1), 1)
        left = self.shape[0]
        while left:
            n = min(step, left)
            content = self.handle.read(n * row_bytes)
            n = len(content) // row_bytes if row_bytes else n
            some = np.frombuffer(content[: n * row_bytes], self.dtype).reshape(n, *shape)
            yield from map(self._value, some)
            left -= n
            if left and n < step:
                raise BadRow("unreadable file", f"it ends {left:,} rows before it should")

    def _value(self, given: Any) -> Any:
        """A step's value, or why it has none."""
        if self.is_picture:
            return content_of(given)
        if self.dtype.kind in "mM":
            in_us = given.astype(f"{self.dtype.kind}8[us]")
            if not np.array_equal(in_us.astype(self.dtype), given, equal_nan=True):
                return _Refusal("wrong type", f"{given} is no whole number of microseconds")
            given = in_us
        elif self.dtype.kind == "U":
            # What is beyond Unicode Python holds, and nothing else does.
            points = np.ascontiguousarray(given).view(f"{self.dtype.byteorder}u4")
            if points.size and points.max() > sys.maxunicode:
                return _Refusal("not UTF-8", f"{points.max():#x} is no character")
        return given.tolist()


@contextlib.contextmanager
def _arrays(
    source: Source, file: File, wanted: Sequence[str] | None
) -> Iterator[dict[str, _Array]]:
    """The arrays of a file that are wanted, by their names; that of `.npy` has any name."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(source.fs.open(file.path, "rb"))
        if opened.read(2) != b"PK":
            opened.seek(0)
            yield {source.spec.input: _open(opened, file.name, is_input=True)}
            if opened.read(1) and wanted is not None:
                raise BadRow("unreadable file", "something follows its array, as another one")
            return
        archive = stack.enter_context(zipfile.ZipFile(opened))
        found = {}
        for name in archive.namelist():
            column = name.removesuffix(".npy")
            is_input = column == source.spec.input
            if not name.endswith(".npy") or (wanted is not None and column not in wanted):
                continue
            if wanted is not None:
                _check_sum(archive, name)
            try:
                handle = stack.enter_context(archive.open(name))
                found[column] = _open(handle, column, is_input)
            except ValueError:
                if wanted is not None or is_input:
                    raise  # of others nobody asks
        yield found


def _check_sum(archive: zipfile.ZipFile, name: str) -> None:
    """Read a member once for its checksum: it is compared at the end, when rows are handed on.

    Raises:
        zipfile.BadZipFile: It is another.
    """
    with archive.open(name) as handle:
        while handle.read(READ_BYTES):
            pass


def _open(handle: Any, name: str, is_input: bool) -> _Array:
    """Read the header of an array.

    Raises:
        ValueError: It holds Python's objects, which nothing but code of the file's own can read;
            or no axis of rows, or rows that are not one after another.
    """
    version = np.lib.format.read_magic(handle)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(handle)
    if dtype.hasobject:
        raise ValueError(
            f"{name} holds Python's objects, which are pickles: save it with a type, as "
            "array.astype(str)"
        )
    if not shape or (is_fortran and len(shape) > 1):
        raise ValueError(f"{name} is no array of rows: save np.ascontiguousarray(array)")
    if dtype.kind not in f"{_TEXTS}{_NUMBERS}mM" or dtype.itemsize == 0:
        raise ValueError(f"{name} is of {dtype}; a row is a text, a number or a picture")
    return _Array(handle, shape, dtype, is_input)


def read_numpy(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    wanted = source.spec.wanted
    with _arrays(source, file, wanted) as arrays:
        if source.spec.input not in arrays:
            raise BadRow("unreadable file", f"it has no array {source.spec.input!r}")
        lengths = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {n:,}" for name, n in lengths.items())
            raise BadRow("unreadable file", f"its arrays have unlike numbers of rows: {told}")
        rows = zip(*(array.rows() for array in arrays.values()), strict=True)
        for i, values in enumerate(rows):
            why = next((value for value in values if isinstance(value, _Refusal)), None)
            row = dict(zip(arrays, values, strict=True))
            yield f"{file.name}#{i}", row if why is None else without_input(source, row, why)


def _file_schema(source: Source, file: File) -> pa.Schema:
    with _arrays(source, file, None) as arrays:
        given = arrays.get(source.spec.input)
        if given is not None and given.dtype.kind not in _TEXTS and not given.is_picture:
            raise ValueError(_say_what_it_takes(source.spec.input, given))
        return pa.schema([pa.field(name, array.type()) for name, array in arrays.items()])


def _say_what_it_takes(name: str, given: _Array) -> str:
    told = f"{name} is {given.dtype} of shape {given.shape}: "
    if len(given.shape) in (3, 4) and given.shape[1] in (1, 3):
        return told + "pictures have their colours last: save array.transpose(0, 2, 3, 1)"
    if len(given.shape) in (3, 4):
        return told + "pictures are uint8, 0 to 255: scale and save array.astype(np.uint8)"
    if len(given.shape) == 2:
        return told + (
            "rows of numbers; pictures have a height and a width (array.reshape(-1, 28, 28)), and "
            "sounds a rate, which only files of sounds say"
        )
    return told + "a row is a text (array.astype(str)) or a picture (uint8)"


NUMPY = Format(
    name="numpy",
    suffixes=(".npy", ".npz"),
    rows=read_numpy,
    schema=over_files(_file_schema),
)
