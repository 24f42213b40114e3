"""A small table as runs write it."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa

from fmembed.rows.columns import row_schema, table_schema
from fmembed.storage import Storage
from fmembed.table.card import Card, StoredOutput, fingerprint
from fmembed.table.key_rows import KeyRows
from fmembed.table.parts import Written, write_part, write_without

DIM = 4


IDENTITY = {"model.weights": "w", "model.normalize": True, "model.dtype": "float32"}


OUTPUT = StoredOutput(pooling="mean", normalize=True, precision="float32")


CARD = Card(
    table="0123abcd", fingerprint=fingerprint(IDENTITY), identity=IDENTITY,
    outputs={"embedding": OUTPUT}, spec={},
)  # fmt: skip


CONFIGURATION = CARD.to_configuration()


VECTORS = ("embedding",)


def block(ids: list[str], bad: tuple[str, ...] = (), seed: int = 0) -> pa.Table:
    """Rows as the embed stage yields them."""
    rows = [
        {"row_id": i, "content_hash": "0" * 32, "topic": "t"}
        | ({"_stage": "read", "_error": "bad JSON", "_message": "m"} if i in bad else {})
        for i in ids
    ]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([("topic", pa.string())])))
    vectors = np.random.default_rng(seed).normal(size=(len(ids), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mask = pa.array([i in bad for i in ids])
    table = table.drop_columns(["_input"])
    table = table.append_column("num_units", pa.array([3] * len(ids), pa.int32()))
    table = table.append_column("_counts", pa.nulls(len(ids), pa.string()))
    table = table.append_column("truncated", pa.array([False] * len(ids)))
    flat = pa.array(vectors.reshape(-1))
    return table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, DIM, mask=mask))


SCHEMA = table_schema(
    pa.schema([("topic", pa.string())]), [pa.field("embedding", pa.list_(pa.float32()))]
)


_WRITES = itertools.count()


def write(uri: str, rows: pa.Table, twins: frozenset[bytes] = frozenset()) -> Written:
    """One write task of a run."""
    return write_with_keys(uri, rows, twins)[0]


def write_with_keys(
    uri: str, rows: pa.Table, twins: frozenset[bytes] = frozenset()
) -> tuple[Written, KeyRows]:
    """The same, and the keys of the rows; those whose id another part has are rejected."""
    written, keys = write_part(uri, [rows], VECTORS, _stamp())
    if not twins:
        return written, keys
    first = [(uri, written.part), (f"{uri}/_rejected", written.rejected)]
    written, keys = write_without(uri, written, keys, twins, VECTORS, _stamp())
    for folder, part in first:  # as `remove_strays` does in the end
        if part is not None:
            Storage(folder).delete(part.path)
    return written, keys


def _stamp() -> dict[str, str]:
    return {**CONFIGURATION, "fmembed.run": "run", "fmembed.write": str(next(_WRITES))}
