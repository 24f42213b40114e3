"""Tiny checkpoints with seeded weights, saved with their real processors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_SIZE = {"height": 32, "width": 32}


def save_tiny(folder: Path, cls: Any, config: Any, tokenizer: Path | None = None) -> Any:
    """Save a model with seeded weights, beside another checkpoint's tokenizer; the model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        for name in _TOKENIZER:
            shutil.copy(tokenizer / name, folder / name)
    return model


def save_clip(folder: Path, tokenizer: Path) -> Path:
    """CLIP, with BERT's tokenizer: its [SEP] (102) ends a text."""
    text = {**_SMALL, "vocab_size": 30522, "max_position_embeddings": 16, "eos_token_id": 102,
            "bos_token_id": 101, "pad_token_id": 0}  # fmt: skip
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    save_tiny(folder, hf.CLIPModel, config, tokenizer)
    hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIZE).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, tokenizer: Path) -> Path:
    """SigLIP, which reads texts padded to their full length."""
    text = {**_SMALL, "vocab_size": 30522, "max_position_embeddings": 16, "projection_size": 32}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    config = hf.SiglipConfig(text_config=text, vision_config=vision)
    save_tiny(folder, hf.SiglipModel, config, tokenizer)
    hf.SiglipImageProcessorPil(size=_SIZE).save_pretrained(folder)
    return folder


def save_clap(folder: Path, tokenizer: Path) -> Path:
    """CLAP, with 16 kHz and three seconds where the real one has 48 kHz and ten."""
    text = {**_SMALL, "vocab_size": 30522, "max_position_embeddings": 130, "pad_token_id": 0}
    audio = {
        "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1],
        "num_attention_heads": [2, 2], "num_hidden_layers": 2, "window_size": 4, "spec_size": 64,
        "num_mel_bins": 16, "enable_fusion": False,
    }  # fmt: skip
    config = hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    save_tiny(folder, hf.ClapModel, config, tokenizer)
    hf.ClapFeatureExtractor(
        feature_size=16, sampling_rate=16_000, max_length_s=3, truncation="rand_trunc",
        hop_length=200, fft_window_size=512, frequency_max=8000,
    ).save_pretrained(folder)  # fmt: skip
    return folder
