"""Folders that are somebody's: whatever is asked of them, not a byte, name or time changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import write_jsonl
from deltalake import write_deltalake
from tables import CARD, CONFIGURATION, IDENTITY, SCHEMA, block, write

from fmembed.cli import run
from fmembed.table.output import check_usable
from fmembed.table.reading import read
from fmembed.table.repair import repair
from fmembed.table.table import Table
from fmembed.table.verify import verify

ROWS = pa.table({"id": [1, 2, 3], "name": ["a", "b", "c"]})


def spark(folder: Path) -> None:
    for n in range(2):
        name = f"part-0000{n}-0a1b2c3d-1111-2222-3333-444455556666-c000.snappy.parquet"
        pq.write_table(ROWS, folder / name)
    (folder / "_SUCCESS").touch()


def hive(folder: Path) -> None:
    for day in ("2026-01-01", "2026-01-02"):
        (folder / f"day={day}").mkdir(parents=True)
        pq.write_table(ROWS, folder / f"day={day}" / f"part-{'0' * 32}.parquet")


def only_names_of_ours(folder: Path) -> None:
    """Names that this project makes, of somebody else's files."""
    pq.write_table(ROWS, folder / f"part-{'0' * 32}.parquet")
    (folder / f"part-{'1' * 32}.parquet#01234567.tmp").write_bytes(b"half")
    (folder / "_runs").mkdir()
    (folder / "_runs" / "1.json").write_text("{}")


def delta(folder: Path) -> None:
    write_deltalake(str(folder), ROWS)
    pq.write_table(ROWS, folder / "part-00000-not-committed.parquet")


def lance(folder: Path) -> None:
    for name in ("_versions/1.manifest", "data/0a1b.lance", "_transactions/0-ab.txn"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"lance")


