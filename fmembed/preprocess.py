"""A raw row to model-ready arrays, on CPU; a bad row becomes a rejection, never a crash."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import pyarrow as pa

from fmembed.checkpoint import Checkpoint
from fmembed.rows import INPUT, accepted, reject


class Tokenize:
    """Text to token ids, cut to the checkpoint's limit.

    Not padded: padding is the batcher's choice, made when the batch's longest row is known.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace the input by `input_ids`, `num_units` and `truncated`.

        Args:
            rows: Rows of `rows.row_schema`.

        Returns:
            The rows without `_input`, with `input_ids: list<int32>` (null for a rejected row),
            `num_units: int32` (tokens, special ones included) and `truncated: bool`.
        """
        good = np.flatnonzero(accepted(rows))
        texts = rows[INPUT].take(pa.array(good)).to_pylist()
        ids: list[Any] = [None] * rows.num_rows
        truncated = [False] * rows.num_rows
        causes: dict[int, tuple[str, str]] = {}
        for i, encoded in zip(good.tolist(), self._encode(texts), strict=True):
            if isinstance(encoded, Exception):
                causes[i] = ("not tokenizable", f"{type(encoded).__name__}: {encoded}"[:200])
            elif not encoded[0]:
                causes[i] = ("empty input", "the tokenizer makes no token of it")
            else:
                ids[i], truncated[i] = encoded
        num_units = [len(i) if i is not None else 0 for i in ids]
        rows = reject(rows.drop_columns([INPUT]), "preprocess", causes)
        rows = rows.append_column("input_ids", pa.array(ids, pa.list_(pa.int32())))
        rows = rows.append_column("num_units", pa.array(num_units, pa.int32()))
        return rows.append_column("truncated", pa.array(truncated, pa.bool_()))

    def _encode(self, texts: list[str]) -> list[tuple[list[int], bool] | Exception]:
        if not texts:
            return []
        try:
            return list(_encode(self._checkpoint, texts))
        # A tokenizer raises whatever its Rust or Python code raises; find the row that did it.
        except Exception as e:
            if len(texts) == 1:
                return [e]
            return [encoded for text in texts for encoded in self._encode([text])]


def _encode(checkpoint: Checkpoint, texts: list[str]) -> list[tuple[list[int], bool]]:
    tokenizer = _load_tokenizer(checkpoint)
    prompted = [checkpoint.prompt + t for t in texts]
    if checkpoint.lower_case:
        prompted = [t.lower() for t in prompted]
    limit = checkpoint.max_tokens
    batch = tokenizer(
        prompted,
        truncation=True,
        max_length=limit,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    if tokenizer.is_fast:
        cut = [bool(e.overflowing) for e in batch.encodings]
    else:
        cut = [
            len(ids) == limit and len(tokenizer(t)["input_ids"]) > limit
            for ids, t in zip(batch["input_ids"], prompted, strict=True)
        ]
    return list(zip(batch["input_ids"], cut, strict=True))


@functools.lru_cache(maxsize=2)
def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    # One core a task: the tokenizer's own threads would compete with the model for the rest.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
    )
