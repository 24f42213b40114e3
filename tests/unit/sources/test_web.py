"""Sources on a web server: logins and signatures are used, and never kept."""

from __future__ import annotations

import gc
import gzip
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from web_server import Server, serve

from fmembed.errors import SourceError
from fmembed.run.work import skip_committed
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.spec import SourceSpec

LINES = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(3))
LOGIN = "me:Zq81%2Fcanary%20p%40ss"
QUERY = "X-Amz-Signature=Xk92canary%2Fsig%3D&flag"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


def rows_of(spec: SourceSpec) -> list[dict[str, Any]]:
    source = open_source(spec)
    tables = [
        rows for i in range(len(source.shards)) for rows in read_shard(source, source.shards[i], i)
    ]
    return [row for row in pa.concat_tables(tables).to_pylist() if row["row_id"] is not None]


def texts_by_id(spec: SourceSpec) -> dict[str, str]:
    return {row["row_id"]: row["_input"] for row in rows_of(spec)}


@pytest.mark.parametrize("missing", [403, 404, 500])
@pytest.mark.parametrize("takes_head", [True, False])
def test_one_file_where_nothing_can_be_listed(
    server: Server, missing: int, takes_head: bool
) -> None:
    server.files["/data/a.jsonl"] = LINES
    server.files["/data/b.txt"] = b"a text"
    server.missing, server.takes_head = missing, takes_head
    ids = [f"a.jsonl#{i}" for i in range(3)]
    assert list(texts_by_id(SourceSpec(uri=f"{server.origin}/data/a.jsonl"))) == ids
    # Nor is a file without a known suffix looked for in a list.
    server.files["/data/export"] = LINES
    spec = SourceSpec(uri=f"{server.origin}/data/export", format="jsonl")
    assert list(texts_by_id(spec)) == [f"export#{i}" for i in range(3)]
    assert texts_by_id(SourceSpec(uri=f"{server.origin}/data/b.txt")) == {"b.txt": "a text"}


def test_a_login_and_a_signature_are_used_and_not_kept(server: Server) -> None:
    server.login, server.signatures = "me:Zq81/canary p@ss", {"X-Amz-Signature=Xk92canary/sig="}
    server.files["/data/a.jsonl.gz"] = gzip.compress(LINES)
    host = server.origin.removeprefix("http://")
    source = open_source(SourceSpec(uri=f"http://{LOGIN}@{host}/data/a.jsonl.gz?{QUERY}#top"))
    (shard,) = source.shards
    assert shard.files[0].path == f"{server.origin}/data/a.jsonl.gz"
    assert "canary" not in repr(source)
    (rows, _) = list(read_shard(source, source.shards[0], 0))
    assert rows["row_id"].to_pylist() == [f"a.jsonl.gz#{i}" for i in range(3)]
    assert rows["_input"].to_pylist() == ["text 0", "text 1", "text 2"]
    assert all(path.endswith("&flag") for _, path, _ in server.asked)


def test_ids_and_shards_stay_when_the_signature_is_another(server: Server) -> None:
    server.files["/data/a.jsonl"] = LINES
    found = []
    for query in ("sig=one&se=2026", "sig=t@wo&se=2027", ""):
        spec = SourceSpec(uri=f"{server.origin}/data/a.jsonl?{query}".rstrip("?"))
        found.append((list(texts_by_id(spec)), [s.key for s in open_source(spec).shards]))
    assert found[0] == found[1] == found[2]
    assert found[0][1][0]
    assert skip_committed(open_source(spec), {found[0][1][0]: 3})[1] == 3


@pytest.mark.parametrize("uri", ["/data/", "/data", "/data/*.jsonl"])
def test_folders_and_globs_take_a_login_and_a_signature(server: Server, uri: str) -> None:
    server.login, server.signatures = "me:pw", {"sig=Xk92canary"}
    page = b"<a href='a.jsonl'>a</a><a href='/data/b%20c.jsonl'>b</a><a href='?C=N;O=D'>Name</a>"
    server.files |= {"/data/": page, "/data": page}
    server.files |= {"/data/a.jsonl": LINES, "/data/b%20c.jsonl": LINES}
    host = server.origin.removeprefix("http://")
    found = list(texts_by_id(SourceSpec(uri=f"http://me:pw@{host}{uri}?sig=Xk92canary")))
    assert found == [f"{name}#{i}" for name in ("a.jsonl", "b%20c.jsonl") for i in range(3)]


