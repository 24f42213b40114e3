"""A loaded checkpoint: the pieces of one batch to the vectors of every output.

Legend: B rows of a batch, L tokens of its longest row, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmembed.arrays import Ints
from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import running
from fmembed.model.company import find_company
from fmembed.model.loading import load_tower
from fmembed.model.pooling import load_dense, pick_layer, pool
from fmembed.model.text import TextTower
from fmembed.model.tower import lengths
from fmembed.rows.pieces import Piece
from fmembed.rows.vectors import Vectors


class Model:
    """Tower, pooling and Dense modules of a checkpoint, on one device.

    `dims` is the length of the vectors by column, as the model makes them.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Load the weights, and run them once; of a family that nobody has tested a few times more.

        Raises:
            ModelError: The weights do not fit the architecture, or need remote code; an output asks
                for a layer or a pooling that the model has not; or the model cannot be run on
                texts, or not so that a row's vector is its own.
        """
        self.checkpoint = checkpoint
        self.device = device
        self.tower = load_tower(checkpoint, device)
        self._dense = load_dense(checkpoint, device)
        name = type(self.tower.model).__name__
        with running(checkpoint, name), torch.inference_mode():
            first = self.forward([self.tower.example()])
        self.dims = {column: int(rows[0].shape[-1]) for column, rows in first.items()}
        if isinstance(self.tower, TextTower) and checkpoint.family.company is None:
            with running(checkpoint, name), torch.inference_mode():
                self.tower.company = find_company(self, self.tower)

    def forward(self, pieces: list[Piece]) -> dict[str, Any]:
        """Run one batch.

        Returns:
            By column: shape (pieces, dim), on the device; for `tokens` a list of arrays (tokens,
            dim), float32, on the CPU.
        """
        states = self.tower.states(pieces)
        found: dict[str, Any] = {}
        for output in self.checkpoint.outputs:
            if output.pooling == "tokens":
                hidden_BLD = pick_layer(states, output.layer).float().cpu().numpy()
                mask_BL = states.mask_BL.bool().cpu().numpy()
                found[output.column] = [h[m] for h, m in zip(hidden_BLD, mask_BL, strict=True)]
                continue
            vectors_BD: Tensor = pool(states, output.pooling, output.layer)
            for dense in self._dense:
                vectors_BD = dense(vectors_BD)
            found[output.column] = vectors_BD
        return found

    def no_vectors(self, num_pieces: int) -> Vectors:
        """Room for the vectors of so many pieces, on the device."""
        return {
            o.column: [None] * num_pieces
            if o.pooling == "tokens"
            else torch.zeros(num_pieces, self.dims[o.column], device=self.device)
            for o in self.checkpoint.outputs
        }

    def lengths(self, pieces: Sequence[Piece], positions: Ints) -> Ints:
        """Units of the sequence that each of these pieces makes: what a batch's budget counts."""
        unit_size = self.checkpoint.unit_size
        if self.checkpoint.modality == "text" and pieces:
            unit_size *= pieces[0].values.ndim  # segment ids are no tokens
        return lengths(pieces, positions, unit_size)
