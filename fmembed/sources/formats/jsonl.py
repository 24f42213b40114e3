"""JSON Lines: an object a line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from fmembed.sources.formats.base import MAX_VALUES, Format, looked_at, over_files
from fmembed.sources.formats.lines import read_lines
from fmembed.sources.formats.ranges import Ends, count_ends, cut_bytes, locate_lines
from fmembed.sources.source import BadRow, File, Mark, RawRow, Rejection, Shard, Source
from fmembed.sources.types import is_bounded

# What the columns' types are taken from.
_SAMPLE_ROWS = 10_000
_SAMPLE_BYTES = 32 * 2**20


def read_jsonl(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    wanted = source.spec.wanted
    for i, line in _rows(source, shard, file):
        row = parse(line, source)
        if isinstance(row, dict):
            row = {c: row[c] for c in wanted if c in row}
        yield f"{file.name}#{i}", row


# What of a file is known otherwise than by its lines; None where it is not.
First = Callable[[Source, File], Iterator[dict[str, Any] | Rejection] | None]


def jsonl_schema(
    source: Source, files: Sequence[File], first: First = lambda *_: None
) -> pa.Schema:
    """The columns of the objects that files begin with; the more files, the fewer of each.

    Args:
        source: What they are of.
        files: Which.
        first: Gives the rows that a file begins with, if it has no lines.
    """
    share = len(looked_at(files))
    max_rows, max_bytes = -(-_SAMPLE_ROWS // share), _SAMPLE_BYTES // share

    def look(source: Source, file: File) -> pa.Schema:
        if (rows := first(source, file)) is None:
            return _file_schema(source, file, max_rows, max_bytes)
        objects: list[dict[str, Any]] = []
        try:
            objects += (row for row in itertools.islice(rows, max_rows) if isinstance(row, dict))
        except BadRow:  # as below
            if not objects:
                raise
        if not objects:
            raise ValueError("its array is empty, or begins with neither objects nor texts")
        return _infer_schema(objects, source.spec.wanted)

    return over_files(look)(source, files)


def _file_schema(source: Source, file: File, max_rows: int, max_bytes: int) -> pa.Schema:
    objects: list[dict[str, Any]] = []
    num_bytes, hint = 0, ""
    try:
        for _, line in itertools.islice(_rows(source, Shard(), file), max_rows):
            if isinstance(line, bytes) and line.lstrip().startswith(b"["):
                hint = "; a line begins an array, where there should be one object a line"
            elif isinstance(line, bytes) and line.strip() == b"{":
                hint = "; its object goes over several lines: write an object a line, or an array"
            row = parse(line, source)
            if isinstance(row, dict):
                objects.append(row)
                num_bytes += len(line) if isinstance(line, bytes) else 0
            if num_bytes > max_bytes:
                break
    except Exception:  # the rest of the file is broken; its rows will be rejected with the cause
        if not objects:
            raise
    if not objects:
        raise ValueError(f"no JSON object in it{hint}")
    return _infer_schema(objects, source.spec.wanted)


def _rows(source: Source, shard: Shard, file: File) -> Iterator[tuple[int, bytes | int]]:
    """Number and content of each line that is not blank; its length, where it is too long."""
    for i, line in read_lines(source, shard, file):
        if isinstance(line, int) or (line and not line.isspace()):
            yield i, line


def parse(line: bytes | int, source: Source) -> dict[str, Any] | Rejection:
    """An object, or why it is none; of one that is too long only its length is given."""
    most = source.spec.max_text_bytes
    if isinstance(line, int):
        return "row too large", f"{line:,} bytes, more than source.max_text_bytes = {most:,}"
    if len(line) > MAX_VALUES and sum(map(line.count, (b",", b"[", b"{"))) > MAX_VALUES:
        return "row too large", f"more than {MAX_VALUES:,} values in {len(line):,} bytes"
    try:
        text = line.decode("utf-8", errors=source.spec.encoding_errors)
        value = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        return "not UTF-8", f"byte {e.object[e.start]:#04x} at position {e.start} of the line"
    except (ValueError, RecursionError) as e:
        return "bad JSON", str(e)
    if not isinstance(value, dict):
        return "bad JSON", f"the line is a {type(value).__name__}, not an object"
    for name in source.spec.wanted:
        if twice := _find_twice(value, name):
            return "bad JSON", f"the name {twice[:80]!a} is there twice"
    return value


class _Ambiguous(dict[str, Any]):
    """An object with a name that is there twice, of which Python takes the last one."""

    twice: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    ambiguous = _Ambiguous(found)
    counts = Counter(name for name, _ in pairs)
    ambiguous.twice = frozenset(name for name, n in counts.items() if n > 1)
    return ambiguous


def _find_twice(row: dict[str, Any], column: str) -> str | None:
    """A name that is there twice: this column's, or one inside its value."""
    if isinstance(row, _Ambiguous) and column in row.twice:
        return column
    left = [row.get(column)]
    while left:
        value = left.pop()
        if isinstance(value, _Ambiguous):
            return min(value.twice)
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
    return None


def _infer_schema(objects: list[dict[str, Any]], wanted: Sequence[str]) -> pa.Schema:
    """The columns, with the types of those that are wanted: there may be a million others."""
    fields = {n: pa.string() for n in dict.fromkeys(itertools.chain.from_iterable(objects))}
    for name in wanted:
        if name in fields:
            fields[name] = _infer_type([o.get(name) for o in objects])
    return pa.schema(list(fields.items()))


def _infer_type(values: list[Any]) -> pa.DataType:
    """The type of all values; JSON's text where they have none in common, or one without bounds."""
    try:
        type_ = pa.infer_type(values)
        if not is_bounded(type_):
            return pa.string()
        return pa.array(values).type
    except (pa.ArrowException, UnicodeError, OverflowError, RecursionError):
        return pa.string()


def _locate(_: Source, parts: Sequence[Shard], ends: Sequence[Ends], begin: Mark) -> list[Shard]:
    return locate_lines(parts, ends, begin)


JSONL = Format(
    name="jsonl",
    suffixes=(".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst"),
    more_suffixes=(".json", ".json.gz", ".json.zst", ".txt"),
    rows=read_jsonl,
    schema=jsonl_schema,
    cut=lambda _, fs, file: cut_bytes(fs, file),
    count=count_ends,
    locate=_locate,
)
