"""Prompts through the text tower that shares a column's space, and why there may be none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny import save_clap

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.evaluate.text_tower import embed_captions
from fmembed.model.embed import embed_here
from fmembed.probes import CaptionedRows
from fmembed.spec import ModelSpec
from fmembed.table.card import Card, StoredOutput, fingerprint

CAPTIONS = ["a dog", None, "a cat that sings", "a dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> ModelSpec:
    folder = save_clap(tmp_path_factory.mktemp("clap"), minilm)
    return ModelSpec(id=str(folder), dtype="float32")


def stored(model: ModelSpec) -> Card:
    checkpoint = open_checkpoint(model, False, "audio")
    identity = checkpoint.identity
    outputs = {o.column: StoredOutput(**dataclasses.asdict(o)) for o in checkpoint.outputs}
    return Card(
        table="0a", fingerprint=fingerprint(identity), identity=identity, modality="audio",
        outputs=outputs, spec={},
    )  # fmt: skip


def captions(model: ModelSpec | None, of: Card) -> CaptionedRows | str:
    vectors = np.eye(4, dtype=np.float32)
    return embed_captions(model, of, "embedding", vectors, CAPTIONS, ["a", "b", "c", "d"])


def test_captions_are_embedded_as_texts_are(model: ModelSpec) -> None:
    pairs = captions(model, stored(model))
    assert isinstance(pairs, CaptionedRows)
    texts = [c for c in CAPTIONS if c]
    rows = embed_here(open_checkpoint(model, False, "text"), texts)
    expected = np.stack(rows["embedding"].to_pylist())
    np.testing.assert_allclose(pairs.captions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pairs.vectors, np.eye(4)[[0, 2, 3]])


def test_why_there_are_none(model: ModelSpec, tiny_bert: Path) -> None:
    of = stored(model)
    assert "needs the model" in str(captions(None, of))
    pooled = {"embedding": of.outputs["embedding"].model_copy(update={"pooling": "mean"})}
    not_shared = of.model_copy(update={"outputs": pooled})
    assert "needs a model with a text tower" in str(captions(model, not_shared))
    assert "has changed since" in str(captions(ModelSpec(id=str(tiny_bert)), of))
    changed = of.model_copy(update={"identity": {**of.identity, "model.weights": "0a"}})
    assert "has changed since" in str(captions(model, changed))
    gone = ModelSpec(id=f"{model.id}-gone")
    assert "its text tower cannot be loaded: model.id" in str(captions(gone, of))
