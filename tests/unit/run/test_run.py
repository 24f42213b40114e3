"""What the driver does before Ray starts, and what it need not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl
from tables import CARD, CONFIGURATION, SCHEMA, block, write

import fmembed
from fmembed import RunSpec, TableError
from fmembed.table.lock import Lock
from fmembed.table.table import Table


def test_the_driver_imports_neither_torch_nor_scikit_learn(tiny_bert: Path) -> None:
    program = (
        "import sys; import fmembed.run.record, fmembed.evaluate.probing; "
        "from fmembed.checkpoint.opening import open_checkpoint; "
        "from fmembed.spec import ModelSpec; "
        "open_checkpoint(ModelSpec(id=sys.argv[1]), False); "
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_bert)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_what_was_checked_is_checked_again_under_the_lock(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has made the table while this one waited for its lock."""

    class Waited(Lock):
        def __enter__(self) -> Lock:
            table = Table(str(tmp_path / "out"))
            table.known()
            table.claim(CARD, SCHEMA, "other")
            written = write(table.uri, block(["a"]))
            assert written.part is not None
            table.rows.commit([written.part], written.schema, CONFIGURATION, ("other", 0))
            return super().__enter__()

    write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    spec = RunSpec.parse(
        {
            "source": {"uri": str(tmp_path / "in.jsonl")},
            "model": {"id": str(tiny_bert), "dtype": "float32"},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    monkeypatch.setattr("fmembed.table.lock.Lock", Waited)
    monkeypatch.setattr("fmembed.run.cluster.connect", lambda _: pytest.fail("the model would run"))
    with pytest.raises(TableError, match="was made by another model or setting"):
        fmembed.embed(spec)
    assert fmembed.read(str(tmp_path / "out"))["row_id"].to_pylist() == ["a"]
