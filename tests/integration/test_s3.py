"""Everything on S3: a real server process on loopback, conditional writes included."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
from conftest import SENTENCES, run_cli
from soak import Bench, Tally, wait_for
from tables import CONFIGURATION
from weeks import Reader, StoreYear, Year

import fmembed
from fmembed import promotion
from fmembed.errors import ConflictError, LockedError, StorageError
from fmembed.sources.formats import ranges
from fmembed.sources.locating import count_part, list_unlocated, locate
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source
from fmembed.sources.walking import HIDDEN
from fmembed.spec import SourceSpec
from fmembed.storage import Storage
from fmembed.table.lock import Lock
from fmembed.table.table import Table

KEY, SECRET = "AKIDCANARY0KEY", "canary-secret-5up3r"
SCHEMA = pa.schema([pa.field("row_id", pa.string(), nullable=False)])


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket's URL; the environment names the server and the credentials."""
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log, stderr=log,
    )  # fmt: skip
    endpoint = f"http://127.0.0.1:{port}"
    names = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    patch = pytest.MonkeyPatch()
    for name, value in names.items():
        patch.setenv(name, value)

    def answers() -> bool:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/"):  # noqa: S310
                return True
        except urllib.error.URLError:
            return False

    wait_for(answers, 30)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    patch.undo()
    server.send_signal(signal.SIGTERM)
    server.wait(30)
    log.close()


def objects() -> dict[str, bytes]:
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    keys = [o["Key"] for page in pages for o in page.get("Contents", [])]
    return {k: client.get_object(Bucket="bucket", Key=k)["Body"].read() for k in keys}


def test_a_table_is_refreshed_from_week_to_week(s3: str, tmp_path: Path, minilm: Path) -> None:
    """In this process; killed at one of its writes, beside `embed`, and vacuumed."""
    year = Year(tmp_path / "year", f"{s3}/weeks", str(minilm), num_rows=60, seed=3)
    year.run(0)
    for week, what in enumerate(["killed", "embed", "refresh"], 1):
        year.change()
        year.write()
        year.run(week, what, kill_at=9)
    year.check_as_from_scratch(f"{s3}/weeks-anew")
    assert year.run(4).result.unchanged
    fmembed.vacuum(year.table, purge=True)
    named = {p.path for p in Table(year.table).rows.parts()}
    assert {p for p in Storage(year.table).sizes("") if p.startswith("part-")} == named
    year.check(year.kept)
    ids = sorted(fmembed.read(year.table, columns=["row_id"])["row_id"].to_pylist())
    done = fmembed.delete(year.table, f"row_id = '{ids[0]}'")
    assert (done.rows, done.rows_left) == (1, len(ids) - 1)
    assert fmembed.verify(year.table).problems == []
    assert fmembed.undelete(year.table) == 1


