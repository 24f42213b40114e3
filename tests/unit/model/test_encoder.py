"""Exactness: the same vectors as the reference library, whatever the batch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SENTENCES
from encoding import embed, window

from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.errors import ModelError
from fmembed.model.budget import choose_budget
from fmembed.model.encoder import Encoder
from fmembed.model.forward import Model
from fmembed.model.pooling import States, pool
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.spec import ModelSpec, PreprocessSpec


def pooling_of(checkpoint: Checkpoint) -> tuple[str, bool]:
    (output,) = checkpoint.outputs
    return output.pooling, output.normalize


class Device:
    """A model on a device that holds no more than so many tokens a batch, or that dies."""

    def __init__(self, model: Any, max_tokens: int, error: Exception) -> None:
        self._model, self._max_tokens, self._error = model, max_tokens, error
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, **more: Any) -> Any:
        self.num_calls += 1
        if input_ids.numel() > self._max_tokens:
            raise self._error
        return self._model(input_ids=input_ids, **more)


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.slow
def test_sentence_transformers_checkpoint(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    checkpoint = open_checkpoint(ModelSpec(id=str(minilm)), native_bfloat16=False)
    assert (*pooling_of(checkpoint), checkpoint.max_tokens) == ("mean", True, 256)
    reference = SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    for batch_tokens in (64, 512, 16_384):
        vectors = embed(checkpoint, SENTENCES, batch_tokens)
        assert cosine(vectors, reference).min() > 0.99999
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def row_by_row(folder: Path, texts: list[str], max_tokens: int) -> list[Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [
            model(
                **tokenizer(
                    t, truncation=True, max_length=max_tokens, return_tensors="pt",
                    return_token_type_ids=False,
                )
            ).last_hidden_state[0]
            for t in texts
        ]  # fmt: skip


def test_plain_encoder_defaults_to_mean(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert)), native_bfloat16=False)
    assert (*pooling_of(checkpoint), checkpoint.max_tokens) == ("mean", False, 64)
    reference = np.stack([h.mean(0).numpy() for h in row_by_row(tiny_bert, SENTENCES, 64)])
    assert cosine(embed(checkpoint, SENTENCES), reference).min() > 0.99999


def test_decoder_defaults_to_last_token(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_llama)), native_bfloat16=False)
    assert pooling_of(checkpoint) == ("last", False)
    reference = np.stack([h[-1].numpy() for h in row_by_row(tiny_llama, SENTENCES, 128)])
    assert cosine(embed(checkpoint, SENTENCES), reference).min() > 0.99999


def test_pooling_ignores_padding() -> None:
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for pooling, expected in (
        ("cls", hidden[1, 0]),
        ("mean", hidden[1, :2].mean(0)),
        ("last", hidden[1, 1]),
        ("max", hidden[1, :2].amax(0)),
    ):
        torch.testing.assert_close(pool(States(hidden, mask), pooling)[1], expected)


def test_not_finite_is_rejected(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert)), native_bfloat16=False)
    encoder = Encoder(checkpoint)
    word = 7592
    with torch.no_grad():
        encoder._tower.model.embeddings.word_embeddings.weight[word] = torch.nan
    rows = [
        {"row_id": i, "content_hash": "0", "_input": t} for i, t in (("a", "hello"), ("b", "x"))
    ]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([])))
    out = encoder(Preprocess(checkpoint, PreprocessSpec())(table)).to_pylist()
    assert out[0]["_error"] == "not finite"
    assert out[0]["embedding"] is None
    assert out[1]["_error"] is None
    assert np.isfinite(out[1]["embedding"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_batch_down_to_one_row(tiny_bert: Path, error: Exception) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    texts = [SENTENCES[i % 4] for i in range(40)] + [SENTENCES[4]]
    encoder = Encoder(checkpoint)
    expected = np.stack(encoder(window(checkpoint, texts))["embedding"].to_pylist()[:40])
    # Room for two of the sentences, and not for the long text (cut at 64 tokens) even alone.
    device = Device(encoder._tower._call, 50, error)
    encoder._tower._call = device
    rows = encoder(window(checkpoint, texts)).to_pylist()
    assert [(r["_stage"], r["_error"]) for r in rows] == [(None, None)] * 40 + [
        ("embed", "out of memory")
    ]
    assert cosine(np.stack([r["embedding"] for r in rows[:40]]), expected).min() > 0.99999
    assert rows[40]["embedding"] is None
    assert (
        sum(json.loads(r["_counts"] or "{}").get("batches_halved", 0) for r in rows)
        == encoder.num_halved
        > 3
    )
    # What was learnt stays: the same rows without the long one fail no more.
    before, num_calls = encoder.num_halved, device.num_calls
    encoder(window(checkpoint, texts[:40]))
    assert encoder.num_halved == before
    assert device.num_calls > num_calls


def test_a_row_that_the_model_fails_on_is_rejected_alone(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    encoder = Encoder(checkpoint)
    encoder._tower._call = Device(
        encoder._tower._call, 63, IndexError("index out of range in self")
    )
    encoder._batch_tokens = 60
    rows = encoder(window(checkpoint, SENTENCES)).to_pylist()
    assert [r["_error"] for r in rows] == [None, None, None, None, "model error", None]
    assert "index out of range" in rows[4]["_message"]
    assert encoder.num_halved == 0


def test_a_failed_gpu_ends_the_process_instead_of_rejecting_rows(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    encoder = Encoder(checkpoint)
    encoder._tower._call = Device(
        encoder._tower._call, 0, RuntimeError("CUDA error: device-side assert")
    )
    with pytest.raises(RuntimeError, match="the GPU failed"):
        encoder(window(checkpoint, SENTENCES))


def test_nan_is_rejected(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    encoder = Encoder(checkpoint)
    with torch.no_grad():
        embeddings = encoder._tower.model.embeddings.word_embeddings.weight
        tokens = np.frombuffer(window(checkpoint, ["Goal!"])["model_input"][0].as_py(), np.int32)
        embeddings[tokens[1]] = float("nan")
    rows = encoder(window(checkpoint, SENTENCES)).to_pylist()
    assert [r["_error"] for r in rows] == [None, None, None, "not finite", None, None]
    assert rows[3]["embedding"] is None


def test_attention_implementations_agree(tiny_bert: Path) -> None:
    vectors = [
        embed(
            open_checkpoint(
                ModelSpec(id=str(tiny_bert), dtype="float32", attn_implementation=name), False
            ),
            SENTENCES,
        )
        for name in ("eager", "sdpa")
    ]
    assert cosine(*vectors).min() > 0.99999


def test_attention_that_is_not_installed_is_refused(tiny_bert: Path) -> None:
    spec = ModelSpec(id=str(tiny_bert), attn_implementation="flash_attention_2")
    with pytest.raises(ModelError, match=r"cannot be loaded.*(?i:flash)"):
        Encoder(open_checkpoint(spec, False))


# torch.compile writes C++ and has it built; CI has a compiler.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
# torch's own compiler uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_gives_the_same(tiny_bert: Path) -> None:
    plain = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    compiled = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32", compile=True), False)
    assert cosine(embed(plain, SENTENCES), embed(compiled, SENTENCES)).min() > 0.99999


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 1024), ("bfloat16", 2048)])
def test_sounds_have_a_budget_of_their_own_on_a_cpu(
    dtype: str, tokens: int, tiny_wav2vec2: Path
) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_wav2vec2), dtype=dtype), False)
    model = Model(checkpoint, torch.device("cpu"))
    assert choose_budget("auto", model) == (tokens, "default")
    assert choose_budget(300, model) == (300, "given")
    assert list(Encoder(checkpoint, batch_tokens="auto")._news) == [
        f"batch_tokens/{tokens}/default"
    ]


def test_packed_rows_compute_little_more_than_their_own_tokens(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert)), False)
    out = Encoder(checkpoint, batch_tokens=64)(window(checkpoint, SENTENCES))
    counts = json.loads(out["_counts"][0].as_py())
    tokens, slots = (counts[f"actor/local/{name}"] for name in ("tokens", "slots"))
    assert tokens == sum(out["num_units"].to_pylist())
    batches = tokens / 64 + 1
    assert tokens < slots < tokens + 16 * batches


def test_weights_that_change_before_they_are_loaded_are_refused(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """As where an actor is started again after hours: the fingerprint names those of before."""
    from transformers import BertModel

    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype="float32"), False)
    Encoder(checkpoint)
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.mul_(2)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"model\.id: the files of .* have changed since this run"):
        Encoder(checkpoint)
    # A commit of the hub's does not change, so nothing is read twice.
    Encoder(replace(checkpoint, revision="0" * 40))
