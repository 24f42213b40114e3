"""What is remembered from process to process on this machine, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def recall(name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was remembered for this key; None where there is nothing, or not as it was written.

    Args:
        name: What kind of thing it is.
        key: What decides it, as JSON.
    """
    try:
        found = json.loads(_path(name, key).read_text(encoding="utf-8"))
        value = found["value"]
        same = found["key"] == key and found["checksum"] == _checksum(value)
        return value if same and isinstance(value, dict) else None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        return None


def remember(name: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Keep something for the next process; a folder that cannot be written to changes nothing.

    A file for each key, put in place whole: of several processes the last wins.

    Args:
        name: What kind of thing it is.
        key: What decides it, as JSON.
        value: As JSON.
    """
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "value": value, "checksum": _checksum(value)}, file)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _checksum(value: Any) -> str:
    content = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _path(name: str, key: Mapping[str, Any]) -> Path:
    """Raises RuntimeError where the user has no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fmembed" / f"{name}-{_checksum(key)}.json"
