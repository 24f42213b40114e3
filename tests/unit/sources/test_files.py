"""What a dataset's paths may lead to: nothing outside their root, and no pipe that never ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from web_server import Server, serve

from fmembed.errors import SourceError
from fmembed.sources.files import open_root, read_whole
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.sources.source import BadRow
from fmembed.spec import SourceSpec
from fmembed.storage import filesystem


def read(source: Any) -> list[dict[str, Any]]:
    return [
        row
        for i in range(len(source.shards))
        for table in read_shard(source, source.shards[i], i)
        for row in table.to_pylist()
        if row["row_id"]
    ]


def fates(tmp_path: Path, root: str, paths: list[str]) -> list[tuple[Any, Any]]:
    """Content and cause of each path in a column of paths below a root."""
    write_jsonl(tmp_path / "in.jsonl", [{"path": p} for p in paths])
    spec = SourceSpec(uri=str(tmp_path / "in.jsonl"), input="path", root=root)
    return [(r["_input"], r["_error"]) for r in read(open_source(spec, ("image",)))]


def tree(tmp_path: Path) -> Path:
    """A root with links of every kind, beside what lies outside it."""
    root = tmp_path / "root"
    (root / "in" / "deep").mkdir(parents=True)
    (root / "in" / "a.png").write_bytes(b"inside")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "s.png").write_bytes(b"secret")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "s.png").write_bytes(b"secret of another that begins alike")
    for name, target in {
        "file": outside / "s.png",
        "relative": "../outside/s.png",
        "folder": outside,
        "folder2": "../root2",
        "up": "..",
        "chain": "file",
        "in/deep/chain": "../../folder",
        "dangling out": "../outside/none.png",
        "environ": "/proc/self/environ",
        "dangling in": "in/none.png",
        "loop": "loop",
        "stays": "in/a.png",
        "in/deep/stays": "../../in",
        "and back": "../root/in/a.png",
    }.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    return root


LEADS_OUT = [
    "file", "relative", "folder/s.png", "folder2/s.png", "up/outside/s.png", "chain",
    "in/deep/chain/s.png", "dangling out", "environ", "folder/none.png",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_no_link_leads_out_of_a_root(scheme: str, tmp_path: Path) -> None:
    root = tree(tmp_path)
    found = fates(tmp_path, f"{scheme}{root}", LEADS_OUT)
    assert found == [(None, "outside the root")] * len(LEADS_OUT)


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (tmp_path / "alias").symlink_to(root)
    stay = ["in/a.png", "stays", "in/deep/stays/a.png", "and back"]
    for name in (root, tmp_path / "alias", f"{root}/"):
        assert fates(tmp_path, str(name), stay) == [(b"inside", None)] * 4
    rest = fates(tmp_path, str(root), ["dangling in", "loop", "pipe", "in", "a\0b"])
    assert [cause for _, cause in rest] == [
        "unreadable file", "unreadable file", "not a regular file", "not a regular file",
        "unreadable file",
    ]  # fmt: skip


def test_the_whole_disk_may_be_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path)
    read_below = open_root(*filesystem("/"), 2**20)
    assert read_below(str(root / "file")[1:]) == b"secret"
    with pytest.raises(BadRow, match="no regular file"):
        read_below("proc/self/environ")


def special(folder: Path, suffix: str) -> list[socket.socket]:
    """A pipe, a socket, links to devices, to the kernel's pages, to nothing and to themselves."""
    os.mkfifo(folder / f"pipe{suffix}")
    listener = socket.socket(socket.AF_UNIX)
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # the name of a socket is short
    listener.bind(f"socket{suffix}")
    os.fchdir(here)
    os.close(here)
    for name, target in (("zero", "/dev/zero"), ("environ", "/proc/self/environ")):
        (folder / f"{name}{suffix}").symlink_to(target)
    (folder / f"nothing{suffix}").symlink_to("none")
    (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (folder / f"folder{suffix}").symlink_to(".")
    return [listener]


SPECIAL = {
    "pipe": "not a regular file",
    "socket": "not a regular file",
    "zero": "not a regular file",
    "environ": "not a regular file",
    "nothing": "unreadable file",
    "loop": "unreadable file",
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".tar"])
def test_what_is_no_file_is_a_rejected_row(suffix: str, tmp_path: Path) -> None:
    """Beside a link to a good file, which is read: snapshots of the hub are made of these."""
    folder, blobs = tmp_path / "in", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    good = blobs / "0123"
    if suffix == ".parquet":
        pq.write_table(pa.table({"txt": ["good"]}), good)
    elif suffix == ".tar":
        import io
        import tarfile

        with tarfile.open(good, "w") as archive:
            member = tarfile.TarInfo("good.txt")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"good"))
    else:
        good.write_text({".txt": "good", ".jsonl": '{"txt": "good"}', ".csv": "txt\ngood"}[suffix])
    (folder / f"good{suffix}").symlink_to("../blobs/0123")
    kept = special(folder, suffix)
    rows = read(open_source(SourceSpec(uri=str(folder), input="txt"), ("text",)))
    for listener in kept:
        listener.close()
    found = {r["row_id"].partition(suffix)[0]: (r["_input"], r["_error"]) for r in rows}
    assert found == {"good": ("good", None)} | {k: (None, v) for k, v in SPECIAL.items()}


