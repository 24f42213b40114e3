"""Texts through a model's text tower: prompts and captions."""

from __future__ import annotations

import numpy as np

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.checkpoint.opening import list_modalities, open_checkpoint
from fmembed.errors import FmembedError
from fmembed.model.embed import embed_here
from fmembed.rows.columns import ERROR, MESSAGE
from fmembed.rows.outputs import DEFAULT
from fmembed.spec import ModelSpec, RunSpec
from fmembed.table.card import Card

# Why a probe, or its cheap competitor, is left out where nobody but the table names what it needs.
NO_MODEL = "needs the model: give --from-config CONFIG"


def embed_prompts(
    spec: RunSpec, model: ModelSpec | None, card: Card, column: str, classes: list[str]
) -> Floats | str:
    """Every template with every class, shape (classes, templates, dim), or why there is none."""
    templates = spec.zeroshot.templates or probes.TEMPLATES[card.modality]
    words = [spec.zeroshot.classes.get(c, c) for c in classes]
    texts = [t.replace("{}", w) for w in words for t in templates]
    found = _embed_texts(model, card, column, texts)
    return found if isinstance(found, str) else found.reshape(len(words), len(templates), -1)


def embed_captions(
    model: ModelSpec | None,
    card: Card,
    column: str,
    vectors: Floats,
    captions: list[str | None],
    hashes: list[str],
) -> probes.CaptionedRows | str:
    given = [i for i, caption in enumerate(captions) if caption]
    kept = [str(captions[i]) for i in given]
    distinct, at = np.unique(np.array(kept, dtype=object).astype(str), return_inverse=True)
    found = _embed_texts(model, card, column, distinct.tolist())
    if isinstance(found, str):
        return found
    codes = np.unique([hashes[i] for i in given], return_inverse=True)[1]
    return probes.CaptionedRows(vectors[given], found[at], codes, np.asarray(at, dtype=np.int64))


def _embed_texts(
    model: ModelSpec | None, card: Card, column: str, texts: list[str]
) -> Floats | str:
    """Embed texts by the tower that shares the column's space, or say why that cannot be."""
    if model is None:
        return NO_MODEL
    output = card.outputs[column]
    try:
        if "text" not in list_modalities(model) or output.pooling != "projection":
            return "needs a model with a text tower, and its projection"
        same_space = {
            "modality": "text", "outputs": {}, "pooling": None, "layer": None, "prompt": None,
            "precision": "float32", "dims": output.dims, "normalize": output.normalize,
            "dtype": card.identity["model.dtype"],
        }  # fmt: skip
        checkpoint = open_checkpoint(model.model_copy(update=same_space), False, "text")
        digests = (card.identity["model.weights"], card.identity["model.adapter"])
        if (checkpoint.digest, checkpoint.adapter_digest) != digests:
            return "the checkpoint has changed since the table was made"
        embedded = embed_here(checkpoint, texts)
    except FmembedError as e:
        return f"its text tower cannot be loaded: {e}"
    for error, message in zip(embedded[ERROR], embedded[MESSAGE], strict=True):
        if error.is_valid:
            return f"a text cannot be embedded: {error}: {message}"
    flat = embedded[DEFAULT].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(len(texts), -1)
