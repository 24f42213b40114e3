"""Objects by URL: a local folder, s3://, gs:// or az://, through obstore.

obstore shares its URL schemes and environment variables with `deltalake`, so one set of
credentials serves parts, log, lock, records and report. Credentials are never arguments: they come
from the environment or from the cloud's own config files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import posixpath
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.core
import obstore
import obstore.fsspec
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from fmembed.errors import StorageError, UserError, reason
from fmembed.redaction import redact as redact
from fmembed.redaction import scrub as scrub
from fmembed.terminal import say


def resolve_package(uri: str, field: str, error: type[UserError]) -> str:
    """Resolve `package:<python package>[/folder]` to a path, without importing the package.

    Raises:
        error: No such package is installed; the message begins with `field`.
    """
    package, _, folder = uri.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise error(f"{field}: no Python package {package!r} is installed; pip install it first")
    return str(Path(found.submodule_search_locations[0]) / folder)


# What `put` leaves of an object on a local disk when it is killed half way.
HALF_WRITTEN = re.compile(r"#[0-9a-f]{8}\.tmp$")
_THREADS = 16
# Of a draft: so many new bytes at least are forced to the disk at once.
_SYNC_BYTES = 32 * 2**20
_CLOUDS = ("s3", "s3a", "gs", "az", "abfs", "abfss")


class Storage:
    """The objects below one folder or URL. Paths are relative to it."""

    def __init__(self, uri: str) -> None:
        uri = uri.removeprefix("file://")
        if "://" in uri:
            self.uri = uri.rstrip("/")
        else:
            path = Path(uri).expanduser().absolute()
            # Delta Lake takes `link/..` for the folder of the link, the system for its target's.
            self.uri = os.path.realpath(path) if ".." in path.parts else str(path)
        self.local = None if "://" in self.uri else Path(self.uri)

    @functools.cached_property
    def _store(self) -> ObjectStore:
        try:
            if self.local:
                return LocalStore(self.uri, mkdir=True)
            return from_url(self.uri, **_options(self.uri))
        except (BaseError, OSError, ValueError) as e:
            raise self._error("reach", "", e) from None

    def put(self, path: str, content: bytes | memoryview) -> None:
        """Write one object whole: readers see the old content or the new, never a piece.

        When this returns the object outlives a crash of the machine. In one request even where
        large: a writer that is killed leaves no unfinished upload, which no listing shows and every
        bill does.

        Raises:
            StorageError: Full, forbidden, out of reach.
        """
        try:
            if self.local:
                self._check(path)
                _put_local(self.local / path, content, replace=True)
            else:
                obstore.put(self._store, path, content, use_multipart=False)
        except (BaseError, OSError) as e:
            raise self._error("write", path, e) from None

    @contextlib.contextmanager
    def draft(self, like: str) -> Iterator[Draft]:
        """An object that gets its name when it is written; unless it does, nothing is left of it.

        Args:
            like: A path as it may get, beside which a local one is written.

        Raises:
            StorageError: As for `put`.
        """
        try:
            if self.local:
                self._check(like)
                with _local_draft(self.local / like) as draft:
                    yield draft
            else:
                yield _CloudDraft(self)
        except OSError as e:  # it has no name yet
            raise self._error("write", "a new file", e) from None

    def create(self, path: str, content: bytes) -> bool:
        """Write an object unless there is one, in one atomic step; whether it was written."""
        try:
            if self.local:
                self._check(path)
                _put_local(self.local / path, content, replace=False)
            else:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
        except (AlreadyExistsError, FileExistsError):
            return False
        except (BaseError, OSError) as e:
            raise self._error("write", path, e) from None
        return True

    def sync(self, *paths: str) -> None:
        """Make what others have written to a local disk outlive a crash of the machine.

        Only what is there: nothing happens to the other paths.
        """
        if self.local is None:
            return
        try:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    _sync(self.local / path)
            # Each folder's own entry too, up to the one that holds the table.
            within = {p for path in paths for p in (self.local / path).parents}
            for folder in sorted(within - set(self.local.parent.parents)):
                _sync(folder)
        except OSError as e:
            raise self._error("write", "", e) from None

    def get(self, path: str) -> bytes:
        """Read one object.

        Raises:
            FileNotFoundError: There is none.
            StorageError: Forbidden or out of reach.
        """
        return bytes(self.get_buffer(path))

    def get_buffer(self, path: str) -> memoryview:
        """As `get`, without a copy."""
        if self.local and not os.path.isdir(self.local):  # looking makes no folder
            raise FileNotFoundError(path)
        try:
            self._check(path)
            return memoryview(obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as e:
            raise self._error("read", path, e) from None

    def get_all(self, paths: Iterable[str]) -> Iterator[bytes | None]:
        """Read objects, several at once, as each takes a request; in order, None for one that is
        not there.
        """

        def read(path: str) -> bytes | None:
            try:
                return self.get(path)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            yield from pool.map(read, paths)

    def size_bytes(self, path: str) -> int | None:
        """An object's size, None where there is none."""
        if self.local and not os.path.isdir(self.local):
            return None
        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as e:
            raise self._error("read", path, e) from None

    def modified(self, path: str) -> datetime:
        """When an object was written, by the storage's own clock.

        Raises:
            FileNotFoundError: There is none.
            StorageError: Forbidden or out of reach.
        """
        try:
            return obstore.head(self._store, path)["last_modified"]
        except FileNotFoundError:
            raise
        except (BaseError, OSError) as e:
            raise self._error("read", path, e) from None

    def paths(self, prefix: str = "") -> list[str]:
        """What lies directly under a prefix that ends at a slash, sorted; folders end at one."""
        if self.local and not os.path.isdir(self.local):
            return []
        try:
            found = obstore.list_with_delimiter(self._store, prefix or None)
        except (BaseError, OSError) as e:
            raise self._error("list", prefix, e) from None
        folders = [f"{name}/" for name in found["common_prefixes"]]
        files = [str(meta["path"]) for meta in found["objects"]]
        return sorted([*(f for f in files if not HALF_WRITTEN.search(f)), *folders])

    def walk(self, prefix: str) -> list[str]:
        """All objects below a prefix that ends at a slash, however deep."""
        if self.local and not os.path.isdir(self.local / prefix):
            return []
        try:
            return [
                str(meta["path"]) for some in obstore.list(self._store, prefix) for meta in some
            ]
        except (BaseError, OSError) as e:
            raise self._error("list", prefix, e) from None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Path to size in bytes of each object directly under a prefix that ends at a slash."""
        if self.local and not os.path.isdir(self.local / prefix):
            return {}
        try:
            found = obstore.list_with_delimiter(self._store, prefix or None)
        except (BaseError, OSError) as e:
            raise self._error("list", prefix, e) from None
        return {str(meta["path"]): int(meta["size"]) for meta in found["objects"]}

    def delete(self, path: str) -> None:
        """Remove one object; nothing happens where there is none."""
        try:
            if self.local:  # half written ones have names that obstore does not take
                self._check(path)
                (self.local / path).unlink()
            else:
                obstore.delete(self._store, path)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as e:
            raise self._error("delete", path, e) from None

    def move(self, path: str, to: str) -> None:
        """Rename one object, over what is there."""
        try:
            if self.local:
                self._check(path)
                self._check(to)
                (self.local / to).parent.mkdir(parents=True, exist_ok=True)
                (self.local / path).replace(self.local / to)
                self.sync(to, path)
            else:
                obstore.rename(self._store, path, to)
        except (BaseError, OSError) as e:
            raise self._error("move", path, e) from None

    def open(self, path: str) -> Any:
        """Open an object for reading by ranges, as a binary file."""
        self._check(path)
        fs, root = filesystem(self.uri)
        return fs.open(f"{root}/{path}", "rb")

    def _check(self, path: str) -> None:
        """Refuse a local path that leads out of the folder by a link, and wait for no pipe.

        Raises:
            StorageError: One of its folders is a link, or it is no file.
        """
        if self.local is None:
            return
        for folder in (*reversed(Path(path).parents[:-1]), Path(path)):
            place = self.local / folder
            is_whole = folder == Path(path)
            if place.is_symlink() and not (is_whole and place.is_file()):
                raise StorageError(
                    f"table: {place} is a link; a table's folders lie in it, and nothing is "
                    "written or read through links out of it"
                )
            if is_whole and place.exists() and not place.is_file():
                raise StorageError(f"table: {place} is no regular file, and is not opened")

    @property
    def delta_uri(self) -> str:
        """The folder as `deltalake` takes it."""
        return self.local.as_uri() if self.local else self.uri

    def delta_options(self) -> dict[str, str]:
        """What `deltalake` needs to be told because it does not find it by itself."""
        session = _aws_session(self.uri)
        if session is None:
            return {}
        found = session.get_credentials().get_frozen_credentials()
        options = {
            "AWS_ACCESS_KEY_ID": found.access_key,
            "AWS_SECRET_ACCESS_KEY": found.secret_key,
            "AWS_SESSION_TOKEN": found.token,
            "AWS_REGION": os.environ.get("AWS_REGION") or session.region_name,
        }
        return {name: value for name, value in options.items() if value}

    def _error(self, verb: str, path: str, error: Exception) -> StorageError:
        where = f"{path} in {self.uri}" if path else self.uri
        return StorageError(f"output.uri: cannot {verb} {where}: {reason(error)}")


def tell(text: str) -> None:
    """Say something in passing, on stderr."""
    say(scrub(text))


class Draft(ABC):
    """An object that is being written."""

    @abstractmethod
    def write(self, content: bytes) -> int:
        """Add to it."""

    @abstractmethod
    def publish(self, path: str) -> None:
        """Put it in its place, as `Storage.put` does."""


class _CloudDraft(Draft):
    """One in memory, as it is sent in one request."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._content = storage, io.BytesIO()

    def write(self, content: bytes) -> int:
        return self._content.write(content)

    def publish(self, path: str) -> None:
        self._storage.put(path, self._content.getbuffer())