def test_a_pipe_as_the_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match=r"no readable jsonl file.*no regular file"):
        open_source(SourceSpec(uri=str(tmp_path / "a.jsonl")))


def test_a_file_that_becomes_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "a.txt")
    monkeypatch.setattr("fmembed.sources.files.check_regular", lambda *_: None)
    with pytest.raises(BadRow, match="no regular file"):
        read_whole(filesystem(str(tmp_path))[0], str(tmp_path / "a.txt"), 2**20)


def test_a_changed_target_of_a_link_is_another_shard(tmp_path: Path) -> None:
    target = write_jsonl(tmp_path / "blob", [{"text": "a"}])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").symlink_to(target)
    spec = SourceSpec(uri=str(tmp_path / "in"))
    (before,) = open_source(spec).shards
    os.utime(target, ns=(0, 1_000_000_000))
    assert open_source(spec).shards[0].key != before.key


@contextmanager
def web() -> Iterator[Server]:
    """A server that has a page wherever one looks."""
    with serve() as server:
        server.otherwise = b"page"
        yield server


def test_no_redirect_leads_out_of_a_root(tmp_path: Path) -> None:
    with web() as server, web() as other:
        outside = {
            "/data/host": f"{other.origin}/data/x",
            "/data/path": f"{server.origin}/secret",
            "/data/short": "/secret",
            "/data/up": "../secret",
            "/data/coded": "%2e%2e/secret",
            "/data/no-scheme": other.origin.removeprefix("http:") + "/data/x",
            "/data/file": "file:///etc/passwd",
            "/data/user": f"http://127.0.0.1@localhost:{server.server_address[1]}/data/x",
            "/data/two": "/data/host",
            "/data/alike": "/database/x",
            "/data/tls": server.origin.replace("http:", "https:") + "/data/x",
        }
        inside = {
            "/data/in": "/data/a",
            "/data/sub/in": "../a",
            "/data/whole": f"{server.origin}/data/a",
        }
        server.moved = outside | inside | {"/data/loop": "/data/loop"}
        paths = [path.removeprefix("/data/") for path in (*outside, *inside, "/data/loop")]
        found = fates(tmp_path, f"{server.origin}/data", paths)
        assert found[: len(outside)] == [(None, "outside the root")] * len(outside)
        assert found[len(outside) : -1] == [(b"page", None)] * len(inside)
        assert found[-1] == (None, "unreadable file")
        # Not only were the answers thrown away: nobody was asked.
        assert other.asked == []
        assert all(path.startswith("/data/") for _, path, _ in server.asked)


@pytest.mark.parametrize(
    "path",
    ["%2e%2e/secret", "%2E./secret", ".%2e/secret", "a/%2e%2e/%2e%2e/secret", "..%2fsecret",
     "%2e%2e%2fsecret", "%252e%252e/secret", "%252e%252e%252fsecret", "..%5csecret",
     "%2e%2e%5csecret", "..;/secret", "..;a=b/secret", "%2e%2e;/secret", ".\t./secret", "%2e%2e"],
)  # fmt: skip
def test_no_encoded_path_leads_out_of_a_root(path: str, tmp_path: Path) -> None:
    with web() as server:
        found = fates(tmp_path, f"{server.origin}/data", [path])
        assert found == [(None, "outside the root")]
        assert server.asked == []


def test_ordinary_paths_of_a_web_root(tmp_path: Path) -> None:
    paths = ["a b.png", "a%20b.png", "100%25.png", "v1..2/x..png", "x;y.png", "a.png?sig=../x&s=1"]
    with web() as server:
        for root in (server.origin, f"{server.origin}/", f"{server.origin}/data%20set/"):
            assert fates(tmp_path, root, paths) == [(b"page", None)] * len(paths)


def test_a_root_is_no_cache_of_another(tmp_path: Path) -> None:
    root = tree(tmp_path)
    with pytest.raises(SourceError, match=r"^source\.root: .* not a cache"):
        fates(tmp_path, f"simplecache::file://{root}", ["file"])
