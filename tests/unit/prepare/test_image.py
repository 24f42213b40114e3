"""Pictures of many depths and kinds, whole and cut, against Pillow and their 8-bit twins."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import transformers
from media import picture, png_chunk
from PIL import Image, ImageFile, ImageOps
from tiny import save_clip

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.checkpoint.processors import ImageTooLargeError, process_image
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.spec import ModelSpec, PreprocessSpec

Pixels = npt.NDArray[Any]


def prepare(folder: Path, contents: list[bytes], **limits: Any) -> list[dict[str, Any]]:
    checkpoint = open_checkpoint(ModelSpec(id=str(folder)), False)
    rows = [{"row_id": str(i), "_input": c} for i, c in enumerate(contents)]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([]), "image"))
    return Preprocess(checkpoint, PreprocessSpec(**limits))(table).to_pylist()


def save(pixels: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(sink, kind, **options)
    return sink.getvalue()


def raw_tiff(values: Pixels, num_bits: int, sample_format: int = 1, white: int = 1) -> bytes:
    """One strip; what Pillow does not write: 12 bits, signs, white as zero."""
    if num_bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        pixels = b"".join(int(p).to_bytes(3, "big") for p in packed)
    else:
        pixels = values.tobytes()
    height, width = values.shape
    tags = [
        (256, 3, width), (257, 3, height), (258, 3, num_bits), (259, 3, 1), (262, 3, white),
        (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(pixels)), (339, 3, sample_format),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


GREY: Pixels = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)
GREY[0, :2] = 0, 255
DEEP: Pixels = GREY.astype(np.uint16) * 257


def stretched(white: int) -> Pixels:
    """What is rounded down to the twin."""
    return np.ceil(GREY * (white / 255)).astype(np.uint16)


RANGES: dict[str, Callable[[], bytes]] = {
    "8 bits": lambda: save(GREY, "PNG"),
    "16 bits, PNG": lambda: save(DEEP, "PNG"),
    "16 bits, a transparent grey": lambda: save(DEEP, "PNG", transparency=771),
    "16 bits, TIFF": lambda: save(DEEP, "TIFF"),
    "16 bits, TIFF in LZW": lambda: save(DEEP, "TIFF", compression="tiff_lzw"),
    "16 bits, TIFF of the other byte order": lambda: save(DEEP.astype(">u2"), "TIFF"),
    "16 bits, white is zero": lambda: raw_tiff(65_535 - DEEP, 16, white=0),
    "16 bits, signed": lambda: raw_tiff(stretched(32_767).astype(np.int16), 16, 2),
    "16 bits, PGM": lambda: save(DEEP.astype(np.int32), "PPM"),
    "16 bits, JPEG 2000": lambda: save(DEEP, "JPEG2000"),
    "12 bits": lambda: raw_tiff(stretched(4095), 12),
    "32 bits that hold 8": lambda: save(GREY.astype(np.int32), "TIFF"),
    "32 bits that hold 16": lambda: save(DEEP.astype(np.int32), "TIFF"),
    "32 bits": lambda: save(GREY.astype(np.int32) * 0x808080, "TIFF"),
    "32 bits, unsigned": lambda: raw_tiff(GREY.astype(np.uint32) * 0x1010101, 32),
    "float to 1": lambda: save(GREY / np.float32(255), "TIFF"),
    "float to 255": lambda: save(GREY.astype(np.float32), "TIFF"),
    "float to 65,535": lambda: save(DEEP.astype(np.float32), "TIFF"),
    "float, white is zero": lambda: raw_tiff(1 - GREY / np.float32(255), 32, 3, white=0),
    "float, PFM": lambda: save(GREY / np.float32(255), "PPM"),
    "16 bits of colour": lambda: rgb16_png(DEEP),
}  # fmt: skip


def rgb16_png(values: Pixels) -> bytes:
    """Which Pillow reads and does not write."""
    height, width = values.shape
    rows = np.repeat(values.astype(">u2")[..., None], 3, axis=2).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body


@pytest.mark.parametrize("case", list(RANGES))
def test_a_deep_picture_is_as_its_8_bit_twin(case: str, tiny_vit: Path) -> None:
    twin, deep = prepare(tiny_vit, [save(GREY, "PNG"), RANGES[case]()])
    assert deep["_message"] is None
    assert deep["model_input"] == twin["model_input"]


def test_a_ramp_of_16_bits_or_floats_is_as_in_8(tiny_vit: Path) -> None:
    ramp = np.tile(np.linspace(0, 65_535, 64).astype(np.uint16), (40, 1))
    contents = [save((ramp // 257).astype(np.uint8), "PNG"), save(ramp, "PNG")]
    contents.append(save((ramp / 65_535).astype(np.float32), "TIFF"))
    eight, sixteen, floats = (r["model_input"] for r in prepare(tiny_vit, contents))
    assert eight == sixteen == floats


UNKNOWN_RANGES: dict[str, tuple[Pixels, str]] = {
    "below zero": (GREY.astype(np.float32) - 20, "from -20 to 235"),
    "a little over 1": (GREY / np.float32(100), "from 0 to 2.55"),
    "between 8 and 16 bits": (GREY.astype(np.float32) * 4, "from 0 to 1020"),
    "over 16 bits": (GREY.astype(np.float32) * 1000, "from 0 to 255000"),
    "whole numbers between": (GREY.astype(np.int32) * 4, "from 0 to 1020"),
    "whole numbers below zero": (GREY.astype(np.int32) - 1, "from -1 to 254"),
    "whole numbers of 17 bits": (GREY.astype(np.int32) * 514, "from 0 to 131070"),
}


@pytest.mark.parametrize("case", list(UNKNOWN_RANGES))
def test_a_range_that_nobody_knows_is_refused(case: str, tiny_vit: Path) -> None:
    values, said = UNKNOWN_RANGES[case]
    (row,) = prepare(tiny_vit, [save(values, "TIFF")])
    assert row["_error"] == "image of unknown range"
    assert said in row["_message"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers(value: float, tiny_vit: Path) -> None:
    values = GREY / np.float32(255)
    values[3, 4] = value
    (row,) = prepare(tiny_vit, [save(values, "TIFF")])
    assert row["_error"] == "corrupt image"
    assert "NaN or infinite" in row["_message"]


def test_a_dark_picture_of_16_bits_stays_dark(tiny_vit: Path) -> None:
    """Its file says what is white, so its own brightest pixel does not."""
    dark, twin = prepare(tiny_vit, [save(DEEP // 16, "PNG"), save(GREY // 16, "PNG")])
    assert dark["model_input"] == twin["model_input"]


def test_a_deep_picture_is_turned_as_the_camera_says(tiny_vit: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(np.rot90(DEEP), "PNG", exif=exif.tobytes())
    found, expected = prepare(tiny_vit, [turned, save(GREY, "PNG")])
    assert found["model_input"] == expected["model_input"]


def frames() -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(w, 40))).resize((50, 40)) for w in (50, 51, 52)]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_of_what_moves_the_first_frame(kind: str, tiny_vit: Path) -> None:
    first, *rest = frames()
    options = {"lossless": True} if kind == "WEBP" else {}
    content = save(first, kind, save_all=True, append_images=rest, **options)
    image = Image.open(io.BytesIO(content))
    image.seek(0)
    found, expected = prepare(tiny_vit, [content, save(image.convert("RGB"), "PNG")])
    assert found["model_input"] == expected["model_input"]


WHOLE = {
    **{k: save(frames()[0], k) for k in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF", "TGA")},
    **{k: save(frames()[0], k) for k in ("JPEG2000", "PPM", "TIFF", "ICO")},
    "progressive JPEG": save(frames()[0], "JPEG", progressive=True),
    "TIFF in LZW": save(frames()[0], "TIFF", compression="tiff_lzw"),
    "16-bit PNG": save(DEEP, "PNG"),
    "moving GIF": save(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "JPEG with a thumbnail": save(
        frames()[0], "JPEG", exif=b"Exif\0\0" + save(frames()[1].resize((8, 8)), "JPEG")
    ),
}


@pytest.mark.parametrize("kind", list(WHOLE))
def test_a_picture_cut_short_is_rejected_or_has_all_its_pixels(kind: str, tiny_vit: Path) -> None:
    content = WHOLE[kind]
    cuts = [*np.linspace(1, len(content) - 1, 30).astype(int), len(content) - 2]
    whole, *rest = prepare(tiny_vit, [content, *(content[:at] for at in cuts)])
    assert whole["_error"] is None
    for row in rest:
        assert row["_error"] == "corrupt image" or row["model_input"] == whole["model_input"]
        assert "object at 0x" not in (row["_message"] or "")
    assert rest[14]["_error"] == "corrupt image" or kind == "moving GIF"


def test_nobody_else_can_have_cut_pictures_read(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much code that comes with checkpoints turns this on."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    contents = [WHOLE[kind][:-200] for kind in ("JPEG", "PNG", "BMP", "TIFF in LZW")]
    assert {r["_error"] for r in prepare(tiny_vit, contents)} == {"corrupt image"}


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "16-bit PNG"])
@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_a_picture_whose_rest_is_zeros_is_rejected(kind: str, share: float, tiny_vit: Path) -> None:
    """As a download leaves it whose file had been given its whole length."""
    content = WHOLE[kind]
    at = int(len(content) * share)
    (row,) = prepare(tiny_vit, [content[:at] + bytes(len(content) - at)])
    assert row["_error"] == "corrupt image"


def test_what_follows_a_picture_is_nothing_of_it(tiny_vit: Path) -> None:
    """Telephones append films, which may look like anything."""
    for kind in ("JPEG", "PNG"):
        rest = b"\xff\xda\x00\x04ab" + np.random.default_rng(0).bytes(500)
        found, expected = prepare(tiny_vit, [WHOLE[kind] + rest, WHOLE[kind]])
        assert found["model_input"] == expected["model_input"]


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_as_pillow_converts_them(mode: str, tiny_vit: Path) -> None:
    content = picture(kind="TIFF" if mode in ("CMYK", "YCbCr") else "PNG", mode=mode)
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    found, expected = prepare(tiny_vit, [content, save(plain, "PNG")])
    assert found["model_input"] == expected["model_input"]


PAN_AND_SCAN = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "shortest edge": ("CLIP", {"size": {"shortest_edge": 224}}, "224 x 5,600,000"),
    "shortest edge, then cropped": ("Levit", {}, "256 x 6,400,000"),
    "fixed": ("ViT", {}, None),
    "fixed, after a longest edge": ("Idefics3", {}, None),
    "padded to a square by itself": ("Llava", {"do_pad": True}, "25,000 x 25,000"),
    "padded to a square by numpy": ("Owlv2", {}, "25,000 x 25,000"),
    "resized, then padded to a square": ("Janus", {}, None),
    "pan and scan": ("Gemma3", PAN_AND_SCAN, None),
    "as it is": ("ViT", {"do_resize": False}, None),
}


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("case", list(SIZES))
def test_what_explodes_when_it_is_resized_is_refused_before(case: str, upright: bool) -> None:
    """129 bytes of one pixel by 25,000: 12 GB where the shortest edge is to be 224."""
    name, options, shape = SIZES[case]
    processor = getattr(transformers, f"{name}ImageProcessorPil")(**options)
    thin = np.full((25_000, 1, 3) if upright else (1, 25_000, 3), 128, np.uint8)
    resize, pad = Image.Image.resize, np.pad
    tracemalloc.start()
    try:
        if shape is None:
            limited = process_image(processor, thin, max_px=10**8)
            np.testing.assert_array_equal(limited, process_image(processor, thin))
        else:
            with pytest.raises(ImageTooLargeError) as raised:
                process_image(processor, thin, max_px=10**8)
            shape = shape if upright else " x ".join(reversed(shape.split(" x ")))
            assert f"would make {shape}," in str(raised.value)
            assert "preprocess.max_image_px = 100,000,000" in str(raised.value)
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()
    assert (Image.Image.resize, np.pad) == (resize, pad)
    assert "pad_to_square" not in vars(processor)


def test_a_thin_picture_is_rejected_beside_good_ones(tmp_path: Path, minilm: Path) -> None:
    folder = save_clip(tmp_path / "clip", minilm)
    thin = save(np.full((25_000, 1), 128, np.uint8), "PNG")
    rows = prepare(folder, [picture(), thin, picture(20, 900)], max_image_px=10**7)
    assert [r["_error"] for r in rows] == [None, "image too large", None]
    assert rows[1]["_message"] == (
        "1 x 25,000 pixels, which the checkpoint's processor (size: {'shortest_edge': 32}) would "
        "make 32 x 800,000, over preprocess.max_image_px = 10,000,000"
    )
