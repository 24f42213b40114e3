"""Pictures and sounds, made up."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import soundfile
from PIL import Image

RATE_HZ = 16_000


def picture(width: int = 50, height: int = 40, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, kind)
    return sink.getvalue()


def sound(num_samples: int, rate_hz: int = RATE_HZ, channels: int = 1, kind: str = "WAV") -> bytes:
    samples = np.random.default_rng(num_samples).normal(0, 0.1, (num_samples, channels))
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate_hz, format=kind)
    return sink.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A header that promises 3.6 gigapixels, in 60 bytes."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", b"")
        + png_chunk(b"IEND", b"")
    )
