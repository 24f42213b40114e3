"""On a real GPU: the vectors of a CPU, memory that runs out, the budget that is measured.

Families, and attention alone, are held to plain transformers on every device there is: see
test_families.py and test_attention.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import SENTENCES
from encoding import embed, window
from tiny import save_tiny

from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.model import budget
from fmembed.model.budget import choose_budget
from fmembed.model.encoder import Encoder
from fmembed.model.forward import Model
from fmembed.spec import ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = [f"{i} {SENTENCES[i % len(SENTENCES)][: 7 + 5 * i]}" for i in range(400)]


def open_as(folder: Path, dtype: Any) -> Checkpoint:
    return open_checkpoint(ModelSpec(id=str(folder), dtype=dtype), native_bfloat16=True)


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_minilm_as_on_a_cpu(minilm: Path, dtype: str) -> None:
    expected = embed(open_as(minilm, "float32"), TEXTS)
    least = 0.99999 if dtype == "float32" else 0.999
    for batch_tokens in (300, 4096, 65_536):
        found = embed(open_as(minilm, dtype), TEXTS, batch_tokens, "cuda")
        assert cosine(found, expected).min() > least


def test_order_and_company_change_nothing(minilm: Path) -> None:
    checkpoint = open_as(minilm, "bfloat16")
    first = embed(checkpoint, TEXTS, 65_536, "cuda")
    order = np.random.default_rng(0).permutation(len(TEXTS))
    again = embed(checkpoint, [TEXTS[i] for i in order], 1000, "cuda")
    assert cosine(again, first[order]).min() > 0.9999


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A gibibyte of the card for this process, whatever others have of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_halved_until_they_fit(tmp_path: Path, minilm: Path, dtype: str) -> None:
    config = hf.BertConfig(
        hidden_size=1024, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4096
    )
    save_tiny(tmp_path, hf.BertModel, config, minilm)
    checkpoint = open_as(tmp_path, dtype)
    texts = [f"{i} {SENTENCES[4]}" for i in range(1500)]
    encoder = Encoder(checkpoint, "cuda", batch_tokens=2**20)
    out = encoder(window(checkpoint, texts))
    assert out["_error"].to_pylist() == [None] * len(texts)
    assert encoder.num_halved > 0
    counts = [json.loads(c) for c in out["_counts"].to_pylist() if c]
    assert sum(c.get("batches_halved", 0) for c in counts) == encoder.num_halved
    found = np.stack(out["embedding"].to_pylist()[::100])
    expected = embed(checkpoint, texts[::100], 1024, "cuda")
    assert cosine(found, expected).min() > (0.99999 if dtype == "float32" else 0.9999)
    # What was learnt stays.
    before = encoder.num_halved
    encoder(window(checkpoint, texts))
    assert encoder.num_halved == before


def test_the_budget_is_measured_once(minilm: Path) -> None:
    model = Model(open_as(minilm, "bfloat16"), torch.device("cuda"))
    first, how = choose_budget("auto", model)
    assert first in budget.BUDGETS["cuda"]
    assert how == "measured"
    assert choose_budget("auto", model) == (first, "cached")


def test_a_process_keeps_to_its_share_of_the_memory(minilm: Path) -> None:
    share = 0.05
    try:
        Encoder(open_as(minilm, "bfloat16"), "cuda", gpu_share=share)
        num_bytes = int(torch.cuda.mem_get_info()[1] * share * 1.5)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
