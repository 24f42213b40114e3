"""FLOP against a count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import DEVICES
from transformers import BertConfig

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.model.encoder import Encoder
from fmembed.model.flops import peak_flops
from fmembed.spec import ModelSpec


@pytest.mark.parametrize("device", DEVICES)
def test_flop_of_a_bert_counted_by_hand(tiny_bert: Path, device: str) -> None:
    config = BertConfig.from_pretrained(tiny_bert)
    width, inner, layers = (
        config.hidden_size, config.intermediate_size, config.num_hidden_layers,
    )  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype=dtype), False)
        encoder = Encoder(checkpoint, device)
        cost = encoder.cost
        for length in (5, 40):
            linear = 2 * length * (4 * width**2 + 2 * width * inner)
            attention = 2 * 2 * length**2 * width
            expected = layers * (linear + attention)
            # The pooler behind the last layer sees one token a row.
            assert abs(cost(np.array([length])) / expected - 1) < 0.02, (dtype, length)
        assert cost(np.array([5, 40])) == cost(np.array([5])) + cost(np.array([40]))


def test_peak_is_a_rate() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_flop_of_a_speech_model_are_counted(tiny_wav2vec2: Path) -> None:
    encoder = Encoder(open_checkpoint(ModelSpec(id=str(tiny_wav2vec2), dtype="float32"), False))
    config = encoder._tower.model.config
    width, frames = config.hidden_size, 100
    layers = 2 * frames * (4 * width**2 + 2 * width * config.intermediate_size)
    assert encoder.cost(np.array([frames])) > config.num_hidden_layers * layers
