"""A raw row to model-ready arrays, on CPU; a bad row becomes a rejection, never a crash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from fmembed.checkpoint.opening import Checkpoint
from fmembed.prepare.audio import prepare_sounds
from fmembed.prepare.image import prepare_images
from fmembed.prepare.text import leave_text, tokenize
from fmembed.rows.columns import INPUT, accepted, reject
from fmembed.rows.counts import SECONDS, with_counts
from fmembed.rows.pieces import Prepared, Refused, pack_pieces
from fmembed.spec import PreprocessSpec


class Preprocess:
    """What the model takes, of a text, a picture or a sound; by the checkpoint's own processor."""

    def __init__(self, checkpoint: Checkpoint, spec: PreprocessSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec

    def stream(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The same a slice at a time.

        Pixels take many times the bytes of a picture's file, and so do token ids while they are
        Python's numbers: 62,500 texts at once made a process of 683 MiB, in slices one of 404. The
        first row of each slice says in `_counts` how many seconds it took.
        """
        step = _SLICE_ROWS[self._checkpoint.modality]
        for start in range(0, rows.num_rows, step):
            began = time.perf_counter()
            ready = self(rows.slice(start, step))
            yield with_counts(ready, {f"{SECONDS}preprocess": time.perf_counter() - began})

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the input by what the model takes.

        Args:
            rows: Rows of `columns.row_schema`.

        Returns:
            The rows without `_input`, with the columns of `rows.pieces`.
        """
        good = np.flatnonzero(accepted(rows))
        inputs = rows[INPUT].take(pa.array(good)).to_pylist()
        prepare = _PREPARE[self._checkpoint.modality]
        if self._checkpoint.endpoint is not None:
            prepare = leave_text
        prepared: list[Prepared | None] = [None] * rows.num_rows
        causes: dict[int, tuple[str, str]] = {}
        for i, result in zip(
            good.tolist(), prepare(self._checkpoint, self._spec, inputs), strict=True
        ):
            if isinstance(result, Refused):
                causes[i] = (result.error, result.message)
            else:
                prepared[i] = result
        rows = reject(rows.drop_columns([INPUT]), "preprocess", causes)
        keeps_text = self._spec.keeps_text(self._checkpoint.modality)
        return pack_pieces(rows, prepared, keeps_text)


_SLICE_ROWS = {"text": 4096, "image": 32, "audio": 32}
_PREPARE: dict[str, Callable[..., list[Prepared | Refused]]] = {
    "text": tokenize,
    "image": prepare_images,
    "audio": prepare_sounds,
}