def test_no_other_host_is_sent_them(server: Server) -> None:
    with serve() as other:
        server.moved["/a.jsonl"] = f"{other.origin}/moved.jsonl"
        other.files["/moved.jsonl"] = LINES
        host = server.origin.removeprefix("http://")
        found = texts_by_id(SourceSpec(uri=f"http://me:Zq81canary@{host}/a.jsonl?sig=Xk92canary"))
    assert list(found) == [f"a.jsonl#{i}" for i in range(3)]
    assert {(path, login) for _, path, login in other.asked} == {("/moved.jsonl", None)}


# fsspec 2026.9 leaves a block cache's file open.
_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    "chain",
    [
        "simplecache::",
        "filecache::",
        pytest.param("blockcache::", marks=_OPEN),
        "zip://inner/a.jsonl::",
    ],
)
def test_chains_keep_no_secret_either(
    server: Server, chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inner/a.jsonl", LINES)
    is_zip = chain.startswith("zip")
    path = "/data/a.zip" if is_zip else "/data/a.jsonl"
    server.files[path] = packed.getvalue() if is_zip else LINES
    server.login, server.signatures = "me:Zq81canary", {"sig=Xk92canary"}
    host = server.origin.removeprefix("http://")
    uri = f"{chain}http://me:Zq81canary@{host}{path}?sig=Xk92canary"
    source = pickle.loads(pickle.dumps(open_source(SourceSpec(uri=uri))))  # noqa: S301 - as Ray
    (rows, _) = list(read_shard(source, source.shards[0], 0))
    assert rows["row_id"].to_pylist() == [f"a.jsonl#{i}" for i in range(3)]
    gc.collect()
    for file in tmp_path.rglob("*"):
        assert b"canary" not in (file.read_bytes() if file.is_file() else b"")


def test_a_root_takes_a_login_and_a_signature(server: Server, tmp_path: Any) -> None:
    server.login, server.signatures = "me:Zq81canary", {"sig=Xk92canary"}
    server.files["/files/a.png"] = b"picture"
    host = server.origin.removeprefix("http://")
    (tmp_path / "in.jsonl").write_text('{"path": "a.png"}\n{"path": "none.png"}\n')
    root = f"http://me:Zq81canary@{host}/files?sig=Xk92canary"
    spec = SourceSpec(uri=str(tmp_path / "in.jsonl"), input="path", root=root)
    source = open_source(spec, ("image",))
    (table, _) = list(read_shard(source, source.shards[0], 0))
    assert table["_input"].to_pylist() == [b"picture", None]
    assert "canary" not in str(table.to_pylist())


def refused(server: Server) -> str:
    host = server.origin.removeprefix("http://")
    return f"http://me:Zq81canary@{host}/a.jsonl?sig=Xk92canary"


def slash_in_password(server: Server) -> str:
    return "http://me:Zq81/canary@host/a.jsonl"


def unreachable(_: Server) -> str:
    return "http://me:Zq81canary@127.0.0.1:9/a.jsonl?sig=Xk92canary"


def no_host(_: Server) -> str:
    return "http://me:Zq81canary@/a.jsonl?sig=Xk92canary"


def nothing_in_it(server: Server) -> str:
    server.login, server.files["/a.jsonl"] = "me:Zq81canary", b""
    return refused(server)


def broken(server: Server) -> str:
    server.login, server.files["/a.jsonl.gz"] = "me:Zq81canary", b"no gzip"
    return refused(server).replace(".jsonl", ".jsonl.gz")


def unknown_protocol(_: Server) -> str:
    return "nosuch+x://me:Zq81canary@host/a.jsonl?sig=Xk92canary"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (refused, "(the server answers 401)"),
        (slash_in_password, "write / as %2F"),
        (unreachable, "a.jsonl"),
        (no_host, "no host can be told"),
        (nothing_in_it, "no readable jsonl file"),
        (broken, "no readable jsonl file"),
        (unknown_protocol, "rotocol not known"),
    ],
)
def test_what_cannot_be_read_is_said_without_them(
    server: Server, make: Callable[[Server], str], says: str
) -> None:
    server.login = "nobody:else"
    with pytest.raises(SourceError) as e:
        open_source(SourceSpec(uri=make(server)))
    said = str(e.value)
    assert said.startswith("source.uri: ")
    assert says in said
    assert "\n" not in said
    for piece in ("Zq81", "canary", "Xk92"):
        assert piece not in said
