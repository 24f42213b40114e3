"""Objects on a local disk, reasons fit to be read, and no secret in them (S3: integration)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmembed.errors import FmembedError, StorageError, reason
from fmembed.redaction import redact
from fmembed.storage import Storage, filesystem


def test_objects(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "new"))
    assert storage.paths() == []
    storage.put("a", b"1")
    storage.put("a", b"2")
    storage.put("folder/b", b"3")
    assert storage.get("a") == b"2"
    assert storage.size_bytes("a") == 1
    assert storage.size_bytes("c") is None
    assert storage.paths() == ["a", "folder/"]
    assert storage.paths("folder/") == ["folder/b"]
    assert storage.create("c", b"4")
    assert not storage.create("c", b"5")
    assert storage.get("c") == b"4"
    with storage.open("folder/b") as f:
        assert f.read() == b"3"
    storage.delete("c")
    storage.delete("c")
    with pytest.raises(FileNotFoundError):
        storage.get("c")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot \w+ .*file"):
        Storage(str(tmp_path / "file" / "t")).put("a", b"1")


def test_other_schemes_are_fsspecs_own() -> None:
    fs, root = filesystem("memory://folder/x")
    assert (type(fs).__name__, root) == ("MemoryFileSystem", "/folder/x")


def test_reason_is_one_line() -> None:
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    chain = "Kernel error -> Generic\n  \x1b[31m↳\x1b[0m GET failed\n  ↳ 403 Forbidden\n"
    assert reason(ValueError(chain)) == "Kernel error -> Generic: GET failed: 403 Forbidden"


@pytest.mark.parametrize(
    ("message", "clean"),
    [
        ("cannot read https://me:pass@host/x?sig=abc#f now", "cannot read https://host/x now"),
        ("('http://u:it's@h/p?q')", "('http://h/p"),
        ("http://[broken:secret@x", "http://..."),
        ("s3://bucket/key", "s3://bucket/key"),
        ("C:\\folder and a ratio 3://", "C:\\folder and a ratio 3://"),
    ],
)
def test_messages_hold_no_secret(message: str, clean: str) -> None:
    assert str(FmembedError(message)) == clean


def test_redact() -> None:
    assert redact("az://account:key@container/path?sv=1&sig=2") == "az://container/path"


def test_a_draft_is_whole_under_its_name_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmembed.storage._SYNC_BYTES", 10)  # the disk is asked meanwhile
    storage = Storage(str(tmp_path / "new"))
    with storage.draft("like") as draft:
        for _ in range(100):
            assert draft.write(b"four") == 4
        assert [p.name.startswith("like#") for p in (tmp_path / "new").iterdir()] == [True]
        draft.publish("name")
    assert storage.get("name") == b"four" * 100

    def fail() -> None:
        with storage.draft("like") as draft:
            draft.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with storage.draft("like") as draft:
        draft.write(b"never published")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["name"]


def test_a_disk_that_refuses_a_draft_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmembed.storage._SYNC_BYTES", 1)
    monkeypatch.setattr("os.fsync", full)

    def write() -> None:
        with Storage(str(tmp_path)).draft("like") as draft:
            draft.write(b"x")
            draft.publish("name")

    with pytest.raises(StorageError, match=r"cannot write a new file in .*: No space left"):
        write()
    assert not list(tmp_path.iterdir())
