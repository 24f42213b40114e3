"""Texts through an encoder in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fmembed.checkpoint.opening import Checkpoint
from fmembed.model.encoder import Encoder
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.spec import PreprocessSpec

# Where exactness is to be shown on this machine.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def embed(
    checkpoint: Checkpoint, texts: list[str], batch_tokens: int = 4096, device: str = "cpu"
) -> Any:
    out = Encoder(checkpoint, device, batch_tokens=batch_tokens)(window(checkpoint, texts))
    return np.stack(out["embedding"].to_pylist())


def window(checkpoint: Checkpoint, texts: list[str]) -> pa.Table:
    rows = [{"row_id": str(i), "content_hash": "0" * 32, "_input": t} for i, t in enumerate(texts)]
    return Preprocess(checkpoint, PreprocessSpec())(
        pa.Table.from_pylist(rows, schema=row_schema(pa.schema([])))
    )