def test_create_is_conditional(s3: str) -> None:
    storage = Storage(f"{s3}/create")
    wins = []
    start = threading.Barrier(8)

    def race(name: str) -> None:
        start.wait()
        if storage.create("one", name.encode()):
            wins.append(name)

    threads = [threading.Thread(target=race, args=(f"t{i}",)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wins) == 1
    assert storage.get("one") == wins[0].encode()
    assert storage.paths() == ["one"]
    storage.put("folder/two", b"2")
    assert storage.paths() == ["folder/", "one"]
    assert storage.paths("folder/") == ["folder/two"]
    with storage.open("folder/two") as f:
        assert f.read() == b"2"
    storage.delete("one")
    assert storage.size_bytes("one") is None


def test_lock(s3: str) -> None:
    storage = Storage(f"{s3}/lock")
    with (
        Lock(storage, "first", beat_s=0.05, expire_s=1),
        pytest.raises(LockedError, match="run first"),
        Lock(storage, "second"),
    ):
        pass
    dead = {"run": "dead", "machine": "elsewhere", "host": "far", "pid": 1, "started": "then"}
    storage.put("_lock/00000009.json", json.dumps(dead).encode())
    with Lock(storage, "third", beat_s=0.05, expire_s=0.5) as third:
        third.check()
        assert storage.paths("_lock/") == ["_lock/00000010.json"]


def test_of_two_commits_on_one_version_the_second_fails(s3: str) -> None:
    tables = [Table(f"{s3}/commits") for _ in range(2)]
    for t in tables:
        t.known()
    part = tables[0].rows.files.write(pa.table({"row_id": ["a"]}, schema=SCHEMA))
    tables[0].rows.commit([part], SCHEMA, CONFIGURATION, ("one", 0))
    rows = pa.table({"row_id": ["b"]}, schema=SCHEMA)
    stray = tables[1].rows.files.write(rows, (), CONFIGURATION)
    with pytest.raises(ConflictError):
        tables[1].rows.commit([stray], SCHEMA, CONFIGURATION, ("two", 0))
    assert tables[0].strays() == [(tables[0].rows, stray.path)]
    assert tables[0].remove_strays() == 1
    assert fmembed.read(f"{s3}/commits")["row_id"].to_pylist() == ["a"]


def test_source_table_and_report_on_s3_and_no_secret_anywhere(
    s3: str, tiny_bert: Path, tmp_path: Path
) -> None:
    client = boto3.client("s3")
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {i} {SENTENCES[i % 6]}", "topic": "xy"[i % 2]})
                 for i in range(40)]  # fmt: skip
        body = "\n".join([*lines, '{"text": null}']).encode()
        client.put_object(Bucket="bucket", Key=f"in/{name}.jsonl", Body=body)
    command = [
        "embed", "--source", f"{s3}/in", "--label", "topic", "--model", str(tiny_bert),
        "--dtype", "float32", "--output", f"{s3}/out",
        "--set", "output.max_rejected_fraction=0.05", "--set", "probes=[knn]",
    ]  # fmt: skip
    said = []
    first = run_cli(*command, "--json", "-v")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    assert (result["rows_read"], result["rows_embedded"], result["rows_rejected"]) == (82, 80, 2)
    said.append(first)
    before = objects()
    assert "out/_report.html" in before
    again = run_cli(*command)
    assert (again.returncode, again.stdout.startswith("nothing to do")) == (0, True), again.stderr
    assert objects() == before
    said += [again, run_cli("verify", f"{s3}/out"), run_cli("rejected", f"{s3}/out")]
    assert said[-2].stdout.splitlines()[-1] == "all is well"
    assert "2 null input (stage read)" in said[-1].stdout
    assert fmembed.read(f"{s3}/out").num_rows == 80

    # What users get wrong: no such bucket, no such prefix, a password in a URL.
    for wrong in (
        [*command[:-6], "--output", "s3://absent/out"],
        ["embed", "--source", f"{s3}/nothing", *command[3:]],
        ["embed", "--source", "http://me:canary-secret-5up3r@127.0.0.1:9/x.jsonl", *command[3:]],
    ):
        failed = run_cli(*wrong)
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.count("\n") == 1
        said.append(failed)
    text = "".join(done.stdout + done.stderr for done in said)
    for secret in (KEY, SECRET):
        assert secret not in text
        assert not [k for k, content in objects().items() if secret.encode() in content]


