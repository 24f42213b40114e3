"""The embed stage: pieces to vectors, in Ray's actors or in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fmembed.checkpoint.opening import Checkpoint
from fmembed.model.server import EndpointEncoder
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.rows.pieces import unpack_pieces
from fmembed.rows.precision import Ranges
from fmembed.rows.vectors import VectorColumns, Vectors
from fmembed.spec import PreprocessSpec
from fmembed.startup import uncollected


class Embed:
    """The embed stage as Ray's actors make it.

    Their processes import torch, which takes two seconds; the driver does not.
    """

    @uncollected()
    def __init__(self, checkpoint: Checkpoint, **options: Any) -> None:
        """Load the model, or make a client of the server that has it.

        Args:
            checkpoint: Which model.
            options: As for `encoder.Encoder`, or for `server.EndpointEncoder`.
        """
        self._encoder = load(checkpoint, **options)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the columns of `rows.pieces` by a column of vectors for each output."""
        return self._encoder(rows)


class WithoutModel:
    """The stage in its place where no row is for the model: all are copies, or rejected.

    No weight is loaded, nor torch imported, and no device held.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dims: Mapping[str, int],
        ranges: Ranges,
        pieces_are_rows: bool,
        **_: Any,
    ) -> None:
        """Prepare.

        Args:
            checkpoint: Which model it would be.
            dims: The length of the vectors that the table has, by column.
            ranges: As for `encoder.Encoder`, as is the next.
            pieces_are_rows: The same.
        """
        self._columns = VectorColumns(checkpoint.outputs, dims, ranges, pieces_are_rows)
        self._none: Vectors = {
            output.column: [] if output.pooling == "tokens"
            else np.empty((0, dims[output.column]), dtype=np.float32)
            for output in checkpoint.outputs
        }  # fmt: skip

    def __call__(self, rows: pa.Table) -> pa.Table:
        """As `Embed`, of rows without pieces: each vector is null."""
        pieces = unpack_pieces(rows)
        if pieces.pieces:
            raise RuntimeError("a row for the model, where none was found to be")
        return self._columns.join(rows, pieces, self._none, {})


def embed_here(checkpoint: Checkpoint, inputs: Sequence[str | bytes]) -> pa.Table:
    """Embed a few inputs in this process.

    Args:
        checkpoint: Which model; no server.
        inputs: Texts, or the files of pictures or sounds.

    Returns:
        A row for each input, in order: a column of vectors for each output, and `_error` and
        `_message` of those that have none.

    Raises:
        ModelError: The model or its tokenizer cannot be loaded.
    """
    encoder = load(checkpoint)
    rows = [{"row_id": str(i), "_input": given} for i, given in enumerate(inputs)]
    table = pa.Table.from_pylist(rows, row_schema(pa.schema([]), checkpoint.modality))
    return encoder(Preprocess(checkpoint, PreprocessSpec())(table))


def load(checkpoint: Checkpoint, **options: Any) -> Callable[[pa.Table], pa.Table]:
    """What turns a window of rows into columns of vectors: see `Embed`."""
    if checkpoint.endpoint is not None:
        return EndpointEncoder(checkpoint, **options)
    from fmembed.model.encoder import Encoder

    return Encoder(checkpoint, **options)
