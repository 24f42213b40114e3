"""Pictures and sounds: as the model's own processor takes them, and what is bad about bad ones."""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from media import RATE_HZ, bomb_png, picture, png_chunk, sound
from PIL import Image

from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.errors import ModelError
from fmembed.model.encoder import Encoder
from fmembed.prepare.stage import Preprocess
from fmembed.prepare.text import _seen_part
from fmembed.rows.columns import row_schema
from fmembed.spec import ModelSpec, PreprocessSpec

RNG = np.random.default_rng(0)


def lying_wav() -> bytes:
    """A header that promises two gigabytes of samples, and four samples."""
    content = bytearray(sound(4))
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 2**31 - 8)
    return bytes(content)


def float_wav(value: float) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, np.full(2000, value, np.float32), RATE_HZ, format="WAV", subtype="FLOAT")
    return sink.getvalue()


def embed(folder: Path, contents: list[bytes], batch_tokens: int = 4096, **limits: Any) -> Any:
    checkpoint, encoder = load(folder, batch_tokens)
    rows = [{"row_id": str(i), "content_hash": "0", "_input": c} for i, c in enumerate(contents)]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([]), checkpoint.modality))
    return encoder(Preprocess(checkpoint, PreprocessSpec(**limits))(table))


@functools.cache
def load(folder: Path, batch_tokens: int) -> tuple[Checkpoint, Encoder]:
    """Once for all tests of a model: loading one takes a second."""
    checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype="float32"), False)
    return checkpoint, Encoder(checkpoint, batch_tokens=batch_tokens)


def assert_equal(rows: pa.Table, expected: list[torch.Tensor]) -> None:
    for vector, reference in zip(rows["embedding"].to_pylist(), expected, strict=True):
        similarity = torch.nn.functional.cosine_similarity(
            torch.tensor(vector, dtype=torch.float64), reference.double(), dim=0
        )
        assert similarity > 0.99999


def moving_picture(kind: str) -> bytes:
    frames = [Image.open(io.BytesIO(picture(w, 40))).resize((50, 40)) for w in (50, 51, 52)]
    sink = io.BytesIO()
    frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
    return sink.getvalue()


def transparent_palette() -> bytes:
    sink = io.BytesIO()
    Image.open(io.BytesIO(picture())).convert("P").save(sink, "PNG", transparency=3)
    return sink.getvalue()


PICTURES = [
    picture(), picture(32, 32), picture(7, 91), picture(1, 1), picture(3, 3), picture(300, 3),
    picture(kind="JPEG"), picture(kind="GIF", mode="P"), picture(mode="L"), picture(mode="RGBA"),
    picture(kind="JPEG", mode="CMYK"), picture(kind="BMP"), picture(kind="WEBP"),
    picture(mode="LA"), picture(mode="1"), picture(kind="TIFF", mode="RGBA"),
    moving_picture("GIF"), moving_picture("WEBP"), transparent_palette(),
]  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [17, 4096])
def test_pictures_are_as_the_reference_has_them(tiny_vit: Path, batch_tokens: int) -> None:
    from transformers import ViTImageProcessorPil, ViTModel
    from transformers.image_utils import load_image

    processor, model = (
        ViTImageProcessorPil.from_pretrained(tiny_vit),
        ViTModel.from_pretrained(tiny_vit).eval(),
    )
    expected = []
    for content in PICTURES:
        # As the library opens what it is given: upright, and in three colours.
        pixels = np.asarray(load_image(Image.open(io.BytesIO(content))))
        batch = processor(pixels, input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            expected.append(model(**batch).last_hidden_state[0, 0])
    rows = embed(tiny_vit, PICTURES, batch_tokens)
    assert rows["_error"].to_pylist() == [None] * len(PICTURES)
    assert rows["num_units"].to_pylist() == [16] * len(PICTURES)
    assert_equal(rows, expected)


def test_pixels_travel_as_bytes(tiny_vit: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_vit)), False)
    table = pa.Table.from_pylist(
        [{"row_id": "a", "_input": picture()}], schema=row_schema(pa.schema([]), "image")
    )
    ready = Preprocess(checkpoint, PreprocessSpec())(table)
    assert ready["input_dtype"].to_pylist() == ["uint8"]
    assert ready["input_shapes"].to_pylist() == [[[3, 32, 32]]]
    assert len(ready["model_input"][0].as_py()) == 3 * 32 * 32


