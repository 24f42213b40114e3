"""The command, on a cluster whose GPUs are only said to be there: its model runs on the CPU.

All else is as on GPUs: what is planned, what actors reserve and wait for.
"""

from __future__ import annotations

import functools
from typing import Any

from fmembed import pipeline
from fmembed.checkpoint.opening import Checkpoint
from fmembed.cli import main
from fmembed.model.embed import Embed


class EmbedOnCpu(Embed):
    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        Embed.__init__(self, checkpoint, **options | {"device": "cpu", "num_threads": 1})


if __name__ == "__main__":
    pipeline.embed = functools.partial(pipeline.embed, stage=EmbedOnCpu)
    pipeline.refresh = functools.partial(pipeline.refresh, stage=EmbedOnCpu)
    main()
