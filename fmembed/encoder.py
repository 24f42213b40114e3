"""Load a model once, forward, pool, normalise: token ids, pixels or samples to vectors.

Legend: B rows of a batch, L tokens of its longest row, D dimensions of a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fmembed.batching import Ints, pad, plan_batches
from fmembed.checkpoint import Checkpoint, load_image_processor, read_config
from fmembed.rows import HALVED, accepted, reject
from fmembed.spec import ModelError

# 16k-token batches were slower than 4k on a CPU (cache); a GPU wants them large.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_OUT_OF_MEMORY = "out of memory"


class Encoder:
    """A loaded checkpoint as a Ray Data stage: one instance an actor, one call a window of rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        num_threads: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: What to load.
            device: "cpu", or "cuda" for the GPU that this process was given.
            num_threads: CPU threads of this process; None leaves torch's choice.
            batch_tokens: Token budget of a batch, padding included; None chooses by device.

        Raises:
            ModelError: The weights do not fit the architecture, or need remote code.
        """
        if num_threads is not None:
            # Ray sets OMP_NUM_THREADS to the CPUs reserved, and reuses workers with their threads.
            torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._batch_tokens = batch_tokens or _BATCH_TOKENS[self._device.type]
        self._checkpoint = checkpoint
        self._model, self._pad_id = _load_model(checkpoint, self._device)
        self._dense = _load_dense(checkpoint, self._device)
        is_image = checkpoint.modality == "image"
        self._processor: Any = load_image_processor(checkpoint) if is_image else None
        self.num_halved = 0

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace `model_input` by `embedding: fixed_size_list<float32>[dim]`.

        A row that the model fails on, even alone, is rejected: its vector is not finite, it does
        not fit into memory, or the model raises. A rejected row's vector is null. `_halved` on the
        first row says how many batches of this window had to be halved.
        """
        good = np.flatnonzero(accepted(rows))
        before = self.num_halved
        vectors, causes = self.embed(_unpack(rows, good))
        rows = reject(
            rows.drop_columns(["model_input", "input_shape"]),
            "embed",
            {int(good[i]): c for i, c in causes.items()},
        )
        full = np.zeros((rows.num_rows, self.dim), dtype=np.float32)
        full[good] = vectors
        missing = ~accepted(rows)
        full[missing] = 0
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(full.reshape(-1)), self.dim, mask=pa.array(missing)
        )
        rows = rows.append_column("embedding", column)
        halved = [self.num_halved - before, *[None] * (rows.num_rows - 1)][: rows.num_rows]
        return rows.append_column(HALVED, pa.array(halved, pa.int32()))

    @torch.inference_mode()
    def embed(
        self, inputs: Sequence[npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[np.float32], dict[int, tuple[str, str]]]:
        """Embed rows of token ids, pixels or samples.

        Batches are filled by length, and each row's vector goes back to its own place: order and
        company of the rows cannot change a vector beyond the rounding of its dtype.

        Args:
            inputs: The model's input of each row: token ids, special ones included, shape
                (tokens,); pixels, shape (channels, height, width); samples, shape (samples,).

        Returns:
            Vectors, shape (rows, dim), float32, and for each row that has none, by its position,
            (error, message).

        Raises:
            RuntimeError: The device itself has failed.
        """
        vectors = np.zeros((len(inputs), self.dim), dtype=np.float32)
        causes = self._too_short(inputs)
        long_enough = [i for i in range(len(inputs)) if i not in causes]
        batches = list(self._plan(inputs, np.array(long_enough, dtype=np.int64)))
        while batches:
            batch = batches.pop(0)
            try:
                vectors[batch] = self._forward([inputs[i] for i in batch]).cpu().numpy()
                continue
            except Exception as e:
                cause = _cause(e)
            # Out of the except clause, because the exception's frames hold the batch's tensors.
            if len(batch) == 1:
                causes[int(batch[0])] = cause
            elif cause[0] == _OUT_OF_MEMORY:
                self._shrink(len(batch) * int(self._lengths(inputs, batch).max()))
                batches = list(self._plan(inputs, np.concatenate([batch, *batches])))
            else:
                batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            causes[int(i)] = ("not finite", "the model's output has NaN or infinity")
        return vectors, causes

    def _plan(self, inputs: Sequence[npt.NDArray[Any]], positions: Ints) -> Iterator[Ints]:
        """Positions of the rows of each batch; rows that padding would change share a shape."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in positions.tolist():
            groups.setdefault(() if self._can_pad else inputs[i].shape, []).append(i)
        for group in map(np.array, groups.values()):
            for batch in plan_batches(self._lengths(inputs, group), self._batch_tokens):
                yield group[batch]

    def _too_short(self, inputs: Sequence[npt.NDArray[Any]]) -> dict[int, tuple[str, str]]:
        """Sounds that make no frame: alone the model would fail, in company give noise."""
        count = getattr(self._model, "_get_feat_extract_output_lengths", None)
        if self._checkpoint.modality != "audio" or count is None or not len(inputs):
            return {}
        frames = count(torch.tensor([i.shape[-1] for i in inputs]))
        return {
            i: ("audio too short", f"{inputs[i].shape[-1]} samples make no frame of this model")
            for i in np.flatnonzero(np.asarray(frames) < 1).tolist()
        }

    def _lengths(self, inputs: Sequence[npt.NDArray[Any]], positions: Ints) -> Ints:
        sizes = np.fromiter((inputs[i].size for i in positions), np.int64, len(positions))
        return -(-sizes // self._checkpoint.unit_size)

    @property
    def _can_pad(self) -> bool:
        """Whether a mask keeps padding out of a row's vector.

        Not for pictures, and not for wav2vec models with group norm, which average over the whole
        padded sound and, as their own documentation says, take no mask.
        """
        if self._checkpoint.modality == "audio":
            return getattr(self._model.config, "feat_extract_norm", "group") == "layer"
        return self._checkpoint.modality == "text"

    def _shrink(self, num_tokens: int) -> None:
        """Halve the budget for good: what did not fit once will not fit the next time."""
        self.num_halved += 1
        self._batch_tokens = max(min(self._batch_tokens, num_tokens) // 2, 1)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def dim(self) -> int:
        """Length of a vector."""
        if self._dense:
            linear = self._dense[-1][0]
            assert isinstance(linear, nn.Linear)
            return linear.out_features
        config = self._model.config
        # Convolutional families have a width by stage; the last is what comes out.
        sizes = getattr(config, "hidden_sizes", None)
        return int(sizes[-1] if sizes else config.hidden_size)

    def _forward(self, inputs: list[npt.NDArray[Any]]) -> Tensor:
        states, mask_BL = _FORWARD[self._checkpoint.modality](self, inputs)
        vectors_BD = pool(states, mask_BL, self._checkpoint.pooling)
        for dense in self._dense:
            vectors_BD = dense(vectors_BD)
        if self._checkpoint.normalize:
            vectors_BD = nn.functional.normalize(vectors_BD, p=2, dim=1)
        return vectors_BD

    def _forward_text(self, inputs: list[npt.NDArray[Any]]) -> tuple[Tensor, Tensor]:
        ids_BL, mask_BL = pad(inputs, self._pad_id)
        ids_BL, mask_BL = ids_BL.to(self._device), mask_BL.to(self._device)
        return self._model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state, mask_BL

    def _forward_image(self, inputs: list[npt.NDArray[Any]]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.stack(inputs)).to(self._device)
        if pixels.dtype == torch.uint8:
            pixels = self._rescale(pixels)
        hidden = self._model(pixel_values=pixels.to(self._model.dtype)).last_hidden_state
        if hidden.ndim == 4:  # a map, as convolutions make it: its places are the patches
            hidden = hidden.flatten(2).transpose(1, 2)
        mask_BL = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        if self._checkpoint.pooling == "mean":
            # Class and register tokens come first; the mean is of the patches.
            num_patches = inputs[0].size // self._checkpoint.unit_size
            mask_BL[:, : max(hidden.shape[1] - num_patches, 0)] = 0
        return hidden, mask_BL

    def _rescale(self, pixels: Tensor) -> Tensor:
        """What the processor left to us: the same float32 arithmetic, on the device."""
        values = pixels.float()
        processor = self._processor
        if processor.do_rescale:
            values = values * processor.rescale_factor
        if processor.do_normalize:
            mean, std = (
                torch.tensor(v, dtype=torch.float32, device=values.device).view(-1, 1, 1)
                for v in (processor.image_mean, processor.image_std)
            )
            values = (values - mean) / std
        return values

    def _forward_audio(self, inputs: list[npt.NDArray[Any]]) -> tuple[Tensor, Tensor]:
        lengths = [i.shape[-1] for i in inputs]
        longest = max(lengths)
        values = np.zeros((len(inputs), *inputs[0].shape[:-1], longest), dtype=np.float32)
        for row, samples in zip(values, inputs, strict=True):
            row[..., : samples.shape[-1]] = samples
        values_BL = torch.from_numpy(values).to(self._device, self._model.dtype)
        name = self._model.main_input_name
        if not self._can_pad:
            hidden = self._model(**{name: values_BL}).last_hidden_state
            return hidden, torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        mask = np.arange(longest) < np.array(lengths)[:, None]
        mask_BL = torch.from_numpy(mask.astype(np.int64)).to(self._device)
        hidden = self._model(**{name: values_BL}, attention_mask=mask_BL).last_hidden_state
        # Samples to frames, as the convolutions in front make them.
        frames_BL = self._model._get_feature_vector_attention_mask(hidden.shape[1], mask_BL)
        return hidden, frames_BL.long()


_FORWARD = {
    "text": Encoder._forward_text,
    "image": Encoder._forward_image,
    "audio": Encoder._forward_audio,
}


def _unpack(rows: pa.Table, positions: Ints) -> list[npt.NDArray[Any]]:
    """The arrays of some rows, as views into the column."""
    flat = rows["model_input"].combine_chunks()
    if isinstance(flat, pa.ChunkedArray):
        flat = pa.concat_arrays(flat.chunks) if flat.num_chunks else pa.array([], flat.type)
    values, offsets = flat.values.to_numpy(), flat.offsets.to_numpy()
    shapes = rows["input_shape"].take(pa.array(positions)).to_pylist()
    return [
        values[offsets[i] : offsets[i + 1]].reshape(shape)
        for i, shape in zip(positions.tolist(), shapes, strict=True)
    ]


def pool(hidden_BLD: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    """Reduce token states to one vector a row.

    Padding never enters: it is excluded before summing or comparing, so batch composition cannot
    change a row's vector.

    Args:
        hidden_BLD: Last hidden states, shape (rows, tokens, dim), any float dtype.
        mask_BL: 1 for real tokens, 0 for the padding on their right, shape (rows, tokens).
        pooling: cls (first token), mean, last (last real token) or max.

    Returns:
        Shape (rows, dim), float32.

    Raises:
        ModelError: The pooling is unknown.
    """
    hidden_BLD = hidden_BLD.float()
    mask_BL1 = mask_BL.unsqueeze(-1)
    if pooling == "cls":
        return hidden_BLD[:, 0]
    if pooling == "mean":
        return (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    if pooling == "max":
        return hidden_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(dim=1)
    if pooling == "last":
        last_B = mask_BL.sum(dim=1) - 1
        return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), last_B]
    raise ModelError(f"model.pooling: unknown pooling {pooling!r}")


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


def has_cuda() -> bool:
    """Whether this process sees a CUDA device."""
    return torch.cuda.is_available()


def _load_model(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, int]:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = checkpoint.folder() / checkpoint.weights
    try:
        model, loading = AutoModel.from_pretrained(
            folder,
            dtype=getattr(torch, checkpoint.dtype),
            use_safetensors=True,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(f"model.id: {checkpoint.id} cannot be loaded: {reason}") from None
    # A pooler head is optional and unused here; anything else missing would be random weights.
    missing = sorted(k for k in loading["missing_keys"] if "pooler" not in k)
    if missing:
        raise ModelError(
            f"model.id: {checkpoint.id} lacks {len(missing)} weights, {missing[0]} first; "
            "they would be random"
        )
    pad_id = getattr(model.config, "pad_token_id", None)
    return model.eval().to(device), int(pad_id) if pad_id is not None else 0


def _load_dense(checkpoint: Checkpoint, device: torch.device) -> list[nn.Sequential]:
    """Load sentence-transformers Dense modules: linear, then an activation of torch.nn."""
    modules = []
    for path in checkpoint.dense:
        folder: Path = checkpoint.folder() / path
        config = read_config(folder)
        linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
        weights = load_file(folder / "model.safetensors")
        linear.load_state_dict({k.removeprefix("linear."): v for k, v in weights.items()})
        name = str(config.get("activation_function", "torch.nn.Tanh")).rsplit(".", 1)[-1]
        activation = getattr(nn, name, None)
        if activation is None:
            raise ModelError(f"model.id: {path}: unknown activation {name!r}")
        # float32, as pooling is: the projection is a few thousandths of the work.
        modules.append(nn.Sequential(linear, activation()).eval().to(device))
    return modules
