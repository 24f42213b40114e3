"""The files that a source's URI names, and what storage says of their content."""

from __future__ import annotations

import contextlib
import os
import posixpath
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from fmembed.errors import NoFilesError, SourceError, reason
from fmembed.redaction import redact, split_chain
from fmembed.sources.files import is_local
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.source import File
from fmembed.spec import SourceSpec
from fmembed.storage import filesystem, resolve_package

# Why something is passed over, as counts and messages say it.
HIDDEN = "files whose names begin with a dot or underscore"
HIDDEN_FOLDER = "folders whose names begin with a dot or underscore"
SEEN = "links to folders that are read by another way"


@dataclass(frozen=True)
class Listing:
    """Files of a filesystem, by path. Their names are relative to `root`.

    `is_named` says that the URI names these files, by a path or a pattern, and so whatever their
    suffix. `passed_over` counts what else is there, by the reason why it is not among them.
    """

    fs: Any
    root: str
    files: list[File]
    is_named: bool
    passed_over: dict[str, int]


def list_files(spec: SourceSpec) -> Listing:
    """List the files that `source.uri` names: one, a glob's, or all below a folder.

    Raises:
        SourceError: There is none, or it cannot be listed.
    """
    uri, shown = spec.uri, redact(spec.uri)
    if uri.startswith("package:"):
        uri = resolve_package(uri, "source.uri", SourceError)
    try:
        fs, root = open_fs(uri)
        # A cache looks for a file in its parent's list, which a web server need not show.
        inner = fs.fs if isinstance(fs, CachingFileSystem) else fs
        is_named = True
        passed_over: Counter[str] = Counter()
        if _is_glob(inner, root):
            found = _followed(inner, inner.glob(root, detail=True))
            root = posixpath.dirname(root[: min(root.find(c) for c in "*?[" if c in root)] + "x")
        elif not _is_web_file(root) and inner.isdir(root):
            is_named = False
            found = _find(inner, root, passed_over)
        else:
            found = _followed(inner, {root: inner.info(root)})
            root = posixpath.dirname(root)
        # A pipe or a link to nothing is listed too: its row is rejected, with its cause.
        listed = (
            File(path, _name(path, root), int(info.get("size") or 0), _revision(info))
            for path, info in found
            if info.get("type") != "directory"
        )
        files = []
        for file in listed:
            if any(map(_is_hidden, file.name.split("/"))):
                passed_over[HIDDEN] += 1
            else:
                files.append(file)
    except FileNotFoundError as e:
        status = getattr(e.__cause__, "status", None)
        why = f" (the server answers {status})" if status is not None else ""
        raise SourceError(f"source.uri: no such file or folder: {shown}{why}") from None
    except ImportError as e:
        raise SourceError(f"source.uri: {shown}: {e}") from None
    except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
        raise SourceError(f"source.uri: cannot read {shown}: {spec.conceal(reason(e))}") from None
    files.sort(key=lambda f: f.path)
    if not files:
        why = "".join(f"; passed over: {n:,} {reason_}" for reason_, n in passed_over.items())
        raise NoFilesError(f"source.uri: no file in {shown}{why}")
    return Listing(fs, root, files, is_named, dict(passed_over))


def open_fs(uri: str) -> tuple[Any, str]:
    """As `storage.filesystem`, but a path that is there is opened as it is named, and what a web
    server's URL holds of secrets is in the filesystem alone.
    """
    *caches, inner = split_chain(uri)
    if _is_web(inner) and set(caches) <= {"simplecache", "filecache", "blockcache"}:
        from fmembed.sources.web import open_web

        fs, url = open_web(inner)
        for cache in reversed(caches):  # which keep lists of what they hold
            fs = fsspec.filesystem(cache, fs=fs)
        return fs, url
    path = Path(uri.removeprefix("file://")).expanduser()
    if path.exists():
        return fsspec.filesystem("file"), str(path.absolute())
    return filesystem(uri)


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http://", "https://"))


def _is_web_file(uri: str) -> bool:
    """Whether a URL's suffix says that it is a file: asking whether it is a folder takes a page."""
    suffixes = tuple(s for format_ in FORMATS.values() for s in format_.suffixes)
    return _is_web(uri) and uri.lower().endswith(suffixes)


def unsigned(uri: str) -> str:
    """A URL that stays the same when its signature is another."""
    if not _is_web(uri):
        return redact(uri)
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_glob(fs: Any, root: str) -> bool:
    if _is_web(root):  # where brackets may be a host's
        return any(c in urlsplit(root).path for c in "*[")
    return any(c in root for c in "*?[") and not fs.exists(root)


def _name(path: str, root: str) -> str:
    """What row ids call a file; of a cached web server's, nothing of its URL's secrets.

    Bytes of a name that are no UTF-8 are written out: `caf\\xe9.txt`.
    """
    if _is_web(path):
        path, root = urlsplit(path).path, urlsplit(root).path
    below = root.rstrip("/") + "/"
    # For 200,000 files relpath takes 3 s.
    name = path[len(below) :] if path.startswith(below) else posixpath.relpath(path, root or "/")
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return name


def _followed(
    fs: Any, found: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What was found, a local link as what it leads to: snapshots of the hub are made of them."""
    for path, info in found.items():
        is_link = info.get("islink") and is_local(fs)
        yield path, _facts(partial(os.stat, path)) if is_link else info


def _find(fs: Any, root: str, passed_over: Counter[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All that is no folder below one, with its path; links to folders are followed, each once.

    On a local disk ourselves: fsspec's dozen facts of each of 200,000 files take 206 MB and 3 s,
    and a folder that it may not read it leaves out without a word.
    """
    if not isinstance(fs, LocalFileSystem):
        yield from fs.find(root, detail=True).items()
        return
    folders, links = [root], deque[str]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        # Links last: a folder that is there is read by its own name, and whatever is reached by
        # two ways is read once, as a link to a folder above must be.
        folder = folders.pop() if folders else links.popleft()
        # What goes while we look, as another program's temporary files do, was not there.
        with contextlib.suppress(FileNotFoundError):
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                passed_over[SEEN] += 1
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with _scan(folder) as scanned:
                entries = sorted(scanned, key=lambda e: e.name)
            for entry in entries:
                if _is_hidden(entry.name):  # with all below it
                    passed_over[HIDDEN_FOLDER if _is_folder(entry) else HIDDEN] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif _is_folder(entry):
                    links.append(entry.path)
                else:
                    told = _facts(entry.stat)
                    if "mtime" in told or entry.is_symlink():
                        yield entry.path, told


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that goes round in circles, or to where nobody may look
        return False


def _facts(look: Callable[[], os.stat_result]) -> Mapping[str, Any]:
    """Of a file, or of what a link leads to."""
    try:
        facts = look()
    except OSError:  # to nothing, or round in circles: reading says which
        return {"type": "other"}
    kind = "directory" if stat.S_ISDIR(facts.st_mode) else "file"
    return {"type": kind, "size": facts.st_size, "mtime": facts.st_mtime}


def _scan(folder: str) -> Any:
    try:
        return os.scandir(folder)
    except PermissionError as e:
        raise PermissionError(e.errno, f"{e.strerror}: {folder}") from None


def _revision(info: Mapping[str, Any]) -> str:
    # By the names that local files, obstore, and other fsspec filesystems use.
    for name in (
        "e_tag", "ETag", "etag", "mtime", "last_modified", "LastModified", "Last-Modified",
        "updated",
    ):  # fmt: skip
        if info.get(name) is not None:
            return str(info[name])
    return ""
