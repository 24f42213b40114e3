"""A raw row to model-ready arrays, on CPU; a bad row becomes a rejection, never a crash.

Whatever the modality, the arrays travel in two columns: `model_input`, a flat list of token ids
(int32), pixels (uint8 where the processor's resizing gives them, else float32) or samples
(float32), and `input_shape`, how to fold it.
"""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.checkpoint import Checkpoint, load_image_processor
from fmembed.rows import INPUT, accepted, reject
from fmembed.spec import PreprocessSpec


class Preprocess:
    """What the model takes, of a text, a picture or a sound; by the checkpoint's own processor."""

    def __init__(self, checkpoint: Checkpoint, spec: PreprocessSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the input by `model_input`, `input_shape`, `num_units` and `truncated`.

        Args:
            rows: Rows of `rows.row_schema`.

        Returns:
            The rows without `_input`, with `model_input: list<int32|uint8|float32>` (null for a
            rejected row), `input_shape: list<int32>`, `num_units: int32` (tokens, special ones
            included; patches; samples) and `truncated: bool`.
        """
        good = np.flatnonzero(accepted(rows))
        inputs = rows[INPUT].take(pa.array(good)).to_pylist()
        prepare = _PREPARE[self._checkpoint.modality]
        prepared: list[_Prepared | None] = [None] * rows.num_rows
        causes: dict[int, tuple[str, str]] = {}
        for i, result in zip(
            good.tolist(), prepare(self._checkpoint, self._spec, inputs), strict=True
        ):
            if isinstance(result, _BadInput):
                causes[i] = (result.error, result.message)
            else:
                prepared[i] = result
        rows = reject(rows.drop_columns([INPUT]), "preprocess", causes)
        type_ = _value_type(self._checkpoint)
        columns = {
            "model_input": _lists([p.values if p else None for p in prepared], type_),
            "input_shape": pa.array([p.shape if p else None for p in prepared], _SHAPE),
            "num_units": pa.array([p.num_units if p else 0 for p in prepared], pa.int32()),
            "truncated": pa.array([bool(p and p.truncated) for p in prepared], pa.bool_()),
        }
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        return rows


_SHAPE = pa.list_(pa.int32())


@dataclass(frozen=True)
class _Prepared:
    values: Any
    shape: tuple[int, ...]
    num_units: int
    truncated: bool = False


@dataclass(frozen=True)
class _BadInput:
    error: str
    message: str


def _lists(rows: list[Any], type_: pa.DataType) -> pa.Array:
    """Flat arrays as `list<type_>`, copied once and never through Python objects."""
    sizes = np.fromiter((0 if r is None else len(r) for r in rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    given = [np.asarray(r, type_.to_pandas_dtype()) for r in rows if r is not None]
    flat = pa.array(np.concatenate([np.empty(0, type_.to_pandas_dtype()), *given]), type_)
    missing = pa.array([r is None for r in rows], pa.bool_())
    return pa.LargeListArray.from_arrays(pa.array(offsets), flat, mask=missing)


def _value_type(checkpoint: Checkpoint) -> pa.DataType:
    if checkpoint.modality == "image":
        return pa.uint8() if _find_image_processor(checkpoint)[1] else pa.float32()
    return pa.int32() if checkpoint.modality == "text" else pa.float32()


# --- text -----------------------------------------------------------------------------------------


def _tokenize(
    checkpoint: Checkpoint, _: PreprocessSpec, texts: list[str]
) -> list[_Prepared | _BadInput]:
    """Text to token ids, cut to the checkpoint's limit.

    Not padded: padding is the batcher's choice, made when the batch's longest row is known.
    """
    if not texts:
        return []
    try:
        encoded = _encode(checkpoint, texts)
    # A tokenizer raises whatever its Rust or Python code raises; find the row that did it.
    except Exception as e:
        if len(texts) == 1:
            return [_BadInput("not tokenizable", f"{type(e).__name__}: {e}")]
        return [row for text in texts for row in _tokenize(checkpoint, _, [text])]
    return [
        _Prepared(ids, (len(ids),), len(ids), cut)
        if ids
        else _BadInput("empty input", "the tokenizer makes no token of it")
        for ids, cut in encoded
    ]


def _encode(checkpoint: Checkpoint, texts: list[str]) -> list[tuple[list[int], bool]]:
    tokenizer = _load_tokenizer(checkpoint)
    prompted = [checkpoint.prompt + t for t in texts]
    if checkpoint.lower_case:
        prompted = [t.lower() for t in prompted]
    limit = checkpoint.max_tokens
    batch = tokenizer(
        prompted,
        truncation=True,
        max_length=limit,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    if tokenizer.is_fast:
        cut = [bool(e.overflowing) for e in batch.encodings]
    else:
        cut = [
            len(ids) == limit and len(tokenizer(t)["input_ids"]) > limit
            for ids, t in zip(batch["input_ids"], prompted, strict=True)
        ]
    return list(zip(batch["input_ids"], cut, strict=True))


@functools.lru_cache(maxsize=2)
def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    # One core a task: the tokenizer's own threads would compete with the model for the rest.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
    )


# --- images ---------------------------------------------------------------------------------------


def _prepare_images(
    checkpoint: Checkpoint, spec: PreprocessSpec, contents: list[bytes]
) -> list[_Prepared | _BadInput]:
    """Bytes of pictures to pixels, decoded by Pillow and resized by the model's own processor."""
    return [_prepare_image(checkpoint, spec, content) for content in contents]


def _prepare_image(
    checkpoint: Checkpoint, spec: PreprocessSpec, content: bytes
) -> _Prepared | _BadInput:
    processor, is_compact = _find_image_processor(checkpoint)
    try:
        image = _decode_image(content, spec.max_image_px)
    except _TooLarge as e:
        return _BadInput("image too large", str(e))
    # Pillow's codecs raise OSError, SyntaxError, struct.error, zlib.error, ... by format.
    except Exception as e:
        return _BadInput("corrupt image", f"{type(e).__name__}: {e}")
    try:
        pixels = _process(processor, image, is_compact)
    except Exception as e:  # a processor raises what it likes
        return _BadInput("not preprocessable", f"{type(e).__name__}: {e}")
    num_units = max(math.ceil(pixels.size / checkpoint.unit_size), 1)
    return _Prepared(pixels.reshape(-1), pixels.shape, num_units)


class _TooLarge(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    pass


def _decode_image(content: bytes, max_px: int) -> npt.NDArray[np.uint8]:
    """Decode to height, width, RGB, as upright as the camera says.

    The size is in the header: a small file that would unfold to gigabytes is never unfolded.
    """
    from PIL import Image, ImageOps

    # Ours is a limit with a cause; Pillow's own warns at one size and raises at another.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; the pixels decide
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > max_px:
                raise _TooLarge(
                    f"{width:,} x {height:,} pixels, more than preprocess.max_image_px = {max_px:,}"
                )
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _process(processor: Any, image: npt.NDArray[np.uint8], is_compact: bool) -> Any:
    rest = {"do_rescale": False, "do_normalize": False} if is_compact else {}
    # Named, because of a picture three pixels high the processor cannot tell which axis is colour.
    batch = processor(
        images=[image], input_data_format="channels_last", return_tensors="np", **rest
    )
    return np.asarray(batch["pixel_values"][0])


@functools.lru_cache(maxsize=2)
def _find_image_processor(checkpoint: Checkpoint) -> tuple[Any, bool]:
    """The processor, and whether it leaves uint8 pixels when told not to rescale.

    Where it does, they travel as a quarter of the bytes, and the encoder rescales them on the
    device by the same arithmetic.
    """
    processor = load_image_processor(checkpoint)
    grey = np.full((64, 48, 3), 128, dtype=np.uint8)
    return processor, _process(processor, grey, is_compact=True).dtype == np.uint8


# --- audio ----------------------------------------------------------------------------------------


def _prepare_sounds(
    checkpoint: Checkpoint, spec: PreprocessSpec, contents: list[bytes]
) -> list[_Prepared | _BadInput]:
    """Bytes of sounds to samples at the model's rate, one channel, by the model's own extractor."""
    return [_prepare_sound(checkpoint, spec, content) for content in contents]


def _prepare_sound(
    checkpoint: Checkpoint, spec: PreprocessSpec, content: bytes
) -> _Prepared | _BadInput:
    extractor = _load_feature_extractor(checkpoint)
    rate_hz = int(extractor.sampling_rate)
    try:
        samples = _decode_sound(content, rate_hz, spec.max_audio_s)
    except _TooLarge as e:
        return _BadInput("audio too long", str(e))
    except Exception as e:  # soundfile.LibsndfileError, and what a bad header leads to
        return _BadInput("corrupt audio", f"{type(e).__name__}: {e}")
    if not len(samples):
        return _BadInput("empty input", "the sound has no sample")
    if not np.isfinite(samples).all():
        return _BadInput("corrupt audio", "it has samples that are NaN or infinite")
    try:
        batch = extractor(samples, sampling_rate=rate_hz, return_tensors="np")
    except Exception as e:
        return _BadInput("not preprocessable", f"{type(e).__name__}: {e}")
    values = np.asarray(batch[extractor.model_input_names[0]][0], dtype=np.float32)
    return _Prepared(values.reshape(-1), values.shape, len(samples))


def _decode_sound(content: bytes, rate_hz: int, max_s: float) -> npt.NDArray[np.float32]:
    import soundfile
    import soxr

    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        # One more than allowed: a header's length may be a lie, what is read is not.
        most = int(max_s * sound.samplerate)
        samples = sound.read(most + 1, dtype="float32", always_2d=True)
        if len(samples) > most:
            raise _TooLarge(f"longer than preprocess.max_audio_s = {max_s:g}")
        mono = samples.mean(axis=1)
        if sound.samplerate == rate_hz or not len(mono):
            return np.asarray(mono, dtype=np.float32)
        return np.asarray(soxr.resample(mono, sound.samplerate, rate_hz), dtype=np.float32)


@functools.lru_cache(maxsize=2)
def _load_feature_extractor(checkpoint: Checkpoint) -> Any:
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
        checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
    )


_PREPARE: dict[str, Callable[..., list[_Prepared | _BadInput]]] = {
    "text": _tokenize,
    "image": _prepare_images,
    "audio": _prepare_sounds,
}
