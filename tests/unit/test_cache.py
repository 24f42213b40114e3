"""What is kept from process to process, and what is made of a file that is not as it was kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fmembed.cache import _path, recall, remember

KEY = {"weights": "0a", "adapter": None, "dtype": "float32", "threads": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fmembed"


def test_what_was_remembered_is_recalled(folder: Path) -> None:
    assert recall("size", KEY) is None
    remember("size", KEY, {"tokens": 2000})
    assert recall("size", KEY) == {"tokens": 2000}
    assert recall("size", KEY | {"dtype": "bfloat16"}) is None
    assert recall("colour", KEY) is None
    remember("size", KEY | {"dtype": "bfloat16"}, {"tokens": 4000})
    assert (recall("size", KEY), len(list(folder.iterdir()))) == ({"tokens": 2000}, 2)


def test_a_file_that_is_off_is_ignored(folder: Path) -> None:
    remember("size", KEY, {"tokens": 2000})
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    kept = json.loads(whole)
    for content in (
        b"", b"{", b"\xff\xfe", b"[]", b"7", b"{}", b"null", whole[:-1],
        whole.replace(b"2000", b"4000"),
        json.dumps({**kept, "value": [2000]}).encode(),
        json.dumps({**kept, "key": KEY | {"threads": 8}}).encode(),
        json.dumps({"value": kept["value"]}).encode(),
    ):  # fmt: skip
        path.write_bytes(content)
        assert recall("size", KEY) is None, content
    remember("size", KEY, {"tokens": 4000})
    assert recall("size", KEY) == {"tokens": 4000}


def test_what_another_has_put_there_is_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember("size", KEY, {"tokens": 2000})
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert recall("size", KEY) is None
    assert recall("size", KEY) == {"tokens": 2000}
    path.unlink()
    os.mkfifo(path)  # who opened it would wait
    assert recall("size", KEY) is None


def test_what_is_old_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "bfloat16"):
        remember("size", KEY | {"dtype": dtype}, {"tokens": 2000})
    (folder / "cut.tmp").touch()
    (folder / "own").touch()
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    assert recall("size", KEY) == {"tokens": 2000}  # and is young again
    remember("other", KEY, {"tokens": 2000})
    names = {p.name for p in folder.iterdir()}
    assert names == {_path("size", KEY).name, _path("other", KEY).name, "own"}
    # Half a file is left by none that can still act, whatever ends it.
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remember("size", KEY, {"tokens": 4000})
    assert {p.name for p in folder.iterdir()} == names


def test_a_relative_place_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _path("size", KEY).is_relative_to(tmp_path / ".cache")


def test_no_place_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    # Root may write into read-only folders, so a file stands where the folder would.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember("size", KEY, {"tokens": 2000})
    assert recall("size", KEY) is None

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    remember("size", KEY, {"tokens": 2000})
    assert recall("size", KEY) is None
    # Nothing half-written stays where a file cannot be put in place.
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    _path("size", KEY).mkdir(parents=True)
    remember("size", KEY, {"tokens": 2000})
    assert [p.name for p in folder.iterdir()] == [_path("size", KEY).name]
