"""A list to vectors in this process."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import SENTENCES
from encoding import embed
from media import picture, sound
from PIL import Image
from tiny import save_clip

import fmembed
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.errors import ModelError, RejectedError, SpecError
from fmembed.spec import ModelSpec

# The fourth sentence goes on for longer than any of these models takes.
pytestmark = pytest.mark.filterwarnings("ignore:.*inputs are longer than the model:UserWarning")


def test_texts_have_the_vectors_of_a_run(tiny_bert: Path) -> None:
    found = fmembed.encode(SENTENCES, model=str(tiny_bert))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert)), fmembed.devices.cpu_has_bfloat16())
    np.testing.assert_array_equal(found, embed(checkpoint, SENTENCES))
    np.testing.assert_array_equal(fmembed.encode(iter(SENTENCES), model=tiny_bert), found)


@pytest.mark.slow
def test_texts_have_the_vectors_of_sentence_transformers(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    found = fmembed.encode(SENTENCES, model={"id": str(minilm), "dtype": "float32"})
    expected = SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    assert np.sum(found * expected, axis=1).min() > 0.99999


@pytest.mark.slow
def test_no_ray_is_imported_nor_started(tiny_bert: Path) -> None:
    code = (
        "import sys, fmembed, psutil\n"
        f"X = fmembed.encode(['one', 'two'], model={str(tiny_bert)!r})\n"
        "own = psutil.Process().children(recursive=True)\n"
        "print(X.shape, [m for m in ('ray', 'deltalake', 'sklearn') if m in sys.modules], own)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(2, 32) [] []\n", "")


def test_one_text_and_none(tiny_bert: Path) -> None:
    found = fmembed.encode(SENTENCES[:1], model=str(tiny_bert))
    assert found.shape == (1, 32)
    one = fmembed.encode(SENTENCES[0], model=str(tiny_bert))
    np.testing.assert_array_equal(one, found[0])
    none = fmembed.encode([], model=str(tiny_bert))
    assert (none.shape, none.dtype) == ((0, 32), np.float32)


def test_fields_of_the_model_are_followed(tiny_bert: Path) -> None:
    model = {"id": str(tiny_bert), "dtype": "float32"}
    plain = fmembed.encode(SENTENCES, model=model)
    cut = fmembed.encode(SENTENCES, model=ModelSpec(**model, dims=8, normalize=True))
    lengths = np.linalg.norm(plain[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, plain[:, :8] / lengths, rtol=1e-5)
    outputs = {"half": {"precision": "float16"}, "bits": {"precision": "binary"}, "each": {
        "pooling": "tokens"}}  # fmt: skip
    both = fmembed.encode(SENTENCES, model={**model, "outputs": outputs})
    np.testing.assert_array_equal(both["half"], plain.astype(np.float16))
    assert (both["bits"].shape, both["bits"].dtype) == ((len(SENTENCES), 4), np.int8)
    means = np.stack([tokens.mean(axis=0) for tokens in both["each"]])
    np.testing.assert_allclose(means, plain, rtol=1e-3, atol=1e-5)
    one = fmembed.encode(SENTENCES[0], model={**model, "outputs": outputs})
    np.testing.assert_array_equal(one["each"], both["each"][0])


def test_common_fields_are_arguments(tiny_bert: Path, tmp_path: Path) -> None:
    model = {"id": str(tiny_bert), "dtype": "float32"}
    named = fmembed.encode(SENTENCES, str(tiny_bert), dtype="float32", dims=8, prompt="query: ")
    fields = {**model, "dims": 8, "prompt": "query: "}
    np.testing.assert_array_equal(named, fmembed.encode(SENTENCES, model=fields))
    spec = ModelSpec(**model, normalize=True)
    both = fmembed.encode(SENTENCES, spec, dims=8)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    for given in (pa.array(SENTENCES), pa.chunked_array([SENTENCES]), pl.Series(SENTENCES)):
        found = fmembed.encode(given, model=model)
        np.testing.assert_array_equal(found, fmembed.encode(SENTENCES, model=model))
    (tmp_path / "a.txt").write_text("one")
    found = fmembed.encode([tmp_path / "a.txt"], model=model)
    np.testing.assert_array_equal(found, fmembed.encode(["one"], model=model))
    with pytest.raises(
        SpecError, match=r"inputs\[0\]: .*a.txt' is a file here; give files as path"
    ):
        fmembed.encode([str(tmp_path / "a.txt")], model=model)
    with pytest.raises(SpecError, match="model: takes an id, or a dict of fields, got int"):
        fmembed.encode(["one"], model=3)  # type: ignore[arg-type]


def test_windows_do_not_show(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"id": str(tiny_bert), "dtype": "float32"}
    whole = fmembed.encode(SENTENCES, model=model)
    monkeypatch.setitem(fmembed.encoding._WINDOW_ROWS, "text", 4)
    np.testing.assert_allclose(fmembed.encode(SENTENCES, model=model), whole, atol=1e-6)


def test_what_cannot_be_embedded_is_told(tiny_bert: Path) -> None:
    given: list[Any] = ["one", "", None, 3, "two", "\ud800"]
    with pytest.raises(RejectedError, match=r"4 of 6 inputs .* inputs\[1\]: empty input") as e:
        fmembed.encode(given, model=str(tiny_bert))
    assert "inputs[3]: wrong type: column 'input': takes text, got int; and 1 more" in str(e.value)
    with pytest.warns(UserWarning, match=r"4 inputs have no vector: inputs\[1\]"):
        found = fmembed.encode(given, model=str(tiny_bert), on_rejected="nan")
    assert np.isnan(found).all(axis=1).tolist() == [False, True, True, True, False, True]
    good = fmembed.encode(["one", "two"], model=str(tiny_bert))
    np.testing.assert_allclose(found[[0, 4]], good, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("default:.*inputs are longer than the model:UserWarning")
def test_what_is_cut_is_told(tiny_bert: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 6 inputs are longer .* \(64 tokens\)"):
        fmembed.encode(SENTENCES, model=str(tiny_bert))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"text": "one"}, "inputs: takes a list of texts, paths or bytes, got dict"),
        (pd.DataFrame({"text": ["one"]}), "got DataFrame; give one of its columns"),
        (pa.table({"text": ["one"]}), "got Table; give one of its columns"),
        (5, "inputs: takes a list of texts, paths or bytes, got int"),
        (None, "got NoneType"),
    ],
)
def test_a_table_is_no_list(given: Any, told: str, tiny_bert: Path) -> None:
    with pytest.raises(SpecError, match=told):
        fmembed.encode(given, model=str(tiny_bert))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "gpu"}, "device: takes auto or cpu or cuda, got 'gpu'"),
        ({"on_rejected": "skip"}, "on_rejected: takes raise or nan, got 'skip'"),
        ({"device": "cuda"}, "device: there is no CUDA device here"),
        ({"dims": 64}, "model.dims: takes at most 32"),
        ({"modality": "audio"}, "modality: .* embeds text, not 'audio'"),
        ({"model": {"name": "x"}}, "model.name: unknown key"),
        ({"model": {"precision": "int8"}}, "model.precision: int8 takes ranges from a sample"),
        ({"model": {"precision": "binary"}, "on_rejected": "nan"}, "on_rejected: the whole num"),
        ({"model": {"endpoint": {"base_url": "http://127.0.0.1:1"}}}, "model.endpoint: encode run"),
    ],
)
def test_a_wrong_argument_is_told(
    options: dict[str, Any], told: str, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fmembed.encoding, "has_cuda", lambda: False)
    given = {"model": {}, **options}
    given["model"] = {"id": str(tiny_bert), **given["model"]}
    with pytest.raises((SpecError, ModelError), match=told):
        fmembed.encode(["one"], **given)


def test_weights_that_have_changed_are_loaded_anew(tiny_bert: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    before = fmembed.encode("one", model=str(folder))
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight.mul_(2)
    model.save_pretrained(folder)
    assert not np.allclose(before, fmembed.encode("one", model=str(folder)), atol=1e-2)


def test_pictures_come_by_path_or_by_bytes(tiny_vit: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    found = fmembed.encode([path, str(path), picture()], model=str(tiny_vit))
    assert found.shape == (3, 32)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    opened = Image.open(path)
    np.testing.assert_array_equal(found[0], fmembed.encode(opened, model=str(tiny_vit)))
    np.testing.assert_array_equal(found[:1], fmembed.encode([opened], model=str(tiny_vit)))
    with pytest.raises(RejectedError, match=r"inputs\[0\]: cannot be read: .*b.png.* No such file"):
        fmembed.encode([tmp_path / "b.png"], model=str(tiny_vit))
    with pytest.raises(RejectedError, match=r"inputs\[0\]: "):
        fmembed.encode([b"no picture"], model=str(tiny_vit))


def test_a_file_over_the_limit_is_not_read(
    tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(2**30)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    with pytest.raises(RejectedError, match=r"too large: 1,073,741,824 bytes, more than source.ma"):
        fmembed.encode([path], model=str(tiny_vit))


def test_sounds_come_by_bytes(tiny_wav2vec2: Path) -> None:
    assert fmembed.encode([sound(8000), sound(4000)], model=str(tiny_wav2vec2)).shape == (2, 32)


def test_of_two_towers_a_text_is_a_text_and_a_path_is_a_file(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = str(save_clip(tmp_path / "clip", minilm))
    (tmp_path / "a.png").write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    texts = fmembed.encode(["a cat", "a dog"], model=clip)
    pictures = fmembed.encode([Path("a.png"), picture()], model=clip)
    assert texts.shape == pictures.shape
    np.testing.assert_array_equal(pictures[0], pictures[1])
    with pytest.raises(SpecError, match=r"inputs\[1\]: 'a.png' is a file here, .* modality"):
        fmembed.encode(["a cat", "a.png"], model=clip)
    by_name = fmembed.encode(["a.png"], model=clip, modality="image")
    np.testing.assert_array_equal(by_name[0], pictures[0])
    with pytest.raises(SpecError, match="texts and files together"):
        fmembed.encode(["a cat", Path("a.png")], model=clip)


def test_arrays_are_pictures(tiny_vit: Path, tmp_path: Path) -> None:
    """One, or several in one array; of other numbers what they would have to be is told."""
    pixels = np.asarray(Image.open(io.BytesIO(picture())).convert("RGB"))
    model = str(tiny_vit)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = fmembed.encode(tmp_path / "a.png", model=model)
    np.testing.assert_array_equal(fmembed.encode(pixels, model=model), expected)
    stacked = np.stack([pixels, pixels])
    for several in (stacked, list(stacked)):
        np.testing.assert_array_equal(
            fmembed.encode(several, model=model), np.stack([expected, expected])
        )
    grey = fmembed.encode(stacked[:, :, :, 0], model=model)
    assert grey.shape == (2, 32)
    with pytest.raises(RejectedError, match=r"an array is a picture as uint8 of shape .*float64"):
        fmembed.encode(pixels / 255, model=model)


def test_a_picture_of_pillow_that_is_damaged_is_rejected(tiny_vit: Path) -> None:
    cut = Image.open(io.BytesIO(picture(64, 64, "JPEG")[:-200]))
    with pytest.raises(RejectedError, match=r"inputs\[1\]: corrupt image: Pillow cannot read it"):
        fmembed.encode([picture(), cut], model=str(tiny_vit))
