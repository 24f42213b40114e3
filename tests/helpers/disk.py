"""A disk that forgets at a crash what was not forced to it, as a layer over `os.fsync`.

A file keeps the bytes it had when it was last synced, none if it never was; a folder the names it
had. So a name may be there without its bytes, and what was deleted may come back.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

_Inode = tuple[int, int]


class Disk:
    """What of one folder would outlive a crash of the machine."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._content: dict[_Inode, bytes] = {}
        self._names: dict[_Inode, dict[str, tuple[_Inode, bool]]] = {}
        self._open: list[int] = []  # so that no inode's number is used again

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """See what is synced from here on."""
        fsync = os.fsync

        def watch(handle: int) -> None:
            fsync(handle)
            self._note(handle)

        with mock.patch("os.fsync", watch):
            yield self
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._open:
            os.close(handle)
        self._open = []

    def _note(self, handle: int) -> None:
        own = os.dup(handle)
        self._open.append(own)
        status = os.fstat(own)
        path = Path(os.readlink(f"/proc/self/fd/{own}"))
        if stat.S_ISDIR(status.st_mode):
            entries = {}
            for entry in os.scandir(path):
                child = entry.stat(follow_symlinks=False)
                self._open.append(os.open(entry.path, os.O_RDONLY))
                entries[entry.name] = ((child.st_dev, child.st_ino), stat.S_ISDIR(child.st_mode))
            self._names[status.st_dev, status.st_ino] = entries
        else:
            self._content[status.st_dev, status.st_ino] = path.read_bytes()

    def settle(self) -> None:
        """All that is there now reaches the disk, as after a minute without a crash."""
        for folder, _, files in os.walk(self._root):
            for path in (*(Path(folder) / f for f in files), Path(folder)):
                handle = os.open(path, os.O_RDONLY)
                self._note(handle)
                os.close(handle)

    def crash(self) -> None:
        """Take the folder back to what has reached the disk."""
        status = self._root.stat()
        kept = self._root.with_name(f"{self._root.name}-kept")
        self._restore((status.st_dev, status.st_ino), kept)
        shutil.rmtree(self._root)
        kept.rename(self._root)
        self.close()
        self._content.clear()
        self._names.clear()
        self.settle()

    def _restore(self, folder: _Inode, to: Path) -> None:
        to.mkdir()
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            if is_folder:
                self._restore(inode, to / name)
            else:
                (to / name).write_bytes(self._content.get(inode, b""))
