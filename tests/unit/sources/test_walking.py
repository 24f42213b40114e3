"""A folder and a pattern give what is there, in order; what cannot be listed is an error."""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from fmembed.errors import NoFilesError, SourceError
from fmembed.sources.opening import open_source
from fmembed.sources.walking import GONE, HIDDEN, HIDDEN_FOLDER, LINKED, STANDS, Walk
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


class Pages(AbstractFileSystem):  # type: ignore[misc]
    """A server's folders: pages that name what is in them, and may name anything else below."""

    def __init__(self, **pages: list[str]) -> None:
        super().__init__()
        self.pages = {name.replace("_", "/"): names for name, names in pages.items()}

    def ls(self, path: str, **_: Any) -> Any:
        names = self.pages[path]
        if "refused" in names:
            raise ConnectionResetError(104, "Connection reset by peer")
        if "gone" in names:
            raise FileNotFoundError(path)
        kinds = ("file", "directory")
        return [{"name": f"{path}/{n}", "size": 1, "type": kinds[n.endswith("/")]} for n in names]


def test_a_folder_that_a_server_does_not_list_is_an_error() -> None:
    pages = Pages(top=["a.txt", "sub/"], top_sub=["refused"])
    assert list(pages.find("top")) == ["top/a.txt"]  # as if it were all
    for pattern in ("", "top/**/*.txt", "top/*/*.txt"):
        with pytest.raises(ConnectionResetError):
            list(Walk(pages, "top", pattern))
    assert found(Walk(pages, "top", "top/*.txt"), "top") == ["a.txt"]


def test_what_two_pages_name_is_one_file() -> None:
    pages = Pages(top=["sub/b.txt", "b.txt", "sub/", "sub.txt", "no/"], top_sub=["b.txt", "c.txt"],
                  top_no=["gone"])  # fmt: skip
    walk = Walk(pages, "top")
    assert sorted(found(walk, "top")) == ["b.txt", "sub.txt", "sub/b.txt", "sub/c.txt"]
    assert walk.passed_over == {GONE: 1}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_listed_whole_however_their_members_are_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["./a.txt", "b//c.txt", "./d/./e.txt", "f/g/h.txt", "_no/i.txt"]
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "text")
    else:
        with tarfile.open(path, "w") as archive_:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 4
                archive_.addfile(info, io.BytesIO(b"text"))
    for folder in ("/", str(tmp_path)):  # ids do not depend on where one stands
        monkeypatch.chdir(folder)
        source = open_source(SourceSpec(uri=f"{kind}://::{path}", format="text_folder"))
        ids = sorted(file.name for shard in source.shards for file in shard.files)
        assert ids == ["a.txt", "b/c.txt", "d/e.txt", "f/g/h.txt"]
        assert source.passed_over == {HIDDEN: 1}


@pytest.mark.parametrize("uri", ["{}", "{}/*/*.txt", "{}/**/*.txt"])
def test_a_file_of_which_storage_does_not_tell_is_an_error(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/b.txt", "a/c.txt")
    look = os.stat

    def fail(path: Any, **told: Any) -> Any:
        if str(path).endswith("b.txt"):
            raise OSError(5, "Input/output error", path)
        return look(path, **told)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(SourceError, match=r"cannot read .*Input/output error: .*b\.txt"):
        open_source(SourceSpec(uri=uri.format(tmp_path)))


def test_patterns_follow_no_links_to_folders_and_say_so(tmp_path: Path) -> None:
    make(tmp_path, "outside/r.txt", "data/a/b.txt")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    for pattern in ("data/*/*.txt", "data/**/*.txt"):
        source = open_source(SourceSpec(uri=f"{tmp_path}/{pattern}"))
        assert (source.num_rows, source.passed_over) == (1, {LINKED: 1})
    assert open_source(SourceSpec(uri=f"{tmp_path}/data/link/*.txt")).num_rows == 1
    assert open_source(SourceSpec(uri=f"{tmp_path}/data")).num_rows == 2


def test_a_pattern_below_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/gone/*.txt", f"{tmp_path}/gone/**/*.txt"):
        with pytest.raises(SourceError, match="no such file or folder") as found_:
            open_source(SourceSpec(uri=uri))
        assert not isinstance(found_.value, NoFilesError)
    with pytest.raises(NoFilesError):
        open_source(SourceSpec(uri=f"{tmp_path}/*.txt"))


def test_of_objects_that_come_in_any_order_none_is_lost() -> None:
    walk = Walk(LOCAL, "b")
    told = [("b/d/e", 1), ("b/a", 0), ("b/d", 0), ("b/d/f", 0), ("b/d/f.txt", 0), ("b/c", 0)]
    given = walk._without_stand_ins([(path, {"size": size}) for path, size in told])
    assert [path for path, _ in given] == ["b/d/e", "b/a", "b/d/f", "b/d/f.txt", "b/c"]
    assert walk.passed_over == {STANDS: 1}


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
