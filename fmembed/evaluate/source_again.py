"""Inputs that a table does not hold, read from the source once more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.errors import FmembedError
from fmembed.rows.columns import PARENT_ID, PIECE_START, PIECE_STOP
from fmembed.rows.ids import RowIds, keys_of
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.sources.shards import uncut
from fmembed.sources.source import Shard, Source
from fmembed.spec import SourceSpec
from fmembed.table.card import Card

_MAX_FETCH_BYTES = 10 * 2**30


def fetch_inputs(
    spec: SourceSpec, card: Card, rows: pa.Table
) -> tuple[list[str | None] | None, tuple[str, Floats] | None, str | None]:
    """Texts of the sample, or cheap features of its pictures or sounds, from the source again.

    Returns:
        The texts, or the features, or why there is neither.
    """
    by_piece = card.identity["preprocess.pieces_are_rows"]
    if by_piece and card.modality != "text":
        return None, None, f"pieces of {card.modality} have no cheap features"
    try:
        source = open_source(spec, (card.modality,))
    except FmembedError as e:
        return None, None, f"the source cannot be read again: {e}"
    if source.num_bytes > _MAX_FETCH_BYTES:
        return None, None, "the source is too large to be read again"
    ids = rows[PARENT_ID if by_piece else "row_id"].to_pylist()
    wanted = ray.put(RowIds(keys_of(dict.fromkeys(ids))))
    fetch = ray.remote(num_cpus=1)(_fetch_shard)
    # Two rows may have one id, of which the table has one.
    found: dict[tuple[str, str], Any] = {}
    described = ray.put(source.without_shards)
    for pairs in ray.get([fetch.remote(described, shard, wanted) for shard in uncut(source)]):
        found.update(pairs)
    inputs = []
    for row_id, content_hash in zip(ids, rows["content_hash"].to_pylist(), strict=True):
        if (row_id, content_hash) not in found:
            return None, None, "the source has changed since"
        inputs.append(found[row_id, content_hash])
    if card.modality == "text":
        return cut_inputs(inputs, rows) if by_piece else inputs, None, None
    if not inputs:
        return None, None, "there is no row"
    return None, (inputs[0][0], np.stack([features for _, features in inputs])), None


def cut_inputs(texts: list[str | None], rows: pa.Table) -> list[str | None]:
    """The pieces that are rows, of the texts that they are pieces of."""
    spans = zip(rows[PIECE_START].to_pylist(), rows[PIECE_STOP].to_pylist(), strict=True)
    return [(t or "")[start:stop] for t, (start, stop) in zip(texts, spans, strict=True)]


def _fetch_shard(source: Source, shard: Shard, wanted: RowIds) -> dict[tuple[str, str], Any]:
    """Inputs by id and content."""
    found: dict[tuple[str, str], Any] = {}
    for rows in read_shard(source, shard, 0):
        rows = rows.filter(rows["_input"].is_valid())
        ids = rows["row_id"].to_pylist()
        here = np.flatnonzero(wanted.contains(keys_of(ids)))
        values: list[Any] = rows["_input"].take(pa.array(here)).to_pylist()
        if source.modality != "text":
            # Not the pictures themselves, which the driver could not hold.
            name, features = probes.CHEAP[source.modality](values)
            values = [(name, f) for f in features]
        for i, value in zip(here.tolist(), values, strict=True):
            found[ids[i], rows["content_hash"][i].as_py()] = value
    return found
