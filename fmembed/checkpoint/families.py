"""What is known of each family of models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fmembed.checkpoint.files import (
    read_processor,
    read_whole_number,
    read_whole_numbers,
)
from fmembed.spec import Modality

# Position ids of these families start after the padding id, so two positions more are needed.
OFFSET_POSITIONS = frozenset(
    (
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)
# Text families whose tokens see each other both ways: asked before transformers' own tables, since
# importing those brings torch into the driver, 206 MiB and 1.7 s.
_BOTH_WAYS = frozenset(("bert", "deberta-v2", "distilbert", "electra", "modernbert", "nomic_bert"))
# Families whose first token stands for the whole picture, and those with no such token, whose own
# pooled output (the mean of the map, normed as in training) does.
_CLASS_TOKEN = frozenset(
    (
        "beit",
        "data2vec-vision",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "vit",
        "vit_mae",
    )
)
_OWN_POOLER = frozenset(
    (
        "bit",
        "convnext",
        "convnextv2",
        "dinov3_convnext",
        "efficientnet",
        "regnet",
        "resnet",
        "swin",
        "swinv2",
        "timm_wrapper",
    )
)
# Models with a tower for each modality into one space.
TOWERS: dict[str, tuple[Modality, Modality]] = {
    "align": ("image", "text"),
    "altclip": ("image", "text"),
    "chinese_clip": ("image", "text"),
    "clap": ("audio", "text"),
    "clip": ("image", "text"),
    "metaclip_2": ("image", "text"),
    "siglip": ("image", "text"),
}
# Trained on texts padded to the full length, and without a mask: its padding is part of the input.
PADDED_TEXT = frozenset(("siglip",))
TOWER_CONFIG = {"text": "text_config", "image": "vision_config", "audio": "audio_config"}


def read_sound_limits(folder: Path, family: str) -> tuple[int, int | None]:
    """The rate that sounds are resampled to, and how many samples the model takes at once."""
    processor = read_processor(folder)
    rate_hz = read_whole_number(processor, "sampling_rate") or 16_000
    if family == "whisper":
        return rate_hz, (read_whole_number(processor, "chunk_length") or 30) * rate_hz
    if family == "clap":  # past this length its extractor takes a random piece
        return rate_hz, (read_whole_number(processor, "max_length_s") or 10) * rate_hz
    if family == "audio-spectrogram-transformer":
        # Kaldi's frames: 25 ms every 10 ms; past these its extractor cuts without a word.
        frames = read_whole_number(processor, "max_length") or 1024
        return rate_hz, (frames - 1) * rate_hz // 100 + rate_hz // 40
    return rate_hz, None


def default_pooling(modality: Modality, family: str, config: dict[str, Any]) -> str:
    if modality == "image":
        if family in _OWN_POOLER:
            return "pooler"
        return "cls" if family in _CLASS_TOKEN else "mean"
    return "last" if modality == "text" and _is_decoder_only(family, config) else "mean"


def unit_size_of(modality: Modality, family: str, config: dict[str, Any]) -> int:
    if modality == "image":
        height, *width = read_whole_numbers(config, "patch_size") or [32]
        return height * (width[0] if width else height) * 3
    if modality == "audio":
        if family in ("whisper", "clap"):
            return (read_whole_number(config, "num_mel_bins") or 64) * 2
        if family == "audio-spectrogram-transformer":
            return (read_whole_number(config, "frequency_stride") or 10) * (
                read_whole_number(config, "time_stride") or 10
            )
        return math.prod(read_whole_numbers(config, "conv_stride") or [320])
    return 1


def _is_decoder_only(family: str, config: dict[str, Any]) -> bool:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(
        str(a).endswith("ForCausalLM") for a in architectures
    ):
        return True
    if family in _BOTH_WAYS or family in OFFSET_POSITIONS:
        return False
    from transformers.models.auto import modeling_auto

    # BERT and its kin have a causal head too, but theirs is the masked one.
    return (
        family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not config.get("is_encoder_decoder")
    )


# Families whose attention runs through transformers' interface and whose positions can be given, so
# that rows can lie one after another; the tests compare each with plain transformers.
PACKED_FAMILIES = frozenset(
    {
        "bert", "camembert", "distilbert", "electra", "llama", "mistral", "mixtral", "modernbert",
        "phi", "qwen2", "qwen3", "roberta", "xlm-roberta",
    }
)  # fmt: skip
# Those, and others of which no module looks at a linear layer's weights by itself.
FUSED = PACKED_FAMILIES | frozenset({"dinov2", "hubert", "vit", "wav2vec2"})
COUNT_FROM_PAD = frozenset({"camembert", "roberta", "xlm-roberta"})
