"""A row that ends the process which reads or prepares it is found, and rejected alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_jsonl
from fsspec.implementations.local import LocalFileSystem

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.rows.columns import CONTENT_HASH, ERROR, KILLS, MESSAGE, ROW_ID, TOTAL, row_schema
from fmembed.run import apart
from fmembed.run.apart import Child, DiedError, PreprocessApart, read_apart
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source
from fmembed.spec import ModelSpec, PreprocessSpec, SourceSpec

pytestmark = pytest.mark.slow  # 40 s: each starts processes


class Killing(LocalFileSystem):  # type: ignore[misc]
    """Files, of which some end the process that reads so many bytes of them."""

    protocol = "killing"

    def __init__(self, killers: tuple[tuple[str, int], ...]) -> None:
        super().__init__()
        self.killers = dict(killers)

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        self._look(path, 0)
        return Path(path).read_bytes()

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        return _Handle(self, path)

    def _look(self, path: str, num_bytes: int) -> None:
        if num_bytes >= self.killers.get(Path(path).name, 1 << 60):
            os.kill(os.getpid(), signal.SIGKILL)


class _Handle:
    def __init__(self, fs: Killing, path: str) -> None:
        self._fs, self._path, self._file = fs, path, io.BytesIO(Path(path).read_bytes())

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, n: int = -1) -> bytes:
        self._fs._look(self._path, self._file.tell())
        return self._file.read(n)


class Fatal(str):
    """A prompt that ends the process when it is put before certain texts."""

    def __add__(self, text: str) -> str:
        if "fatal" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return text


@pytest.fixture(scope="module", autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    apart._reader.end()
    apart._preparer.end()


def read_both(
    source: Source, killing: Any, **changed: Any
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """All that is read without a killer, and with some: rows, the last of them the marker's."""
    shard = Shard(tuple(f for s in source.shards for f in s.files))
    whole = pa.concat_tables(read_shard(source, shard, 0))
    fatal = replace(source, fs=killing, **changed)
    return whole, pa.concat_tables(read_apart(fatal, shard, 0)).to_pylist()


def test_a_file_that_kills_its_reader_is_rejected_alone(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    source = open_source(SourceSpec(uri=str(tmp_path)))
    whole, rows = read_both(source, Killing((("41.txt", 0),)))
    assert [(r[ROW_ID], r[ERROR]) for r in rows if r[ERROR]] == [("41.txt", KILLS)]
    assert [r[ROW_ID] for r in rows] == whole[ROW_ID].to_pylist()
    hashes = dict(zip(whole[ROW_ID].to_pylist(), whole[CONTENT_HASH].to_pylist(), strict=True))
    assert all(r[CONTENT_HASH] == hashes[r[ROW_ID]] for r in rows if not r[ERROR])
    assert rows[-1][TOTAL] == 60


def test_a_row_whose_file_kills_is_rejected_under_its_id_and_the_next_ones_are_read(
    tmp_path: Path,
) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for i in range(1700):
        (media / f"{i}.png").write_bytes(b"x%d" % i)
    rows = [{"id": f"row {i}", "image": f"{i}.png"} for i in range(1700)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    spec = SourceSpec(uri=str(path), id="id", input="image", root=str(media))
    source = open_source(spec, "image")
    killing = Killing((("1234.png", 0),))
    whole, rows = read_both(source, source.fs, root=(killing, str(media)))
    assert whole.num_rows == 1701
    assert [r[ROW_ID] for r in rows] == whole[ROW_ID].to_pylist()
    (killed,) = (r for r in rows if r[ERROR])
    assert (killed[ROW_ID], killed[ERROR]) == ("row 1234", KILLS)
    assert rows[-1][TOTAL] == 1700


def test_what_nobody_can_read_past_is_said_and_the_next_file_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"text": f"{name} {i} " + "x" * 1500} for i in range(1200)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    source = open_source(SourceSpec(uri=str(tmp_path)))
    whole, rows = read_both(source, Killing((("a.jsonl", 2**20),)))
    ids = [r[ROW_ID] for r in rows]
    (killed,) = (r for r in rows if r[ERROR])
    num_read = ids.index(killed[ROW_ID])
    assert 600 < num_read < 700  # rows in a MiB
    assert killed[ROW_ID] == f"a.jsonl#{num_read}.."
    assert killed[MESSAGE].startswith(f"from row {num_read} on: its process died")
    expected = whole[ROW_ID].to_pylist()
    assert ids == [*expected[:num_read], killed[ROW_ID], *expected[1200:]]
    assert rows[-1][TOTAL] == num_read + 1 + 1200


def texts(*given: str) -> pa.Table:
    rows = [{"row_id": str(i), "_input": text} for i, text in enumerate(given)]
    return pa.Table.from_pylist(rows, row_schema(pa.schema([])))


def test_rows_that_kill_while_they_are_prepared_are_rejected_alone(minilm: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(minilm)), False)
    given = [f"text {i}" for i in range(6)]
    plain = PreprocessApart(checkpoint, PreprocessSpec())(texts(*given))
    given[1] = given[4] = "a fatal text"
    stage = PreprocessApart(replace(checkpoint, prompt=Fatal()), PreprocessSpec())
    (ready,) = stage.stream(texts(*given))
    causes = ready[ERROR].to_pylist()
    assert [i for i, cause in enumerate(causes) if cause] == [1, 4]
    assert set(causes) == {None, KILLS}
    others = np.flatnonzero(np.asarray(ready[ERROR].is_null()))
    assert ready.select(plain.schema.names).take(others) == plain.take(others)


def test_a_child_that_takes_the_last_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child()
    assert child.call(len, "four") == 4
    monkeypatch.setattr(apart, "_MOST_MEMORY", 0.0)
    assert child.call(len, "four") == 4  # it holds little
    with pytest.raises(DiedError, match="took the last of the node's memory and was ended"):
        child.call(_take_memory)
    assert child.call(len, "four") == 4
    child.end()


def _take_memory() -> None:
    held = []
    while True:
        held.append(b"x" * 2**24)


def test_what_a_child_raises_is_no_death() -> None:
    child = Child()
    with pytest.raises(ZeroDivisionError):
        child.call(divmod, 1, 0)
    child.end()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os; from fmembed.run.apart import Child\n"
        "if __name__ == '__main__':\n"
        "    child = Child(); print(child.call(os.getpid), flush=True); os.kill(os.getpid(), 9)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60
    )
    pid = int(ended.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
