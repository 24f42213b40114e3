"""What was deleted by hand, and no later run may bring back.

    <table>/_deleted/<blake2b>.ids         keys of ids, 16 bytes each (rows/ids.py), sorted
    <table>/_deleted/<blake2b>.contents    keys of contents, of rows whose ids are places
    <table>/_deleted/pending               that the table still has some of them
    <table>/_deleted/since                 the first version that has none of them

They are there as keys alone: of somebody who has asked to be forgotten no name is kept. Files are
named after their bytes, and all of them count, so that a new one is written before an old one goes.

Of tables side by side in a store (store.py) each goes by the lists of all: what was deleted from
one model's table does not come back in another's.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from fmembed.errors import TableError
from fmembed.rows.ids import Keys, LeftOut, keys_of
from fmembed.storage import Storage

# What a store of tables has, at its top.
STORE_MARK = "_store.json"
_FOLDER, _PENDING, _SINCE = "_deleted/", "_deleted/pending", "_deleted/since"
_NAME = re.compile(rf"{_FOLDER}[0-9a-f]{{32}}\.(ids|contents)")


class Deleted:
    """The lists of one table; `beside` are those of the others in its store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = self.storage = storage

    @property
    def beside(self) -> list[Deleted]:
        """The lists of the tables in the same store; of a table that is in none, none."""
        outer, _, name = self._storage.uri.rpartition("/tables/")
        if not outer or outer.endswith(":/") or "/" in name:
            return []
        store = Storage(outer)
        if store.size_bytes(STORE_MARK) is None:
            return []
        names = [p for p in store.paths("tables/") if p.endswith("/") and p != f"tables/{name}/"]
        return [Deleted(Storage(f"{outer}/{path.rstrip('/')}")) for path in names]

    def read(self) -> LeftOut:
        """All keys, sorted.

        Raises:
            TableError: A file is not as it was written: it is not known what has to stay out.
        """
        every = [self._read(), *(other._read() for other in self.beside)]
        ids, contents = ([getattr(o, kind) for o in every] for kind in ("ids", "contents"))
        return LeftOut(np.unique(np.concatenate(ids)), np.unique(np.concatenate(contents)))

    def _read(self) -> LeftOut:
        found: dict[str, list[Keys]] = {"ids": [keys_of([])], "contents": [keys_of([])]}
        for path in self._paths():
            content, kind = self._storage.get(path), path.rpartition(".")[2]
            if path != _path_of(content, kind):
                raise TableError(
                    f"table: {path} in {self._storage.uri}, which says what was deleted and stays "
                    "out, is not as it was written; nothing was changed: take it from a backup "
                    "(fmembed undelete lets all that was deleted come back)"
                )
            found[kind].append(np.frombuffer(content, dtype="S16"))
        return LeftOut(**{kind: np.unique(np.concatenate(some)) for kind, some in found.items()})

    def begin(self, more: LeftOut) -> None:
        """Put keys on the lists, of which the table may have rows until `finish`. Only under the
        lock.
        """
        old, known = self._paths(), self._read()
        self._storage.put(_PENDING, b"")
        kept = set()
        for kind in ("ids", "contents"):
            keys = np.unique(np.concatenate([getattr(known, kind), getattr(more, kind)]))
            if len(keys):
                content = keys.tobytes()
                kept.add(path := _path_of(content, kind))
                self._storage.put(path, content)
        for path in set(old) - kept:
            self._storage.delete(path)

    @property
    def was_stopped(self) -> bool:
        """Whether whoever listed rows was killed before they were out."""
        return self._storage.size_bytes(_PENDING) is not None

    @property
    def is_pending(self) -> bool:
        """Whether rows that are listed may be in the table: whoever listed them was killed, or has
        listed them for another table of the store.
        """
        return self.was_stopped or len(self.read()) > len(self._read())

    @property
    def since(self) -> int:
        """The first version without them, by what was written last; 0 where nothing was."""
        try:
            return int(self._storage.get(_SINCE))
        except (FileNotFoundError, ValueError):
            return 0

    def finish(self, version: int) -> None:
        """The table has none of them any more, from a version on. Only under the lock."""
        is_pending = self.is_pending
        if is_pending and self.beside:
            self.begin(self.read())
        if is_pending or self.since > version:  # a log that was made anew counts anew
            self._storage.put(_SINCE, str(version).encode())
        self._storage.delete(_PENDING)

    def clear(self) -> None:
        """Empty the lists, whatever is in them. Only under the lock."""
        for path in [*self._paths(), _PENDING, _SINCE]:
            self._storage.delete(path)

    def _paths(self) -> list[str]:
        return [path for path in self._storage.paths(_FOLDER) if _NAME.fullmatch(path)]


def _path_of(content: bytes, kind: str) -> str:
    return f"{_FOLDER}{hashlib.blake2b(content, digest_size=16).hexdigest()}.{kind}"
