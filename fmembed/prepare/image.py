"""Pictures to pixels, by the checkpoint's own processor."""

from __future__ import annotations

import functools
import io
import math
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import (
    ImageTooLargeError,
    load_image_processor,
    process_image,
)
from fmembed.rows.pieces import Prepared, Refused
from fmembed.spec import PreprocessSpec
from fmembed.startup import uncollected

if TYPE_CHECKING:
    from PIL import Image


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
        pixels = np.asarray(process_image(processor, image, is_compact, spec.max_image_px))
    except ImageTooLargeError as e:
        return Refused("image too large", str(e))
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

    Of what moves the first frame, of several pages the first. The size is in the header: a small
    file that would unfold to gigabytes is never unfolded, but refused.
    """
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    # Pillow warns at this many pixels and raises at twice as many, wherever it learns of a size: in
    # the header, or of a picture inside of another, which opening an icon unfolds.
    Image.MAX_IMAGE_PIXELS = max_px / 2  # type: ignore[assignment]
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a checkpoint's own code may have turned it on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels decide
            with Image.open(io.BytesIO(content), formats=_picture_formats()) as image:
                if damage := _find_damage(image.format, content):
                    return Refused("corrupt image", damage)
                upright = ImageOps.exif_transpose(image)
                if image.mode.partition(";")[0] not in ("I", "F"):
                    return np.asarray(upright.convert("RGB"))
                grey = _to_8_bits(np.asarray(upright), image)
    except UnidentifiedImageError:  # whose message names an object in memory
        return Refused("corrupt image", "it is no picture of a kind that Pillow knows")
    except Image.DecompressionBombError as e:
        size = str(e).partition(" exceeds")[0]
        message = f"{size} is over preprocess.max_image_px = {max_px:,}"
        return Refused("image too large", message)
    return grey if isinstance(grey, Refused) else np.stack([grey] * 3, axis=-1)


def _find_damage(kind: str | None, content: bytes) -> str | None:
    """What Pillow does not look at: whether a JPEG has its end, and the checksums of a PNG.

    A file whose rest is zeros, as a download leaves it that had been given its whole length, is
    otherwise decoded without a word: in nine of ten places where a JPEG may break off so.
    """
    if kind in ("JPEG", "MPO"):
        at = 2
        # Segments come with their lengths, up to the first scan; in what follows no end is feigned.
        while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
            filler = content[at + 1 : at + 2] == b"\xff"
            at += 1 if filler else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if content.find(b"\xff\xd9", at) < 0:
            return "it is cut short: the marker of a JPEG's end is missing"
    elif kind == "PNG":
        at = 8
        while (name := content[at + 4 : at + 8]).isalpha() and name != b"IEND":
            end = at + 8 + int.from_bytes(content[at : at + 4], "big")
            # No pixel depends on a chunk whose name begins with a small letter.
            crc = zlib.crc32(memoryview(content)[at + 4 : end]) if name[:1].isupper() else None
            if crc not in (None, int.from_bytes(content[end : end + 4], "big")):
                return f"it is cut short or changed: its {name.decode('latin-1')} has a wrong CRC"
            at = end + 4
    return None


_STRIP_ROWS = 256


def _to_8_bits(values: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[np.uint8] | Refused:
    """Grey of more than 8 bits, rounded down as Pillow does with colours of 16.

    A file whose pixels have 12 or 16 bits says what is black and what is white. Of 32 bits, whole
    numbers or floats, it is the least of the customary ranges that holds all pixels (0 to 1, to
    255, to 65,535), unless they fill less than a sixteenth of it.

    Args:
        values: Shape (height, width), integers or float32, as Pillow decodes them.
        image: What they were decoded from.

    Returns:
        Shape (height, width), or that nobody can tell how bright they are.
    """
    tops = _possible_whites(image)
    if tops[-1] == 2**32 - 1:
        values = values.view(np.uint32)  # Pillow has no mode for these
    low, high = values.min().item(), values.max().item()
    if not math.isfinite(low + high):  # NaN spreads to both
        return Refused("corrupt image", "it has pixels that are NaN or infinite")
    top = next((t for t in tops if high <= t), 0)
    if low < 0 or not (top == tops[0] or high * 16 >= top > 0):
        return Refused(
            "image of unknown range",
            f"its pixels go from {low:g} to {high:g}, and nothing says what is black and what is "
            "white; scale them to 8 bits",
        )
    grey = np.empty(values.shape, dtype=np.uint8)
    # A strip at a time, because float64 takes eight times the bytes. The thousandth is for floats:
    # 3 / 255 in float32 is a little less than that.
    for start in range(0, len(values), _STRIP_ROWS):
        strip = values[start : start + _STRIP_ROWS].astype(np.float64)
        grey[start : start + _STRIP_ROWS] = np.floor(strip * (255 / top) + 1e-3)
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # which Pillow heeds up to 8 bits
    return 255 - grey if white_is_zero else grey


def _possible_whites(image: Image.Image) -> tuple[int, ...]:
    """The numbers that may stand for white in a picture of Pillow's modes I, I;16 and F."""
    if image.mode == "F":
        return (1, 255, 65_535)
    tags = getattr(image, "tag_v2", None)
    if tags is not None:  # a TIFF's bits per sample, and whether one of them is the sign
        num_bits = tags.get(258, (1,))[0] - (tags.get(339, (1,))[0] == 2)
    else:  # Pillow stretches a PGM's pixels to 16 bits, and a JPEG 2000's
        num_bits = 16 if image.mode != "I" or image.format == "PPM" else 31
    top = 2**num_bits - 1
    return (top,) if num_bits < 31 else (255, 65_535, top)


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
