"""Pictures to pixels, by the checkpoint's own processor."""

from __future__ import annotations

import functools
import io
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import (
    load_image_processor,
    process_image,
)
from fmembed.rows.pieces import Prepared, Refused
from fmembed.spec import PreprocessSpec
from fmembed.startup import uncollected


def prepare_images(
    checkpoint: Checkpoint, spec: PreprocessSpec, contents: list[bytes]
) -> list[Prepared | Refused]:
    """Bytes of pictures to pixels, decoded by Pillow and resized by the model's own processor."""
    return [_prepare_image(checkpoint, spec, content) for content in contents]


def _prepare_image(
    checkpoint: Checkpoint, spec: PreprocessSpec, content: bytes
) -> Prepared | Refused:
    processor, is_compact = _find_image_processor(checkpoint)
    try:
        image = _decode_image(content, spec.max_image_px)
    # Pillow's codecs raise OSError, SyntaxError, struct.error, zlib.error, ... by format.
    except Exception as e:
        return Refused("corrupt image", f"{type(e).__name__}: {e}")
    if isinstance(image, Refused):
        return image
    try:
        pixels = np.asarray(process_image(processor, image, is_compact))
    except Exception as e:  # a processor raises what it likes
        return Refused("not preprocessable", f"{type(e).__name__}: {e}")
    num_units = max(math.ceil(pixels.size / checkpoint.unit_size), 1)
    return Prepared([pixels], [num_units], [(0, num_units)])


@functools.cache
def _picture_formats() -> tuple[str, ...]:
    """Pillow's, but for EPS: that it hands to Ghostscript, which runs the program that it is."""
    from PIL import Image

    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _decode_image(content: bytes, max_px: int) -> npt.NDArray[np.uint8] | Refused:
    """Decode to height, width, RGB, as upright as the camera says.

    The size is in the header: a small file that would unfold to gigabytes is never unfolded, but
    refused.
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
        message = f"{size} is over preprocess.max_image_px = {max_px:,}"
        return Refused("image too large", message)


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
