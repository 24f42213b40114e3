"""The fingerprint of one checkpoint of each kind, as the first release made it.

A table is continued only where the fingerprint is the one that it was made with: whatever moves in
the code, these stay. The files are written out here byte by byte, so that no library's version is
in them.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.spec import EndpointSpec, ModelSpec, RunSpec
from fmembed.table.card import fingerprint

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {
        "idx": 2,
        "name": "2",
        "path": "2_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]
CLIP = {
    "config.json": {
        "model_type": "clip",
        "text_config": {"model_type": "clip_text_model", "max_position_embeddings": 77},
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 32},
    },
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
    "tokenizer_config.json": {"model_max_length": 77},
}
# The files of a checkpoint's folder, by kind.
FILES: dict[str, dict[str, Any]] = {
    "text encoder": {
        "config.json": {"model_type": "bert", "max_position_embeddings": 512},
        "modules.json": MODULES,
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": True},
        "config_sentence_transformers.json": {
            "prompts": {"passage": "passage: "}, "default_prompt_name": "passage",
        },
        "tokenizer_config.json": {"model_max_length": 512},
    },
    "positions after the padding": {
        "config.json": {
            "model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1,
        },
        "tokenizer_config.json": {"model_max_length": 10**30},
    },
    "decoder": {
        "config.json": {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 32768,
        },
        "tokenizer_config.json": {"model_max_length": 8192},
    },
    "image tower": CLIP,
    "text tower": CLIP,
    "padded text tower": {
        "config.json": {
            "model_type": "siglip", "text_config": {"max_position_embeddings": 64},
            "vision_config": {"patch_size": 16},
        },
        "preprocessor_config.json": {"image_processor_type": "SiglipImageProcessor"},
    },
    "sound tower": {
        "config.json": {
            "model_type": "clap", "text_config": {}, "audio_config": {"num_mel_bins": 64},
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "ClapFeatureExtractor", "sampling_rate": 48_000,
            "max_length_s": 10,
        },
    },
    "class token": {
        "config.json": {"model_type": "dinov2", "patch_size": 14},
        "preprocessor_config.json": {"image_processor_type": "BitImageProcessor"},
    },
    "own pooler": {
        "config.json": {"model_type": "resnet"},
        "preprocessor_config.json": {"image_processor_type": "ConvNextImageProcessor"},
    },
    "whisper": {
        "config.json": {"model_type": "whisper", "num_mel_bins": 80},
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16_000,
            "chunk_length": 30,
        },
    },
    "spectrogram transformer": {
        "config.json": {
            "model_type": "audio-spectrogram-transformer", "frequency_stride": 10,
            "time_stride": 10,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "ASTFeatureExtractor", "max_length": 1024,
        },
    },
    "waveform": {
        "config.json": {"model_type": "wav2vec2", "conv_stride": [5, 2, 2, 2, 2, 2, 2]},
        "preprocessor_config.json": {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
    },
}  # fmt: skip
# Of each kind: the fingerprint, numbers to a unit, and samples at once.
PINNED: dict[str, tuple[str, int, int | None]] = {
    "text encoder": ("5c9ef034fa74a5859f618729f03bf1d2", 1, None),
    "positions after the padding": ("866be9c2d245461ed9713134d8617b7b", 1, None),
    "decoder": ("148b329366463afe62b79c6a3ec17833", 1, None),
    "image tower": ("9031f13b962246d4c2e81f44cd8888a4", 3072, None),
    "text tower": ("891294eb0cce7231f0b4a100d9367dc8", 1, None),
    "padded text tower": ("680784aa96e157a687173070d49be272", 1, None),
    "sound tower": ("3dc8d1601417a631a9a3d564cd12a79a", 128, 480_000),
    "class token": ("e2981d3fd8064cd21bd49515111c50a0", 588, None),
    "own pooler": ("74eedc282e58b480f0db2c75cc2708ee", 3072, None),
    "whisper": ("0efb10c5625e88eeacdae25426cd5d78", 160, 480_000),
    "spectrogram transformer": ("ae5481954cfff2e8eb15dfac5e36ebb7", 100, 164_080),
    "waveform": ("cbb69ba5fd0610eb4b360c4b0b7c864c", 320, None),
}


def save(folder: Path, files: dict[str, Any], weights: str = "model.safetensors") -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    (folder / weights).write_bytes(
        struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.0, 2.0)
    )
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint(kind: str, tmp_path: Path) -> None:
    save(tmp_path, FILES[kind])
    spec = ModelSpec(id=str(tmp_path), dtype="float32")
    modality: Any = "text" if "text tower" in kind else None
    checkpoint = open_checkpoint(spec, False, modality)
    found = fingerprint(checkpoint.identity), checkpoint.unit_size, checkpoint.window_samples
    assert found == PINNED[kind]


def test_an_adapter(tmp_path: Path) -> None:
    save(tmp_path / "base", FILES["decoder"])
    adapter = {"adapter_config.json": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}}
    save(tmp_path / "adapter", adapter, "adapter_model.safetensors")
    spec = ModelSpec(id=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), dtype="bfloat16")
    assert fingerprint(open_checkpoint(spec, False).identity) == "9089ce813de30f37af7b6571652cb622"


def test_a_server() -> None:
    endpoint = EndpointSpec(base_url="http://localhost:8000/v1", dimensions=64)
    spec = ModelSpec(id="BAAI/bge-m3", endpoint=endpoint, prompt="query: ", normalize=True)
    assert fingerprint(open_checkpoint(spec, False).identity) == "17ba346f2a2a7cff41c48b9616790a0b"


def test_several_outputs(tmp_path: Path) -> None:
    save(tmp_path, FILES["class token"])
    outputs: Any = {
        "whole": {"normalize": True, "precision": "float16"},
        "patches": {"pooling": "mean", "layer": -2, "dims": 16},
    }
    spec = ModelSpec(id=str(tmp_path), dtype="float32", outputs=outputs)
    assert fingerprint(open_checkpoint(spec, False).identity) == "230973503084a848b89059b8763d5713"


def test_the_demos_table_is_still_continued() -> None:
    """The fingerprint of the table that jobs/configs/text.yaml makes, as 0.1.0 has it."""
    spec = RunSpec.from_yaml(str(ROOT / "jobs/configs/text.yaml"), {"model.dtype": "float32"})
    checkpoint = open_checkpoint(spec.model, False, "text")
    identity = {**checkpoint.identity, **spec.preprocess.identity("text")}
    assert fingerprint(identity) == "1f604bed6e192dd3b068a357939feb80"
