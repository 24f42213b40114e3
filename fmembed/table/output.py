"""Whether a run may write to a table: nothing there, or its own rows, columns and ids."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fmembed.errors import StorageError, TableError
from fmembed.redaction import redact
from fmembed.storage import HALF_WRITTEN, Storage
from fmembed.table.card import TABLE, Card, fingerprint
from fmembed.table.deleted import STORE_MARK
from fmembed.table.log import Log

if TYPE_CHECKING:
    from fmembed.table.table import Table

# Where a run has died before its log was made, only these are left of it.
_OWN_LOCK = re.compile(r"_lock/(\d{8,18}\.json|\.probe-[0-9a-f]{32})")
# Folders that make the one above them somebody's table.
_OF_TABLES = ("_delta_log", "_versions", ".hoodie", "metadata/version-hint.text")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def check_usable(table: Table, identity: dict[str, Any], model: str = "") -> None:
    """Make sure that a run with this identity may write here: nothing there, or its own table.

    Looked at before Ray starts, and once more when the lock is had: whoever held it may have
    made the table meanwhile.

    Args:
        identity: Of the run.
        model: What the run calls its model, for a message.

    Raises:
        TableError: It holds something else, another model's vectors, or lies in another table.
    """
    card = table.card()
    if card is None:
        _check_empty(table)
    elif (
        table.uri.endswith("/_rejected")
        and Log(table.uri.removesuffix("/_rejected")).configuration().get(TABLE) == card.table
    ):
        raise TableError(f"output.uri: {table.uri} lies inside another table; give another folder")
    elif card.fingerprint != fingerprint(identity) and not table.is_bare():
        raise TableError(_of_another(table, card, identity, model))


def _of_another(table: Table, card: Card, identity: dict[str, Any], model: str) -> str:
    """What a run is told whose vectors would be others than those of the table."""
    told = card.spec.get("model")
    by = redact(str(told.get("id", "?")))[:200] if isinstance(told, dict) else "?"
    num_rows = sum(part.num_rows for part in table.rows.parts())
    now = f", this run's model is {model}" if model and model != by else ""
    differ = [
        _difference(name, card.identity.get(name), identity.get(name))
        for name in sorted(card.identity.keys() | identity.keys())
        if card.identity.get(name) != identity.get(name)
    ]
    return (
        f"output.uri: {table.uri} was made by another model or setting: its {num_rows:,} rows "
        f"by {by}{now}; {'; '.join(differ)}. With what made them all {num_rows:,} are kept; "
        "else give another output.uri"
    )


def _check_empty(table: Table) -> None:
    if table.rows.delta() is not None:
        raise TableError(
            f"output.uri: {table.uri} is another Delta table, no fmembed table; give another folder"
        )
    if table.has_own_files():
        raise TableError(
            f"output.uri: {table.uri} holds parts of a table whose log is gone; nothing was "
            "changed: fmembed verify --repair makes it a log, or give another folder"
        )
    if table.storage.size_bytes(STORE_MARK) is not None:
        raise TableError(
            f"output.uri: {table.uri} is a store of tables: give it as output.store, or --store"
        )
    for path in table.storage.paths():
        within = [path] if not path.endswith("/") else table.storage.paths(path)
        if path == "_delta_log/" and not any(p.endswith("/") for p in within):
            continue  # `Log.delta` has found nothing in it
        if path == "_lock/" and _is_own_lock(table, within):
            continue
        raise TableError(
            f"output.uri: {table.uri} is not empty (there is {path[:80]}) and no fmembed table; "
            "give another folder"
        )
    if outer := _around(table):
        raise TableError(
            f"output.uri: {table.uri} lies inside another table ({outer}); give another folder"
        )


def _is_own_lock(table: Table, within: Sequence[str]) -> bool:
    """Whether `_lock` holds what a killed run has left there: nothing yet, or half a lock."""
    files = [HALF_WRITTEN.sub("", path) for path in table.storage.sizes("_lock/")]
    has_folder = any(path.endswith("/") for path in within)
    return not has_folder and all(map(_OWN_LOCK.fullmatch, files))


def _around(table: Table) -> str | None:
    """The table that this folder is inside of, if any."""
    if table.storage.local:
        parents = Path(os.path.realpath(table.storage.local)).parents
        return next((str(p) for p in parents if any((p / s).exists() for s in _OF_TABLES)), None)
    scheme, _, path = table.uri.partition("://")
    names = path.strip("/").split("/")
    for i in range(len(names) - 1, 0, -1):
        parent = Storage(f"{scheme}://{'/'.join(names[:i])}")
        with contextlib.suppress(StorageError):  # not this user's to look at
            if parent.sizes("_delta_log/"):  # its first entries may have been tidied away
                return parent.uri
    return None


def check_columns(table: Table, column: str, id_column: str | None) -> None:
    """Make sure that a run embeds the column that the table was filled from, with the same ids.

    With another column all rows would be taken for done, with other ids all would come twice.

    Args:
        column: What the run embeds.
        id_column: Where it has its ids from; None for files' names and rows' numbers.

    Raises:
        TableError: It embeds another one, or has ids from another one.
    """
    card = table.card()
    if card is None or table.is_bare():
        return
    source = card.spec.get("source")
    source = source if isinstance(source, dict) else {}
    known = source.get("input")
    if isinstance(known, str) and known != column:
        raise TableError(
            f"source.input: {table.uri} was filled from the column {known[:200]!r}, this run "
            f"embeds {column!r}; name that column or another output.uri"
        )
    known = source.get("id", id_column)
    if known != id_column:
        raise TableError(
            f"source.id: the ids of {table.uri} are from {_said(known)}, those of this run from "
            f"{_said(id_column)}, so that all rows would come twice; give the same, or another "
            "output.uri"
        )


def check_schema(table: Table, schema: pa.Schema) -> None:
    """Make sure that a table which has rows has the columns that a run would write.

    Raises:
        TableError: It has others.
    """
    delta = table.rows.delta()
    if delta is not None and table.card() is not None and not table.is_bare():
        table.rows.check_columns(delta, schema)


def carried_types(table: Table, carried: pa.Schema) -> pa.Schema:
    """The types of carried columns: what the table has them as, where it has rows by now.

    What another week's files would have is no reason to begin a new table: a value that does
    not fit is its own row's fate.
    """
    if table.card() is None or table.is_bare():
        return carried
    known = table.rows.schema()
    return pa.schema(
        [known.field(f.name) if f.name in known.names else f for f in carried]
    ).remove_metadata()


def _difference(name: str, old: Any, new: Any) -> str:
    """How a part of an identity differs, for people: a digest tells them nothing."""
    if name == "contract":
        return "another version of fmembed computed them in another way"
    if any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        what = name.rpartition(".")[2]
        return f"the {what} {'differs' if what == 'adapter' else 'differ'}"
    return f"{name} was {old!r}, is {new!r}"


def _said(id_column: Any) -> str:
    return "files' names and rows' numbers" if id_column is None else f"column {id_column!a:.200}"
