"""A shard of a source -> canonical rows (`columns.row_schema`), whatever the format.

Parsing is ours, because one bad input fails Ray's typed readers: here a bad file, line or value
becomes a rejected row and everything around it is kept.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.rows.columns import CHANGED, SHARD, SKIPPED, TOTAL, row_schema
from fmembed.sources.canonical import canonical
from fmembed.sources.deaths import Deaths
from fmembed.sources.files import check_regular, open_root
from fmembed.sources.formats.base import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    FETCHED,
    rejection,
    too_large,
    without_input,
)
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.locating import is_unlocated, locate_alone
from fmembed.sources.picks import Pick
from fmembed.sources.source import BrokenOff, File, RawRow, Shard, Source

_FETCH_THREADS = 16
_NONE = Deaths()


def read_shard(
    source: Source, shard: Shard, index: int, pick: Pick | None = None
) -> Iterator[pa.Table]:
    """Read one shard: tables of up to 1,000 canonical rows, rejected ones among them, and the
    marker row that ends it.

    Args:
        source: What the shard belongs to; its own shards are not looked at.
        shard: What to read.
        index: Which of the source's shards it is, for the rows to say.
        pick: Which rows to hand on; all, where there is none.
    """
    return (table for _, table in read_steps(source, shard, index, pick) if table.num_rows)


def read_steps(
    source: Source,
    shard: Shard,
    index: int,
    pick: Pick | None = None,
    deaths: Deaths = _NONE,
) -> Iterator[tuple[int, pa.Table]]:
    """As `read_shard`, and with each table, which may be empty, how many rows were read by then.

    Args:
        source: As for `read_shard`, as are the next three.
        shard: What to read.
        index: Which one it is.
        pick: Which rows to hand on.
        deaths: Rows to hand on one by one, and those to reject unseen.
    """
    schema = row_schema(source.carried, source.modality)
    # Of a process that has died the rows are counted as they come, so none is left out beforehand.
    wanted = _Wanted(None if pick is None or deaths else pick.places)
    if wanted.places is not None and source.file_is_row:
        files = list(shard.files)
        shard = replace(shard, files=tuple(files[at] for at in wanted.places))
    read = itertools.islice(_read_to_the_end(source, shard, deaths), shard.max_rows)
    rows: Iterator[RawRow] = wanted.of(read, source.file_is_row)
    if source.root is not None:
        rows = _fetch(source, rows, source.root, 1 if deaths else 2 * _FETCH_THREADS)
    num_rows = 0
    for chunk in _chunks(source, rows, deaths.alone):
        table = canonical(source, chunk, index, schema)
        places = wanted.take(table.num_rows)
        num_rows = int(places[-1]) + 1
        yield num_rows, table if pick is None else pick(places, table)
    num_rows = max(num_rows, wanted.num_read)
    skipped, changed = (0, 0) if pick is None else pick.counts()
    marker = {SHARD: index, TOTAL: num_rows, SKIPPED: skipped, CHANGED: changed}
    yield num_rows, pa.Table.from_pylist([marker], schema=schema)


def read_here(source: Source) -> list[pa.Table]:
    """Read all shards in this process: for a few rows."""
    return [t for i, shard in enumerate(source.shards) for t in read_shard(source, shard, i)]


class _Wanted:
    """The rows of a shard that are wanted, by their places; all, where there are none."""

    def __init__(self, places: npt.NDArray[np.int64] | None) -> None:
        self.places = None if places is None else places.tolist()
        self.num_read = 0
        self._given: deque[int] = deque()

    def of(self, rows: Iterator[RawRow], is_cut: bool) -> Iterator[RawRow]:
        """Those among rows, which are them already if `is_cut`."""
        wanted = None if self.places is None else set(self.places)
        numbers = iter(self.places) if is_cut and self.places is not None else itertools.count()
        for at, row in zip(numbers, rows, strict=False):
            self.num_read = at + 1
            if wanted is None or at in wanted:
                self._given.append(at)
                yield row

    def take(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The places of the next rows that were handed on."""
        return np.array([self._given.popleft() for _ in range(num_rows)], dtype=np.int64)


