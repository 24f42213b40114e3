"""Prompts through the text tower that shares a column's space, and why there may be none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fmembed.evaluate.stored import Stored
from tiny import save_clap

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.evaluate.text_tower import embed_captions
from fmembed.model.embed import embed_here
from fmembed.probes import PairData
from fmembed.spec import ModelSpec

CAPTIONS = ["a dog", None, "a cat that sings", "a dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> ModelSpec:
    folder = save_clap(tmp_path_factory.mktemp("clap"), minilm)
    return ModelSpec(id=str(folder), dtype="float32")


def stored(model: ModelSpec) -> Stored:
    checkpoint = open_checkpoint(model, False, "audio")
    outputs = {o.column: dataclasses.asdict(o) for o in checkpoint.outputs}
    return Stored(checkpoint.identity, outputs, {}, "audio")


def captions(model: ModelSpec | None, of: Stored) -> PairData | str:
    vectors = np.eye(4, dtype=np.float32)
    return embed_captions(model, of, "embedding", vectors, CAPTIONS, ["a", "b", "c", "d"])


def test_captions_are_embedded_as_texts_are(model: ModelSpec) -> None:
    pairs = captions(model, stored(model))
    assert isinstance(pairs, PairData)
    texts = [c for c in CAPTIONS if c]
    rows = embed_here(open_checkpoint(model, False, "text"), texts)
    expected = np.stack(rows["embedding"].to_pylist())
    np.testing.assert_allclose(pairs.captions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pairs.vectors, np.eye(4)[[0, 2, 3]])


def test_why_there_are_none(model: ModelSpec, tiny_bert: Path) -> None:
    of = stored(model)
    assert "needs the model" in str(captions(None, of))
    pooled = {"embedding": {**of.outputs["embedding"], "pooling": "mean"}}
    not_shared = dataclasses.replace(of, outputs=pooled)
    assert "needs a model with a text tower" in str(captions(model, not_shared))
    assert "has changed since" in str(captions(ModelSpec(id=str(tiny_bert)), of))
    changed = dataclasses.replace(of, identity={**of.identity, "model.weights": "0a"})
    assert "has changed since" in str(captions(model, changed))
    gone = ModelSpec(id=f"{model.id}-gone")
    assert "its text tower cannot be loaded: model.id" in str(captions(gone, of))
