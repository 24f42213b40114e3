"""One large file, read in parts by Ray's tasks; and a machine of one core."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

import fmembed
from fmembed import RunSpec, pipeline
from fmembed.bench.ways import EmbedNothing
from fmembed.run import stages
from fmembed.run.progress import _Counter
from fmembed.sources import reading
from fmembed.sources.formats import ranges
from fmembed.table.table import Table

ROWS = [{"text": f"text number {i}", "topic": f"t{i % 3}"} for i in range(300)]


def spec_of(tmp_path: Path, source: Path, model: Path) -> RunSpec:
    return RunSpec.parse(
        {
            "source": {"uri": str(source), "label": "topic"},
            "model": {"id": str(model), "dtype": "float32"},
            "output": {"uri": str(tmp_path / "out")},
            "probes": [],
        }
    )


def texts_of(table: Path) -> dict[str, str]:
    rows = fmembed.read(str(table), columns=["row_id", "topic"]).to_pylist()
    return {row["row_id"]: row["topic"] for row in rows}


@pytest.mark.usefixtures("local_ray")
def test_a_file_is_read_in_parts_by_the_ids_that_its_rows_have(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PART_BYTES", 1500)
    # The driver looks through no file, whatever it wants to know of its rows beforehand.
    monkeypatch.setattr(reading, "locate_alone", None)
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    spec = spec_of(tmp_path, source, tiny_bert)
    result = pipeline.embed(spec, quiet=True, stage=EmbedNothing)
    assert result.rows_embedded == 300
    expected = {f"in.jsonl#{i}": f"t{i % 3}" for i in range(300)}
    assert texts_of(tmp_path / "out") == expected
    assert len(Table(str(tmp_path / "out")).shard_ends()) == 9
    assert pipeline.embed(spec, quiet=True, stage=EmbedNothing).rows_skipped == 300
    write_jsonl(source, [*ROWS[:100], {"text": "another", "topic": "t"}, *ROWS[100:]])
    again = pipeline.refresh(spec, quiet=True, stage=EmbedNothing)
    # By its number a row is another one, from the new one on; its content is where it was.
    assert (again.rows_new, again.rows_changed, again.contents_embedded) == (1, 200, 1)
    assert fmembed.verify(str(tmp_path / "out")).problems == []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("shards_per_worker", [0, 2])
def test_rows_of_few_shards_are_prepared_beside_reading(
    shards_per_worker: int, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows either way; what reading took is in the figures of both."""
    monkeypatch.setattr(stages, "_SHARDS_PER_WORKER", shards_per_worker)
    operators: set[str] = set()
    on_step = _Counter.on_execution_step

    def see(self: _Counter, executor: Any) -> None:
        operators.update(operator.name for operator in executor._topology or ())
        on_step(self, executor)

    monkeypatch.setattr(_Counter, "on_execution_step", see)
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    result = pipeline.embed(spec_of(tmp_path, source, tiny_bert), quiet=True, stage=EmbedNothing)
    assert result.rows_embedded == 300
    assert len(texts_of(tmp_path / "out")) == 300
    assert result.stages["read, preprocess"]["rows"] == 300
    assert result.stages["read, preprocess"]["busy_s"] > 0
    # By 0 all rows are prepared by the task that reads them.
    assert ("ReadShards" in operators) == bool(shards_per_worker)
    assert ("ReadShards->MapBatches(Preprocess.stream)" in operators) != bool(shards_per_worker)


def test_a_machine_of_one_core_does_its_work(tmp_path: Path, tiny_bert: Path) -> None:
    """A Ray of one CPU, as a cluster may have: what reads and what cuts windows take turns."""
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    script = (
        "import ray, sys; from fmembed import cli\n"
        "ray.init('local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    args: list[Any] = [
        "embed", "--source", source, "--model", tiny_bert, "--dtype", "float32",
        "--output", tmp_path / "out", "--set", "probes=[]",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "300 read, 300 embedded" in done.stdout


def test_a_ray_that_is_started_here_has_two_cpus_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmembed.run import own_node

    for cpus, given in ((1, 2), (0.5, 2), (2, None), (64, None)):
        monkeypatch.setattr(own_node.utils, "get_num_cpus", lambda cpus=cpus: cpus)
        assert own_node._count_cpus() == given
