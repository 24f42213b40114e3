"""Frames of a sound that are its own and no padding, by family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_frames(_: Any, __: Tensor, hidden_BLD: Tensor) -> Tensor:
    return torch.ones(hidden_BLD.shape[:2], dtype=torch.int64, device=hidden_BLD.device)


def _whisper_frames(_: Any, num_samples_B: Tensor, hidden_BLD: Tensor) -> Tensor:
    """A mel frame every 160 samples, two of them to a state."""
    frames_B = -(-num_samples_B // 320)
    return (torch.arange(hidden_BLD.shape[1], device=frames_B.device) < frames_B[:, None]).long()


def _ast_frames(config: Any, num_samples_B: Tensor, hidden_BLD: Tensor) -> Tensor:
    """Two class tokens, then patches by frequency and, within it, by time."""
    num_freq = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    num_time = (hidden_BLD.shape[1] - 2) // num_freq
    # Kaldi's frames: 25 ms every 10 ms, none begun that does not fit.
    frames_B = ((num_samples_B - 400) // 160 + 1).clamp(min=1)
    starts = torch.arange(num_time, device=frames_B.device) * config.time_stride
    by_time = (starts < frames_B[:, None]).long()
    none = torch.zeros(len(by_time), 2, dtype=torch.int64, device=by_time.device)
    return torch.cat([none, by_time.repeat(1, num_freq)], dim=1)


FRAMES = {"whisper": _whisper_frames, "audio-spectrogram-transformer": _ast_frames}
