"""JSON under its own name: an array of objects or texts, or, as is as common, an object a line."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from fsspec.utils import infer_compression

from fmembed.sources.formats.base import Format
from fmembed.sources.formats.jsonl import jsonl_schema, parse, read_jsonl
from fmembed.sources.source import BadRow, File, RawRow, Rejection, Shard, Source

# An array has to be in memory whole: its elements may go over any number of lines.
_MOST_BYTES = 2**30
_SAMPLE_BYTES = 2**22
_SAMPLE_ROWS = 10_000
# What begins, ends and parts values; a text, in which these mean nothing, is gone over at once.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)
_BLANK = b" \t\r\n"


def read_json(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    if not _is_array(source, file):
        yield from read_jsonl(source, shard, file)
        return
    content = _read(source, file, _MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise BadRow(
            "file too large",
            f"an array of more than {_MOST_BYTES:,} bytes; write it as JSON Lines, an object a "
            "line (jq -c '.[]')",
        )
    for i, element in enumerate(_elements(content)):
        row = _parse(element, source)
        if isinstance(row, dict):
            row = {c: row[c] for c in source.spec.wanted if c in row}
        yield f"{file.name}#{i}", row


def json_schema(source: Source, files: Sequence[File]) -> pa.Schema:
    """The columns of the objects that files begin with."""
    return jsonl_schema(source, files, _first_rows)


def _first_rows(source: Source, file: File) -> Iterator[dict[str, Any] | Rejection] | None:
    """The elements that an array begins with; None of another file."""
    if not _is_array(source, file):
        _check_bare(_read(source, file, _SAMPLE_BYTES))
        return None
    for most in (_SAMPLE_BYTES, _MOST_BYTES):  # the first one may be longer than that
        content = _read(source, file, most)
        is_cut = len(content) == most
        if not is_cut or next(_elements(content, is_cut), None) is not None:
            break
    elements = itertools.islice(_elements(content, is_cut), _SAMPLE_ROWS)
    return (_parse(element, source) for element in elements)


def _check_bare(content: bytes) -> None:
    """Refuse one object that holds the rows.

    Raises:
        ValueError: With how they are taken out.
    """
    try:
        whole = json.loads(content)
    except ValueError:  # several lines, or cut
        return
    for name, value in whole.items() if isinstance(whole, dict) else ():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            raise ValueError(
                f"it is one object, whose rows are in {name[:80]!a}: take them out "
                f"(jq '.[\"{name[:80]}\"]', or json.load(file)[{name[:80]!a}])"
            )


def _is_array(source: Source, file: File) -> bool:
    return _read(source, file, 4096).lstrip(_BLANK).startswith(b"[")


def _read(source: Source, file: File, most: int) -> bytes:
    compression = infer_compression(file.name)
    with source.fs.open(file.path, "rb", compression=compression) as handle:
        return bytes(handle.read(most)).removeprefix(b"\xef\xbb\xbf")


def _parse(element: bytes, source: Source) -> dict[str, Any] | Rejection:
    most = source.spec.max_text_bytes
    if len(element) > most:
        return parse(len(element), source)
    if element.startswith(b'"'):
        try:
            text = element.decode(errors=source.spec.encoding_errors)
            return {source.spec.input: json.loads(text)}
        except UnicodeDecodeError as e:
            return "not UTF-8", f"byte {e.object[e.start]:#04x} at position {e.start} of the text"
        except ValueError as e:
            return "bad JSON", str(e)
    return parse(element, source)


def _elements(content: bytes, is_cut: bool = False) -> Iterator[bytes]:
    """The elements of an array, each as it is written.

    Args:
        content: Begins with the array.
        is_cut: Whether it may end within one, which is then left out.

    Raises:
        BadRow: The array does not end, or something follows it.
    """
    at = content.index(b"[") + 1
    depth, begin = 0, at
    for mark in _MARKS.finditer(content, at):
        kind = content[mark.start()]
        if kind in b"[{":
            depth += 1
        elif kind in b"]}" and depth:
            depth -= 1
        elif depth == 0 and kind in b",]}":
            element = content[begin : mark.start()].strip(_BLANK)
            begin = mark.end()
            if element or kind == ord(","):
                yield element
            if kind != ord(","):
                if kind == ord("}") or content[begin:].strip(_BLANK):
                    raise BadRow("bad JSON", f"the array ends at byte {mark.start():,}, not there")
                return
    if not is_cut:
        raise BadRow("bad JSON", "the array does not end")


JSON = Format(
    name="json",
    suffixes=(".json", ".json.gz", ".json.zst"),
    rows=read_json,
    schema=json_schema,
)
