"""Pixels to states.

Legend: B rows of a batch, L tokens of a picture: class and register tokens, then patches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import load_image_processor, process_image
from fmembed.model.pooling import States
from fmembed.model.tower import Tower
from fmembed.rows.pieces import Piece


class ImageTower(Tower):
    """A model of pictures, or the half of one that embeds them."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, model: Any) -> None:
        super().__init__(checkpoint, device, model)
        self._processor = load_image_processor(checkpoint)

    def states(self, pieces: Sequence[Piece]) -> States:
        pixels = self.send(torch.from_numpy(np.stack([p.values for p in pieces])))
        if pixels.dtype == torch.uint8:
            pixels = self._rescale(pixels)
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.model.dtype)}
        if self._checkpoint.family.masks_patches:
            # Nothing masked (mask_ratio is 0), and the noise that shuffles patches in their order.
            num_patches = self.model.embeddings.patch_embeddings.num_patches
            order = torch.arange(num_patches, dtype=torch.float32, device=self._device)
            inputs["noise"] = order.expand(len(pieces), -1)
        hidden, layers, pooled = self._run(**inputs)
        mask_BL = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        config = getattr(self.model.config, "vision_config", self.model.config)
        if getattr(config, "patch_size", None):
            # Class and register tokens come first; the mean is of the patches.
            num_patches = pieces[0].values.size // self._checkpoint.unit_size
            mask_BL[:, : max(hidden.shape[1] - num_patches, 0)] = 0
        return States(hidden, mask_BL, layers, pooled)

    def example(self, num_tokens: int = 4) -> Piece:
        grey = np.full((64, 48, 3), 128, dtype=np.uint8)
        return Piece(np.asarray(process_image(self._processor, grey)), 1)

    def _entry(self) -> Any:
        if not self._checkpoint.towers and hasattr(self.model, "vision_encoder"):
            return self.model.vision_encoder  # SAM's and its kin: what follows draws masks
        return super()._entry()

    def _rescale(self, pixels: Tensor) -> Tensor:
        """What the processor left to us: the same float32 arithmetic, on the device."""
        values = pixels.float()
        if self._processor.do_rescale:
            values = values * self._processor.rescale_factor
        if self._processor.do_normalize:
            mean, std = self._mean_std
            values = (values - mean) / std
        return values

    @functools.cached_property
    def _mean_std(self) -> tuple[Tensor, ...]:
        # Once, because making a tensor on a GPU of Python's numbers waits for all that it was sent.
        return tuple(
            torch.tensor(v, dtype=torch.float32, device=self._device).view(-1, 1, 1)
            for v in (self._processor.image_mean, self._processor.image_std)
        )
