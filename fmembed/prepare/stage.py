"""A raw row to model-ready arrays, on CPU; a bad row becomes a rejection, never a crash.

Whatever the modality, what the model takes travels as bytes in the narrowest type that changes
nothing: `model_input` (bytes), `input_dtype`, and `input_shapes`, one shape for each piece (a chunk
of a text, a window of a sound; else one). Token ids are int32; pixels uint8 where rescaling them
on the device gives the same; samples int16 where the sound was stored so, at the model's rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from fmembed.checkpoint.opening import Checkpoint
from fmembed.prepare.audio import prepare_sounds
from fmembed.prepare.image import prepare_images
from fmembed.prepare.text import leave_text, tokenize
from fmembed.rows.columns import INPUT, accepted, reject
from fmembed.rows.counts import SECONDS, with_counts
from fmembed.rows.pieces import DTYPE_NAMES, SHAPES, SPANS, BadInput, Prepared
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
            The rows without `_input`, with `model_input: large_binary` (null for a rejected row),
            `input_dtype: string`, `input_shapes: list<list<int32>>`, `piece_units: list<int32>`
            (tokens, special ones included; patches; samples), `piece_spans: list<list<int64>>`
            (from where to where of the input), `num_units: int32`, their sum, and
            `truncated: bool`.
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
            if isinstance(result, BadInput):
                causes[i] = (result.error, result.message)
            else:
                prepared[i] = result
        rows = reject(rows.drop_columns([INPUT]), "preprocess", causes)

        def column(take: Callable[[Prepared], Any], type_: pa.DataType) -> pa.Array:
            return pa.array([take(p) if p else None for p in prepared], type_)

        return (
            rows.append_column("model_input", column(Prepared.bytes, pa.large_binary()))
            .append_column(
                "input_dtype", column(lambda p: DTYPE_NAMES[p.pieces[0].dtype], pa.string())
            )
            .append_column("input_shapes", column(lambda p: [x.shape for x in p.pieces], SHAPES))
            .append_column("piece_units", column(lambda p: p.units, pa.list_(pa.int32())))
            .append_column("piece_spans", column(lambda p: p.spans, SPANS))
            .append_column("num_units", column(lambda p: sum(p.units), pa.int32()).fill_null(0))
            .append_column("truncated", column(lambda p: p.truncated, pa.bool_()).fill_null(False))
        )


_SLICE_ROWS = {"text": 4096, "image": 32, "audio": 32}
_PREPARE: dict[str, Callable[..., list[Prepared | BadInput]]] = {
    "text": tokenize,
    "image": prepare_images,
    "audio": prepare_sounds,
}
