"""Files that a dataset names: no link or redirect leads out of a root, and no pipe is waited for.

Of other filesystems than local ones and HTTP (S3, zip, ...) paths lead nowhere but to themselves.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import fsspec.asyn

from fmembed.sources.source import BadRow

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 10
_READ_BYTES = 2**20
# Regular files by their mode, but made by the kernel as they are read.
_OF_THE_KERNEL = ("/proc/", "/sys/")


def is_local(fs: Any) -> bool:
    """Whether a filesystem is this machine's own."""
    return "local" in protocols(fs)


class TooLargeError(Exception):
    """A file holds more than a row may: `num_bytes` at least. Which field says so, callers know."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"{num_bytes:,} bytes")
        self.num_bytes = num_bytes


def read_whole(fs: Any, path: str, most: int, size: int = 0) -> bytes:
    """Read a file, and no more of it than a row may hold.

    Args:
        fs: Where.
        path: Which.
        most: Bytes that it may have.
        size: What a listing says of it, 0 where it says nothing.

    Raises:
        BadRow: A local one that is no regular file.
        TooLargeError: It holds more.
    """
    if size > most:
        raise TooLargeError(size)
    if is_local(fs):
        check_regular(fs, path)
        # It may have become a pipe since: opened so, that is not waited for either.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise _not_regular(path)
            return _read_up_to(file, most, facts.st_size)
    # Where a listing tells the size one request does; a web server's word for it is not taken.
    if size and "https" not in protocols(fs):
        return bytes(fs.cat_file(path))
    with fs.open(path, "rb") as file:
        return _read_up_to(file, most, getattr(file, "size", None) or 0)


def _read_up_to(file: Any, most: int, stated: int) -> bytes:
    if stated > most:
        raise TooLargeError(stated)
    pieces, num_bytes = [], 0
    while piece := bytes(file.read(_READ_BYTES)):
        pieces.append(piece)
        num_bytes += len(piece)
        if num_bytes > most:
            raise TooLargeError(num_bytes)
    return b"".join(pieces)


def check_regular(fs: Any, path: str) -> None:
    """Refuse what is no file: opening a pipe waits for ever, and a device may do anything.

    Raises:
        BadRow: A local pipe, socket, device, folder, or page of the kernel.
    """
    if is_local(fs):
        of_kernel = os.path.realpath(path).startswith(_OF_THE_KERNEL)
        if of_kernel or not stat.S_ISREG(os.stat(path).st_mode):
            raise _not_regular(path)


def open_root(fs: Any, folder: str, most: int) -> Callable[[str], bytes]:
    """How to read what lies below a folder or URL, and nothing outside it.

    Local links are followed as long as they stay inside; so are redirects. The root may be a link.

    Returns:
        A function from a path below the root to the file's content. It raises BadRow where
        that is outside, or no regular file, TooLargeError where it has more than `most` bytes.
    """
    folder = folder.rstrip("/")
    if is_local(fs):
        root = os.path.join(os.path.realpath(folder or "/"), "")

        def read_local(path: str) -> bytes:
            real = os.path.realpath(f"{folder}/{path}")
            if not real.startswith(root):
                raise BadRow("outside the root", "a link leads out of source.root")
            return read_whole(fs, real, most)

        return read_local
    if "https" in protocols(fs):
        return lambda path: bytes(fsspec.asyn.sync(fs.loop, _get_below, fs, folder, path, most))
    return lambda path: read_whole(fs, f"{folder}/{path}", most)


async def _get_below(fs: Any, folder: str, path: str, most: int) -> bytes:
    """Get a page, following redirects by hand: aiohttp would ask whomever they name."""
    session = await fs.set_session()
    root, url = fs.encode_url(folder), fs.encode_url(f"{folder}/{path}")
    for _ in range(_MAX_REDIRECTS):
        if not _is_below(url, root):
            raise BadRow("outside the root", "its URL or a redirect leads out of source.root")
        async with session.get(url, **{**fs.kwargs, "allow_redirects": False}) as answer:
            target = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or target is None:
                if answer.status == 404:
                    raise FileNotFoundError(f"no such file: {path}")
                answer.raise_for_status()
                pieces, num_bytes = [], 0
                async for piece in answer.content.iter_chunked(_READ_BYTES):
                    pieces.append(piece)
                    num_bytes += len(piece)
                    if num_bytes > most:
                        raise TooLargeError(num_bytes)
                return b"".join(pieces)
            url = answer.url.join(fs.encode_url(target))
            if root.user is not None:
                url = url.with_user(root.user).with_password(root.password)
    raise BadRow("unreadable file", f"more than {_MAX_REDIRECTS} redirects")


def _is_below(url: Any, root: Any) -> bool:
    """Whether a URL is below another, by every way in which a server may read its path."""
    same = (url.scheme, url.host, url.port) == (root.scheme, root.host, root.port)
    if (root.scheme, url.scheme, url.host) == ("http", "https", root.host):
        same = root.is_default_port() and url.is_default_port()
    path, base = _plain(url.raw_path), _plain(root.raw_path).rstrip("/") + "/"
    # Some servers take what follows a semicolon off each step.
    steps = [step.partition(";")[0].strip() for step in re.split(r"[/\\]", path)]
    return same and path.startswith(base) and ".." not in steps


def _plain(path: str) -> str:
    while (plain := unquote(path)) != path:
        path = plain
    return path


def protocols(fs: Any) -> tuple[str, ...]:
    """What a filesystem is called."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _not_regular(path: str) -> BadRow:
    return BadRow("not a regular file", f"{os.path.basename(path)} is no regular file")