def test_credentials_from_a_config_file(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    file = tmp_path / "credentials"
    file.write_text(f"[team]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "team")
    storage = Storage(f"{s3}/profile")
    storage.put("x", b"1")
    assert storage.get("x") == b"1"
    table = Table(f"{s3}/profile-table")
    table.known()
    part = table.rows.files.write(pa.table({"row_id": ["a"]}, schema=SCHEMA))
    assert table.rows.commit([part], SCHEMA, {}, ("one", 0)) == 1


def test_forbidden_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot write x in s3://absent"):
        Storage("s3://absent").put("x", b"1")


def test_a_killed_driver_resumes(s3: str, bench: Bench) -> None:
    table = f"{s3}/killed"
    with bench.held(table) as run:
        run.kill()
        assert run.end() == -signal.SIGKILL
    assert 0 < bench.num_committed(table) < len(bench.ids)
    # What the dead run has written and not committed, and what is somebody's.
    log, rows = Table(table).rows, pa.table({"row_id": ["stray"]}, schema=SCHEMA)
    stray = log.files.write(rows, (), log.configuration()).path
    Storage(table).put("part-00.parquet", b"half")
    run = bench.start(table, None)
    assert run.end() == 0, run.messages()
    paths = Storage(table).paths()
    assert "part-00.parquet" in paths
    assert stray not in paths
    tally = Tally()
    assert bench.check(table, tally) == []
    assert (tally.lost, tally.twice) == (0, 0)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in run.messages()


def test_objects_are_read_as_they_are_named(s3: str) -> None:
    names = ["a%2Fb", "c d", "e#f", "g?h", "\u00fc", "i%20j", "k*l", "m@n:o"]
    for name in names:
        body = json.dumps({"text": name}).encode()
        boto3.client("s3").put_object(Bucket="bucket", Key=f"named/{name}/{name}.jsonl", Body=body)
    for name in names:
        for uri in (f"{s3}/named/{name}/{name}.jsonl", f"{s3}/named/{name}"):
            source = open_source(SourceSpec(uri=uri))
            rows, _ = list(read_shard(source, source.shards[0], 0))
            assert rows["row_id"].to_pylist() == [f"{name}.jsonl#0"]
            assert rows["_input"].to_pylist() == [name]


def test_a_folder_is_listed_whole_and_in_order(s3: str) -> None:
    """However deep, with what consoles leave of folders that were made there."""
    names = [
        "a.txt",
        "a/b.txt",
        "a/c/d.txt",
        "a-b.txt",
        "_no/e.txt",
        "f/.g.txt",
        "x.csv",
        "a/",
        "h/",
    ]
    for name in names:
        boto3.client("s3").put_object(Bucket="bucket", Key=f"tree/{name}", Body=name[:-1].encode())
    boto3.client("s3").put_object(Bucket="bucket", Key="trees/other.txt", Body=b"other")

    def found(pattern: str) -> list[str]:
        source = open_source(SourceSpec(uri=f"{s3}/tree{pattern}"))
        files = [file for shard in source.shards for file in shard.files]
        assert all(file.revision and file.size for file in files)
        return [file.path.removeprefix("bucket/tree/") for file in files]

    assert found("") == ["a-b.txt", "a.txt", "a/b.txt", "a/c/d.txt"]
    assert found("/*.txt") == ["a-b.txt", "a.txt"]
    assert found("/*/*.txt") == ["a/b.txt"]
    assert found("/a/**/*.txt") == ["a/b.txt", "a/c/d.txt"]
    source = open_source(SourceSpec(uri=f"{s3}/tree"))
    assert source.passed_over[HIDDEN] == 2
    assert source.passed_over["files with .csv, no text_folder"] == 1


def test_a_large_file_is_read_in_parts(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From object to object's end: no part asks for another's bytes, and all give the whole."""
    lines = [json.dumps({"text": f"number {i} " + "x" * (i % 50)}) for i in range(200)]
    content = "".join(f"{line}\n" for line in lines).encode()
    boto3.client("s3").put_object(Bucket="bucket", Key="large/rows.jsonl", Body=content)
    monkeypatch.setattr(ranges, "PART_BYTES", 1000)
    source = open_source(SourceSpec(uri=f"{s3}/large"))
    (parts,) = list_unlocated(source, source.shards, {})
    located = locate(source, parts, [count_part(source, part) for part in parts.parts])
    assert len(located) == -(-len(content) // 1000)
    rows = [r for i, shard in enumerate(located) for r in _rows_of(source, shard, i)]
    assert rows == [(f"rows.jsonl#{i}", json.loads(line)["text"]) for i, line in enumerate(lines)]


def _rows_of(source: Source, shard: Shard, index: int) -> list[tuple[str, str]]:
    rows = pa.concat_tables(read_shard(source, shard, index)).to_pylist()
    return [(row["row_id"], row["_input"]) for row in rows if row["row_id"] is not None]


def test_a_reader_of_a_store_sees_whole_versions_and_no_others(
    tmp_path: Path, minilm: Path, s3: str
) -> None:
    """Through refreshes, a kill, a better model, a rollback and a vacuum."""
    noises = {"first": 1.1, "better": 0.7}
    year = StoreYear(tmp_path / "year", f"{s3}/store", str(minilm), 200, noises)
    with Reader(year) as reader:
        for name, kill_at in (("first", 0), ("first", 9), ("better", 14)):
            reader.allow()
            assert year.refresh(name, kill_at).promotion in ("promoted", "current")
            reader.wait()
            year.change()
        year.promoted = year.previous
        promotion.rollback(year.store)
        reader.wait()
        for table in fmembed.Store.open(year.store).tables():
            fmembed.vacuum(f"{year.store}/tables/{table.name}", keep_days=0, keep_versions=1)
        year.check()
        reader.wait()
    told = reader.told(num_back=1)
    assert "of 3 versions" in told
