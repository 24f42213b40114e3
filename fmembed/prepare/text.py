"""Texts to token ids, cut or in chunks."""

from __future__ import annotations

import numpy as np

from fmembed.checkpoint.opening import Checkpoint
from fmembed.prepare.tokenizer import Tokenizer, Values, load_tokenizer
from fmembed.rows.pieces import Prepared, Refused
from fmembed.spec import PreprocessSpec

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
    load_tokenizer(checkpoint)  # what is wrong with the checkpoint is no row's fault
    try:
        encoded = _encode(checkpoint, spec, texts)
    # A tokenizer raises whatever its Rust or Python code raises; find the row that did it.
    except Exception as e:
        if len(texts) == 1:
            return [Refused("not tokenizable", f"{type(e).__name__}: {e}")]
        return [row for text in texts for row in tokenize(checkpoint, spec, [text])]
    if spec.keeps_text("text"):
        whole = [_as_counted(checkpoint, text) for text in texts]
        return [_to_prepared(t, *found) for t, found in zip(whole, encoded, strict=True)]
    return [_to_prepared("", *found) for found in encoded]


# A text's pieces, each with its span; and whether the model does not see all of it.
_Encoded = tuple[list[tuple[Values, tuple[int, int]]], bool]


def _to_prepared(
    text: str, pieces: list[tuple[Values, tuple[int, int]]], is_cut: bool
) -> Prepared | Refused:
    arrays = [np.array(values, dtype=np.int32) for values, _ in pieces]
    if not arrays or not arrays[0].size:
        return Refused("empty input", "the tokenizer makes no token of it")
    spans = [span for _, span in pieces]
    units = [a.shape[-1] for a in arrays]
    return Prepared(arrays, units, spans, is_cut, [text[start:stop] for start, stop in spans])


def _encode(checkpoint: Checkpoint, spec: PreprocessSpec, texts: list[str]) -> list[_Encoded]:
    if spec.chunk_tokens is not None:
        return [_chunk(checkpoint, spec, text) for text in texts]
    tokenizer = load_tokenizer(checkpoint)
    prepared = [_prepare(checkpoint, text) for text in texts]
    limit = checkpoint.max_tokens
    prepared = [t if len(t) <= _LONG else _seen_part(tokenizer, t, limit) for t in prepared]
    return [
        ([(values, (0, len(text)))], is_cut)
        for (values, is_cut), text in zip(tokenizer.encode(prepared), texts, strict=True)
    ]


def _as_counted(checkpoint: Checkpoint, text: str) -> str:
    """The text whose characters spans count: the small letters of some take two."""
    small = text.lower() if checkpoint.lower_case else text
    return text if len(small) == len(text) else small


def _prepare(checkpoint: Checkpoint, text: str) -> str:
    prompted = checkpoint.prompt + text
    return prompted.lower() if checkpoint.lower_case else prompted


def _seen_part(tokenizer: Tokenizer, text: str, limit: int) -> str:
    """The part of a very long text that holds twice the tokens that the model sees.

    A tokenizer goes through all of a text before it cuts it, and takes some hundred bytes for each
    character: 64 MB of text made a process of gigabytes for the first 256 tokens.
    """
    size = _LONG
    while size < len(text):
        part = text[:size] if tokenizer.truncation_side == "right" else text[-size:]
        if tokenizer.count(part) > 2 * limit:
            return part
        size *= 4
    return text


def _chunk(checkpoint: Checkpoint, spec: PreprocessSpec, text: str) -> _Encoded:
    """Cut a text at tokens; each chunk begins with the prompt, as a text of its own would.

    A chunk is what its characters give when tokenised alone, so its vector is that of its text.
    """
    tokenizer = load_tokenizer(checkpoint)
    assert spec.chunk_tokens is not None
    limit = min(spec.chunk_tokens, checkpoint.max_tokens)
    if checkpoint.lower_case:
        text = text.lower()
    offsets = tokenizer.spans(text)
    around = tokenizer.count(checkpoint.prompt)
    if around >= limit:
        raise ValueError(f"the prompt is {around} tokens long, preprocess.chunk_tokens {limit}")
    step = max(limit - around - spec.chunk_overlap, 1)
    spans: list[tuple[int, int]] = []
    for first in range(0, max(len(offsets), 1), step):
        last = min(first + limit - around, len(offsets)) - 1
        if last < first:
            break
        spans.append((offsets[first][0], offsets[last][1]))
        if last + 1 == len(offsets):
            break
    encoded = tokenizer.encode([_prepare(checkpoint, text[a:b]) for a, b in spans])
    pieces = [(values, span) for (values, _), span in zip(encoded, spans, strict=True)]
    return pieces, any(is_cut for _, is_cut in encoded)


def leave_text(
    checkpoint: Checkpoint, _: PreprocessSpec, texts: list[str]
) -> list[Prepared | Refused]:
    """Text as it is, for a server that has its own tokenizer; its units are characters."""
    prompted = [checkpoint.prompt + text for text in texts]
    return [
        Prepared([np.frombuffer(p.encode(), dtype=np.uint8)], [len(p)], [(0, len(t))])
        for p, t in zip(prompted, texts, strict=True)
    ]
