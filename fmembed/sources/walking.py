"""What lies below a folder, or matches a pattern: one entry after another, in order.

An entry is a path and what the filesystem tells of it. What cannot be listed is an error and never
left out, as fsspec's `find` and `glob` do: a refresh would take its rows for gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from fmembed.storage import list_below

# Why something is passed over, as counts and messages say it.
HIDDEN = "files whose names begin with a dot or underscore"
HIDDEN_FOLDER = "folders whose names begin with a dot or underscore"
SEEN = "links to folders that are read by another way"

Facts = Mapping[str, Any]


class Walk:
    """A look through a filesystem, from one folder down.

    `passed_over` counts what is not handed on, by reason. Of a local folder with ten million files
    no more is held than their names.
    """

    def __init__(self, fs: Any, root: str, pattern: str = "") -> None:
        """Begin.

        Args:
            fs: Where.
            root: The folder.
            pattern: What paths of files below it must match, as a glob; none where all are wanted.
                No folder is looked into below which nothing can match.
        """
        self.passed_over: Counter[str] = Counter()
        self._fs, self._root = fs, root
        self._is_local = isinstance(fs, LocalFileSystem)
        self._matches = re.compile(glob_translate(pattern)).match if pattern else None
        steps = pattern[len(root) :].strip("/").split("/") if pattern else ["**"]
        fixed = next((i for i, step in enumerate(steps) if "**" in step), None)
        self._any_depth = fixed is not None
        folders = steps[: len(steps) - 1 if fixed is None else fixed]
        self._folders = [re.compile(glob_translate(step)).match for step in folders]
        # A link to a folder is followed after all others: a folder that is there is read by its own
        # name, and whatever is reached by two ways is read once, as a link to a folder above must.
        self._links: deque[tuple[str, int]] = deque()
        self._seen: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[tuple[str, Facts]]:
        """All that is no folder, in the order of paths; but what links lead to after the rest."""
        yield from self._below(self._root, 0)
        while self._links:
            yield from self._below(*self._links.popleft())

    def _below(self, folder: str, depth: int) -> Iterator[tuple[str, Facts]]:
        stack = [self._entries(folder, depth)]
        while stack:
            for path, facts in stack[-1]:
                if facts is None:
                    stack.append(self._entries(path, depth + len(stack)))
                    break
                yield path, facts
            else:
                stack.pop()

    def _entries(self, folder: str, depth: int) -> Iterator[tuple[str, Facts | None]]:
        """What is in a folder; without facts a folder that is to be looked into."""
        if self._any_depth and depth >= len(self._folders):
            below = list_below(self._fs, folder)
            if below is not None:
                yield from (each for each in below if self._wants(each[0]))
                return
        # What goes while we look, as another program's temporary files do, was not there.
        suppressed = (FileNotFoundError,) if folder != self._root else ()
        names: list[str] = []
        with contextlib.suppress(*suppressed):
            names, links, told = self._scan(folder) if self._is_local else self._list(folder)
        # By paths, of which a folder's go on with a slash.
        names.sort()
        start = os.path.join(folder, "")
        for name in names:
            path = told[name]["name"].rstrip("/") if name in told else start + name
            if name.endswith("/"):
                if not self._may_hold(name[:-1], depth):
                    continue
                if _is_hidden(name):  # with all below it
                    self.passed_over[HIDDEN_FOLDER] += 1
                elif name in links:
                    self._links.append((path[:-1], depth + 1))
                else:
                    yield path.rstrip("/"), None
            elif self._wants(path):
                if _is_hidden(name):
                    self.passed_over[HIDDEN] += 1
                else:
                    facts = told.get(name) or facts_of(partial(os.stat, path))
                    if facts["type"] != "other" or name in links:
                        yield path, facts

    def _wants(self, path: str) -> bool:
        return self._matches is None or self._matches(path) is not None

    def _may_hold(self, name: str, depth: int) -> bool:
        """Whether something below a folder can match."""
        if depth < len(self._folders):
            return self._folders[depth](name) is not None
        return self._any_depth

    def _scan(self, folder: str) -> tuple[list[str], set[str], dict[str, Facts]]:
        """Names in a local folder, those of folders with a slash; which of them are links.

        Ourselves: fsspec's dozen facts of each of 200,000 files take 206 MB and 3 s.
        """
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in self._seen:
            self.passed_over[SEEN] += 1
            return [], set(), {}
        self._seen.add((facts.st_dev, facts.st_ino))
        names, links = [], set[str]()
        try:
            scanned = os.scandir(folder)
        except PermissionError as e:
            raise PermissionError(e.errno, f"{e.strerror}: {folder}") from None
        with scanned:
            for entry in scanned:
                name = f"{entry.name}/" if _is_folder(entry) else entry.name
                names.append(name)
                if entry.is_symlink():
                    links.add(name)
        return names, links, {}

    def _list(self, folder: str) -> tuple[list[str], set[str], dict[str, Facts]]:
        """As `_scan`, of any other filesystem, and what it tells of each."""
        told = {}
        for facts in self._fs.ls(folder, detail=True):
            path = facts["name"].rstrip("/")
            if path != folder.rstrip("/"):  # its own, as some have it
                is_folder = facts["type"] == "directory"
                told[path.rpartition("/")[2] + ("/" if is_folder else "")] = facts
        return list(told), set(), told


def facts_of(look: Callable[[], os.stat_result]) -> Facts:
    """Of a file, or of what a link leads to."""
    try:
        facts = look()
    except OSError:  # to nothing, or round in circles: reading says which
        return {"type": "other"}
    kind = "directory" if stat.S_ISDIR(facts.st_mode) else "file"
    return {"type": kind, "size": facts.st_size, "mtime": facts.st_mtime}


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that goes round in circles, or to where nobody may look
        return False
