"""Token ids to states: packed one row after another where the model can, else padded.

Legend: B rows of a batch, L tokens of its longest row, T slots of all rows packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fmembed.arrays import Ints
from fmembed.checkpoint.families import Company, list_turns
from fmembed.checkpoint.opening import Checkpoint
from fmembed.model.attention import PACKED
from fmembed.model.batching import pack, pad
from fmembed.model.pooling import States
from fmembed.model.state import State
from fmembed.model.tower import Tower
from fmembed.rows.pieces import Piece

Ids = npt.NDArray[np.int32]


class TextTower(Tower):
    """A model of texts, or the half of one that embeds them.

    A piece's values are token ids, shape (tokens,); or, where the tokenizer gives segment ids that
    matter, both, shape (2, tokens).

    Attributes:
        company: Which rows may share a batch.
    """

    company: Company

    def __init__(self, checkpoint: Checkpoint, device: torch.device, model: Any) -> None:
        super().__init__(checkpoint, device, model)
        self.packs = self.attention == PACKED
        config = model.config
        inner = getattr(config, "text_config", config) if checkpoint.towers else config
        pad_id = getattr(inner, "pad_token_id", None)
        self._pad_id = int(pad_id) if pad_id is not None else 0
        # What is kept for generating the next token is never used here.
        if getattr(inner, "use_cache", False):
            inner.use_cache = False
        family = checkpoint.family
        # Of a family that nobody has tested the least is taken to be true, until it is found out.
        self.company = family.company or "same length"
        entry = self._entry()
        takes = inspect.signature(getattr(entry, "forward", entry)).parameters
        self._takes_segments = "token_type_ids" in takes
        is_steady = family.company is not None and not family.changes_itself
        self._state = None if is_steady else State(model)
        # Past these lengths the positions of a whole batch turn otherwise.
        self._turns = sorted(set(list_turns(inner.to_dict())))

    def shares(self, piece: Piece) -> tuple[int, ...]:
        length = piece.values.shape[-1]
        if self.company == "any":
            return tuple(length > turn for turn in self._turns)
        return (length,)

    @property
    def max_rows(self) -> int:
        return 1 if self.company == "none" else super().max_rows

    def states(self, pieces: Sequence[Piece]) -> States:
        if self._state is not None:
            self._state.put_back()
        ids = [p.values if p.values.ndim == 1 else p.values[0] for p in pieces]
        segments = None
        if self._takes_segments and pieces[0].values.ndim == 2:
            segments = [p.values[1] for p in pieces]
        if self.packs:
            return self._packed(ids, segments)
        ids_BL, mask_BL = pad(ids, self._pad_id)
        ids_BL, mask_BL = self.send(ids_BL), self.send(mask_BL)
        more = {} if self._checkpoint.pads_text else {"attention_mask": mask_BL}
        if segments is not None:
            more["token_type_ids"] = self.send(pad(segments, 0)[0])
        hidden, layers, pooled = self._run(input_ids=ids_BL, **more)
        return States(hidden, mask_BL, layers, pooled)

    def example(self, num_tokens: int = 4) -> Piece:
        return Piece(np.arange(num_tokens, dtype=np.int32) % 4, num_tokens)

    def num_slots(self, lengths: Ints) -> int:
        if not self.packs:
            return super().num_slots(lengths)
        num_tokens = int(lengths.sum())
        if self._device.type != "cpu":
            return num_tokens
        # oneDNN compiles a kernel for each shape and keeps it: with few of them sentences went
        # through MiniLM at 514 rows/s instead of 500, and a process grew by 6 % over 16,000 of them
        # instead of 14 %.
        multiple = 64 if num_tokens >= 512 else 16
        return -(-num_tokens // multiple) * multiple

    def _packed(self, ids: list[Ids], segments: list[Ids] | None) -> States:
        num_slots = self.num_slots(np.array([len(i) for i in ids]))
        ids_1T, bounds, lengths = pack(ids, self._pad_id, num_slots)
        # What follows the last row counts from its end.
        starts = np.repeat(bounds.numpy(), [*lengths, ids_1T.shape[1] - lengths.sum()])
        places = np.arange(ids_1T.shape[1]) - starts
        if self._checkpoint.family.positions_after_padding:
            # As the family counts: from past the padding's id, and a padding token not at all.
            real = np.concatenate([[0], np.cumsum(ids_1T[0].numpy() != self._pad_id)])
            places = np.where(np.diff(real) > 0, real[1:] - real[starts], 0) + self._pad_id
        more = {}
        if segments is not None:
            more["token_type_ids"] = self.send(pack(segments, 0, num_slots)[0])
        states, layers, _ = self._run(
            input_ids=self.send(ids_1T),
            position_ids=self.send(torch.from_numpy(places)[None]),
            cu_seq_lens_q=self.send(bounds),
            max_length_q=int(lengths.max()),
            **more,
        )
        # Pooling sees rows of one length, as it would have without packing.
        at_BL = np.arange(lengths.max()) + bounds[:-1].numpy()[:, None]
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        at = self.send(torch.from_numpy(np.where(mask_BL, at_BL, 0)))
        return States(
            states[0][at],
            self.send(torch.from_numpy(mask_BL.astype(np.int64))),
            [layer[0][at] for layer in layers],
        )
