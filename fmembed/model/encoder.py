"""The embed stage: windows of model-ready rows to columns of vectors, in batches that fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fmembed.arrays import Ints
from fmembed.checkpoint.opening import Checkpoint
from fmembed.errors import ModelError
from fmembed.model.batching import plan_batches
from fmembed.model.budget import choose_budget
from fmembed.model.failures import OUT_OF_MEMORY, cause_of, free_memory
from fmembed.model.flops import count_flop, peak_flops, synchronize
from fmembed.model.forward import Model
from fmembed.model.meter import Meter
from fmembed.model.process import bound_kernels, keep_freed_memory
from fmembed.rows.counts import add_counts
from fmembed.rows.pieces import Piece, unpack_pieces
from fmembed.rows.precision import Ranges
from fmembed.rows.vectors import Causes, VectorColumns, Vectors


class Encoder:
    """A loaded checkpoint as a Ray Data stage: one instance an actor, one call a window of rows.

    `num_halved` counts the batches that did not fit; `cost` tells the model's FLOP for rows of
    given lengths, 0 where they cannot be counted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        gpu_share: float = 1.0,
        num_threads: int | None = None,
        batch_tokens: int | Literal["auto"] | None = None,
        ranges: Ranges | None = None,
        pieces_are_rows: bool = False,
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: What to load.
            device: "cpu", or "cuda" for the GPU that this process was given.
            gpu_share: The part of its memory that this process may take: others have the rest.
            num_threads: CPU threads of this process; None leaves torch's choice.
            batch_tokens: Token budget of a batch, padding included; "auto" measures the model, or
                takes what was measured before; None, for a few rows, is the device's default.
            ranges: For outputs in int8.
            pieces_are_rows: Give a row's pieces as a list, to be rows of the table; else averaged.

        Raises:
            ModelError: The weights do not fit the architecture, or need remote code.
        """
        began = time.perf_counter()
        if device == "cpu":
            keep_freed_memory()
            bound_kernels()
        else:
            # torch rounds what convolutions in float32 multiply to 10 bits, unless told not to;
            # its products it does not.
            torch.backends.cudnn.allow_tf32 = False
            if gpu_share < 1:  # so that a batch too large fails here, and not in another process
                torch.cuda.set_per_process_memory_fraction(gpu_share)
        if num_threads is not None:
            # Ray sets OMP_NUM_THREADS to the CPUs reserved, and reuses workers with their threads.
            torch.set_num_threads(num_threads)
        self._model = model = Model(checkpoint, torch.device(device))
        self._tower = model.tower
        self._columns = VectorColumns(checkpoint.outputs, model.dims, ranges or {}, pieces_are_rows)
        self.num_halved = 0
        self._batch_tokens, how = choose_budget(batch_tokens, model, gpu_share)
        # Reported once: the counts of all windows are added up.
        self._news = {f"batch_tokens/{self._batch_tokens}/{how}": 1}
        load_s = time.perf_counter() - began
        dtype = getattr(torch, checkpoint.dtype)
        self.cost = count_flop(model)
        self._meter = Meter(load_s, lambda: peak_flops(model.device, dtype), self.cost)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace `model_input` by a column of vectors for each output.

        A row that the model fails on, even alone, is rejected: its vector is not finite, it does
        not fit into memory, or the model raises. A rejected row's vector is null. `_counts` on the
        first row says how many batches of this window had to be halved, what the meter
        counted, and once how large a batch is and who chose that.
        """
        before = self.num_halved
        self._meter.start()
        pieces = unpack_pieces(rows)
        vectors, causes = self.embed(pieces.pieces)
        rows = self._columns.join(rows, pieces, vectors, causes)
        news, self._news = self._news, {}
        counts = {"batches_halved": self.num_halved - before, **pieces.counts, **news}
        return add_counts(rows, {**counts, **self._meter.stop()})

    @torch.inference_mode()
    def embed(self, pieces: Sequence[Piece]) -> tuple[Vectors, Causes]:
        """Embed pieces.

        Batches are filled by length, and each piece's vector goes back to its own place: order and
        company of the rows cannot change a vector beyond the rounding of its dtype.

        Args:
            pieces: The model's inputs.

        Returns:
            For each output the vectors of the pieces, float32: shape (pieces, dim), for `tokens` a
            list of (tokens, dim); and for those that have none, by position, (error, message).

        Raises:
            ModelError: An output asks for a layer or a pooling that the model has not.
            RuntimeError: The device itself has failed.
        """
        causes: Causes = {
            i: ("audio too short", f"{pieces[i].num_units} samples make no frame of this model")
            for i in np.flatnonzero(self._tower.is_too_short(pieces)).tolist()
        }
        vectors = self._run_batches(pieces, causes)
        for column, rows in vectors.items():
            if isinstance(rows, Tensor):
                with self._meter.timed("copy_s"):
                    vectors[column] = rows.cpu().numpy()
                finite = np.isfinite(vectors[column]).all(axis=1)
            else:
                finite = np.array([r is None or np.isfinite(r).all() for r in rows], dtype=np.bool_)
            for i in np.flatnonzero(~finite).tolist():
                causes.setdefault(i, ("not finite", "the model's output has NaN or infinity"))
        return vectors, causes

    def _run_batches(self, pieces: Sequence[Piece], causes: Causes) -> Vectors:
        """Run all pieces that have no cause; to those on which the model fails, give one.

        Vectors stay on the device until the window is done: one copy back, and no waiting between.
        """
        vectors = self._model.no_vectors(len(pieces))
        long_enough = [i for i in range(len(pieces)) if i not in causes]
        batches = self._plan(pieces, np.array(long_enough, dtype=np.int64))
        while batches:
            batch = batches.pop(0)
            try:
                with self._meter.timed("forward_s"):
                    found = self._model.forward([pieces[i] for i in batch])
            except ModelError:
                raise
            except Exception as e:
                cause = cause_of(e)
            else:
                lengths = self._model.lengths(pieces, batch)
                self._meter.batch(lengths, self._tower.num_slots(lengths))
                for column, rows in found.items():
                    if isinstance(rows, Tensor):
                        vectors[column][self._tower.send(torch.from_numpy(batch))] = rows
                        continue
                    for i, row in zip(batch.tolist(), rows, strict=True):
                        vectors[column][i] = row
                continue
            # Out of the except clause, because the exception's frames hold the batch's tensors.
            if len(batch) == 1:
                causes[int(batch[0])] = cause
            elif cause[0] == OUT_OF_MEMORY:
                self._shrink(self._model.lengths(pieces, batch))
                batches = self._plan(pieces, np.concatenate([batch, *batches]))
            else:
                batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        # A GPU may still be at work on what it was sent.
        with self._meter.timed("forward_s"):
            synchronize(self._model.device)
        return vectors

    def _plan(self, pieces: Sequence[Piece], positions: Ints) -> list[Ints]:
        return list(_plan(self._model, pieces, positions, self._batch_tokens))

    def _shrink(self, lengths: Ints) -> None:
        """Halve the budget for good: what did not fit once will not fit the next time."""
        self.num_halved += 1
        num_tokens = int(lengths.sum() if self._tower.packs else len(lengths) * lengths.max())
        self._batch_tokens = max(min(self._batch_tokens, num_tokens) // 2, 1)
        free_memory(self._model.device)


def _plan(
    model: Model, pieces: Sequence[Piece], positions: Ints, batch_tokens: int
) -> Iterator[Ints]:
    """Positions of the rows of each batch, of rows that may share one."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in positions.tolist():
        groups.setdefault(model.tower.shares(pieces[i]), []).append(i)
    for group in map(np.array, groups.values()):
        lengths = model.lengths(pieces, group)
        for batch in plan_batches(
            lengths, batch_tokens, model.tower.max_rows, packed=model.tower.packs
        ):
            yield group[batch]
