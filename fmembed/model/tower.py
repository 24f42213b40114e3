"""Load a model and run it: model-ready arrays to states, by modality and family.

Legend: B rows of a batch, L tokens, patches or frames of its longest row, D dimensions of a state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fmembed.arrays import Ints
from fmembed.checkpoint.families import COUNT_FROM_PAD, FUSED
from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import (
    load_feature_extractor,
    load_image_processor,
    process_image,
)
from fmembed.model.attention import PACKED
from fmembed.model.audio import FRAMES, all_frames
from fmembed.model.batching import pack, pad
from fmembed.model.linear import fuse
from fmembed.model.loading import load_model
from fmembed.model.pooling import States, as_sequence
from fmembed.rows.pieces import Piece


class Tower:
    """A loaded model, for one modality."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Load the weights.

        Raises:
            ModelError: The weights do not fit the architecture, or need remote code.
        """
        self._checkpoint = checkpoint
        self._device = device
        self._copies: Any = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.model = load_model(checkpoint, device)
        config = self.model.config
        inner = getattr(config, "text_config", config) if checkpoint.towers else config
        pad_id = getattr(inner, "pad_token_id", None)
        self._pad_id = int(pad_id) if pad_id is not None else 0
        self._all_layers = any(o.layer is not None for o in checkpoint.outputs)
        self._processor: Any = None
        if checkpoint.modality == "image":
            self._processor = load_image_processor(checkpoint)
        elif checkpoint.modality == "audio":
            self._processor = load_feature_extractor(checkpoint)
        # What is kept for generating the next token is never used here.
        if getattr(inner, "use_cache", False):
            inner.use_cache = False
        self._call = self._entry()
        self.attention = self.model.config._attn_implementation
        self.packs = self.attention == PACKED and checkpoint.modality == "text"
        # What code of the checkpoint's own does with its layers is not known.
        is_known = type(self.model).__module__.startswith("transformers.")
        in_families = is_known and checkpoint.family in FUSED
        if device.type == "cpu" and not checkpoint.compile and in_families:
            fuse(self.model)
        if checkpoint.compile:
            self._call = torch.compile(self._call, dynamic=True)

    @property
    def can_pad(self) -> bool:
        """Whether a mask keeps padding out of a row's vector.

        Not for pictures, nor for sounds that the extractor has brought to one length, and not for
        wav2vec models with group norm, which average over the whole padded sound and, as their own
        documentation says, take no mask.
        """
        if self._checkpoint.modality == "audio":
            return getattr(self.model.config, "feat_extract_norm", "group") == "layer"
        return self._checkpoint.modality == "text"

    def is_too_short(self, pieces: Sequence[Piece]) -> list[bool]:
        """Which sounds make no frame: alone the model would fail, in company give noise."""
        count = getattr(self.model, "_get_feat_extract_output_lengths", None)
        if self._checkpoint.modality != "audio" or not self._is_waveform or count is None:
            return [False] * len(pieces)
        frames = count(torch.tensor([p.num_units for p in pieces]))
        return [bool(n < 1) for n in frames]

    def states(self, pieces: Sequence[Piece]) -> States:
        """Run the model on one batch."""
        return _STATES[self._checkpoint.modality](self, pieces)

    def example(self, num_tokens: int = 4) -> Piece:
        """A small input, by which the dimensions of the outputs are known before any row comes.

        Args:
            num_tokens: Of a text.
        """
        if self._checkpoint.modality == "text":
            return Piece(np.arange(num_tokens, dtype=np.int32) % 4, num_tokens)
        if self._checkpoint.modality == "image":
            grey = np.full((64, 48, 3), 128, dtype=np.uint8)
            return Piece(np.asarray(process_image(self._processor, grey)), 1)
        silence = np.zeros(self._checkpoint.rate_hz, dtype=np.float32)
        values = silence if self._is_waveform else self._extract(silence)
        return Piece(values, len(silence))

    @property
    def _is_waveform(self) -> bool:
        return bool(getattr(self.model.config, "conv_stride", None))

    def _entry(self) -> Any:
        """What to call: the model, or the part of it that embeds this modality."""
        modality, model = self._checkpoint.modality, self.model
        if self._checkpoint.towers:
            return getattr(model, f"get_{modality}_features")
        if hasattr(model, "vision_encoder"):  # SAM: what follows draws masks
            return model.vision_encoder
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
            return model.get_encoder()
        return model

    def _run(self, **inputs: Any) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        if self._all_layers:
            inputs["output_hidden_states"] = True
        out = self._call(**inputs)
        layers: Sequence[Tensor] = getattr(out, "hidden_states", None) or ()
        pooled = getattr(out, "pooler_output", None)
        return (
            as_sequence(out.last_hidden_state),
            [as_sequence(layer) for layer in layers],
            pooled.flatten(1) if pooled is not None else None,
        )

    def _packed(self, pieces: Sequence[Piece]) -> States:
        ids = [p.values for p in pieces]
        num_slots = self.num_slots(np.array([len(i) for i in ids]))
        ids_1T, bounds, lengths = pack(ids, self._pad_id, num_slots)
        # What follows the last row counts from its end.
        starts = np.repeat(bounds.numpy(), [*lengths, ids_1T.shape[1] - lengths.sum()])
        places = np.arange(ids_1T.shape[1]) - starts
        if self._checkpoint.family in COUNT_FROM_PAD:
            # As the family counts: from past the padding's id, and a padding token not at all.
            real = np.concatenate([[0], np.cumsum(ids_1T[0].numpy() != self._pad_id)])
            places = np.where(np.diff(real) > 0, real[1:] - real[starts], 0) + self._pad_id
        states, layers, _ = self._run(
            input_ids=self.send(ids_1T),
            position_ids=self.send(torch.from_numpy(places)[None]),
            cu_seq_lens_q=self.send(bounds),
            max_length_q=int(lengths.max()),
        )
        # Pooling sees rows of one length, as it would have without packing.
        at_BL = np.arange(lengths.max()) + bounds[:-1].numpy()[:, None]
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        at = self.send(torch.from_numpy(np.where(mask_BL, at_BL, 0)))
        return States(
            states[0][at],
            self.send(torch.from_numpy(mask_BL.astype(np.int64))),
            [layer[0][at] for layer in layers],
        )

    def num_slots(self, lengths: Ints) -> int:
        """Tokens, patches or frames that a batch of rows of these lengths computes."""
        if not self.packs:
            return len(lengths) * int(lengths.max())
        num_tokens = int(lengths.sum())
        if self._device.type != "cpu":
            return num_tokens
        # oneDNN compiles a kernel for each shape and keeps it: with few of them sentences went
        # through MiniLM at 514 rows/s instead of 500, and a process grew by 6 % over 16,000 of them
        # instead of 14 %.
        multiple = 64 if num_tokens >= 512 else 16
        return -(-num_tokens // multiple) * multiple

    def send(self, tensor: Tensor) -> Tensor:
        """To the device.

        To a GPU from pinned memory and in a stream of its own: nothing here waits for the device,
        so that the next batch is made ready and copied while this one computes.
        """
        if self._copies is None:
            return tensor
        with torch.cuda.stream(self._copies):
            sent = tensor.pin_memory().to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        sent.record_stream(computing)  # its memory is not given away before it was computed with
        return sent

    def _text(self, pieces: Sequence[Piece]) -> States:
        if self.packs:
            return self._packed(pieces)
        ids_BL, mask_BL = pad([p.values for p in pieces], self._pad_id)
        ids_BL, mask_BL = self.send(ids_BL), self.send(mask_BL)
        mask = {} if self._checkpoint.pads_text else {"attention_mask": mask_BL}
        hidden, layers, pooled = self._run(input_ids=ids_BL, **mask)
        return States(hidden, mask_BL, layers, pooled)

    def _image(self, pieces: Sequence[Piece]) -> States:
        pixels = self.send(torch.from_numpy(np.stack([p.values for p in pieces])))
        if pixels.dtype == torch.uint8:
            pixels = self._rescale(pixels)
        inputs: dict[str, Any] = {"pixel_values": pixels.to(self.model.dtype)}
        if self._checkpoint.family == "vit_mae":
            # Nothing masked (mask_ratio is 0), and the noise that shuffles patches in their order.
            num_patches = self.model.embeddings.patch_embeddings.num_patches
            order = torch.arange(num_patches, dtype=torch.float32, device=self._device)
            inputs["noise"] = order.expand(len(pieces), -1)
        hidden, layers, pooled = self._run(**inputs)
        mask_BL = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        config = getattr(self.model.config, "vision_config", self.model.config)
        if getattr(config, "patch_size", None):
            # Class and register tokens come first; the mean is of the patches.
            num_patches = pieces[0].values.size // self._checkpoint.unit_size
            mask_BL[:, : max(hidden.shape[1] - num_patches, 0)] = 0
        return States(hidden, mask_BL, layers, pooled)

    def _rescale(self, pixels: Tensor) -> Tensor:
        """What the processor left to us: the same float32 arithmetic, on the device."""
        values = pixels.float()
        if self._processor.do_rescale:
            values = values * self._processor.rescale_factor
        if self._processor.do_normalize:
            mean, std = self._mean_std
            values = (values - mean) / std
        return values

    @functools.cached_property
    def _mean_std(self) -> tuple[Tensor, ...]:
        # Once, because making a tensor on a GPU of Python's numbers waits for all that it was sent.
        return tuple(
            torch.tensor(v, dtype=torch.float32, device=self._device).view(-1, 1, 1)
            for v in (self._processor.image_mean, self._processor.image_std)
        )

    def _audio(self, pieces: Sequence[Piece]) -> States:
        if not self._is_waveform:
            return self._spectrogram(pieces)
        # The extractor's own normalisation, a sound at a time; samples travelled as they were.
        sounds = [self._extract(p.values) for p in pieces]
        lengths = [len(s) for s in sounds]
        values = np.zeros((len(sounds), max(lengths)), dtype=np.float32)
        for row, samples in zip(values, sounds, strict=True):
            row[: len(samples)] = samples
        values_BL = self.send(torch.from_numpy(values)).to(self.model.dtype)
        if not self.can_pad:
            hidden, layers, pooled = self._run(input_values=values_BL)
            mask_BL = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            return States(hidden, mask_BL, layers, pooled)
        real = np.arange(values.shape[1]) < np.array(lengths)[:, None]
        real_BL = self.send(torch.from_numpy(real.astype(np.int64)))
        hidden, layers, pooled = self._run(input_values=values_BL, attention_mask=real_BL)
        # Samples to frames, as the convolutions in front make them.
        frames_BL = self.model._get_feature_vector_attention_mask(hidden.shape[1], real_BL)
        return States(hidden, frames_BL.long(), layers, pooled)

    def _extract(self, samples: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if samples.dtype == np.int16:
            samples = samples.astype(np.float32) / 2**15  # as libsndfile reads them as floats
        rate_hz = self._checkpoint.rate_hz
        batch = self._processor(samples, sampling_rate=rate_hz, return_tensors="np")
        return np.asarray(batch[self._processor.model_input_names[0]][0], dtype=np.float32)

    def _spectrogram(self, pieces: Sequence[Piece]) -> States:
        values = self.send(torch.from_numpy(np.stack([p.values for p in pieces])))
        values = values.to(self.model.dtype)
        name = self._processor.model_input_names[0]
        family = self._checkpoint.family
        if family == "clap":
            is_longer = torch.zeros(len(pieces), 1, dtype=torch.bool, device=self._device)
            hidden, layers, pooled = self._run(**{name: values, "is_longer": is_longer})
        else:
            hidden, layers, pooled = self._run(**{name: values})
        num_units = self.send(torch.tensor([p.num_units for p in pieces]))
        mask_BL = FRAMES.get(family, all_frames)(self.model.config, num_units, hidden)
        return States(hidden, mask_BL, layers, pooled)


_STATES = {"text": Tower._text, "image": Tower._image, "audio": Tower._audio}


def lengths(pieces: Sequence[Piece], positions: Ints, unit_size: int) -> Ints:
    """Units of the sequence that each piece makes: what a batch's budget counts."""
    sizes = np.fromiter((pieces[i].values.size for i in positions), np.int64, len(positions))
    return -(-sizes // unit_size)
