"""The embed stage: pieces to vectors, in Ray's actors or here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from fmembed.checkpoint.opening import Checkpoint
from fmembed.model.server import EndpointEncoder
from fmembed.startup import uncollected


class Embed:
    """The embed stage. Its processes import torch, which takes two seconds; the driver does not."""

    @uncollected()
    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        self._stage: Callable[[pa.Table], pa.Table]
        if checkpoint.endpoint is not None:
            self._stage = EndpointEncoder(checkpoint, **options)
        else:
            from fmembed.model.encoder import Encoder

            self._stage = Encoder(checkpoint, **options)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self._stage(rows)
