"""Tables whose vectors and labels a test chooses, a version after another, for the gate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forged
import inline
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from fmembed import promotion
from fmembed.evaluate import gate as gate_module
from fmembed.rows.columns import REJECTED_SCHEMA, row_schema
from fmembed.table.card import fingerprint
from fmembed.table.parts import write_part
from fmembed.table.table import Table

Array = npt.NDArray[np.float32]
DIM, NUM_CLASSES = 16, 4


@dataclass(frozen=True)
class Rows:
    """What a version holds."""

    vectors: Array
    labels: Sequence[str]
    texts: Sequence[str]
    ids: Sequence[str]
    num_rejected: int = 0


def rows(
    num: int = 400,
    *,
    noise: float = 0.35,
    seed: int = 0,
    corpus: int = 0,
    dim: int = DIM,
    num_rejected: int = 0,
) -> Rows:
    """Rows of four classes; `seed` is the model's noise, `corpus` which texts there are."""
    truth = np.random.default_rng(corpus).integers(0, NUM_CLASSES, num)
    rng = np.random.default_rng([seed, 1])
    # Classes in other directions for each model.
    centres = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:NUM_CLASSES]
    vectors = centres[truth] + noise * rng.normal(size=(num, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Rows(
        vectors.astype(np.float32),
        [f"class {t}" for t in truth],
        [f"corpus {corpus} row {i}" for i in range(num)],
        [f"r{i}" for i in range(num)],
        num_rejected,
    )


def add_version(
    folder: Path, rows: Rows, *, model: str = "w", normalize: bool = True, column: str = "embedding"
) -> Table:
    """Make a version of these rows and no others; the table, where there is none."""
    identity = {**forged.IDENTITY, "model.weights": model}
    outputs = {column: {**forged.OUTPUT, "column": column, "normalize": normalize}}
    spec = {**forged.SPEC, "model": {"id": model}, "probes": ["knn", "linear"]}
    configuration = {
        f"fmembed.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in {
            "spec": spec, "identity": identity, "modality": "text", "ranges": {},
            "outputs": outputs, "fingerprint": fingerprint(identity), "table": "0123abcd",
        }.items()
    }  # fmt: skip
    table = Table(str(folder))
    number = table.rows.version() + 1
    carried = pa.schema([("topic", pa.string()), ("text", pa.string())])
    block = pa.Table.from_pylist(
        [
            {
                "row_id": row_id, "topic": label, "text": text,
                "content_hash": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            }
            for row_id, label, text in zip(rows.ids, rows.labels, rows.texts, strict=True)
        ],
        schema=row_schema(carried),
    ).drop_columns(["_input"])  # fmt: skip
    num, dim = rows.vectors.shape
    flat = pa.array(rows.vectors.reshape(-1))
    for name, values in {
        "num_units": pa.array([3] * num, pa.int32()),
        "_counts": pa.nulls(num, pa.string()),
        "truncated": pa.array([False] * num),
        column: pa.FixedSizeListArray.from_arrays(flat, dim),
    }.items():
        block = block.append_column(name, values)
    stamp = {"fmembed.write": str(number)}
    written, _ = write_part(table.uri, [block], (column,), stamp)
    assert written.part is not None
    bad = pa.Table.from_pylist(
        [
            {"row_id": f"bad{i}", "stage": "read", "error": "bad JSON", "message": "m"}
            for i in range(rows.num_rejected)
        ],
        schema=REJECTED_SCHEMA,
    )
    table.known()
    before = [table.rejected.parts(), table.rows.parts()]
    run = (f"r{number}", 0)
    if rows.num_rejected or before[0]:
        part = [table.rejected.files.write(bad, (), configuration)] if rows.num_rejected else []
        table.rejected.commit(part, REJECTED_SCHEMA, configuration, run, removed=before[0])
    table.rows.commit([written.part], written.schema, configuration, run, removed=before[1])
    return Table(str(folder))


def run_inline(patch: pytest.MonkeyPatch) -> None:
    """For the test, what the gate starts as tasks runs in this process."""
    patch.setattr(gate_module, "ray", inline.INLINE)
    cluster = SimpleNamespace(connect=lambda: None)

    class Cluster:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return cluster

        def __exit__(self, *_: object) -> None:
            pass

    patch.setattr(promotion, "Cluster", Cluster)
