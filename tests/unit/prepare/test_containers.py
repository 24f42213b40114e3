"""Files of sounds that are cut, put together, or do not say how long they are."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import soundfile
from media import RATE_HZ

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.prepare.containers import DamagedSoundError, _frame_bytes, check_length
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.spec import ModelSpec, PreprocessSpec

NUM_SAMPLES = 16_000


def tone(num_samples: int = NUM_SAMPLES, rate_hz: int = RATE_HZ, channels: int = 1) -> Any:
    """Loud and soft by turns, so that an encoder of varying rates varies them."""
    time_s = np.arange(num_samples)[:, None] / rate_hz
    loud = np.where((time_s * 4).astype(int) % 2, 0.5, 0.01)
    pitch_hz = 200 + 300 * time_s / (1 + np.arange(channels))
    return loud * np.sin(2 * np.pi * pitch_hz * time_s)


def write(kind: str, subtype: str | None = None, rate_hz: int = RATE_HZ, **options: Any) -> bytes:
    samples = options.pop("samples", tone())
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate_hz, format=kind, subtype=subtype, **options)
    return sink.getvalue()


def read(content: bytes) -> npt.NDArray[np.float32]:
    samples: npt.NDArray[np.float32] = soundfile.read(io.BytesIO(content), dtype="float32")[0]
    return samples


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def tagged(content: bytes) -> bytes:
    """Behind a tag with a picture in it."""
    return b"ID3\x04\0\0\0\0\x02\x00" + bytes(256) + content


KINDS: dict[str, bytes] = {
    "WAV": write("WAV"),
    "WAV, big-endian": write("WAV", endian="BIG"),
    "WAV, extensible": write("WAVEX"),
    "WAV, ADPCM": write("WAV", "IMA_ADPCM"),
    "RF64": write("RF64"),
    "W64": write("W64"),
    "AIFF": write("AIFF"),
    "AU": write("AU"),
    "AU, little-endian": write("AU", endian="LITTLE"),
    "CAF": write("CAF"),
    "CAF, ALAC": write("CAF", "ALAC_16"),
    "SVX": write("SVX"),
    "SPHERE": write("NIST"),
    "FLAC": write("FLAC"),
    "FLAC behind a tag": tagged(write("FLAC")),
    "Vorbis": write("OGG", "VORBIS"),
    "Opus": write("OGG", "OPUS"),
    "MP3": write("MP3"),
    "MP3 behind a tag": tagged(write("MP3")),
    "MP3 before a tag": write("MP3") + b"TAG" + bytes(125),
    "MP3, constant rate": write("MP3", bitrate_mode="CONSTANT", compression_level=0.5),
    "MP3, 44.1 kHz": write("MP3", rate_hz=44_100, samples=tone(44_100, 44_100, 2)),
}


def without_table(content: bytes) -> bytes:
    """An MP3 without its first frame, which says how many there are."""
    return content[_frame_bytes(content[:4]) :]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_whole_sound_is_read_as_ever(kind: str) -> None:
    assert check_length(KINDS[kind]) is KINDS[kind]


def is_whole(content: bytes, whole: npt.NDArray[np.float32]) -> bool:
    try:
        found = read(check_length(content))
    except (DamagedSoundError, soundfile.LibsndfileError):
        return True
    return np.array_equal(found, whole)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_sound_cut_short_is_rejected_or_has_all_its_samples(kind: str) -> None:
    content = KINDS[kind]
    whole = read(content)
    cuts = [*np.linspace(1, len(content) - 2, 40).astype(int), len(content) - 1]
    assert [at for at in cuts if not is_whole(content[:at], whole)] == []
    with pytest.raises((DamagedSoundError, soundfile.LibsndfileError)):
        read(check_length(content[: len(content) // 2]))


@pytest.mark.parametrize("kind", [k for k in KINDS if "before a tag" not in k])
def test_sounds_put_together_are_rejected(kind: str) -> None:
    with pytest.raises(DamagedSoundError, match="several sounds"):
        check_length(KINDS[kind] * 2)


@pytest.mark.parametrize("less", [0, 8])
def test_a_wav_whose_length_counts_its_header_is_whole(less: int) -> None:
    content = bytearray(KINDS["WAV"])
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", len(content) - less)
    np.testing.assert_array_equal(read(check_length(bytes(content))), read(KINDS["WAV"]))


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "CAF", "RF64", "FLAC", "Vorbis", "MP3"])
def test_what_follows_a_sound_is_nothing_of_it(kind: str) -> None:
    content = KINDS[kind] + b"TAG" + bytes(125)
    np.testing.assert_array_equal(read(check_length(content)), read(KINDS[kind]))


def ogg_pages(content: bytes) -> list[bytes]:
    starts = [at for at in range(len(content)) if content.startswith(b"OggS", at)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


@pytest.mark.parametrize("kind", ["Vorbis", "Opus"])
def test_an_ogg_with_a_page_that_was_changed_is_rejected(kind: str) -> None:
    pages = ogg_pages(KINDS[kind])
    page = pages[len(pages) // 2]
    for at in (len(page) // 2, len(page) - 1):
        spoiled = page[:at] + bytes([page[at] ^ 4]) + page[at + 1 :]
        with pytest.raises(DamagedSoundError, match="does not match its checksum"):
            check_length(b"".join(pages).replace(page, spoiled))


@pytest.mark.parametrize("kind", ["Vorbis", "Opus"])
def test_an_ogg_that_ends_with_a_page_but_not_the_last_is_cut(kind: str) -> None:
    content = b"".join(ogg_pages(KINDS[kind])[:-1])
    with pytest.raises(DamagedSoundError, match="the page that ends it is missing"):
        check_length(content)


def test_an_mp3_that_ends_with_a_frame_but_not_the_last_is_cut() -> None:
    content = KINDS["MP3"]
    ends, at = [], 0
    while at < len(content):
        at += _frame_bytes(content[at : at + 4])
        ends.append(at)
    with pytest.raises(DamagedSoundError, match=r"tells of 30 frames, and 14 are there"):
        check_length(content[: ends[14]])


def test_an_mp3_whose_rest_is_zeros_is_cut() -> None:
    content = without_table(KINDS["MP3, constant rate"])
    half = len(content) // 2
    assert len(content) - half > 4096
    with pytest.raises(DamagedSoundError, match="what follows its last frame is zeros"):
        check_length(content[:half] + bytes(len(content) - half))
    padded = content + bytes(1000)
    np.testing.assert_array_equal(read(check_length(padded)), read(content))


def size_of(kind: str, name: bytes, size: bytes, after: int = 4) -> Callable[[], bytes]:
    content = KINDS[kind]
    return lambda: patched(content, content.index(name) + after, size)


def flac_without_length() -> bytes:
    """As a program writes it that cannot come back."""
    content = KINDS["FLAC"]
    return patched(content, 21, bytes([content[21] & 0xF0, 0, 0, 0, 0]))


OPEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "WAV, 0": ("WAV", size_of("WAV", b"data", bytes(4))),
    "WAV, 0 of all": ("WAV", lambda: patched(size_of("WAV", b"data", bytes(4))(), 4, bytes(4))),
    "WAV, -1": ("WAV", size_of("WAV", b"data", b"\xff" * 4)),
    "WAV, sox": ("WAV", size_of("WAV", b"data", struct.pack("<I", 0x7FFFF000))),
    "WAV, 2 GiB": ("WAV", size_of("WAV", b"data", struct.pack("<I", 2**31))),
    "WAV, big-endian": ("WAV, big-endian", size_of("WAV, big-endian", b"data", bytes(4))),
    "RF64, 0": ("RF64", lambda: patched(KINDS["RF64"], 28, bytes(16))),
    "RF64, -1": ("RF64", lambda: patched(KINDS["RF64"], 28, b"\xff" * 8)),
    "W64, 0": ("W64", size_of("W64", b"data", bytes(8), 16)),
    "W64, -1": ("W64", size_of("W64", b"data", b"\xff" * 8, 16)),
    "AIFF, 0": ("AIFF", size_of("AIFF", b"SSND", bytes(4))),
    "AIFF, -1": ("AIFF", size_of("AIFF", b"SSND", b"\xff" * 4)),
    "CAF, -1": ("CAF", size_of("CAF", b"data", b"\xff" * 8)),
    "AU, 0": ("AU", lambda: patched(KINDS["AU"], 8, bytes(4))),
    "AU, -1": ("AU", lambda: patched(KINDS["AU"], 8, b"\xff" * 4)),
    "FLAC, 0": ("FLAC", flac_without_length),
}


@pytest.mark.parametrize("case", list(OPEN))
def test_a_length_that_was_left_open_is_that_of_the_file(case: str) -> None:
    kind, make = OPEN[case]
    np.testing.assert_array_equal(read(check_length(make())), read(KINDS[kind]))


@pytest.mark.parametrize("rate_hz", [8000, 16_000, 24_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_of_varying_rates_that_does_not_say_how_long_it_is(
    rate_hz: int, channels: int
) -> None:
    """Of which libsndfile guesses it by the first frame, and stopped after a third of this one."""
    samples = tone(4 * rate_hz, rate_hz, channels)
    content = write("MP3", rate_hz=rate_hz, samples=samples)
    found, expected = read(check_length(without_table(content))), read(content)
    # The delay of encoder and decoder, which the table tells, is left in; so is the last frame.
    found = found[576 : 576 + len(expected) - 1200]
    np.testing.assert_allclose(found[3000:], expected[3000 : len(found)], atol=1e-4)


def test_a_sound_without_samples_stays_one() -> None:
    empty = write("WAV", samples=np.zeros(0))
    for rest in (b"", b"LIST" + struct.pack("<I", 4) + b"abcd", b"id3 " + bytes(4)):
        assert check_length(empty + rest) == empty + rest


def test_a_file_made_for_it_does_not_keep_us() -> None:
    head = KINDS["MP3"][:4]
    heads = [b"\xff\xf8\xc9\x08\x00", b"\xff\xf9\x19\x08\x00"]
    flac = flac_without_length()[:8192] + b"".join(heads) * 200_000
    began = time.monotonic()
    for content in (
        KINDS["WAV"][:12] + bytes(20_000_000),
        KINDS["WAV"] + bytes(20_000_000),
        head + b"\xff" * 5_000_000,
        b"ID3" + bytes(7) + b"ID3" + bytes(5_000_000),
        flac,
    ):
        check_length(content)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_changed_byte_brings_it_down(kind: str) -> None:
    """What a damaged header leads to is one of the errors that make a rejected row."""
    random = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(KINDS[kind])
        for at in random.integers(0, min(len(content), 120), 3):
            content[at] = random.integers(256)
        try:
            check_length(bytes(content))
        except (DamagedSoundError, struct.error, ValueError, IndexError):
            continue


def test_rows_are_rejected_with_the_cause(tiny_wav2vec2: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_wav2vec2)), False)
    adts = b"\xff\xf1\x50\x80\x19\x1f\xfc" + np.random.default_rng(0).bytes(193)
    contents = [
        KINDS["WAV"], KINDS["WAV"][:16_022], KINDS["MP3"][:1206], KINDS["Vorbis"] * 2, adts * 20,
        OPEN["WAV, 0 of all"][1](),
    ]  # fmt: skip
    rows = [{"row_id": str(i), "_input": c} for i, c in enumerate(contents)]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([]), "audio"))
    whole, *cut, opened = Preprocess(checkpoint, PreprocessSpec())(table).to_pylist()
    assert opened["model_input"] == whole["model_input"]
    assert {r["_error"] for r in cut} == {"corrupt audio"}
    assert [r["_message"] for r in cut] == [
        "it is cut short: it tells of 32,000 bytes of samples, and 15,978 are there",
        "it is cut short: its last frame is not whole",
        "several sounds stand in it, one behind another",
        "LibsndfileError: Format not recognised.",
    ]
