"""A loaded model and what every modality does with it.

Legend: B rows of a batch, L tokens, patches or frames of its longest row, D dimensions of a state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmembed.arrays import Ints
from fmembed.checkpoint.opening import Checkpoint
from fmembed.model.pooling import States, as_sequence
from fmembed.rows.pieces import Piece


class Tower(ABC):
    """A loaded model, for one modality.

    Attributes:
        model: The whole model, of which `states` may run a part.
        attention: The name of its attention function.
        can_pad: Whether a mask keeps padding out of a row's vector.
        packs: Whether rows are laid one after another instead of padded.
    """

    can_pad = False
    packs = False

    def __init__(self, checkpoint: Checkpoint, device: torch.device, model: Any) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._copies: Any = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.model = model
        self.attention = model.config._attn_implementation
        self._all_layers = any(o.layer is not None for o in checkpoint.outputs)
        self._call = self._entry()
        if checkpoint.compile:
            self._call = torch.compile(self._call, dynamic=True)

    @property
    def max_rows(self) -> int:
        """How many rows a batch may have, whatever their length."""
        return 1024

    def shares(self, piece: Piece) -> tuple[int, ...]:
        """Pieces of which this is the same may share a batch."""
        return () if self.can_pad else piece.values.shape

    @abstractmethod
    def states(self, pieces: Sequence[Piece]) -> States:
        """Run the model on one batch."""

    @abstractmethod
    def example(self, num_tokens: int = 4) -> Piece:
        """A small input, by which the dimensions of the outputs are known before any row comes.

        Args:
            num_tokens: Of a text.
        """

    def is_too_short(self, pieces: Sequence[Piece]) -> list[bool]:
        """Which pieces make no state: alone the model would fail, in company give noise."""
        return [False] * len(pieces)

    def num_slots(self, lengths: Ints) -> int:
        """Tokens, patches or frames that a batch of rows of these lengths computes."""
        return len(lengths) * int(lengths.max())

    def send(self, tensor: Tensor) -> Tensor:
        """To the device.

        To a GPU from pinned memory and in a stream of its own: nothing here waits for the device,
        so that the next batch is made ready and copied while this one computes.
        """
        if self._copies is None:
            return tensor
        with torch.cuda.stream(self._copies):
            sent = tensor.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        sent.record_stream(computing)  # its memory is not given away before it was computed with
        return sent

    def _entry(self) -> Any:
        """What to call: the model, or the part of it that embeds this modality."""
        if self._checkpoint.towers:
            return getattr(self.model, f"get_{self._checkpoint.modality}_features")
        if getattr(self.model.config, "is_encoder_decoder", False) and hasattr(
            self.model, "decoder"
        ):
            return self.model.get_encoder()
        return self.model

    def _run(self, **inputs: Any) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        if self._all_layers:
            inputs["output_hidden_states"] = True
        out = self._call(**inputs)
        layers: Sequence[Tensor] = getattr(out, "hidden_states", None) or ()
        pooled = getattr(out, "pooler_output", None)
        return (
            as_sequence(out.last_hidden_state),
            [as_sequence(layer) for layer in layers],
            pooled.flatten(1) if pooled is not None else None,
        )


def lengths(pieces: Sequence[Piece], positions: Ints, unit_size: int) -> Ints:
    """Units of the sequence that each piece makes: what a batch's budget counts."""
    sizes = np.fromiter((pieces[i].values.size for i in positions), np.int64, len(positions))
    return -(-sizes // unit_size)
