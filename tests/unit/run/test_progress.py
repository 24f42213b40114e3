"""What a run counts by stage, from figures as Ray's executor has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from fmembed.run.progress import Progress, _Counter
from fmembed.run.verdict import EMBED, READ
from fmembed.sources.source import File, Shard, Source
from fmembed.spec import SourceSpec
from fmembed.telling import Teller


def operator(name: str, tasks: int, rows: int | None, is_finished: bool = False) -> Any:
    metrics = SimpleNamespace(
        num_tasks_finished=tasks, row_outputs_taken=rows, block_generation_time=1.5
    )
    return SimpleNamespace(name=name, metrics=metrics, has_execution_finished=lambda: is_finished)


@pytest.mark.parametrize(
    ("shards_read", "rows_read", "rows_embedded", "shown"),
    [
        (0, None, None, (0, 0)),
        (0, 400, 0, (400, 0)),
        (5, 2230, 2230, (2225, 2225)),
        # The markers of five shards are not yet through the model.
        (5, 2230, 3, (2225, 0)),
    ],
)
def test_a_stage_counts_the_rows_and_not_the_markers_that_end_shards(
    shards_read: int, rows_read: int | None, rows_embedded: int | None, shown: tuple[int, int]
) -> None:
    progress = Progress(Teller(quiet=True))
    counter: Any = _Counter()
    counter.progress, counter.operators = progress, {"Preprocess": READ, "Embed": EMBED}
    read = "ReadShards->MapBatches(Preprocess.stream)->StreamingRepartition[]"
    topology = [
        operator(read, shards_read, rows_read), operator("MapBatches(Embed)", 9, rows_embedded)
    ]  # fmt: skip
    counter.on_execution_step(SimpleNamespace(_topology=topology))
    assert (progress.stages[READ].rows, progress.stages[EMBED].rows) == shown
    assert progress.stages[READ].busy_s == 1.5


@pytest.mark.parametrize(
    ("num_rows", "shards_read", "is_finished", "total"),
    [
        # Nothing is read to its end: nobody knows.
        (None, 0, False, None),
        # The first of two shards was a fifth of the bytes, and held 100 rows.
        (None, 1, False, 500),
        (None, 2, True, 100),
        # Where the source tells, until all is read: rows that were done before do not come.
        (640, 1, False, 640),
        (640, 2, True, 100),
    ],
)
def test_how_many_rows_there_will_be(
    num_rows: int | None, shards_read: int, is_finished: bool, total: float | None
) -> None:
    progress = Progress(Teller(quiet=True))
    halves = [None, None] if num_rows is None else [num_rows // 2] * 2
    shards = tuple(
        Shard((File(name, name, size),), num_rows=rows)
        for name, size, rows in zip("ab", (20, 80), halves, strict=True)
    )
    progress.expect(Source(SourceSpec(uri="x"), "jsonl", None, shards, pa.schema([])))
    counter: Any = _Counter()
    counter.progress, counter.operators = progress, {"Preprocess": READ, "Embed": EMBED}
    topology = [
        operator("ReadShards->Preprocess", shards_read, 100 + shards_read, is_finished),
        operator("Embed", 9, 50),
    ]
    counter.on_execution_step(SimpleNamespace(_topology=topology))
    assert {task.total for task in progress._bars.tasks} == {total}