class _LocalDraft(Draft):
    """One beside its place; the disk is at work on it while the rest is made.

    Of a part of 256 MiB that is written in 1.5 s, forcing it to the disk took 0.6 s at the end.
    """

    def __init__(self, half: Path, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._half, self._file, self._pool = half, file, pool
        self._num_new = 0
        self._syncing: Future[None] | None = None

    def write(self, content: bytes) -> int:
        num_bytes = self._file.write(content)
        self._num_new += num_bytes
        if self._num_new >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._file.flush()
            self._syncing = self._pool.submit(os.fsync, self._file.fileno())
            self._num_new = 0
        return num_bytes

    def publish(self, path: str) -> None:
        self._file.flush()
        self._wait()
        os.fsync(self._file.fileno())
        place = self._half.with_name(posixpath.basename(path))
        self._half.replace(place)
        _sync(place.parent)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # raises what the disk has said


@contextlib.contextmanager
def _local_draft(like: Path) -> Iterator[_LocalDraft]:
    half = _beside(like)
    try:
        with half.open("xb") as file, ThreadPoolExecutor(1) as pool:
            yield _LocalDraft(half, file, pool)
    finally:
        half.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Where a file is written before it is moved to its place, whose folder is there then."""
    absent = [p for p in path.parents if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in absent:
        _sync(folder.parent)
    return path.with_name(f"{path.name}#{secrets.token_hex(4)}.tmp")


def _put_local(path: Path, content: bytes | memoryview, replace: bool) -> None:
    """Write a file beside its place, force it to the disk, and move it there."""
    half = _beside(path)
    try:
        with half.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            half.replace(path)
        else:
            os.link(half, path)
    finally:
        half.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one that may be passed through and not listed, as homes often are
            return
        raise
    try:
        os.fsync(handle)
    except OSError as e:  # file systems that know no such thing of folders
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem that a path or URL is on, and the path there.

    Clouds by obstore, so that a source and a table share their credentials; anything else
    (http, hf, zip, ...) by fsspec's own.
    """
    scheme = uri.partition("://")[0]
    if "://" in uri and scheme in _CLOUDS:
        protocol: Any = scheme
        return obstore.fsspec.FsspecStore(protocol, **_options(uri)), uri.partition("://")[
            2
        ].rstrip("/")
    fs, root = fsspec.core.url_to_fs(uri)
    return fs, str(root)


def is_cloud(fs: Any) -> bool:
    """Whether a filesystem is a cloud's."""
    return isinstance(fs, obstore.fsspec.FsspecStore)


class CloudFolder:
    """A bucket, or a folder in it, as `filesystem` names it."""

    def __init__(self, protocol: str, root: str) -> None:
        self._bucket = root.partition("/")[0]
        uri = f"{protocol}://{self._bucket}"
        self._store = from_url(uri, **_options(uri))

    @classmethod
    def of(cls, fs: Any, root: str) -> CloudFolder | None:
        """One of a filesystem that is a cloud's; None of another."""
        return cls(fs.protocol, root) if is_cloud(fs) else None

    def list_below(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Path and facts of all objects below a folder of it, as they come: a thousand a request,
        however deep.
        """
        for some in obstore.list(self._store, folder.partition("/")[2] or None):
            for told in some:
                facts = {name: told[name] for name in ("size", "e_tag", "last_modified")}
                yield f"{self._bucket}/{told['path']}", {"type": "file", **facts}


def _options(uri: str) -> dict[str, Any]:
    # obstore's own 30 s would need 70 Mbit/s for a part of 256 MiB. Given options, it no longer
    # looks into the environment for the others.
    names = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
    plain_http = any(os.environ.get(name, "").lower() in ("1", "true") for name in names)
    options = {"client_options": {"timeout": "600s", "allow_http": plain_http}}
    session = _aws_session(uri)
    if session is None:
        return options
    from obstore.auth.boto3 import Boto3CredentialProvider

    return {**options, "credential_provider": Boto3CredentialProvider(session)}


def _aws_session(uri: str) -> Any:
    """A boto3 session, where AWS's config files hold the credentials: obstore reads none."""
    if not uri.startswith(("s3://", "s3a://")) or "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
    )
    if not any(Path(f).expanduser().is_file() for f in files):
        return None
    try:
        import boto3
    except ImportError:
        raise StorageError(
            f"output.uri: {uri}: reading AWS's config files takes boto3: pip install "
            "'fmembed[aws]', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        session = boto3.Session()
        return session if session.get_credentials() is not None else None
    except Exception as e:  # botocore's own: a profile that is not there, a file that is not one
        raise StorageError(f"output.uri: {uri}: AWS's config files: {reason(e)}") from None
