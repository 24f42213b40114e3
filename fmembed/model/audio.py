"""Samples or spectrograms to states, and which of these are the sound's own and no padding.

Legend: B rows of a batch, L samples or frames of its longest row, D dimensions of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import extract_features, load_feature_extractor
from fmembed.model.pooling import States
from fmembed.model.tower import Tower
from fmembed.rows.pieces import Piece


class AudioTower(Tower):
    """A model of sounds, or the half of one that embeds them."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, model: Any) -> None:
        super().__init__(checkpoint, device, model)
        self._extractor = load_feature_extractor(checkpoint)
        self._is_waveform = bool(getattr(model.config, "conv_stride", None))
        # Not sounds that the extractor has brought to one length, and not those of wav2vec models
        # with group norm, which average over the whole padded sound and, as their own documentation
        # says, take no mask.
        self.can_pad = getattr(model.config, "feat_extract_norm", "group") == "layer"

    def states(self, pieces: Sequence[Piece]) -> States:
        return self._waveform(pieces) if self._is_waveform else self._spectrogram(pieces)

    def example(self, num_tokens: int = 4) -> Piece:
        silence = np.zeros(self._checkpoint.rate_hz, dtype=np.float32)
        values = silence if self._is_waveform else self._extract(silence)
        return Piece(values, len(silence))

    def is_too_short(self, pieces: Sequence[Piece]) -> list[bool]:
        count = getattr(self.model, "_get_feat_extract_output_lengths", None)
        if not self._is_waveform or count is None:
            return super().is_too_short(pieces)
        frames = count(torch.tensor([p.num_units for p in pieces]))
        return [bool(n < 1) for n in frames]

    def _waveform(self, pieces: Sequence[Piece]) -> States:
        # The extractor's own normalisation, a sound at a time; samples travelled as they were.
        sounds = [self._extract(p.values) for p in pieces]
        lengths = [len(s) for s in sounds]
        values = np.zeros((len(sounds), max(lengths)), dtype=np.float32)
        for row, samples in zip(values, sounds, strict=True):
            row[: len(samples)] = samples
        values_BL = self.send(torch.from_numpy(values)).to(self.model.dtype)
        if not self.can_pad:
            hidden, layers, pooled = self._run(input_values=values_BL)
            mask_BL = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            return States(hidden, mask_BL, layers, pooled)
        real = np.arange(values.shape[1]) < np.array(lengths)[:, None]
        real_BL = self.send(torch.from_numpy(real.astype(np.int64)))
        hidden, layers, pooled = self._run(input_values=values_BL, attention_mask=real_BL)
        # Samples to frames, as the convolutions in front make them.
        frames_BL = self.model._get_feature_vector_attention_mask(hidden.shape[1], real_BL)
        return States(hidden, frames_BL.long(), layers, pooled)

    def _spectrogram(self, pieces: Sequence[Piece]) -> States:
        values = self.send(torch.from_numpy(np.stack([p.values for p in pieces])))
        inputs = {self._extractor.model_input_names[0]: values.to(self.model.dtype)}
        family = self._checkpoint.family
        if family.takes_is_longer:
            # Never: no more travels at once than the model takes.
            inputs["is_longer"] = torch.zeros(len(pieces), 1, dtype=torch.bool, device=self._device)
        hidden, layers, pooled = self._run(**inputs)
        num_units = self.send(torch.tensor([p.num_units for p in pieces]))
        mask_BL = _FRAMES[family.frames](self.model.config, num_units, hidden)
        return States(hidden, mask_BL, layers, pooled)

    def _extract(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return extract_features(self._extractor, samples, self._checkpoint.rate_hz)


def _all_frames(_: Any, __: Tensor, hidden_BLD: Tensor) -> Tensor:
    return torch.ones(hidden_BLD.shape[:2], dtype=torch.int64, device=hidden_BLD.device)


def _whisper_frames(_: Any, num_samples_B: Tensor, hidden_BLD: Tensor) -> Tensor:
    """A mel frame every 160 samples, two of them to a state."""
    frames_B = -(-num_samples_B // 320)
    return (torch.arange(hidden_BLD.shape[1], device=frames_B.device) < frames_B[:, None]).long()


def _patch_frames(config: Any, num_samples_B: Tensor, hidden_BLD: Tensor) -> Tensor:
    """Two class tokens, then patches by frequency and, within it, by time."""
    num_freq = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    num_time = (hidden_BLD.shape[1] - 2) // num_freq
    # Kaldi's frames: 25 ms every 10 ms, none begun that does not fit.
    frames_B = ((num_samples_B - 400) // 160 + 1).clamp(min=1)
    starts = torch.arange(num_time, device=frames_B.device) * config.time_stride
    by_time = (starts < frames_B[:, None]).long()
    none = torch.zeros(len(by_time), 2, dtype=torch.int64, device=by_time.device)
    return torch.cat([none, by_time.repeat(1, num_freq)], dim=1)


# By the family's `frames`.
_FRAMES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "all": _all_frames,
    "whisper": _whisper_frames,
    "patches": _patch_frames,
}
