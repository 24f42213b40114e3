"""Texts to token ids, cut or in chunks."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import (
    loading,
)
from fmembed.errors import ModelError
from fmembed.rows.pieces import Prepared, Refused
from fmembed.spec import PreprocessSpec
from fmembed.startup import uncollected

# A text of more characters is shown to the tokenizer only in part.
_LONG = 2**17


def tokenize(
    checkpoint: Checkpoint, spec: PreprocessSpec, texts: list[str]
) -> list[Prepared | Refused]:
    """Text to token ids, cut to the checkpoint's limit, or into chunks.

    Not padded, but for models trained on padding: it is the batcher's choice, made when the batch's
    longest row is known.
    """
    if not texts:
        return []
    _load_tokenizer(checkpoint)  # what is wrong with the checkpoint is no row's fault
    try:
        encoded = _encode(checkpoint, spec, texts)
    # A tokenizer raises whatever its Rust or Python code raises; find the row that did it.
    except Exception as e:
        if len(texts) == 1:
            return [Refused("not tokenizable", f"{type(e).__name__}: {e}")]
        return [row for text in texts for row in tokenize(checkpoint, spec, [text])]
    return [_to_prepared(pieces, cut) for pieces, cut in encoded]


# Of a piece the token ids; or, where segment ids matter, both.
_Values = list[int] | tuple[list[int], list[int]]
# A text's pieces, each with its span; and whether the model does not see all of it.
_Encoded = tuple[list[tuple[_Values, tuple[int, int]]], bool]


def _to_prepared(pieces: list[tuple[_Values, tuple[int, int]]], is_cut: bool) -> Prepared | Refused:
    arrays = [np.array(values, dtype=np.int32) for values, _ in pieces]
    if not arrays or not arrays[0].size:
        return Refused("empty input", "the tokenizer makes no token of it")
    return Prepared(arrays, [a.shape[-1] for a in arrays], [span for _, span in pieces], is_cut)


def _encode(checkpoint: Checkpoint, spec: PreprocessSpec, texts: list[str]) -> list[_Encoded]:
    tokenizer = _load_tokenizer(checkpoint)
    prepared = [checkpoint.prompt + t for t in texts]
    if checkpoint.lower_case:
        prepared = [t.lower() for t in prepared]
    limit = checkpoint.max_tokens
    if spec.chunk_tokens is not None:
        return [_chunk(checkpoint, spec, text) for text in texts]
    prepared = [t if len(t) <= _LONG else _seen_part(tokenizer, t, limit) for t in prepared]
    with_segments = _gives_segments(checkpoint)
    of_rows: list[_Values]
    options = {
        "truncation": True,
        "max_length": limit,
        "padding": "max_length" if checkpoint.pads_text else False,
        "return_attention_mask": False,
        "return_token_type_ids": with_segments,
    }
    if tokenizer.is_fast and prepared:
        # The call sets the Rust tokenizer's truncation and padding; the rest goes to it directly,
        # without offsets: 11 us of CPU a short row instead of 21, 35 us a sentence instead of 55.
        tokenizer(prepared[:1], **options)
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(prepared)
        of_rows = [(e.ids, e.type_ids) if with_segments else e.ids for e in encodings]
        cut = [bool(e.overflowing) for e in encodings]
    else:
        batch = tokenizer(prepared, **options)
        of_rows = ids_of_rows = batch["input_ids"]
        cut = [
            len(ids) == limit and len(tokenizer(t)["input_ids"]) > limit
            for ids, t in zip(ids_of_rows, prepared, strict=True)
        ]
        if with_segments:
            of_rows = list(zip(ids_of_rows, batch["token_type_ids"], strict=True))
    return [
        ([(values, (0, len(text)))], is_cut)
        for values, is_cut, text in zip(of_rows, cut, texts, strict=True)
    ]


def _seen_part(tokenizer: Any, text: str, limit: int) -> str:
    """The part of a very long text that holds twice the tokens that the model sees.

    A tokenizer goes through all of a text before it cuts it, and takes some hundred bytes for each
    character: 64 MB of text made a process of gigabytes for the first 256 tokens.
    """
    size = _LONG
    while size < len(text):
        part = text[:size] if tokenizer.truncation_side == "right" else text[-size:]
        if len(tokenizer(part, truncation=False, verbose=False)["input_ids"]) > 2 * limit:
            return part
        size *= 4
    return text


def _chunk(checkpoint: Checkpoint, spec: PreprocessSpec, text: str) -> _Encoded:
    """Cut a text at tokens; each chunk begins with the prompt, as a text of its own would.

    A chunk is what its characters give when tokenised alone, so its vector is that of its text.
    """
    tokenizer = _load_tokenizer(checkpoint)
    assert spec.chunk_tokens is not None
    limit = min(spec.chunk_tokens, checkpoint.max_tokens)
    if checkpoint.lower_case:
        text = text.lower()
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = own["offset_mapping"]
    around = len(tokenizer(checkpoint.prompt)["input_ids"])
    if around >= limit:
        raise ValueError(f"the prompt is {around} tokens long, preprocess.chunk_tokens {limit}")
    step = max(limit - around - spec.chunk_overlap, 1)
    pieces: list[tuple[_Values, tuple[int, int]]] = []
    with_segments = _gives_segments(checkpoint)
    truncated = False
    for first in range(0, max(len(offsets), 1), step):
        last = min(first + limit - around, len(offsets)) - 1
        if last < first:
            break
        start, stop = offsets[first][0], offsets[last][1]
        words = checkpoint.prompt + text[start:stop]
        batch = tokenizer(
            words.lower() if checkpoint.lower_case else words,
            truncation=True,
            max_length=checkpoint.max_tokens,
            padding="max_length" if checkpoint.pads_text else False,
            return_token_type_ids=with_segments,
            return_attention_mask=False,
        )
        ids = batch["input_ids"]
        truncated |= bool(batch.encodings[0].overflowing)
        values = (ids, batch["token_type_ids"]) if with_segments else ids
        pieces.append((values, (start, stop)))
        if last + 1 == len(offsets):
            break
    return pieces, truncated


def leave_text(
    checkpoint: Checkpoint, _: PreprocessSpec, texts: list[str]
) -> list[Prepared | Refused]:
    """Text as it is, for a server that has its own tokenizer; its units are characters."""
    prompted = [checkpoint.prompt + text for text in texts]
    return [
        Prepared([np.frombuffer(p.encode(), dtype=np.uint8)], [len(p)], [(0, len(t))])
        for p, t in zip(prompted, texts, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _gives_segments(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer gives segment ids, and the model may make something else without them.

    Nearly all tokenizers give nothing but zeros, which the models that were tested take for none;
    so the ids do not travel then.
    """
    tokenizer = _load_tokenizer(checkpoint)
    if "token_type_ids" not in tokenizer.model_input_names:
        return False
    return checkpoint.family.company is None or any(tokenizer("a b")["token_type_ids"])


@functools.lru_cache(maxsize=2)
@uncollected()
def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    # One core a task: the tokenizer's own threads would compete with the model for the rest.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    with loading(checkpoint.id):
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder() / checkpoint.weights, trust_remote_code=checkpoint.trust_remote_code
        )
    # transformers makes one of nothing but a config, which takes every word for unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
        raise ModelError(
            f"model.id: the tokenizer of {checkpoint.id} has no vocabulary; "
            "fetch the whole checkpoint"
        )
    return tokenizer