def test_a_photograph_is_turned_as_the_camera_says(tiny_vit: Path) -> None:
    upright = Image.open(io.BytesIO(picture()))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    sink = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(sink, "PNG", exif=exif)
    vectors = embed(tiny_vit, [picture(), sink.getvalue()])["embedding"].to_pylist()
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [100, 100_000])
def test_sounds_are_as_the_reference_has_them(tiny_wav2vec2: Path, batch_tokens: int) -> None:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tiny_wav2vec2)
    model = Wav2Vec2Model.from_pretrained(tiny_wav2vec2).eval()
    contents = [sound(n) for n in (1600, 4000, 4000, 801, 16_000, 12_345)]
    contents += [sound(4000, channels=2), sound(3000, kind="FLAC"), sound(4000, kind="OGG")]
    contents += [sound(4000, kind="MP3"), sound(4000, kind="AIFF")]
    expected = []
    for content in contents:
        samples, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        batch = extractor(samples.mean(axis=1), sampling_rate=RATE_HZ, return_tensors="pt")
        with torch.inference_mode():
            expected.append(model(batch["input_values"]).last_hidden_state[0].mean(dim=0))
    rows = embed(tiny_wav2vec2, contents, batch_tokens)
    assert rows["_error"].to_pylist() == [None] * len(contents)
    assert rows["num_units"].to_pylist()[:4] == [1600, 4000, 4000, 801]
    assert_equal(rows, expected)


def test_sounds_are_resampled(tiny_wav2vec2: Path) -> None:
    rows = embed(tiny_wav2vec2, [sound(8000, rate_hz=8000), sound(44_100, rate_hz=44_100)])
    assert rows["num_units"].to_pylist() == [16_000, 16_000]
    assert rows["_error"].to_pylist() == [None, None]


BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"hello", "corrupt image"),
    "cut PNG": (lambda: picture()[:200], "corrupt image"),
    "cut JPEG": (lambda: picture(kind="JPEG")[:300], "corrupt image"),
    "header only": (lambda: picture()[:8], "corrupt image"),
    "zeros": (lambda: bytes(500), "corrupt image"),
    "noise": (lambda: RNG.bytes(500), "corrupt image"),
    "a sound": (lambda: sound(100), "corrupt image"),
    "bytes turned": (
        lambda: picture()[:60] + bytes(40) + picture()[100:],
        "corrupt image",
    ),
    "decompression bomb": (bomb_png, "image too large"),
    "a little too large": (lambda: picture(201, 100), "image too large"),
    "no pixel": (lambda: bomb_png(0, 0), "corrupt image"),
}


@pytest.mark.parametrize("case", list(BAD_PICTURES))
def test_bad_pictures(case: str, tiny_vit: Path) -> None:
    make, cause = BAD_PICTURES[case]
    rows = embed(tiny_vit, [picture(), make(), picture(20, 20)], max_image_px=20_000).to_pylist()
    assert [r["_error"] for r in rows] == [None, cause, None]
    assert rows[1]["_stage"] == "preprocess"
    assert rows[1]["_message"]
    assert [r["embedding"] is None for r in rows] == [False, True, False]


BAD_SOUNDS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "text": (lambda: b"hello", "corrupt audio"),
    "header only": (lambda: sound(100)[:20], "corrupt audio"),
    "zeros": (lambda: bytes(500), "corrupt audio"),
    "noise": (lambda: RNG.bytes(500), "corrupt audio"),
    "a picture": (picture, "corrupt audio"),
    "no sample": (lambda: sound(0), "empty input"),
    "NaN": (lambda: float_wav(np.nan), "corrupt audio"),
    "infinity": (lambda: float_wav(np.inf), "corrupt audio"),
    "too long": (lambda: sound(2 * RATE_HZ + 1), "audio too long"),
    "shorter than a frame": (lambda: sound(8), "audio too short"),
    "a length that is a lie": (lying_wav, "audio too short"),
    "cut FLAC": (lambda: sound(9000, kind="FLAC")[:400], "corrupt audio"),
}


@pytest.mark.parametrize("case", list(BAD_SOUNDS))
def test_bad_sounds(case: str, tiny_wav2vec2: Path) -> None:
    make, cause = BAD_SOUNDS[case]
    contents = [sound(4000), make(), sound(1600)]
    rows = embed(tiny_wav2vec2, contents, max_audio_s=2).to_pylist()
    assert [r["_error"] for r in rows] == [None, cause, None]
    assert rows[1]["_message"]
    assert [r["embedding"] is None for r in rows] == [False, True, False]


