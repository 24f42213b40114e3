"""What is remembered from process to process on this machine, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HALF, _DAY_S = ".tmp", 86_400
_KEPT_S, _HALF_S = 90 * _DAY_S, _DAY_S


def recall(name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was remembered for this key; None where there is nothing, or not as it was written, or
    by another user.

    Args:
        name: What kind of thing it is.
        key: What decides it, as JSON.
    """
    try:
        path = _path(name, key)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        value = found["value"]
        same = found["key"] == key and found["checksum"] == _checksum(value)
        if not (same and isinstance(value, dict)):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return value
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        return None


def remember(name: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Keep something for the next process; a folder that cannot be written to changes nothing.

    A file for each key, put in place whole: of several processes the last wins. What nobody has
    recalled for a quarter is deleted.

    Args:
        name: What kind of thing it is.
        key: What decides it, as JSON.
        value: As JSON.
    """
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(name, key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_HALF)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "value": value, "checksum": _checksum(value)}, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _sweep(folder: Path) -> None:
    """Delete what was recalled last long ago, and what a killed process has left half written."""
    now = time.time()
    for entry in os.scandir(folder):
        most = _KEPT_S if entry.name.endswith(".json") else _HALF_S
        if entry.name.endswith((".json", _HALF)):
            with contextlib.suppress(OSError):
                if now - entry.stat(follow_symlinks=False).st_mtime > most:
                    os.unlink(entry.path)


def _checksum(value: Any) -> str:
    content = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _path(name: str, key: Mapping[str, Any]) -> Path:
    return folder() / f"{name}-{_checksum(key)}.json"


def folder() -> Path:
    """Where it is kept.

    Raises:
        RuntimeError: The user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be passed over, says the standard that it is of.
    cache = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return cache / "fmembed"
