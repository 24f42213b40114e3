"""Layers, several columns, Matryoshka, quantised and token vectors, chunks and windows."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SENTENCES
from media import RATE_HZ, sound

from fmembed.checkpoint.opening import Checkpoint, open_checkpoint
from fmembed.errors import ModelError
from fmembed.model.encoder import Encoder
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import row_schema
from fmembed.rows.pieces import Piece
from fmembed.rows.vectors import average
from fmembed.spec import ModelSpec, PreprocessSpec
from fmembed.table.parts import write_part


def embed(
    checkpoint: Checkpoint, inputs: list[Any], ranges: Any = None, **preprocess: Any
) -> pa.Table:
    spec = PreprocessSpec(**preprocess)
    rows = [
        {"row_id": f"r{i}", "content_hash": "0" * 32, "_input": x} for i, x in enumerate(inputs)
    ]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([]), checkpoint.modality))
    encoder = Encoder(
        checkpoint, ranges=ranges, pieces_are_rows=spec.pieces_are_rows(checkpoint.modality)
    )
    return encoder(Preprocess(checkpoint, spec)(table))


def open_(folder: Path, **spec: Any) -> Checkpoint:
    return open_checkpoint(ModelSpec(id=str(folder), dtype="float32", **spec), False)


def close(found: Any, expected: Any) -> None:
    expected = expected.numpy() if isinstance(expected, torch.Tensor) else np.array(expected)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-5)


def test_more_dimensions_than_the_model_has_are_refused(tiny_bert: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32", dims=33), False)
    with pytest.raises(ModelError, match=r"^model\.dims: takes at most 32 with this model, got 33"):
        Encoder(checkpoint)


def test_layers_poolings_and_dims_come_in_one_pass(tiny_bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    outputs = {
        "first": {"layer": 0, "pooling": "cls"}, "middle": {"layer": 1}, "last": {"layer": -1},
        "short": {"dims": 8, "normalize": True}, "tokens": {"pooling": "tokens"}, "most": {
            "pooling": "max"},
    }  # fmt: skip
    rows = embed(open_(tiny_bert, outputs=outputs), SENTENCES).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = AutoModel.from_pretrained(tiny_bert).eval()
    for text, row in zip(SENTENCES, rows, strict=True):
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            out = model(input_ids=ids["input_ids"], output_hidden_states=True)
        close(row["first"], out.hidden_states[0][0, 0])
        close(row["middle"], out.hidden_states[1][0].mean(dim=0))
        close(row["last"], out.last_hidden_state[0].mean(dim=0))
        close(row["most"], out.last_hidden_state[0].amax(dim=0))
        # Cut first, normalised after: of length 1 again.
        cut = out.last_hidden_state[0].mean(dim=0)[:8]
        close(row["short"], cut / cut.norm())
        close(row["tokens"], out.last_hidden_state[0])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"layer": 7}, r"model.layer: takes -3 to 2 with this model, got 7"),
        ({"pooling": "projection"}, r"model.pooling: .* has no projection"),
        ({"pooling": "cls+mean"}, r"cls\+mean is for images"),
        ({"pooling": "tokens", "precision": "int8"}, r"tokens takes float32 or float16"),
        ({"outputs": {"a": {"layer": 1, "pooling": "pooler"}}}, r"model.outputs.a.layer"),
    ],
)
def test_what_the_model_has_not_is_refused(tiny_bert: Path, spec: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Encoder(open_(tiny_bert, **spec))


def test_a_pooler_that_was_not_saved_is_refused_only_where_it_is_asked_for(
    tmp_path: Path, minilm: Path
) -> None:
    from tiny import save_tiny
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                        intermediate_size=64)  # fmt: skip
    save_tiny(tmp_path, lambda c: BertModel(c, add_pooling_layer=False), config, minilm)
    Encoder(open_(tmp_path))
    with pytest.raises(ModelError, match="they would be random"):
        Encoder(open_(tmp_path, pooling="pooler"))


def test_quantised_columns_have_their_types(tiny_bert: Path) -> None:
    outputs = {
        "q": {"precision": "int8"}, "b": {"precision": "binary"}, "h": {"precision": "float16"},
    }  # fmt: skip
    ranges = {"q": (np.full(32, -3, np.float32), np.full(32, 3, np.float32))}
    rows = embed(open_(tiny_bert, outputs=outputs), [*SENTENCES, ""], ranges)
    kinds = {"q": (pa.int8(), 32), "b": (pa.int8(), 4), "h": (pa.float16(), 32)}
    for column, (type_, dim) in kinds.items():
        assert rows.schema.field(column).type.equals(pa.list_(type_, dim))


def test_what_float16_cannot_hold_is_rejected(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {"h": {"precision": "float16"}, "full": {}}
    checkpoint = open_(tiny_bert, outputs=outputs)
    encoder = Encoder(checkpoint)
    before = encoder._tower.states

    def louder(pieces: list[Piece]) -> Any:
        states = before(pieces)
        states.hidden_BLD[[len(p.values) == 3 for p in pieces]] *= 1e7
        return states

    monkeypatch.setattr(encoder._tower, "states", louder)
    rows = [{"row_id": t, "content_hash": "0" * 32, "_input": t} for t in ("a", SENTENCES[1])]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([])))
    loud, quiet = encoder(Preprocess(checkpoint, PreprocessSpec())(table)).to_pylist()
    assert (loud["_error"], loud["h"], loud["full"]) == ("not finite", None, None)
    assert "float16" in loud["_message"]
    assert quiet["_error"] is None
    assert quiet["h"] is not None


def test_a_prompt_longer_than_a_chunk_is_named(tiny_bert: Path) -> None:
    rows = embed(open_(tiny_bert, prompt="one two three four five six seven"), ["text"],
                 chunk_tokens=8)  # fmt: skip
    assert rows["_error"].to_pylist() == ["not tokenizable"]
    assert "the prompt is 9 tokens long" in rows["_message"][0].as_py()


def test_average_weighs_by_units() -> None:
    vectors = np.array([[1.0], [4.0], [10.0]], np.float32)
    found = average(vectors, np.array([2, 1, 5], np.float32), np.array([2, 1]))
    close(found, [[2.0], [10.0]])


# --- chunks ---------------------------------------------------------------------------------------

LONG = " ".join(f"sentence number {i} says something of its own." for i in range(40))


@pytest.mark.parametrize("overlap", [0, 8])
def test_chunks_are_rows_that_embed_as_their_own_text(
    tiny_bert: Path, tmp_path: Path, overlap: int
) -> None:
    checkpoint = open_(tiny_bert)
    options = {"chunk_tokens": 24, "chunk_overlap": overlap}
    block = embed(checkpoint, [LONG, "short", LONG[:300]], **options)
    written, _ = write_part(str(tmp_path), [block], ("embedding",))
    assert written.part is not None
    rows = pq.read_table(tmp_path / written.part.path).to_pylist()
    assert (written.num_rows, len(rows)) == (3, written.part.num_rows)
    parents = {"r0": LONG, "r1": "short", "r2": LONG[:300]}
    texts = [parents[r["parent_id"]][r["piece_start"] : r["piece_stop"]] for r in rows]
    assert [r["piece_text"] for r in rows] == texts
    alone = embed(checkpoint, texts).to_pylist()
    for row, other in zip(rows, alone, strict=True):
        close(row["embedding"], other["embedding"])
        assert row["num_units"] == other["num_units"] <= 24
        assert not row["truncated"]
    for parent, text in parents.items():
        own = [r for r in rows if r["parent_id"] == parent]
        assert [r["row_id"] for r in own] == [f"{parent}@{i}" for i in range(len(own))]
        # Nothing between two chunks but blanks, and together they are the whole text.
        assert (own[0]["piece_start"], own[-1]["piece_stop"]) == (0, len(text))
        for before, after in itertools.pairwise(own):
            assert not text[before["piece_stop"] : after["piece_start"]].strip()
            assert (after["piece_start"] < before["piece_stop"]) == (overlap > 0)


def test_chunks_average_back_to_their_document(tiny_bert: Path) -> None:
    checkpoint = open_(tiny_bert)
    mean = embed(checkpoint, [LONG], chunk_tokens=24, pieces="mean").to_pylist()[0]
    rows = embed(checkpoint, [LONG], chunk_tokens=24).to_pylist()[0]
    expected = np.average(rows["embedding"], axis=0, weights=rows["piece_units"])
    close(mean["embedding"], expected)
    assert mean["num_units"] == sum(rows["piece_units"])


def test_every_chunk_has_the_prompt(tiny_bert: Path) -> None:
    prompted = open_(tiny_bert, prompt="passage: ")
    rows = embed(prompted, [LONG], chunk_tokens=24).to_pylist()[0]
    spans = rows["piece_spans"]
    alone = embed(prompted, [LONG[a:b] for a, b in spans]).to_pylist()
    close(rows["embedding"], [r["embedding"] for r in alone])
    assert max(rows["piece_units"]) <= 24


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_sounds_are_averaged_over_their_windows(tiny_wav2vec2: Path) -> None:
    checkpoint = open_(tiny_wav2vec2)
    content = sound(20_000)
    whole = embed(checkpoint, [content], window_s=0.5).to_pylist()[0]
    rows = embed(checkpoint, [content], window_s=0.5, pieces="rows").to_pylist()[0]
    assert rows["piece_spans"] == [[0, 8000], [8000, 16_000], [16_000, 20_000]]
    close(whole["embedding"], np.average(rows["embedding"], axis=0, weights=[8000, 8000, 4000]))
    short = embed(checkpoint, [sound(8000)], window_s=0.5).to_pylist()[0]
    close(short["embedding"], embed(checkpoint, [sound(8000)]).to_pylist()[0]["embedding"])


@pytest.mark.parametrize(
    ("num_samples", "overlap_s", "spans"),
    [
        (8000, 0, [(0, 8000)]),
        (8001, 0, [(0, 8000), (1, 8001)]),  # a rest of next to nothing takes from before
        (12_000, 0.25, [(0, 8000), (4000, 12_000)]),
        (16_000, 0.25, [(0, 8000), (4000, 12_000), (8000, 16_000)]),
    ],
)
def test_windows(
    tiny_wav2vec2: Path, num_samples: int, overlap_s: float, spans: list[tuple[int, int]]
) -> None:
    checkpoint = open_(tiny_wav2vec2)
    options = PreprocessSpec(window_s=0.5, window_overlap_s=overlap_s)
    table = pa.Table.from_pylist(
        [{"row_id": "a", "_input": sound(num_samples)}],
        schema=row_schema(pa.schema([]), "audio"),
    )
    ready = Preprocess(checkpoint, options)(table)
    assert ready["piece_spans"].to_pylist() == [[list(s) for s in spans]]


@pytest.mark.slow
def test_sounds_longer_than_the_model_takes_go_through_in_windows(
    tmp_path: Path, minilm: Path
) -> None:
    from tiny import save_clap

    checkpoint = open_(save_clap(tmp_path, minilm))
    assert checkpoint.window_samples == 3 * RATE_HZ
    content = sound(4 * RATE_HZ)
    options = {"pieces": "rows"}
    rows = embed(checkpoint, [content], **options).to_pylist()[0]
    assert rows["piece_spans"] == [[0, 48_000], [48_000, 64_000]]
    # Its own extractor would take a random piece; here every run gives the same.
    mean = embed(checkpoint, [content]).to_pylist()[0]["embedding"]
    close(mean, embed(checkpoint, [content]).to_pylist()[0]["embedding"])
    expected = np.average(rows["embedding"], axis=0, weights=[48_000, 16_000])
    close(mean, expected / np.linalg.norm(expected))


def test_samples_travel_as_they_were_stored(tiny_wav2vec2: Path) -> None:
    contents = [sound(4000), sound(4000, channels=2), sound(4000, rate_hz=8000)]
    table = pa.Table.from_pylist(
        [{"row_id": str(i), "_input": c} for i, c in enumerate(contents)],
        schema=row_schema(pa.schema([]), "audio"),
    )
    ready = Preprocess(open_(tiny_wav2vec2), PreprocessSpec())(table)
    assert ready["input_dtype"].to_pylist() == ["int16", "float32", "float32"]
    assert len(ready["model_input"][0].as_py()) == 2 * 4000
    assert RATE_HZ == 16_000


def test_the_text_of_a_chunk_is_the_originals(tiny_bert: Path, tmp_path: Path) -> None:
    """A model that sees small letters; some of which take two characters."""
    checkpoint = dataclasses.replace(open_(tiny_bert), lower_case=True)
    texts = ["SOME Words " * 30, "\u0130stanbul IS Large " * 30]
    block = embed(checkpoint, texts, chunk_tokens=24)
    written, _ = write_part(str(tmp_path), [block], ("embedding",))
    assert written.part is not None
    rows = pq.read_table(tmp_path / written.part.path).to_pylist()
    for parent, text in zip(("r0", "r1"), texts, strict=True):
        own = [r for r in rows if r["parent_id"] == parent]
        # Of the second one the small letters, which are what the places count.
        whole = text if parent == "r0" else text.lower()
        assert len(own) > 2
        for row in own:
            assert row["piece_text"] == whole[row["piece_start"] : row["piece_stop"]]
            assert row["piece_text"].strip()


def test_the_text_of_a_chunk_may_be_left_out(tiny_bert: Path, tmp_path: Path) -> None:
    block = embed(open_(tiny_bert), [LONG], chunk_tokens=24, keep_text=False)
    written, _ = write_part(str(tmp_path), [block], ("embedding",))
    assert written.part is not None
    assert "piece_text" not in pq.read_schema(tmp_path / written.part.path).names