def test_a_long_table_of_texts_is_handed_on_in_slices(tiny_bert: Path) -> None:
    texts = [f"number {i}" for i in range(9000)]
    rows = pa.Table.from_pylist(
        [{"row_id": str(i), "content_hash": "0", "_input": t} for i, t in enumerate(texts)],
        schema=row_schema(pa.schema([])),
    )
    preprocess = Preprocess(open_checkpoint(ModelSpec(id=str(tiny_bert)), False), PreprocessSpec())
    slices = list(preprocess.stream(rows))
    assert [s.num_rows for s in slices] == [4096, 4096, 808]
    joined = pa.concat_tables(slices).drop_columns(["_counts"])
    assert joined.combine_chunks().equals(preprocess(rows).combine_chunks())
    assert all("seconds/preprocess" in s["_counts"][0].as_py() for s in slices)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_what_stands_beside_the_pixels_is_not_unfolded(name: bytes, tiny_vit: Path) -> None:
    """200 MB of text or colour profile in 200 kB: rejected or passed over, never held."""
    head, rest = picture()[:33], picture()[33:]
    zeros = zlib.compress(b"\0" * 200_000_000, 1)
    content = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[name] + zeros
    tracemalloc.start()
    rows = embed(tiny_vit, [picture(), head + png_chunk(name, content) + rest])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows["_error"].to_pylist()[0] is None
    assert rows["_error"].to_pylist()[1] in (None, "corrupt image")
    assert peak < 50_000_000


def test_a_picture_inside_of_an_icon_has_the_same_limit(tiny_vit: Path) -> None:
    inner = bomb_png(30_000, 30_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + inner
    rows = embed(tiny_vit, [picture(), icon], max_image_px=20_000)
    assert rows["_error"].to_pylist() == [None, "image too large"]
    assert "preprocess.max_image_px = 20,000" in rows["_message"].to_pylist()[1]


def test_many_channels_count(tiny_wav2vec2: Path) -> None:
    contents = [sound(16_000), sound(16_000, channels=8), sound(12_000, channels=8)]
    rows = embed(tiny_wav2vec2, contents, max_audio_s=2, max_audio_samples=100_000)
    assert rows["_error"].to_pylist() == [None, "audio too long", None]
    assert "8 channels at 16,000 Hz" in rows["_message"].to_pylist()[1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_long_text_only_what_the_model_sees_is_tokenised(
    side: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, "truncation_side": side}))
    words = " ".join(f"word{i % 977} of {i}" for i in range(3000))
    texts = [words, " " * 40_000 + words, "short", words[:5000]]
    checkpoint = open_checkpoint(ModelSpec(id=str(folder)), False)
    rows = pa.Table.from_pylist([{"_input": t} for t in texts], row_schema(pa.schema([])))
    whole = Preprocess(checkpoint, PreprocessSpec())(rows)
    monkeypatch.setattr("fmembed.prepare.text._LONG", 2000)
    seen: list[int] = []
    part_of = _seen_part

    def spy(*arguments: Any) -> str:
        seen.append(len(part_of(*arguments)))
        return part_of(*arguments)

    monkeypatch.setattr("fmembed.prepare.text._seen_part", spy)
    assert Preprocess(checkpoint, PreprocessSpec())(rows).equals(whole)
    assert whole["truncated"].to_pylist() == [True, True, False, True]
    assert seen[0] == seen[2] == 2000
    assert seen[1] == (len(texts[1]) if side == "right" else 2000)


def test_a_picture_starts_no_program(tiny_vit: Path) -> None:
    """EPS is a program for Ghostscript, which Pillow would run."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n{} loop\n%%EOF\n"
    rows = embed(tiny_vit, [picture(), eps])
    assert rows["_error"].to_pylist() == [None, "corrupt image"]


def test_a_tokenizer_without_a_vocabulary_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_bert, folder)
    for name in ("tokenizer.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"vocabulary|cannot be loaded"):
        Preprocess(open_checkpoint(ModelSpec(id=str(folder)), False), PreprocessSpec())(
            pa.Table.from_pylist(
                [{"row_id": "a", "_input": "word"}], schema=row_schema(pa.schema([]))
            )
        )
