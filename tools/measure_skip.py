"""What it costs to skip a million committed rows: `python tools/measure_skip.py`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from tables import CONFIGURATION

from fmembed.rows.columns import table_schema
from fmembed.rows.ids import contents_of, keys_of
from fmembed.run.work import skip_committed
from fmembed.sources.opening import open_source
from fmembed.sources.reading import read_shard
from fmembed.spec import SourceSpec
from fmembed.table.key_rows import KeyRows
from fmembed.table.table import Table

NUM_ROWS, NUM_PARTS, DIM = 1_000_000, 10, 8


def text(i: int) -> str:
    """What document i says."""
    return f"some words of document number {i} " * 5


def main() -> None:
    """Make a table of a million rows and the file they came from; time the three ways to skip."""
    with tempfile.TemporaryDirectory() as folder:
        table = Table(f"{folder}/table")
        table.known()
        schema = table_schema(pa.schema([]), [pa.field("embedding", pa.list_(pa.float32(), DIM))])
        n = NUM_ROWS // NUM_PARTS
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(n * DIM, np.float32)), DIM)
        rest = [vectors, np.ones(n, np.int32), np.zeros(n, bool)]
        parts, keys = [], []
        for k in range(NUM_PARTS):
            rows = range(k * n, (k + 1) * n)
            hashes = [blake2b(text(i).encode(), digest_size=16).hexdigest() for i in rows]
            columns = [[f"doc-{i}" for i in rows], hashes, *rest]
            parts.append(table.rows.files.write(pa.table(columns, schema=schema)))
            of_part = KeyRows.of(keys_of(columns[0]), contents_of(hashes))
            keys.append((of_part, {"embedded": parts[-1].path}))
        started = time.monotonic()
        kept = table.key_files.write("0123ab-0", keys, {})
        print(f"writing the keys: {time.monotonic() - started:.1f} s")
        table.rows.commit(parts, schema, CONFIGURATION, ("run", 0))
        path = Path(folder) / "in.jsonl"
        with path.open("w", encoding="utf-8") as f:
            for i in range(NUM_ROWS):
                row = {"id": f"doc-{i}", "text": text(i)}
                f.write(json.dumps(row) + "\n")

        started = time.monotonic()
        known = table.known()
        print(f"what the driver looks at: {time.monotonic() - started:.2f} s")
        started = time.monotonic()
        ids = known.load()
        assert (len(ids), known.missing) == (NUM_ROWS, ())
        print(f"loading them: {time.monotonic() - started:.1f} s, {ids.nbytes / NUM_ROWS:g} B/row")
        table.storage.delete(kept)
        started = time.monotonic()
        assert len(table.known().load()) == NUM_ROWS
        print(f"from the parts, without the keys: {time.monotonic() - started:.1f} s")
        source = open_source(SourceSpec(uri=str(path), id="id"))
        started = time.monotonic()
        _, num_skipped = skip_committed(source, {source.shards[0].key or "": NUM_ROWS})
        assert num_skipped == NUM_ROWS
        print(f"a file that is committed whole: {time.monotonic() - started:.3f} s")
        started = time.monotonic()
        (marker,) = [t.to_pylist()[-1] for t in read_shard(source, source.shards[0], 0, ids)]
        assert (marker["_skipped"], marker["_changed"]) == (NUM_ROWS, 0)
        print(
            f"a file that has changed, row by row: {time.monotonic() - started:.1f} s on one core"
        )


if __name__ == "__main__":
    main()
