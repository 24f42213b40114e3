"""Features of pictures and sounds that anyone can have without a model: what a model must beat."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from fmembed.probes.arrays import Floats

_SIDE_PX = 16
_NUM_BANDS = 40
_MAX_S = 30.0


def pixels(contents: Sequence[bytes | None]) -> tuple[str, Floats]:
    """Raw pixels of each picture at 16 x 16, shape (rows, 768); zeros for what is no picture."""
    from PIL import Image

    features = np.zeros((len(contents), _SIDE_PX * _SIDE_PX * 3), dtype=np.float32)
    for i, content in enumerate(contents):
        try:
            with Image.open(io.BytesIO(content or b"")) as image:
                small = image.convert("RGB").resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)
        except Exception:  # noqa: S112 - it has been rejected, or the source has changed since
            continue
        features[i] = np.asarray(small, dtype=np.float32).reshape(-1) / 255
    return "raw pixels", features


def spectrum(contents: Sequence[bytes | None]) -> tuple[str, Floats]:
    """Mean and deviation over time of 40 log mel bands, shape (rows, 80); zeros for no sound."""
    import soundfile

    features = np.zeros((len(contents), 2 * _NUM_BANDS), dtype=np.float32)
    for i, content in enumerate(contents):
        try:
            with soundfile.SoundFile(io.BytesIO(content or b"")) as sound:
                rate_hz = sound.samplerate
                samples = sound.read(int(_MAX_S * rate_hz), dtype="float32", always_2d=True)
        except Exception:  # noqa: S112 - it has been rejected, or the source has changed since
            continue
        bands = _log_mel(samples.mean(axis=1), rate_hz)
        features[i] = np.concatenate([bands.mean(axis=0), bands.std(axis=0)])
    return "mel statistics", features


def _log_mel(samples: Floats, rate_hz: int) -> Floats:
    """Log power in 40 triangular mel bands, frames of 25 ms every 10 ms; shape (frames, 40)."""
    size, step = max(rate_hz // 40, 2), max(rate_hz // 100, 1)
    samples = np.pad(samples, (0, max(size - len(samples), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::step] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    top = 2595 * np.log10(1 + rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, _NUM_BANDS + 2) / 2595) - 1)
    at_hz = np.fft.rfftfreq(size, 1 / rate_hz)
    low, peak, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    weights = np.clip(
        np.minimum((at_hz - low) / (peak - low), (high - at_hz) / (high - peak)), 0, 1
    )
    return np.asarray(np.log(power @ weights.T + 1e-10), dtype=np.float32)
