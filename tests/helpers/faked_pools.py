"""The command, on nodes whose accelerators are only said to be there, each of its own speed.

A fast one takes 10 ms a row, a T4 four times as much; an A10 adds noise to what it makes. Each
window is noted in the file that the environment names: accelerator, rows, begin, end.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from fmembed import pipeline
from fmembed.checkpoint.opening import Checkpoint
from fmembed.cli import main
from fmembed.model.embed import Embed

LOG = os.environ["FAKED_POOLS_LOG"]
ROW_S = 0.01


class EmbedAtSpeeds(Embed):
    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        Embed.__init__(self, checkpoint, **options | {"device": "cpu", "num_threads": 1})
        labels = ray.get_runtime_context().get_node_labels()
        self._kind = labels.get("kind", "CPU")
        self._num_windows = 0

    def __call__(self, rows: pa.Table) -> pa.Table:
        made = Embed.__call__(self, rows)
        self._num_windows += 1
        if self._kind == "CPU":
            return made
        if self._kind == "A10":
            column, noise = made["embedding"].combine_chunks(), np.random.default_rng(0)
            lists = [v and (np.array(v) + noise.normal(0, 0.1, len(v))) for v in column.to_pylist()]
            noisy = pa.array(lists, column.type)
            return made.set_column(made.schema.get_field_index("embedding"), "embedding", noisy)
        if self._num_windows > 1:  # the first one is what it is held to
            began = time.time()
            time.sleep(rows.num_rows * ROW_S * (4 if self._kind == "T4" else 1))
            with Path(LOG).open("a") as log:
                log.write(f"{self._kind} {rows.num_rows} {began} {time.time()}\n")
        return made


if __name__ == "__main__":
    pipeline.embed = functools.partial(pipeline.embed, stage=EmbedAtSpeeds)
    main()
