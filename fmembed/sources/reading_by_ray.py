"""A source's shards as a Ray Data dataset: a Datasource with one read task a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from fmembed.rows.ids import RowIds
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source


def read(
    source: Source, committed: RowIds | None = None, num_cpus: float = 1.0
) -> ray.data.Dataset:
    """Read the shards as Ray Data blocks of `columns.row_schema(source.carried)`.

    Args:
        source: What `open_source` found.
        committed: Rows to leave out; the marker row that ends a shard says how many.
        num_cpus: What Ray reserves for a read task.
    """
    committed_ref = ray.put(committed) if committed is not None and len(committed) else None
    described, shards, num_bytes = source.without_shards, source.shards, source.num_bytes

    # A task is sent what its function holds: one shard, and never the list of all files.
    def read_fn(index: int, shard: Shard) -> Callable[[], Iterator[pa.Table]]:
        def read_blocks() -> Iterator[pa.Table]:
            known = ray.get(committed_ref) if committed_ref is not None else None
            yield from read_shard(described, shard, index, known)

        return read_blocks

    class Shards(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return num_bytes

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, exec_stats=None, input_files=None
            )
            return [ReadTask(read_fn(i, shard), unknown) for i, shard in enumerate(shards)]

    # With more blocks than read tasks Ray splits every block anew (67 pieces in a trial).
    datasource = Shards()  # type: ignore[no-untyped-call]
    dataset: ray.data.Dataset = ray.data.read_datasource(
        datasource, override_num_blocks=len(shards), num_cpus=num_cpus
    )
    return dataset
