"""The ids of rows that were deleted, and that no later run may bring back.

    <table>/_deleted/<blake2b>.keys    16 bytes an id (rows/ids.py), sorted; named after its bytes

Ids are there as keys alone: of somebody who has asked to be forgotten no name is kept. All files
count, so that a new one may be written before an old one goes.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from fmembed.errors import TableError
from fmembed.rows.ids import Keys, keys_of
from fmembed.storage import Storage

_FOLDER = "_deleted/"
_NAME = re.compile(rf"{_FOLDER}[0-9a-f]{{32}}\.keys")


class DeletedIds:
    """The list of one table."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self) -> Keys:
        """All keys, sorted, shape (ids,).

        Raises:
            TableError: A file is not as it was written: it is not known what has to stay out.
        """
        found = [keys_of([])]
        for path in self._paths():
            content = self._storage.get(path)
            if path != _path_of(content):
                raise TableError(
                    f"table: {path} in {self._storage.uri}, which says what was deleted and stays "
                    "out, is not as it was written; nothing was changed: take it from a backup "
                    "(fmembed undelete lets all that was deleted come back)"
                )
            found.append(np.frombuffer(content, dtype="S16"))
        return np.unique(np.concatenate(found))

    def add(self, ids: Keys) -> None:
        """Put keys on the list. Only under the lock."""
        old = self._paths()
        content = np.unique(np.concatenate([self.read(), ids])).tobytes()
        self._storage.put(_path_of(content), content)
        for path in old:
            if path != _path_of(content):
                self._storage.delete(path)

    def clear(self) -> None:
        """Empty it, whatever is in it. Only under the lock."""
        for path in self._paths():
            self._storage.delete(path)

    def _paths(self) -> list[str]:
        return [path for path in self._storage.paths(_FOLDER) if _NAME.fullmatch(path)]


def _path_of(content: bytes) -> str:
    return f"{_FOLDER}{hashlib.blake2b(content, digest_size=16).hexdigest()}.keys"
