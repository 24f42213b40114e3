"""The embed stage: windows of model-ready rows to columns of vectors, in batches that fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fmembed.arrays import Ints
from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import loading
from fmembed.devices import device_name
from fmembed.errors import ModelError
from fmembed.model.batching import plan_batches
from fmembed.model.budget import (
    BUDGETS,
    CPU_AUDIO_BYTES,
    DEFAULT,
    ROW_TOKENS,
    choose,
    recall,
    remember,
)
from fmembed.model.loading import load_tower
from fmembed.model.meter import Meter, measure_cost, peak_flops, synchronize
from fmembed.model.pooling import load_dense, pick_layer, pool
from fmembed.model.process import bound_kernels, keep_freed_memory
from fmembed.model.tower import lengths
from fmembed.rows.pieces import Piece
from fmembed.rows.precision import Ranges
from fmembed.rows.vectors import Causes, Stage, Vectors

_COUNTED_TOKENS = 64
_OUT_OF_MEMORY = "out of memory"


class Encoder:
    """A loaded checkpoint as a Ray Data stage: one instance an actor, one call a window of rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        num_threads: int | None = None,
        batch_tokens: int | Literal["auto"] | None = None,
        ranges: Ranges | None = None,
        pieces_are_rows: bool = False,
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: What to load.
            device: "cpu", or "cuda" for the GPU that this process was given.
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
        if num_threads is not None:
            # Ray sets OMP_NUM_THREADS to the CPUs reserved, and reuses workers with their threads.
            torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._checkpoint = checkpoint
        self._tower = load_tower(checkpoint, self._device)
        self._dense = load_dense(checkpoint, self._device)
        with loading(checkpoint.id), torch.inference_mode():
            first = self._forward([self._tower.example()])
        self._dims = {column: int(rows[0].shape[-1]) for column, rows in first.items()}
        self._stage = Stage(checkpoint.outputs, self._dims, ranges or {}, pieces_are_rows)
        self.num_halved = 0
        self._batch_tokens, how = self._choose_budget(batch_tokens)
        # With the first window, because windows' counts are summed.
        self._said = {f"batch_tokens/{self._batch_tokens}/{how}": 1}
        load_s = time.perf_counter() - began
        dtype = getattr(torch, checkpoint.dtype)
        # FLOP of the model for rows of these lengths.
        self.cost = self._measure_cost()
        self._meter = Meter(load_s, lambda: peak_flops(self._device, dtype), self.cost)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace `model_input` by a column of vectors for each output.

        A row that the model fails on, even alone, is rejected: its vector is not finite, it does
        not fit into memory, or the model raises. A rejected row's vector is null. `_counts` on the
        first row says how many batches of this window had to be halved, what the meter
        counted, and once how large a batch is and who chose that.
        """
        before = self.num_halved

        def counts() -> dict[str, Any]:
            said, self._said = self._said, {}
            return {"batches_halved": self.num_halved - before, **said, **self._meter.stop()}

        self._meter.start()
        return self._stage.run(rows, self.embed, counts)

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
        # They stay on the device until the window is done: one copy back, and no waiting between.
        vectors: Vectors = {
            o.column: [None] * len(pieces)
            if o.pooling == "tokens"
            else torch.zeros(len(pieces), self._dims[o.column], device=self._device)
            for o in self._checkpoint.outputs
        }
        causes: Causes = {
            i: ("audio too short", f"{pieces[i].num_units} samples make no frame of this model")
            for i in np.flatnonzero(self._tower.is_too_short(pieces)).tolist()
        }
        long_enough = [i for i in range(len(pieces)) if i not in causes]
        batches = list(self._plan(pieces, np.array(long_enough, dtype=np.int64)))
        while batches:
            batch = batches.pop(0)
            try:
                with self._meter.timed("forward_s"):
                    found = self._forward([pieces[i] for i in batch])
            except ModelError:
                raise
            except Exception as e:
                cause = _cause(e)
            else:
                own = self._lengths(pieces, batch)
                self._meter.batch(own, self._tower.num_slots(own))
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
            elif cause[0] == _OUT_OF_MEMORY:
                own = self._lengths(pieces, batch)
                self._shrink(int(own.sum() if self._tower.packs else len(own) * own.max()))
                batches = list(self._plan(pieces, np.concatenate([batch, *batches])))
            else:
                batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        # A GPU may still be at work on what it was sent.
        with self._meter.timed("forward_s"):
            synchronize(self._device)
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

    def _forward(self, pieces: list[Piece]) -> dict[str, Any]:
        states = self._tower.states(pieces)
        found: dict[str, Any] = {}
        for output in self._checkpoint.outputs:
            if output.pooling == "tokens":
                hidden_BLD = pick_layer(states, output.layer).float().cpu().numpy()
                mask_BL = states.mask_BL.bool().cpu().numpy()
                found[output.column] = [h[m] for h, m in zip(hidden_BLD, mask_BL, strict=True)]
                continue
            vectors_BD: Tensor = pool(states, output.pooling, output.layer)
            for dense in self._dense:
                vectors_BD = dense(vectors_BD)
            found[output.column] = vectors_BD
        return found

    def _choose_budget(self, given: int | Literal["auto"] | None) -> tuple[int, str]:
        """Tokens of a batch; and whether that was given, measured, cached or is the default."""
        kind, checkpoint = self._device.type, self._checkpoint
        default, budgets = DEFAULT[kind], BUDGETS[kind]
        if given and given != "auto":
            return given, "given"
        if kind == "cpu" and checkpoint.modality == "audio":
            item_bytes = getattr(torch, checkpoint.dtype).itemsize
            return CPU_AUDIO_BYTES // item_bytes, "default"
        # A compiled model would compile for each budget; pictures and sounds have sizes of their
        # own, of which a few make a batch.
        if not given or checkpoint.modality != "text" or checkpoint.compile:
            return default, "default"
        # A power of two, as the budgets are, so that rows fill them.
        row_tokens = 2 ** (min(ROW_TOKENS, checkpoint.max_tokens).bit_length() - 1)
        key = {
            "weights": checkpoint.digest,
            "adapter": checkpoint.adapter_digest,
            "family": checkpoint.model_type,
            "attention": self._tower.attention,
            "dtype": checkpoint.dtype,
            "device": device_name(self._device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "row_tokens": row_tokens,
        }
        if (known := recall(key, budgets)) is not None:
            return known, "cached"
        row = self._tower.example(row_tokens)
        with torch.inference_mode():
            found = choose(
                budgets, lambda n: self._seconds([row] * (n // row_tokens)), default, row_tokens
            )
        remember(key, found or default)
        return (found, "measured") if found else (default, "default")

    def _seconds(self, rows: list[Piece]) -> float | None:
        """What a batch takes; None where the model fails on it."""
        began = time.perf_counter()
        try:
            self._forward(rows)
            synchronize(self._device)
            return time.perf_counter() - began
        except Exception as e:
            _cause(e)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _measure_cost(self) -> Callable[[Ints], float]:
        """The model's FLOP for rows of given lengths; 0 where they cannot be counted."""

        def run(num_tokens: int) -> int:
            example = self._tower.example(num_tokens)
            self._forward([example])
            return int(self._lengths([example], np.zeros(1, dtype=np.int64))[0])

        is_text = self._checkpoint.modality == "text"
        try:
            if self._checkpoint.compile:
                return lambda _: 0.0
            with torch.inference_mode():
                most = min(self._checkpoint.max_tokens, _COUNTED_TOKENS)
                return measure_cost(run, not is_text, most)
        except Exception:  # what an operator says that cannot be counted
            return lambda _: 0.0

    def _plan(self, pieces: Sequence[Piece], positions: Ints) -> Iterator[Ints]:
        """Positions of the rows of each batch; rows that padding would change share a shape."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in positions.tolist():
            shape = () if self._tower.can_pad else pieces[i].values.shape
            groups.setdefault(shape, []).append(i)
        for group in map(np.array, groups.values()):
            lengths_of_group = self._lengths(pieces, group)
            packed = self._tower.packs
            for batch in plan_batches(lengths_of_group, self._batch_tokens, packed=packed):
                yield group[batch]

    def _lengths(self, pieces: Sequence[Piece], positions: Ints) -> Ints:
        return lengths(pieces, positions, self._checkpoint.unit_size)

    def _shrink(self, num_tokens: int) -> None:
        """Halve the budget for good: what did not fit once will not fit the next time."""
        self.num_halved += 1
        self._batch_tokens = max(min(self._batch_tokens, num_tokens) // 2, 1)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _cause(error: Exception) -> tuple[str, str]:
    """Why a row cannot be embedded, if it was the only one of its batch.

    Raises:
        RuntimeError: Not the rows but the device is at fault: a CUDA context that has failed once
            fails every later call, so the process has to end and Ray starts another.
    """
    message = (str(error).splitlines() or [type(error).__name__])[0]
    # On a CPU the allocator raises a plain RuntimeError.
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in message
    ):
        return _OUT_OF_MEMORY, "the row alone does not fit into the device's memory"
    if "CUDA error" in message or "CUBLAS_STATUS" in message:
        raise RuntimeError(f"the GPU failed: {message}") from error
    return "model error", f"{type(error).__name__}: {message}"
