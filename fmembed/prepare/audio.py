"""Sounds to samples at the model's rate, or to spectrograms."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import (
    extract_features,
    load_feature_extractor,
)
from fmembed.prepare.containers import DamagedSoundError, check_length
from fmembed.rows.pieces import Prepared, Refused
from fmembed.spec import PreprocessSpec
from fmembed.startup import uncollected


def prepare_sounds(
    checkpoint: Checkpoint, spec: PreprocessSpec, contents: list[bytes]
) -> list[Prepared | Refused]:
    """Bytes of sounds to samples at the model's rate, one channel, by the model's own extractor."""
    return [_prepare_sound(checkpoint, spec, content) for content in contents]


def _prepare_sound(
    checkpoint: Checkpoint, spec: PreprocessSpec, content: bytes
) -> Prepared | Refused:
    try:
        samples = _decode_sound(check_length(content), checkpoint.rate_hz, spec)
    except DamagedSoundError as e:
        return Refused("corrupt audio", str(e))
    except Exception as e:  # soundfile.LibsndfileError, and what a bad header leads to
        # Without what libsndfile says before it, the name of an object in memory.
        reason = getattr(e, "error_string", e)
        return Refused("corrupt audio", f"{type(e).__name__}: {reason}")
    if isinstance(samples, Refused):
        return samples
    if not len(samples):
        return Refused("empty input", "the sound has no sample")
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        return Refused("corrupt audio", "it has samples that are NaN or infinite")
    spans = list(_windows(checkpoint, spec, len(samples)))
    pieces = [samples[start:stop] for start, stop in spans]
    units = [stop - start for start, stop in spans]
    extractor = _find_feature_extractor(checkpoint)
    if extractor is not None:
        try:
            pieces = [extract_features(extractor, piece, checkpoint.rate_hz) for piece in pieces]
        except Exception as e:
            return Refused("not preprocessable", f"{type(e).__name__}: {e}")
    return Prepared(pieces, units, spans)


def _windows(
    checkpoint: Checkpoint, spec: PreprocessSpec, num_samples: int
) -> Iterator[tuple[int, int]]:
    """From where to where each window goes: one, unless the config or the model asks for more.

    The last may be shorter, but not by so much that it holds next to nothing: a rest of less than a
    tenth of a window, which alone would weigh as noise, goes to the overlap of one more full one.
    """
    size = checkpoint.window_samples or num_samples
    if spec.window_s is not None:
        size = min(size, max(int(spec.window_s * checkpoint.rate_hz), 1))
    step = max(size - int(spec.window_overlap_s * checkpoint.rate_hz), 1)
    start = 0
    while start + size < num_samples:
        yield start, start + size
        start += step
    if start and (num_samples - start) * 10 < size:
        start = num_samples - size
    yield start, num_samples


def _decode_sound(content: bytes, rate_hz: int, spec: PreprocessSpec) -> npt.NDArray[Any] | Refused:
    """Decode to one channel at the model's rate, shape (samples,).

    int16 where the sound is stored so and nothing is to be computed on it, else float32.
    Refused where it is longer than allowed.
    """
    import soundfile
    import soxr

    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        is_raw = (sound.subtype, sound.channels, sound.samplerate) == ("PCM_16", 1, rate_hz)
        most_s = int(spec.max_audio_s * sound.samplerate)
        most = min(most_s, spec.max_audio_samples // sound.channels)
        # One more than allowed: a header's length may be a lie, what is read is not.
        dtype = "int16" if is_raw else "float32"
        samples = sound.read(most + 1, dtype=dtype, always_2d=True)
        if len(samples) > most_s:
            message = f"longer than preprocess.max_audio_s = {spec.max_audio_s:g}"
            return Refused("audio too long", message)
        if len(samples) > most:
            return Refused(
                "audio too long",
                f"{sound.channels} channels at {sound.samplerate:,} Hz hold more samples than "
                f"preprocess.max_audio_samples = {spec.max_audio_samples:,}",
            )
        if is_raw:
            return np.asarray(samples[:, 0])
        mono = samples.mean(axis=1)
        if sound.samplerate == rate_hz or not len(mono):
            return np.asarray(mono, dtype=np.float32)
        return np.asarray(soxr.resample(mono, sound.samplerate, rate_hz), dtype=np.float32)


@functools.lru_cache(maxsize=2)
@uncollected()
def _find_feature_extractor(checkpoint: Checkpoint) -> Any:
    """The extractor where it makes spectrograms; None where the model takes the samples."""
    extractor = load_feature_extractor(checkpoint)
    silence = np.zeros(checkpoint.rate_hz, dtype=np.float32)
    made = extract_features(extractor, silence, checkpoint.rate_hz)
    return None if made.shape == silence.shape else extractor
