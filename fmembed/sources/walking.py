"""What lies below a folder, or matches a pattern: one entry after another, in order.

An entry is a path and what the filesystem tells of it. What cannot be listed is an error and never
left out, as fsspec's `walk` does by itself: a refresh would take its rows for gone.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fsspec.archive import AbstractArchiveFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from fsspec.utils import glob_translate

from fmembed.storage import CloudFolder

# Why something is passed over, as counts and messages say it.
HIDDEN = "files whose names begin with a dot or underscore"
HIDDEN_FOLDER = "folders whose names begin with a dot or underscore"
SEEN = "links to folders that are read by another way"
LINKED = "links to folders, which a pattern does not follow"
STANDS = "empty objects that stand for folders"
DEAD_LINKS = "links that lead to nothing, or to where nobody may look"
GONE = "folders that are listed, and are not there"

Facts = Mapping[str, Any]
# What is in a folder so far down; without facts a folder that is to be looked into.
_Look = Callable[[str, int], Iterator[tuple[str, Facts | None]]]


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
        self._fs, self._root, self._has_pattern = fs, root, bool(pattern)
        self._matches = re.compile(glob_translate(pattern)).match if pattern else None
        steps = pattern[len(root) :].strip("/").split("/") if pattern else ["**"]
        fixed = next((i for i, step in enumerate(steps) if "**" in step), None)
        self._any_depth = fixed is not None
        folders = steps[: len(steps) - 1 if fixed is None else fixed]
        self._folders = [re.compile(glob_translate(step)).match for step in folders]
        # A link to a folder is followed after all others: a folder that is there is read by its own
        # name, and whatever is reached by two ways is read once, as a link to a folder above must.
        self._links: deque[str] = deque()
        self._seen: set[tuple[int, int]] = set()
        self._cloud = CloudFolder.of(fs, root)

    def __iter__(self) -> Iterator[tuple[str, Facts]]:
        """All that is no folder, in the order of paths where the filesystem has one; what links
        lead to comes after the rest.
        """
        if isinstance(self._fs, LocalFileSystem):
            yield from self._walk(self._root, 0, self._scan)
            while self._links:
                yield from self._walk(self._links.popleft(), 0, self._scan)
        elif self._cloud is None and _finds_by_itself(self._fs):
            found = self._fs.find(self._root, detail=True)
            yield from ((path, facts) for path, facts in found.items() if self._wants(path))
        else:
            given = set()
            for path, facts in self._walk(self._root, 0, self._list):
                # A page may name what is in the folder of another one, which names it too.
                if path not in given:
                    yield path, facts
                if self._cloud is None:
                    given.add(path)

    def _walk(self, folder: str, depth: int, look: _Look) -> Iterator[tuple[str, Facts]]:
        stack = [look(folder, depth)]
        while stack:
            for path, facts in stack[-1]:
                if facts is None:
                    stack.append(look(path, depth + len(stack)))
                    break
                yield path, facts
            else:
                stack.pop()

    def _scan(self, folder: str, depth: int) -> Iterator[tuple[str, Facts | None]]:
        """What is in a local folder; without facts a folder that is to be looked into.

        Ourselves: fsspec's dozen facts of each of 200,000 files take 206 MB and 3 s.
        """
        names: list[str] = []
        links: set[str] = set()
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in self._seen:
                self.passed_over[SEEN] += 1
                return
            self._seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as scanned:
                for entry in scanned:
                    name = f"{entry.name}/" if _is_folder(entry) else entry.name
                    names.append(name)
                    if entry.is_symlink():
                        links.add(name)
        except FileNotFoundError:
            # What goes while we look, as another program's temporary files do, was not there.
            if folder == self._root:
                raise
            return
        except OSError as e:
            raise _at(folder, e) from None
        # By paths, of which a folder's go on with a slash.
        names.sort()
        start = os.path.join(folder, "")
        for name in names:
            path = start + name
            if name.endswith("/"):
                path = path[:-1]
                if not self._may_hold(name[:-1], depth):
                    continue
                if name not in links:
                    yield path, None
                elif self._has_pattern:
                    self.passed_over[LINKED] += 1
                else:
                    self._links.append(path)
            elif self._wants(path) and not self._is_hidden(name, HIDDEN):
                told = facts_of(path, name in links)
                if told is not None:
                    yield path, told

    def _list(self, folder: str, depth: int) -> Iterator[tuple[str, Facts | None]]:
        """The same, of any other filesystem."""
        if self._cloud is not None and self._any_depth and depth >= len(self._folders):
            found = self._without_stand_ins(self._cloud.list_below(folder))
            yield from (each for each in found if self._wants(each[0]))
            return
        try:
            told = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            if folder != self._root:
                self.passed_over[GONE] += 1
            elif self._cloud is None:  # which has no folder where no object is
                raise
            return
        children = {}
        for facts in told:
            path = facts["name"].rstrip("/")
            if path != folder.rstrip("/"):  # its own, as some have it
                children[path + "/" * (facts["type"] == "directory")] = facts
        for path in sorted(children):
            name = path.rstrip("/").rpartition("/")[2]
            if path.endswith("/"):
                if self._may_hold(name, depth):
                    yield path.rstrip("/"), None
            elif self._wants(path) and not self._is_hidden(name, HIDDEN):
                yield path, children[path]

    def _without_stand_ins(self, found: Iterable[tuple[str, Facts]]) -> Iterator[tuple[str, Facts]]:
        """Without the empty objects `folder/` that consoles make: their slash is taken off, but
        they come where it sorts them, right before what is in the folder.
        """
        last: tuple[str, Facts] | None = None
        for path, facts in found:
            if last is not None:
                if not last[1]["size"] and path.startswith(f"{last[0]}/"):
                    self.passed_over[STANDS] += 1
                else:
                    yield last
            last = path, facts
        if last is not None:
            yield last

    def _wants(self, path: str) -> bool:
        return self._matches is None or self._matches(path) is not None

    def _may_hold(self, name: str, depth: int) -> bool:
        """Whether a folder is to be looked into: something below it can match, and it is not
        hidden, with all below it.
        """
        if depth < len(self._folders):
            can = self._folders[depth](name) is not None
        else:
            can = self._any_depth
        return can and not self._is_hidden(name, HIDDEN_FOLDER)

    def _is_hidden(self, name: str, reason: str) -> bool:
        is_hidden = name.startswith((".", "_"))
        if is_hidden:
            self.passed_over[reason] += 1
        return is_hidden


def facts_of(path: str, is_link: bool) -> Facts | None:
    """Of a local file, or of what a link leads to; None where it is gone.

    Raises:
        OSError: Nobody may say, or storage does not.
    """
    try:
        facts = os.stat(path)
    except OSError as e:
        if is_link:  # to nothing, round in circles, to where nobody may look: reading says which
            return {"type": "other"}
        if isinstance(e, FileNotFoundError):
            return None
        raise _at(path, e) from None
    kind = "directory" if stat.S_ISDIR(facts.st_mode) else "file"
    return {"type": kind, "size": facts.st_size, "mtime": facts.st_mtime}


def _finds_by_itself(fs: Any) -> bool:
    """Whether a filesystem lists all below a folder in a way of its own: archives, which know all
    that is in them, hf, and others with one request for all. fsspec's own leaves out what fails.
    """
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    own = type(fs).find is not AbstractFileSystem.find
    return own or isinstance(fs, AbstractArchiveFileSystem)


def _at(path: str, error: OSError) -> OSError:
    return type(error)(error.errno, f"{error.strerror}: {path}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():  # that goes round in circles, or to where nobody may look
            return False
        raise
