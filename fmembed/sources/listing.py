"""The files that a source's URI names, and what storage says of their content."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.cached import CachingFileSystem

from fmembed.errors import NoFilesError, SourceError, reason
from fmembed.redaction import redact, split_chain
from fmembed.sources.file_list import FileList
from fmembed.sources.files import is_local
from fmembed.sources.formats.registry import FORMATS
from fmembed.sources.source import File
from fmembed.sources.walking import HIDDEN, Facts, Walk, facts_of
from fmembed.spec import SourceSpec
from fmembed.storage import filesystem, is_cloud, resolve_package


@dataclass(frozen=True)
class Listing:
    """Files of a filesystem, by path. Their names are relative to `root`.

    `is_named` says that the URI names these files, by a path or a pattern, and so whatever their
    suffix. `passed_over` counts what else is there, by the reason why it is not among them.
    """

    fs: Any
    root: str
    files: FileList
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
        passed_over: Counter[str] = Counter()
        found: Iterable[tuple[str, Facts]]
        is_named = True
        if _is_glob(inner, root):
            pattern = root.replace("?", "[?]") if _is_web(root) else root
            root = posixpath.dirname(root[: min(root.find(c) for c in "*?[" if c in root)] + "x")
            found = walk = Walk(inner, root, pattern)
            passed_over = walk.passed_over
        elif not _is_web_file(root) and (_is_bucket(inner, root) or inner.isdir(root)):
            is_named = False
            found = walk = Walk(inner, root)
            passed_over = walk.passed_over
        else:
            facts = inner.info(root)
            if facts.get("islink") and is_local(fs):  # as what it leads to
                facts = facts_of(root, is_link=True)
            found = [(root, facts)]
            root = posixpath.dirname(root)
        files = FileList(_listed(found, root, passed_over))
        if not files.is_sorted:  # what links lead to came last
            files = FileList(sorted(files))
    except FileNotFoundError as e:
        status = getattr(e.__cause__, "status", None)
        why = f" (the server answers {status})" if status is not None else ""
        where = f" (below {os.getcwd()})" if not re.match(r"/|~|[a-z]+:", uri) else ""
        raise SourceError(f"source.uri: no such file or folder: {shown}{where}{why}") from None
    except ImportError as e:
        raise SourceError(f"source.uri: {shown}: {e}") from None
    except Exception as e:  # by filesystem: OSError, obstore's own, aiohttp's own
        raise SourceError(f"source.uri: cannot read {shown}: {spec.conceal(reason(e))}") from None
    if not files:
        why = "".join(f"; passed over: {n:,} {reason_}" for reason_, n in passed_over.items())
        raise NoFilesError(f"source.uri: no file in {shown}{why}")
    return Listing(fs, root, files, is_named, dict(passed_over))


def _listed(
    found: Iterable[tuple[str, Facts]], root: str, passed_over: Counter[str]
) -> Iterator[File]:
    """What was found as files, but for folders and what is hidden."""
    for path, facts in found:
        name = _name(path, root)
        if name.startswith((".", "_")) or "/." in name or "/_" in name:
            passed_over[HIDDEN] += 1
        # A pipe or a link to nothing is listed too: its row is rejected, with its cause.
        elif facts.get("type") != "directory":
            yield File(path, name, int(facts.get("size") or 0), _revision(facts))


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


def _is_bucket(fs: Any, root: str) -> bool:
    """Whether a cloud's path is a whole bucket, of which some servers say that it is an object."""
    return is_cloud(fs) and "/" not in root


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
    if not root:  # of an archive
        name = posixpath.normpath(f"/{path}").lstrip("/")
    elif path.startswith(below):  # for 200,000 files relpath takes 3 s
        name = path[len(below) :]
    else:
        name = posixpath.relpath(path, root)
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return name


def _revision(info: Facts) -> str:
    # By the names that local files, obstore, and other fsspec filesystems use.
    for name in (
        "e_tag", "ETag", "etag", "mtime", "last_modified", "LastModified", "Last-Modified",
        "updated",
    ):  # fmt: skip
        if info.get(name) is not None:
            return str(info[name])
    return ""
