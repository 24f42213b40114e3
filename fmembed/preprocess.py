"""A raw row to model-ready arrays, on CPU; a bad row becomes a rejection, never a crash.

Whatever the modality, what the model takes travels as bytes in the narrowest type that changes
nothing: `model_input` (bytes), `input_dtype`, and `input_shapes`, one shape for each piece (a chunk
of a text, a window of a sound; else one). Token ids are int32; pixels uint8 where rescaling them
on the device gives the same; samples int16 where the sound was stored so, at the model's rate.
"""

from __future__ import annotations

import functools
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fmembed.checkpoint import (
    Checkpoint,
    load_feature_extractor,
    load_image_processor,
    loading,
    process_image,
)
from fmembed.rows import INPUT, SECONDS, accepted, reject, with_counts
from fmembed.spec import ModelError, PreprocessSpec
from fmembed.startup import uncollected


class Preprocess:
    """What the model takes, of a text, a picture or a sound; by the checkpoint's own processor."""

    def __init__(self, checkpoint: Checkpoint, spec: PreprocessSpec) -> None:
        self._checkpoint = checkpoint
        self._spec = spec

    def stream(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The same a slice at a time.

        Pixels take many times the bytes of a picture's file, and so do token ids while they are
        Python's numbers: 62,500 texts at once made a process of 683 MiB, in slices one of 404. The
        first row of each slice says in `_counts` how many seconds it took.
        """
        step = _SLICE_ROWS[self._checkpoint.modality]
        for start in range(0, rows.num_rows, step):
            began = time.perf_counter()
            ready = self(rows.slice(start, step))
            yield with_counts(ready, {f"{SECONDS}preprocess": time.perf_counter() - began})

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the input by what the model takes.

        Args:
            rows: Rows of `rows.row_schema`.

        Returns:
            The rows without `_input`, with `model_input: large_binary` (null for a rejected row),
            `input_dtype: string`, `input_shapes: list<list<int32>>`, `piece_units: list<int32>`
            (tokens, special ones included; patches; samples), `piece_spans: list<list<int64>>`
            (from where to where of the input), `num_units: int32`, their sum, and
            `truncated: bool`.
        """
        good = np.flatnonzero(accepted(rows))
        inputs = rows[INPUT].take(pa.array(good)).to_pylist()
        prepare = _PREPARE[self._checkpoint.modality]
        if self._checkpoint.endpoint is not None:
            prepare = _leave_text
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

        def column(take: Callable[[_Prepared], Any], type_: pa.DataType) -> pa.Array:
            return pa.array([take(p) if p else None for p in prepared], type_)

        return (
            rows.append_column("model_input", column(_Prepared.bytes, pa.large_binary()))
            .append_column("input_dtype", column(lambda p: _NAMES[p.pieces[0].dtype], pa.string()))
            .append_column("input_shapes", column(lambda p: [x.shape for x in p.pieces], _SHAPES))
            .append_column("piece_units", column(lambda p: p.units, pa.list_(pa.int32())))
            .append_column("piece_spans", column(lambda p: p.spans, _SPANS))
            .append_column("num_units", column(lambda p: sum(p.units), pa.int32()).fill_null(0))
            .append_column("truncated", column(lambda p: p.truncated, pa.bool_()).fill_null(False))
        )


_SLICE_ROWS = {"text": 4096, "image": 32, "audio": 32}
# Characters, from which only a part of a text is shown to the tokenizer.
_LONG = 2**17
# dtype.name takes 3 us.
_NAMES = {np.dtype(name): name for name in ("uint8", "int16", "int32", "float32")}
_SHAPES = pa.list_(pa.list_(pa.int32()))
_SPANS = pa.list_(pa.list_(pa.int64()))


@dataclass(frozen=True)
class _Prepared:
    pieces: list[npt.NDArray[Any]]
    units: list[int]
    spans: list[tuple[int, int]]
    truncated: bool = False

    def bytes(self) -> bytes:
        return b"".join(piece.tobytes() for piece in self.pieces)


@dataclass(frozen=True)
class _BadInput:
    error: str
    message: str


# --- text -----------------------------------------------------------------------------------------


def _tokenize(
    checkpoint: Checkpoint, spec: PreprocessSpec, texts: list[str]
) -> list[_Prepared | _BadInput]:
    """Text to token ids, cut to the checkpoint's limit, or into chunks.

    Not padded, but for models trained on padding: it is the batcher's choice, made when the batch's
    longest row is known.
    """
    if not texts:
        return []
    _load_tokenizer(checkpoint)  # what is wrong with the checkpoint is no row's fault
    try:
        encoded = _encode(checkpoint, spec, texts)
    # A tokenizer raises whatever its Rust or Python code raises; find the row that did it.
    except Exception as e:
        if len(texts) == 1:
            return [_BadInput("not tokenizable", f"{type(e).__name__}: {e}")]
        return [row for text in texts for row in _tokenize(checkpoint, spec, [text])]
    return [
        _Prepared(
            [np.array(ids, dtype=np.int32) for ids, _ in pieces],
            [len(ids) for ids, _ in pieces],
            [span for _, span in pieces],
            cut,
        )
        if pieces and pieces[0][0]
        else _BadInput("empty input", "the tokenizer makes no token of it")
        for pieces, cut in encoded
    ]


# Of a text: token ids and span of each piece, and whether the model does not see all of it.
_Encoded = tuple[list[tuple[list[int], tuple[int, int]]], bool]


def _encode(checkpoint: Checkpoint, spec: PreprocessSpec, texts: list[str]) -> list[_Encoded]:
    tokenizer = _load_tokenizer(checkpoint)
    prepared = [checkpoint.prompt + t for t in texts]
    if checkpoint.lower_case:
        prepared = [t.lower() for t in prepared]
    limit = checkpoint.max_tokens
    if spec.chunk_tokens is not None:
        return [_chunk(checkpoint, spec, text) for text in texts]
    prepared = [t if len(t) <= _LONG else _seen_part(tokenizer, t, limit) for t in prepared]
    options = {
        "truncation": True,
        "max_length": limit,
        "padding": "max_length" if checkpoint.pads_text else False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
    }
    if tokenizer.is_fast and prepared:
        # The call sets the Rust tokenizer's truncation and padding; the rest goes to it directly,
        # without offsets: 11 us of CPU a short row instead of 21, 35 us a sentence instead of 55.
        tokenizer(prepared[:1], **options)
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(prepared)
        ids_of_rows = [e.ids for e in encodings]
        cut = [bool(e.overflowing) for e in encodings]
    else:
        ids_of_rows = tokenizer(prepared, **options)["input_ids"]
        cut = [
            len(ids) == limit and len(tokenizer(t)["input_ids"]) > limit
            for ids, t in zip(ids_of_rows, prepared, strict=True)
        ]
    return [
        ([(ids, (0, len(text)))], is_cut)
        for ids, is_cut, text in zip(ids_of_rows, cut, texts, strict=True)
    ]


def _seen_part(tokenizer: Any, text: str, limit: int) -> str:
    """The part of a very long text that holds twice the tokens that the model sees.

    A tokenizer goes through all of a text before it cuts it, and takes some hundred bytes for each
    character: 64 MB of text made a process of gigabytes for the first 256 tokens.
    """
    size = _LONG
    while size < len(text):
        part = text[:size] if tokenizer.truncation_side == "right" else text[-size:]
        if len(tokenizer(part, truncation=False, verbose=False)["input_ids"]) > 2 * limit:
            return part
        size *= 4
    return text


def _chunk(checkpoint: Checkpoint, spec: PreprocessSpec, text: str) -> _Encoded:
    """Cut a text at tokens; each chunk begins with the prompt, as a text of its own would.

    A chunk is what its characters give when tokenised alone, so its vector is that of its text.
    """
    tokenizer = _load_tokenizer(checkpoint)
    assert spec.chunk_tokens is not None
    limit = min(spec.chunk_tokens, checkpoint.max_tokens)
    if checkpoint.lower_case:
        text = text.lower()
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = own["offset_mapping"]
    around = len(tokenizer(checkpoint.prompt)["input_ids"])
    if around >= limit:
        raise ValueError(f"the prompt is {around} tokens long, preprocess.chunk_tokens {limit}")
    step = max(limit - around - spec.chunk_overlap, 1)
    pieces = []
    truncated = False
    for first in range(0, max(len(offsets), 1), step):
        last = min(first + limit - around, len(offsets)) - 1
        if last < first:
            break
        start, stop = offsets[first][0], offsets[last][1]
        words = checkpoint.prompt + text[start:stop]
        batch = tokenizer(
            words.lower() if checkpoint.lower_case else words,
            truncation=True,
            max_length=checkpoint.max_tokens,
            padding="max_length" if checkpoint.pads_text else False,
            return_token_type_ids=False,
            return_attention_mask=False,
        )
        truncated |= bool(batch.encodings[0].overflowing)
        pieces.append((batch["input_ids"], (start, stop)))
        if last + 1 == len(offsets):
            break
    return pieces, truncated


def _leave_text(
    checkpoint: Checkpoint, _: PreprocessSpec, texts: list[str]
) -> list[_Prepared | _BadInput]:
    """Text as it is, for a server that has its own tokenizer; its units are characters."""
    prompted = [checkpoint.prompt + text for text in texts]
    return [
        _Prepared([np.frombuffer(p.encode(), dtype=np.uint8)], [len(p)], [(0, len(t))])
        for p, t in zip(prompted, texts, strict=True)
    ]


@functools.lru_cache(maxsize=2)
@uncollected()
def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    # One core a task: the tokenizer's own threads would compete with the model for the rest.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    with loading(checkpoint.id):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )
    # transformers makes one of nothing but a config, which takes every word for unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
        raise ModelError(
            f"model.id: the tokenizer of {checkpoint.id} has no vocabulary; "
            "fetch the whole checkpoint"
        )
    return tokenizer


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
        pixels = np.asarray(process_image(processor, image, is_compact))
    except Exception as e:  # a processor raises what it likes
        return _BadInput("not preprocessable", f"{type(e).__name__}: {e}")
    num_units = max(math.ceil(pixels.size / checkpoint.unit_size), 1)
    return _Prepared([pixels], [num_units], [(0, num_units)])


@functools.cache
def _picture_formats() -> tuple[str, ...]:
    """Pillow's, but for EPS: that it hands to Ghostscript, which runs the program that it is."""
    from PIL import Image

    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


class _TooLarge(Exception):  # noqa: N818 - a row's fate, not a failure of the run
    pass


def _decode_image(content: bytes, max_px: int) -> npt.NDArray[np.uint8]:
    """Decode to height, width, RGB, as upright as the camera says.

    The size is in the header: a small file that would unfold to gigabytes is never unfolded.
    """
    from PIL import Image, ImageOps

    # Pillow warns at this many pixels and raises at twice as many, wherever it learns of a size: in
    # the header, or of a picture inside of another, which opening an icon unfolds.
    Image.MAX_IMAGE_PIXELS = max_px / 2  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels decide
            with Image.open(io.BytesIO(content), formats=_picture_formats()) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as e:
        size = str(e).partition(" exceeds")[0]
        raise _TooLarge(f"{size} is over preprocess.max_image_px = {max_px:,}") from None


@functools.lru_cache(maxsize=2)
@uncollected()
def _find_image_processor(checkpoint: Checkpoint) -> tuple[Any, bool]:
    """The processor, and whether it leaves uint8 pixels when told not to rescale.

    Where it does, they travel as a quarter of the bytes, and the encoder rescales them on the
    device by the same arithmetic.
    """
    processor = load_image_processor(checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    compact = np.asarray(process_image(processor, picture, is_compact=True))
    if compact.dtype != np.uint8:
        return processor, False
    # Not where something comes after rescaling: SAM's processor pads what it has normalised.
    values: Any = compact.astype(np.float32)
    if processor.do_rescale:
        values = values * np.float32(processor.rescale_factor)
    if processor.do_normalize:
        mean, std = (np.float32(v) for v in (processor.image_mean, processor.image_std))
        values = (values - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    whole = np.asarray(process_image(processor, picture))
    return processor, values.shape == whole.shape and np.allclose(values, whole, atol=1e-5)


# --- audio ----------------------------------------------------------------------------------------


def _prepare_sounds(
    checkpoint: Checkpoint, spec: PreprocessSpec, contents: list[bytes]
) -> list[_Prepared | _BadInput]:
    """Bytes of sounds to samples at the model's rate, one channel, by the model's own extractor."""
    return [_prepare_sound(checkpoint, spec, content) for content in contents]


def _prepare_sound(
    checkpoint: Checkpoint, spec: PreprocessSpec, content: bytes
) -> _Prepared | _BadInput:
    try:
        samples = _decode_sound(content, checkpoint.rate_hz, spec)
    except _TooLarge as e:
        return _BadInput("audio too long", str(e))
    except Exception as e:  # soundfile.LibsndfileError, and what a bad header leads to
        return _BadInput("corrupt audio", f"{type(e).__name__}: {e}")
    if not len(samples):
        return _BadInput("empty input", "the sound has no sample")
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        return _BadInput("corrupt audio", "it has samples that are NaN or infinite")
    spans = list(_windows(checkpoint, spec, len(samples)))
    pieces = [samples[start:stop] for start, stop in spans]
    units = [stop - start for start, stop in spans]
    extractor = _find_feature_extractor(checkpoint)
    if extractor is not None:
        try:
            pieces = [_spectrogram(extractor, piece, checkpoint.rate_hz) for piece in pieces]
        except Exception as e:
            return _BadInput("not preprocessable", f"{type(e).__name__}: {e}")
    return _Prepared(pieces, units, spans)


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


def _spectrogram(
    extractor: Any, samples: npt.NDArray[Any], rate_hz: int
) -> npt.NDArray[np.float32]:
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 2**15
    batch = extractor(samples, sampling_rate=rate_hz, return_tensors="np")
    return np.asarray(batch[extractor.model_input_names[0]][0], dtype=np.float32)


def _decode_sound(content: bytes, rate_hz: int, spec: PreprocessSpec) -> npt.NDArray[Any]:
    """Decode to one channel at the model's rate, shape (samples,).

    int16 where the sound is stored so and nothing is to be computed on it, else float32.
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
            raise _TooLarge(f"longer than preprocess.max_audio_s = {spec.max_audio_s:g}")
        if len(samples) > most:
            raise _TooLarge(
                f"{sound.channels} channels at {sound.samplerate:,} Hz hold more samples than "
                f"preprocess.max_audio_samples = {spec.max_audio_samples:,}"
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
    made = _spectrogram(extractor, silence, checkpoint.rate_hz)
    return None if made.shape == silence.shape else extractor


_PREPARE: dict[str, Callable[..., list[_Prepared | _BadInput]]] = {
    "text": _tokenize,
    "image": _prepare_images,
    "audio": _prepare_sounds,
}
