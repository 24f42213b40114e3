"""A folder and a pattern give what is there, in order; what cannot be listed is an error."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fmembed.errors import SourceError
from fmembed.sources.opening import open_source
from fmembed.sources.walking import HIDDEN, HIDDEN_FOLDER, Walk
from fmembed.spec import SourceSpec

LOCAL = fsspec.filesystem("file")
NAMES = (
    "a.txt", "a/b.txt", "a/c/d.txt", "a-b/e.txt", "a0.txt", "b/x1/f.txt", "b/x2/g.txt",
    "b/y/deep/deeper/h.txt", "é/i.txt", "z.csv",
)  # fmt: skip
PATTERNS = ("*.txt", "*/*.txt", "a*/*", "b/x?/*.txt", "b/[xy]*/*.txt", "**/*.txt", "b/**/*.txt",
            "b/**", "*/x1/*", "none*/*.txt", "b/*/deep/**/h.txt")  # fmt: skip


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def found(walk: Walk, root: str) -> list[str]:
    return [path.removeprefix(f"{root}/") for path, _ in walk]


@pytest.fixture(params=["local", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """The same files on two filesystems, made in no order."""
    names = random.Random(7).sample(NAMES, len(NAMES))  # noqa: S311
    if request.param == "local":
        make(tmp_path, *names)
        return LOCAL, str(tmp_path)
    memory = MemoryFileSystem()
    root = f"/{tmp_path.name}"
    for name in names:
        memory.pipe_file(f"{root}/{name}", b"text")
    return memory, root


def test_all_comes_in_the_order_of_paths(tree: tuple[Any, str]) -> None:
    fs, root = tree
    assert found(Walk(fs, root), root) == sorted(NAMES)
    assert all(facts["size"] == 4 for _, facts in Walk(fs, root))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_what_fsspec_finds(pattern: str, tree: tuple[Any, str]) -> None:
    fs, root = tree
    expected = [p for p, i in fs.glob(f"{root}/{pattern}", detail=True).items()
                if i["type"] == "file"]  # fmt: skip
    walked = [path for path, _ in Walk(fs, root, f"{root}/{pattern}")]
    assert walked == sorted(expected)


@pytest.mark.parametrize("pattern", ["*/*.txt", "**/*.txt", "a/c/*"])
def test_a_pattern_that_cannot_be_looked_through_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, *NAMES)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith(("/a", "/c")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"source\.uri: cannot read .*: Permission denied"):
        open_source(SourceSpec(uri=f"{tmp_path}/{pattern}"))
    # Where nothing can match, nobody looks.
    assert open_source(SourceSpec(uri=f"{tmp_path}/b/*/*.txt")).num_rows == 2
    assert open_source(SourceSpec(uri=f"{tmp_path}/*.txt")).num_rows == 2


def test_a_folder_that_a_server_does_not_list_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryFileSystem()
    memory.pipe_file("/half/a/b.txt", b"text")
    ls = MemoryFileSystem.ls

    def fail(self: MemoryFileSystem, path: str, **told: Any) -> Any:
        if path.endswith("/a"):
            raise ConnectionResetError(104, "Connection reset by peer")
        return ls(self, path, **told)

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    for uri in ("memory://half", "memory://half/**/*.txt"):
        with pytest.raises(SourceError, match=r"cannot read .*Connection reset"):
            open_source(SourceSpec(uri=uri))


def test_what_is_hidden_is_counted_where_it_could_match(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "_b.txt", ".c.csv", "_d/e.txt", "f/_g.txt")
    walk = Walk(LOCAL, str(tmp_path), f"{tmp_path}/*.txt")
    assert found(walk, str(tmp_path)) == ["a.txt"]
    assert walk.passed_over == {HIDDEN: 1}
    walk = Walk(LOCAL, str(tmp_path))
    assert found(walk, str(tmp_path)) == ["a.txt"]
    assert walk.passed_over == {HIDDEN: 3, HIDDEN_FOLDER: 1}


def test_a_folder_in_1500_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    Path("x.txt").write_text("text")
    ((path, _),) = Walk(LOCAL, str(tmp_path))
    assert path.count("/d") >= 1500
    Path("x.txt").unlink()
    for _ in range(1500):  # `rmtree` calls itself for each
        os.chdir("..")
        os.rmdir("d")


def test_what_goes_while_we_look_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/b.txt", "c.txt", "d.txt")
    walk = iter(Walk(LOCAL, str(tmp_path)))
    assert next(walk)[0].endswith("a/b.txt")
    (tmp_path / "c.txt").unlink()
    assert [path for path, _ in walk] == [str(tmp_path / "d.txt")]
