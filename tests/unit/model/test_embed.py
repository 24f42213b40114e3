"""The stage as Ray's actors make it, by weights and by a server; and a few inputs here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES
from encoding import embed, window
from fake_endpoint import DIM, REFUSED, serve, vector_of

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.model.embed import Embed, WithoutModel, embed_here
from fmembed.rows.columns import reject
from fmembed.run.stages import stored_dims
from fmembed.spec import ModelSpec


def test_inputs_embed_here_as_they_do_in_a_run(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    rows = embed_here(checkpoint, SENTENCES)
    assert rows["_error"].null_count == len(SENTENCES)
    found = np.stack(rows["embedding"].to_pylist())
    np.testing.assert_allclose(found, embed(checkpoint, SENTENCES), rtol=1e-4, atol=1e-5)
    staged = Embed(checkpoint, batch_tokens=64)(window(checkpoint, SENTENCES))
    np.testing.assert_allclose(np.stack(staged["embedding"].to_pylist()), found, rtol=1e-4,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("pieces_are_rows", [False, True])
def test_without_a_model_rows_come_in_the_same_columns(
    pieces_are_rows: bool, tiny_bert: Path
) -> None:
    outputs = {
        "plain": {}, "cut": {"dims": 5}, "bits": {"precision": "binary", "dims": 12},
        "small": {"precision": "int8"}, "half": {"precision": "float16"},
        "each": {"pooling": "tokens"},
    }  # fmt: skip
    spec = ModelSpec.model_validate({"id": str(tiny_bert), "outputs": outputs})
    checkpoint = open_checkpoint(spec, False)
    low, high = np.full(32, -1, np.float32), np.full(32, 1, np.float32)
    told = {"ranges": {"small": (low, high)}, "pieces_are_rows": pieces_are_rows}
    rows = window(checkpoint, ["one", "two", "three"])
    embedded = Embed(checkpoint, **told)(rows)
    dims = stored_dims(checkpoint.outputs, embedded.schema)
    assert dims == {"plain": 32, "cut": 5, "bits": 16, "small": 32, "half": 32, "each": 32}
    stage = WithoutModel(checkpoint, dims=dims, **told)
    nothing = reject(window(checkpoint, ["", "", ""]), "read", dict.fromkeys(range(3), ("e", "m")))
    refused = stage(nothing)
    assert refused.schema == embedded.drop_columns(["_counts"]).schema
    assert all(refused[name].null_count == 3 for name in outputs)
    with pytest.raises(RuntimeError, match="a row for the model"):
        stage(rows)


def test_a_server_s_vectors_come_in_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    texts = [*SENTENCES[:3], f"please {REFUSED}"]
    with serve() as server:
        endpoint = {"base_url": server.url, "batch_rows": 2}
        outputs = {"full": {}, "bits": {"precision": "binary"}}
        spec = ModelSpec.model_validate({"id": "m", "endpoint": endpoint, "outputs": outputs})
        checkpoint = open_checkpoint(spec, False)
        stage = Embed(checkpoint, dim=DIM)
        rows = stage(window(checkpoint, texts))
        again = stage(window(checkpoint, texts[:1]))
    assert rows["_error"].to_pylist() == [None, None, None, "refused by the server"]
    assert rows["full"].to_pylist() == [*(vector_of(t) for t in texts[:3]), None]
    assert rows["bits"].null_count == 1
    counts = json.loads(rows["_counts"][0].as_py())
    assert counts["input_rows"] == 4
    assert counts["input_bytes"] >= sum(len(t.encode()) for t in texts)
    # Each window has its own share of what the client counts.
    assert json.loads(again["_counts"][0].as_py())["endpoint_requests"] == 1
