"""A table as a run leaves it, made without one, so that a test can write what it likes into it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fmembed.rows.columns import row_schema
from fmembed.table.card import fingerprint
from fmembed.table.parts import write_part
from fmembed.table.records import Commit, run_path
from fmembed.table.table import Table

WORDS = ("river", "market", "engine")
NUM_ROWS = 60
OUTPUT = {
    "column": "embedding", "pooling": "mean", "layer": None, "normalize": True, "dims": None,
    "precision": "float32",
}  # fmt: skip
IDENTITY = {
    "contract": 2, "model.revision": None, "model.weights": "w", "model.adapter": None,
    "model.modality": "text", "model.dtype": "float32", "model.max_tokens": 64, "model.prompt": "",
    "preprocess.pieces_are_rows": False,
}  # fmt: skip
SPEC = {
    "source": {"uri": "in.jsonl", "input": "text", "label": "topic", "carry": ["text"]},
    "model": {"id": "model"},
    "output": {"uri": "out"},
    "probes": ["knn"],
}
RUN = {
    "run_id": "r", "started": "2026-01-01T00:00:00+00:00", "version": 1, "fingerprint": "f",
    "table": "elsewhere", "rows_read": NUM_ROWS, "rows_embedded": NUM_ROWS, "rows_rejected": 0,
    "rows_skipped": 0, "rows_per_s": 1.0, "seconds": 1.0, "table_rows": NUM_ROWS,
    "table_rejected": 0, "num_units": 0, "num_truncated": 0, "counts": {}, "causes": {},
    "stages": {}, "verdict": {}, "compute": {},
}  # fmt: skip


def make_table(
    folder: Path,
    *,
    dim: int = 8,
    spec: Any = SPEC,
    identity: dict[str, Any] | None = {},  # noqa: B006 - not changed
    run: Any = RUN,
    columns: dict[str, Any] | None = None,
    **metadata: Any,
) -> Table:
    """Commit sixty rows in three groups, carrying `topic` and `text`.

    Args:
        folder: Where.
        dim: Length of a vector.
        spec: `fmembed.spec`, JSON or a text as it is.
        identity: Over `IDENTITY`; None for an empty one.
        run: The record of the last run.
        columns: Columns in place of those made here.
        metadata: Other `fmembed.` entries, JSON or texts as they are.
    """
    identity = {**IDENTITY, **identity} if identity is not None else {}
    given = {"spec": spec, "identity": identity, "modality": "text", "ranges": {}} | metadata
    given.setdefault("outputs", {"embedding": OUTPUT})
    configuration = {
        f"fmembed.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
    }
    configuration |= {"fmembed.fingerprint": fingerprint(identity), "fmembed.table": "0123abcd"}
    table = Table.open_output(str(folder), identity)
    table.known()
    written, _ = write_part(table.uri, [_block(dim, columns or {})], ("embedding",))
    assert written.part is not None
    table.rows.commit([written.part], written.schema, configuration, ("r", 0))
    if run is not None:
        commit = Commit(run="r", rows=0, rows_version=1)
        record = {"commit": commit.model_dump(), "result": run}
        table.storage.put(run_path(commit), json.dumps(record).encode())
    return table


def _block(dim: int, columns: dict[str, Any]) -> pa.Table:
    truth = np.arange(NUM_ROWS) % len(WORDS)
    texts = [f"{WORDS[t]} number {i}" for i, t in enumerate(truth)]
    rows = [
        {
            "row_id": f"r{i}",
            "content_hash": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            "topic": WORDS[t],
            "text": text,
        }
        for i, (t, text) in enumerate(zip(truth, texts, strict=True))
    ]
    carried = pa.schema([("topic", pa.string()), ("text", pa.string())])
    table = pa.Table.from_pylist(rows, schema=row_schema(carried)).drop_columns(["_input"])
    noise = np.random.default_rng(0).normal(size=(NUM_ROWS, dim))
    vectors = (np.eye(dim)[truth] + 0.05 * noise).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = {
        "num_units": pa.array([3] * NUM_ROWS, pa.int32()),
        "_counts": pa.nulls(NUM_ROWS, pa.string()),
        "truncated": pa.array([False] * NUM_ROWS),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
    }
    for name, column in (own | columns).items():
        if name in table.schema.names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table
