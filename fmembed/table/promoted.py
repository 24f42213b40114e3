"""What a reader gets: a version of a table, or what a store has promoted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fmembed.errors import FmembedError, TableError
from fmembed.table.store import SHORT, TABLES, Pointer, Store
from fmembed.table.table import Table

# A reader that comes upon a version which is taken away looks again at what is promoted by then.
_MAX_LOOKS = 5

_T = TypeVar("_T")


@dataclass(frozen=True)
class Found:
    """A version of a table that a reader asked for, maybe by its store; the table is still."""

    table: Table
    version: int | None
    store: Store | None = None
    pointer: Pointer | None = None


def find_version(
    uri: str | Path, version: int | None = None, fingerprint: str | None = None
) -> Found:
    """What a reader gets: the table of this name, or of a store what is promoted.

    Args:
        uri: The table, or the store.
        version: Of a table, which; None for the newest.
        fingerprint: What it must have been made by, whole or its beginning; None for any.

    Raises:
        TableError: No such table or version, nothing promoted, or made by something else.
    """
    store = Store.find(uri)
    if store is not None and version is None:
        for _ in range(_MAX_LOOKS):
            current = store.current()
            try:
                return _find_promoted(store, current, fingerprint)
            except FmembedError:
                again = store.current()
                if again is None or (current and again.generation == current.generation):
                    raise  # nothing has taken its place meanwhile
        return _find_promoted(store, store.current(), fingerprint)
    if store is None:
        table = Table.open(uri, is_still=True)
        card = table.card()
        assert card is not None
        _check_made_by(table.uri, card.fingerprint, fingerprint)
        return Found(table, version)
    raise TableError(
        f"version: {store.uri} is a store, which is read at what is promoted; for another "
        f"version give one of its tables, as {store.uri}/{TABLES}/..."
    )


def _find_promoted(store: Store, pointer: Pointer | None, fingerprint: str | None) -> Found:
    if pointer is None:
        have = ", ".join(store.names()) or "none"
        raise TableError(
            f"store: nothing is promoted yet in {store.uri}; its tables: {have}; fmembed promote "
            "switches to one"
        )
    _check_made_by(store.uri, pointer.fingerprint, fingerprint)
    table = Table.open(store.uri_of(pointer.table), is_still=True)
    table.check_version(pointer.version)
    store.check_same(pointer, table)
    return Found(table, pointer.version, store, pointer)


def read_found(found: Callable[[], Found], read: Callable[[Found], _T]) -> _T:
    """Read what is promoted; once more where it is taken away meanwhile for another one."""
    looked = found()
    for _ in range(_MAX_LOOKS):
        try:
            return read(looked)
        except (FmembedError, OSError):
            if looked.store is None or looked.pointer is None:
                raise
            again = found()
            if again.pointer is None or again.pointer.generation == looked.pointer.generation:
                raise
            looked = again
    return read(looked)


def pinned_versions(table: Table) -> list[int]:
    """The versions that the store of a table needs, if it lies in one."""
    found = Store.of(table)
    if found is None:
        return []
    store, name = found
    return [pointer.version for pointer in store.pinned() if pointer.table == name]


def promoted_version(table: Table) -> int | None:
    """The version of a table that its store has promoted, if it lies in one that has."""
    if (found := Store.of(table)) is None:
        return None
    store, name = found
    current = store.current()
    return current.version if current is not None and current.table == name else None


def _check_made_by(uri: str, made: str, asked: str | None) -> None:
    if asked is not None and len(asked) < SHORT:
        raise TableError(
            f"fingerprint: takes all of it, or at least {SHORT} letters, got {asked!a:.80}"
        )
    if asked is not None and not made.startswith(asked):
        raise TableError(f"fingerprint: {uri} was made by {made}, not by {asked!a:.80}")
