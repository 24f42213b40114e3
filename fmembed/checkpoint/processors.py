"""A checkpoint's own processors of pictures and sounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from fmembed.checkpoint.opening import Checkpoint, check_unchanged
from fmembed.errors import ModelError


def load_image_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor, on Pillow: torchvision is not needed."""
    from transformers import AutoImageProcessor

    with loading(checkpoint.id):
        processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint.folder() / checkpoint.weights,
            trust_remote_code=checkpoint.trust_remote_code,
            backend="pil",
        )
    check_unchanged(checkpoint)
    return processor


class ImageTooLargeError(Exception):
    """What a processor would make of a picture is over the limit; it has not been made."""


def process_image(
    processor: Any, image: Any, is_compact: bool = False, max_px: int | None = None
) -> Any:
    """One picture as the processor makes it for the model.

    Args:
        processor: What `load_image_processor` gave.
        image: Shape (height, width, 3), uint8.
        is_compact: Leave rescaling and normalising to the caller, where the processor can.
        max_px: Pixels that a picture may have at any step on the way.

    Returns:
        Shape (3, height, width), a numpy array.

    Raises:
        ImageTooLargeError: Resized or padded, it would have more.
    """
    if max_px is not None:
        with _limited(processor, image, max_px):
            return process_image(processor, image, is_compact)
    if hasattr(processor, "val_transforms"):  # timm's own, which knows no options
        return processor([image], return_tensors="pt")["pixel_values"][0].numpy()
    rest = {"do_rescale": False, "do_normalize": False} if is_compact else {}
    # Named, because of a picture three pixels high the processor cannot tell which axis is colour.
    batch = processor(
        images=[image], input_data_format="channels_last", return_tensors="np", **rest
    )
    return batch["pixel_values"][0]


@contextmanager
def _limited(processor: Any, image: Any, max_px: int) -> Iterator[None]:
    """Look at the shape that a picture is to get, before it is made.

    One pixel by 25,000 becomes 1.2 billion, and 12 GB, where its shortest edge is to be 224. What
    shape a processor makes it alone knows, and there are a hundred of them; but all resize with
    Pillow, and to pad a picture they call numpy or a method of one name. So these are what asks.
    """
    from PIL import Image

    resize, pad = Image.Image.resize, np.pad

    def check(width: int, height: int) -> None:
        if width * height > max_px:
            size = getattr(processor, "size", None) and processor.to_dict()["size"]
            raise ImageTooLargeError(
                f"{image.shape[1]:,} x {image.shape[0]:,} pixels, which the checkpoint's processor "
                f"(size: {size}) would make {width:,} x {height:,}, over preprocess.max_image_px = "
                f"{max_px:,}"
            )

    def checked_resize(picture: Any, size: Any, *rest: Any, **options: Any) -> Any:
        check(*size)
        return resize(picture, size, *rest, **options)

    def checked_pad(array: Any, pad_width: Any, *rest: Any, **options: Any) -> Any:
        added = np.broadcast_to(pad_width, (np.ndim(array), 2)).sum(axis=1)
        sides = sorted((np.shape(array) + added).tolist())  # the shortest axis is that of colours
        check(sides[-1], sides[-2] if len(sides) > 1 else 1)
        return pad(array, pad_width, *rest, **options)

    Image.Image.resize = checked_resize  # type: ignore[method-assign,assignment]
    np.pad = checked_pad
    if square := getattr(processor, "pad_to_square", None):

        def checked_square(image: Any, *rest: Any, **options: Any) -> Any:
            check(max(image.shape), max(image.shape))
            return square(image, *rest, **options)

        processor.pad_to_square = checked_square
    try:
        yield
    finally:
        Image.Image.resize = resize  # type: ignore[method-assign]
        np.pad = pad
        if square:
            del processor.pad_to_square


def load_feature_extractor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own feature extractor for sounds."""
    from transformers import AutoFeatureExtractor

    with loading(checkpoint.id):
        extractor = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )
    check_unchanged(checkpoint)
    return extractor


@contextmanager
def loading(name: str, field: str = "model.id") -> Iterator[None]:
    """What other libraries raise while they load a checkpoint, as one line.

    Raises:
        ModelError: Whatever was raised: a config can be wrong in more ways than can be checked.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"{field}: {name} cannot be loaded: {first_line(e)}") from None


def first_line(error: Exception) -> str:
    """What other libraries say of an error, as far as it goes into a line; with the cause where an
    import has failed, as transformers tells only its module's name.
    """
    line = next(filter(None, str(error).splitlines()), type(error).__name__)
    cause = error.__cause__ if isinstance(error, ImportError) else None
    return line if cause is None else f"{line} ({type(cause).__name__}: {cause})"


@contextmanager
def running(checkpoint: Checkpoint, architecture: str) -> Iterator[None]:
    """What a model raises when it is run for the first time, as one line that names it.

    Raises:
        ModelError: Whatever was raised.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as e:
        reason = first_line(e)
        if checkpoint.dtype != "float32" and re.search("half|float16", reason, re.IGNORECASE):
            reason += "; try model.dtype: float32"
        raise ModelError(
            f"model.id: {checkpoint.id} is of the architecture {architecture}, which cannot be "
            f"run: {reason}"
        ) from None


def extract_features(
    extractor: Any, samples: npt.NDArray[Any], rate_hz: int
) -> npt.NDArray[np.float32]:
    """One sound as the extractor makes it for the model: normalised samples, or a spectrogram.

    Args:
        extractor: What `load_feature_extractor` gave.
        samples: Shape (samples,), float32, or int16 as a file stores them.
        rate_hz: Samples a second, which the extractor compares with its own.

    Returns:
        Shape (samples,), or a spectrogram's two or three axes.
    """
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 2**15  # as libsndfile reads them as floats
    batch = extractor(samples, sampling_rate=rate_hz, return_tensors="np")
    return np.asarray(batch[extractor.model_input_names[0]][0], dtype=np.float32)
