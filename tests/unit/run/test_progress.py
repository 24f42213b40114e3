"""What a run counts by stage, from figures as Ray's executor has them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fmembed.run.progress import Progress, _Counter
from fmembed.run.verdict import EMBED, READ


def operator(name: str, tasks: int, rows: int | None) -> Any:
    metrics = SimpleNamespace(
        num_tasks_finished=tasks, row_outputs_taken=rows, block_generation_time=1.5
    )
    return SimpleNamespace(name=name, metrics=metrics)


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
    progress = Progress(None, quiet=True)
    counter: Any = _Counter()
    counter.progress, counter.operators = progress, {"Preprocess": READ, "Embed": EMBED}
    read = "ReadShards->MapBatches(Preprocess.stream)->StreamingRepartition[]"
    topology = [
        operator(read, shards_read, rows_read), operator("MapBatches(Embed)", 9, rows_embedded)
    ]  # fmt: skip
    counter.on_execution_step(SimpleNamespace(_topology=topology))
    assert (progress.stages[READ].rows, progress.stages[EMBED].rows) == shown
    assert progress.stages[READ].busy_s == 1.5