def iceberg(folder: Path) -> None:
    for name in ("metadata/v1.metadata.json", "metadata/version-hint.text"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("1")
    (folder / "data").mkdir()
    pq.write_table(ROWS, folder / "data" / "00000-0-ab-0001.parquet")


def home(folder: Path) -> None:
    (folder / "part-notes.txt").write_text("of the play")
    (folder / ".profile").write_text("export EDITOR=ed")
    (folder / "letters").mkdir()
    (folder / "letters" / "part-1.parquet").write_text("dear")


def only_hidden(folder: Path) -> None:
    (folder / ".gitkeep").touch()


def lock_of_another(folder: Path) -> None:
    (folder / "_lock").mkdir()
    (folder / "_lock" / "LOCK").write_text("mine")


MAKERS = [spark, hive, only_names_of_ours, delta, lance, iceberg, home, only_hidden,
          lock_of_another]  # fmt: skip


def look(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every name below a folder, with its time, and a file's bytes."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in paths
    }


def embed(tmp_path: Path, model: Path, output: Path, **source: Any) -> int:
    rows = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    config = {
        "source": {"uri": str(rows), **source},
        "model": {"id": str(model), "dtype": "float32"},
        "output": {"uri": str(output)},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return run(["embed", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_somebodys_stays_as_it_is(
    make: Callable[[Path], None],
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    make(folder)
    before = look(folder)
    assert embed(tmp_path, tiny_bert, folder) == 2
    assert capsys.readouterr().err.startswith("fmembed: output.uri: ")
    for command in (["verify"], ["verify", "--repair"], ["rejected"], ["probe"]):
        assert run([command[0], str(folder), *command[1:]]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
    assert look(folder) == before


@pytest.mark.parametrize("make", [delta, lance, iceberg])
def test_a_folder_inside_of_a_table_is_refused(
    make: Callable[[Path], None],
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    make(folder)
    (folder / "empty").mkdir()
    before = look(folder)
    for inside in (folder / "empty", folder / "new" / "er"):
        assert embed(tmp_path, tiny_bert, inside) == 2
        assert "lies inside another table" in capsys.readouterr().err
    assert look(folder) == before


def test_what_lies_in_a_table_and_is_not_of_it_stays(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    table = Table.open_output(str(folder), IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "run")
    written = write(table.uri, block(["a", "b"], ("b",)))
    assert written.part is not None
    table.rows.commit([written.part], written.schema, CONFIGURATION, ("run", 0))
    stray = write(table.uri, block(["c"], seed=1)).part
    assert stray is not None
    # Another table's part, by a name of the same make, and what another tool is just writing.
    other = table.rows.files.write(
        block(["d"]).select(["row_id"]), (), {**CONFIGURATION, "fmembed.table": "another"}
    )
    home(folder)
    theirs = [
        other.path,
        f"part-{'2' * 32}.parquet",
        "part-00000-ab-c000.snappy.parquet",
        "_SUCCESS",
        "_delta_log/_commit_0a1b.json.tmp",
        "letters/part-1.parquet",
        "part-notes.txt",
        ".profile",
    ]
    for name in theirs:
        if not (folder / name).exists():
            (folder / name).write_bytes(b"theirs")
    before = {name: look(folder)[name] for name in theirs}
    table = Table.open_output(str(folder), IDENTITY)
    check_usable(table, IDENTITY)
    table.claim(CARD, SCHEMA, "next")
    table.remove_strays()
    assert not (folder / stray.path).exists()
    verify(str(folder))
    repair(str(folder))
    assert {name: look(folder)[name] for name in theirs} == before
    assert read(str(folder))["row_id"].to_pylist() == ["a"]


@pytest.mark.parametrize(
    ("source", "output", "what"),
    [
        ("data", "data/out", "holds"),
        ("data", "data", "holds"),
        ("data/../data", "link/out", "holds"),
        ("data/**", "data/out", "holds"),
        ("data/*/*.parquet", "data/out", "holds"),
        ("data/**/*.parquet", "data/deep/out", "holds"),
        ("data/deep/a.txt", "data/deep", "lies in"),
        ("data/deep", "data", "lies in"),
    ],
)
def test_a_source_and_its_table_are_kept_apart(
    source: str,
    output: str,
    what: str,
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.json", "c.parquet"):
        (folder / name).write_text("one")
    os.symlink(tmp_path / "data", tmp_path / "link")
    before = look(tmp_path / "data")
    uri = str(tmp_path / source)
    kind = "parquet" if source.endswith(".parquet") else None
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one"]}), folder / "c.parquet")
        before = look(tmp_path / "data")
    code = embed(tmp_path, tiny_bert, tmp_path / output, uri=uri, format=kind or "text_folder")
    said = capsys.readouterr().err
    assert code == 2, said
    assert f" {what} " in said, said
    assert look(tmp_path / "data") == before


def test_a_source_inside_a_table_of_ours_is_refused(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is there and could be added to: only that it would read itself is wrong."""
    table = Table.open_output(str(tmp_path / "out"), IDENTITY)
    table.known()
    table.claim(CARD, SCHEMA, "run")
    (tmp_path / "out" / "texts").mkdir()
    (tmp_path / "out" / "texts" / "a.txt").write_text("one")
    source = {"uri": str(tmp_path / "out" / "texts"), "format": "text_folder"}
    assert embed(tmp_path, tiny_bert, tmp_path / "out", **source) == 2
    assert " lies in " in capsys.readouterr().err


def test_a_pattern_that_matches_no_part_may_lie_beside_the_table(tmp_path: Path) -> None:
    from fmembed.inputs import _check_apart
    from fmembed.sources.opening import open_source
    from fmembed.spec import RunSpec

    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    spec = RunSpec.parse(
        {"source": {"uri": str(tmp_path / "*.jsonl")}, "model": {"id": "m"},
         "output": {"uri": str(tmp_path / "out")}}
    )  # fmt: skip
    _check_apart(spec, open_source(spec.source))


def test_a_path_that_delta_decodes_is_refused(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its library looks for the log of a%2Fb in a/b, and would leave the parts in a%2Fb."""
    assert embed(tmp_path, tiny_bert, tmp_path / "a%2Fb") == 2
    assert "Delta Lake opens no folder with %2F in its path" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a%2Fb").exists()