def _read_to_the_end(source: Source, shard: Shard, deaths: Deaths) -> Iterator[RawRow]:
    """Read; what breaks off becomes a rejected row with its cause, and what came before stays.

    Decompressors and parsers raise what they like (zlib.error, zipfile.BadZipFile, ...), so there
    is no list of what to expect.
    """
    at = 0
    for file in shard.files:
        num_rows = 0
        try:
            if is_unlocated(source, shard):
                shard = locate_alone(source, shard)
            rows = _read_file(source, shard, file)
            for row in deaths.past(source, rows, at) if deaths else rows:
                yield row
                num_rows += 1
        except Exception as e:
            error, message = rejection(e, source)
            # Two dots: lines that were left blank have numbers too, so a plain one may be taken.
            rest = f"{file.name}#{shard.first_row + num_rows}.."
            num_before = num_rows or (shard.first_row if shard.marks else shard.start)
            row_id = rest if num_before else file.name
            if num_rows or (shard.marks and num_before):
                message = f"from row {shard.first_row + num_rows} on: {message}"
            yield row_id, (error, message) if source.file_is_row else BrokenOff(error, message)
            at += 1
        at += num_rows


def _read_file(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    # A file that is a row is looked at by `read_whole`; a library's dataset is no file.
    if source.fs is not None and not source.file_is_row:
        check_regular(source.fs, file.path)
    yield from FORMATS[source.format].rows(source, shard, file)


def _chunks(source: Source, rows: Iterator[RawRow], alone: range) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    num_bytes, most = 0, source.most_bytes
    for at, (row_id, row) in enumerate(rows):
        if isinstance(row, dict):
            size = 0
            for value in row.values():
                size += len(value) if isinstance(value, str | bytes) else _num_bytes(value)
            if size > most:
                row = without_input(source, row, too_large(size, source))
            num_bytes += size
        chunk.append((row_id, row))
        is_full = len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES
        # It is handed on before the next row is asked for, which may end the process.
        if is_full or at in alone or at + 1 in alone:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _num_bytes(value: Any) -> int:
    """About what a value holds, nested ones too, however deep."""
    num_bytes, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            num_bytes += 64 * len(value)
            left.extend(value.values() if isinstance(value, dict) else value)
        else:
            num_bytes += len(value) if isinstance(value, str | bytes) else 8
    return num_bytes


def _fetch(
    source: Source, rows: Iterator[RawRow], root: tuple[Any, str], ahead: int
) -> Iterator[RawRow]:
    """Put the content in place of the paths; a file that cannot be read is its own row's fate.

    Args:
        source: What the rows are from.
        rows: With paths.
        root: Below which they are.
        ahead: How many are fetched at once.
    """
    read_below = open_root(*root, source.most_bytes)
    column = source.spec.input

    def fetch(item: RawRow) -> RawRow:
        row_id, row = item
        if isinstance(row, tuple) or row.get(column) is None:
            return item
        path = row[column]
        if not isinstance(path, str):
            message = f"column {column!r}: takes a path, got {type(path).__name__}"
            return row_id, {**row, FETCHED: ("wrong type", message)}
        # It may begin with the root, as the config writes that or without its login and signature.
        given = path.removeprefix((source.spec.root or "").rstrip("/") + "/")
        given = given.removeprefix(root[1].rstrip("/") + "/")
        if given.startswith("/") or "://" in given or ".." in given.split("/") or "\\" in given:
            message = f"column {column!r}: {given[:200]!a} does not lie below source.root"
            return row_id, {**row, FETCHED: ("outside the root", message)}
        try:
            return row_id, {**row, FETCHED: read_below(given)}
        except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
            return row_id, {**row, FETCHED: rejection(e, source)}

    # Over a network most of a fetch is waiting.
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        while some := list(itertools.islice(rows, ahead)):
            yield from pool.map(fetch, some)
