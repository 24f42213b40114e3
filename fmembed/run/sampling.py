"""Some of the rows that the model would see, read and prepared: what is to be known of them all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions

from fmembed.arrays import Ints
from fmembed.checkpoint.opening import Checkpoint
from fmembed.forecast import Range
from fmembed.prepare.stage import Preprocess
from fmembed.rows.columns import NUM_UNITS, SHARD, TOTAL, accepted
from fmembed.rows.counts import SECONDS, sum_counts
from fmembed.rows.pieces import PIECE_UNITS
from fmembed.run.apart import PreprocessApart, read_apart
from fmembed.run.faults import TASK_DEATHS, root_cause
from fmembed.sources.picks import Chosen, ChosenRows
from fmembed.sources.reading import read_shard
from fmembed.sources.source import Shard, Source
from fmembed.spec import PreprocessSpec

# A sample is as large as these seconds of one process allow, and no smaller than so many rows.
_SAMPLE_S, _LEAST_ROWS = 20.0, 64
# Prepared rows that are kept for the model to be tried on.
_KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Sampled:
    """What reading and preparing have made of some rows of the source.

    `units` are of all, 0 of those that were rejected, `shards` the numbers of the shards that they
    are of, shapes (rows,); `num_pieces` of those that were not, `num_rejected` were. `is_cut` says
    whether there was not the time for all shards. `rows` are some, for the model. `prepare_s` are
    seconds of one process for each row.
    """

    units: Ints
    num_pieces: Ints
    shards: Ints
    num_rejected: int
    is_cut: bool
    rows: pa.Table | None
    prepare_s: float

    @property
    def num_rows(self) -> int:
        """Rows that were drawn."""
        return len(self.units)

    def units_of_a_row(self, num_rows: int, times: Mapping[int, int] | None) -> Range:
        """Units of a row, with two standard errors to both sides; exact where all rows were drawn.

        Args:
            num_rows: Of how many they were drawn.
            times: How often each shard was drawn, whose rows may be alike; None where rows were
                drawn from all.
        """
        n, units = self.num_rows, self.units
        if not n:
            return Range.exactly(0)
        if times is None and not self.is_cut:
            mean = float(units.mean())
            left = max(1 - n / num_rows, 0.0)
            off = 2 * float(units.std()) / math.sqrt(n) * math.sqrt(left)
        else:
            mean, off = self._by_shard(times)
        return Range(mean, max(mean - off, 0.0), mean + off)

    def _by_shard(self, times: Mapping[int, int] | None) -> tuple[float, float]:
        """The mean of the shards' means, each as often as its shard was drawn or by its rows; and
        two standard errors.
        """
        shards, of_shard = np.unique(self.shards, return_inverse=True)
        sizes = np.bincount(of_shard)
        means = np.bincount(of_shard, weights=self.units) / sizes
        weights = sizes if times is None else np.array([times[i] for i in shards.tolist()])
        mean = float((weights * means).sum() / weights.sum())
        if len(shards) == 1:  # nobody knows
            return mean, mean
        spread = math.sqrt(float(((weights * (means - mean)) ** 2).sum())) / float(weights.sum())
        return mean, 2 * spread * math.sqrt(len(shards) / (len(shards) - 1))

    def rejected(self, num_rows: int) -> Range:
        """Rows that preparing rejects, by the exact interval of their share among those drawn.

        Args:
            num_rows: Of how many they were drawn.
        """
        n, rejected = self.num_rows, self.num_rejected
        if n >= num_rows:
            return Range.exactly(rejected)
        if not n:  # they have changed since they were counted
            return Range(0, 0, num_rows)
        from scipy.stats import binomtest

        share = binomtest(rejected, n).proportion_ci()
        return Range(rejected / n * num_rows, share.low * num_rows, share.high * num_rows)


def draw(
    source: Source,
    shards: Sequence[tuple[int, Shard]],
    chosen: ChosenRows,
    checkpoint: Checkpoint,
    spec: PreprocessSpec,
) -> Sampled:
    """Read and prepare rows of some shards, in a task.

    Args:
        source: What they belong to.
        shards: Which, with their numbers.
        chosen: The rows of them.
        checkpoint: The model.
        spec: How it is given its inputs.
    """
    task: Any = ray.remote(num_cpus=1)(_draw)
    given = (source.without_shards, shards, chosen, checkpoint, spec)
    try:
        sampled: Sampled = ray.get(task.remote(*given, False))
    except ray.exceptions.RayError as e:
        if not isinstance(root_cause(e), TASK_DEATHS):
            raise
        sampled = ray.get(task.remote(*given, True))
    return sampled


def _draw(
    source: Source,
    shards: Sequence[tuple[int, Shard]],
    chosen: ChosenRows,
    checkpoint: Checkpoint,
    spec: PreprocessSpec,
    apart: bool,
) -> Sampled:
    began = time.perf_counter()
    read = read_apart if apart else read_shard
    prepare = (PreprocessApart if apart else Preprocess)(checkpoint, spec)
    prepare_s = 0.0
    num_rows = num_rejected = num_bytes = 0
    units, pieces, of_shards, kept = [], [], [], []
    # Where there is not the time for all, those that are left out are like the others.
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    num_shards = 0
    for index, shard in (shards[at] for at in order):
        num_shards += 1
        for rows in read(source, shard, index, Chosen(chosen, index)):
            some = rows.filter(rows[TOTAL].is_null())  # without the marker
            for ready in prepare.stream(some):
                prepare_s += sum_counts(ready).get(f"{SECONDS}preprocess", 0.0)
                good = ready.filter(pa.array(accepted(ready)))
                num_rows += ready.num_rows
                num_rejected += ready.num_rows - good.num_rows
                units.append(ready[NUM_UNITS].to_numpy())
                of_shards.append(ready[SHARD].to_numpy())
                pieces.append(good[PIECE_UNITS].combine_chunks().value_lengths().to_numpy())
                if num_bytes < _KEPT_BYTES:
                    kept.append(good)
                    num_bytes += good.nbytes
        if num_rows >= _LEAST_ROWS and time.perf_counter() - began > _SAMPLE_S:
            break
    none = [np.zeros(0, dtype=np.int64)]
    return Sampled(
        units=np.concatenate([*none, *units]),
        num_pieces=np.concatenate([*none, *pieces]),
        shards=np.concatenate([*none, *of_shards]),
        num_rejected=num_rejected,
        is_cut=num_shards < len(shards),
        rows=pa.concat_tables(kept, promote_options="default") if kept else None,
        prepare_s=prepare_s / max(num_rows, 1),
    )
