"""Files of a web server, by URL: a source's, or those below its root."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import aiohttp
from fsspec.implementations.http import HTTPFileSystem


class WebFiles(HTTPFileSystem):  # type: ignore[misc]
    """fsspec's HTTPFileSystem, with user, password and signature in it and not in the paths.

    So no name, row id, shard or log that a path ends up in holds them, and a folder's serve for
    each of its files. No other host is sent them.
    """

    def __init__(self, origin: str, login: str, query: str, **options: Any) -> None:
        super().__init__(**options)
        self._origin, self._login, self._query = origin, login, query

    def encode_url(self, url: str) -> Any:
        """The URL that is asked for, given a path."""
        if url == self._origin or url.startswith(self._origin + "/"):
            if self._login:
                url = url.replace("://", f"://{self._login}@", 1)
            if self._query:
                url += ("&" if "?" in url else "?") + self._query
        return super().encode_url(url)

    async def _isdir(self, path: str) -> bool:
        # A server that shows a file need not show a list of them (403).
        try:
            return bool(await super()._isdir(path))
        except aiohttp.ClientResponseError:
            return False


def open_web(url: str) -> tuple[WebFiles, str]:
    """The files that an http or https URL is among, and the URL without its secrets.

    Raises:
        ValueError: It cannot be read, as where a password holds a slash.
    """
    try:
        parts = urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # whose message quotes what it takes for a port
        is_whole = False
    if not is_whole:
        raise ValueError("no host can be told; in a user or password write / as %2F, and so on")
    origin = f"{parts.scheme}://{host}"
    # No server may compress its answers: a body of a megabyte could unfold to gigabytes, at once.
    options = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
    return WebFiles(origin, login, parts.query, client_kwargs=options), origin + parts.path
