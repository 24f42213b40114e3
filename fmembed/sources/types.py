"""Carried columns: the type of each over all files, and values, kept as given or not at all.

A table is a Delta Lake table, and Delta has fewer types than Arrow (its protocol, "Primitive
types"). A type is turned into one of them only where no value is changed by it.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa

# Leaves and levels of a carried column's type; what has more is kept as JSON.
_MAX_LEAVES, _MAX_LEVELS = 1000, 16
_MAX_DECIMAL_DIGITS = 38


def is_bounded(type_: pa.DataType) -> bool:
    """Whether a nested type has few enough levels and leaves to be a column's type."""
    left, num_leaves = [(type_, 1)], 0
    while left:
        inner, level = left.pop()
        num_leaves += 1
        if level > _MAX_LEVELS or num_leaves > _MAX_LEAVES:
            return False
        left.extend((inner.field(i).type, level + 1) for i in range(inner.num_fields))
    return True


class UnstorableError(Exception):
    """A type of which Delta Lake has no like; its message names the type."""


class Unreadable:
    """Stands for a value that Python cannot hold; `keep` refuses it."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self._why})"


def stored_type(type_: pa.DataType) -> pa.DataType:
    """The type that a column of this one is kept in.

    Text for UUIDs, for columns without a value, and (as JSON) for types that nest too deeply; UTC
    for other time zones; a wider number for those that Delta has not.

    Raises:
        UnstorableError: There is none that holds its values.
    """
    if not is_bounded(type_):
        return pa.string()
    return _stored(type_)


def _stored(type_: pa.DataType, keeps_null: bool = False) -> pa.DataType:
    t, inside = pa.types, partial(_stored, keeps_null=keeps_null)
    if t.is_null(type_):
        return type_ if keeps_null else pa.string()
    if isinstance(type_, pa.BaseExtensionType):
        return pa.string() if isinstance(type_, pa.UuidType) else inside(type_.storage_type)
    if t.is_dictionary(type_) or t.is_run_end_encoded(type_):
        return inside(type_.value_type)
    if t.is_struct(type_):
        return pa.struct([f.with_type(inside(f.type)).with_nullable(True) for f in type_])
    if t.is_map(type_):
        return pa.map_(inside(type_.key_type), inside(type_.item_type))
    if any(is_(type_) for is_ in _LISTS):
        return pa.list_(inside(type_.value_type))
    if t.is_large_string(type_) or t.is_string_view(type_):
        return pa.string()
    if t.is_large_binary(type_) or t.is_binary_view(type_) or t.is_fixed_size_binary(type_):
        return pa.binary()
    if t.is_unsigned_integer(type_):  # uint64 above 2^63 is its own row's fate
        return _SIGNED.get(type_, pa.int64())
    if t.is_float16(type_):
        return pa.float32()
    if t.is_timestamp(type_):
        return pa.timestamp("us", None if type_.tz is None else "UTC")
    if t.is_date(type_):
        return pa.date32()
    if t.is_decimal(type_):
        if type_.precision > _MAX_DECIMAL_DIGITS or type_.scale < 0:
            raise UnstorableError(str(type_))
        return pa.decimal128(type_.precision, type_.scale)
    if t.is_string(type_) or t.is_binary(type_) or t.is_boolean(type_):
        return type_
    if t.is_signed_integer(type_) or t.is_floating(type_):
        return type_
    raise UnstorableError(str(type_))


_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
    pa.types.is_large_list_view,
)  # fmt: skip
_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64()}


def common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    """The type that holds the values of all of these: wider numbers, the union of structs' fields.

    Text where they have none in common, which other values are written into as JSON.

    Raises:
        UnstorableError: Of one of them there is no like in Delta Lake.
    """
    stored = [_stored(t, keeps_null=True) if is_bounded(t) else pa.string() for t in types]
    leaves = {kind for type_ in stored for kind in _kinds(type_)}
    # What Arrow would make of these does not hold the values of both.
    if {"text", "bytes"} <= leaves or {"decimal", "float"} <= leaves:
        return pa.string()
    try:
        fields = [pa.schema([("", type_)]) for type_ in stored]
        return _stored(pa.unify_schemas(fields, promote_options="permissive").field(0).type)
    except (pa.ArrowException, UnstorableError):
        return pa.string()


def _kinds(type_: pa.DataType) -> Iterator[str]:
    left = [type_]
    while left:
        inner = left.pop()
        left += [inner.field(i).type for i in range(inner.num_fields)]
        for kind, is_ in _KINDS.items():
            if is_(inner):
                yield kind


_KINDS = {
    "text": pa.types.is_string, "bytes": pa.types.is_binary, "decimal": pa.types.is_decimal,
    "float": pa.types.is_floating,
}  # fmt: skip


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """All columns of some files, each by the types that they give it; the first's order first."""
    types: dict[str, dict[pa.DataType, None]] = {}
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, {})[field.type] = None
    return pa.schema([(name, _common(list(found))) for name, found in types.items()])


def _common(types: list[pa.DataType]) -> pa.DataType:
    # What is no carried column may be of any type.
    if len(types) == 1:
        return types[0]
    try:
        return common_type(types)
    except UnstorableError:
        return next(t for t in types if not _is_storable(t))


def _is_storable(type_: pa.DataType) -> bool:
    try:
        stored_type(type_)
    except UnstorableError:
        return False
    return True


def keep(value: Any, type_: pa.DataType) -> Any:
    """A value as a column of this type holds it.

    Raises:
        ValueError: Not without changing it.
        pyarrow.ArrowException, TypeError, OverflowError, RecursionError: Not at all.
    """
    if value is None:
        return None
    if isinstance(value, Unreadable):
        raise ValueError(repr(value))
    if pa.types.is_string(type_) and not isinstance(value, str):
        return _as_text(value)
    value = _plain(value)
    kept = pa.scalar(value, type_).as_py()
    if not _is_same(kept, value):
        raise ValueError("would be changed")
    return kept


def _as_text(value: Any) -> str:
    """A value that is no text, as text: JSON, and what JSON has no word for as it is written."""
    if isinstance(value, uuid.UUID | Decimal | date):
        return str(value)
    return json.dumps(value, default=str)


def _plain(value: Any) -> Any:
    """UUIDs as text, in lists and structs too."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_plain(inner) for inner in value)
    return value


def _is_same(kept: Any, given: Any) -> bool:
    """Whether nothing of what was given is lost; Python compares numbers exactly."""
    if isinstance(given, dict):
        if isinstance(kept, list):  # a map
            return _is_same(kept, list(given.items()))
        return isinstance(kept, dict) and all(
            inner is None or _is_same(kept.get(name), inner) for name, inner in given.items()
        )
    if isinstance(given, list | tuple):
        return (
            isinstance(kept, list | tuple)
            and len(kept) == len(given)
            and all(map(_is_same, kept, given))
        )
    if isinstance(given, bool) or isinstance(kept, bool):
        return kept is given
    if isinstance(given, float) and math.isnan(given):
        return isinstance(kept, float) and math.isnan(kept)
    if isinstance(given, datetime) or isinstance(kept, datetime):
        return (
            isinstance(given, datetime) and isinstance(kept, datetime) and _same_time(kept, given)
        )
    return bool(kept == given)


def _same_time(kept: datetime, given: datetime) -> bool:
    # A time without a zone is no time in UTC; and pandas' have nanoseconds.
    return (kept.tzinfo is None) == (given.tzinfo is None) and bool(kept == given)
