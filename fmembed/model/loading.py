"""A checkpoint's weights into a model, and the model into the tower for its modality."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils import parametrize

from fmembed.checkpoint.opening import Checkpoint, adapter_folder, check_unchanged
from fmembed.checkpoint.processors import loading
from fmembed.checkpoint.shapes import explain_mismatch
from fmembed.errors import ModelError
from fmembed.model.attention import PACKED, can_pack, register
from fmembed.model.audio import AudioTower
from fmembed.model.image import ImageTower
from fmembed.model.linear import fuse
from fmembed.model.text import TextTower
from fmembed.model.tower import Tower

_NUMBER = re.compile(r"\.\d+\.")
_TOWERS: dict[str, type[Tower]] = {"text": TextTower, "image": ImageTower, "audio": AudioTower}


def load_tower(checkpoint: Checkpoint, device: torch.device) -> Tower:
    """Load a checkpoint for the modality that it is to embed.

    Raises:
        ModelError: The weights do not fit the architecture, or need remote code.
    """
    model = _load_model(checkpoint, device)
    check_unchanged(checkpoint, with_weights=True)
    return _TOWERS[checkpoint.modality](checkpoint, device, model)


def _attention(checkpoint: Checkpoint, device: torch.device) -> str | None:
    """Which attention to load the model with; None for what transformers takes by itself."""
    if checkpoint.attn_implementation is not None:
        return checkpoint.attn_implementation
    if checkpoint.compile or checkpoint.pads_text or checkpoint.towers:
        return None
    own_pooling = any(o.pooling in ("pooler", "projection") for o in checkpoint.outputs)
    if checkpoint.modality != "text" or own_pooling or not checkpoint.family.packs:
        return None
    if not can_pack(device, getattr(torch, checkpoint.dtype)):
        return None
    register()
    return PACKED


def _load_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto import modeling_auto
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # The encoder alone where the library has a class for it: T5 and its kin.
    encoders = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    auto = AutoModelForTextEncoding if checkpoint.model_type in encoders else AutoModel
    options: dict[str, Any] = {}
    if (attn := _attention(checkpoint, device)) is not None:
        options["attn_implementation"] = attn
    if checkpoint.family.masks_patches:
        options["mask_ratio"] = 0.0
    with loading(checkpoint.id):
        model, report = auto.from_pretrained(
            checkpoint.folder() / checkpoint.weights,
            dtype=getattr(torch, checkpoint.dtype),
            use_safetensors=True,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    if mismatched := sorted(report["mismatched_keys"]):
        raise ModelError(explain_mismatch(checkpoint.id, *mismatched[0]))
    if surplus := _surplus_layers(model, report["unexpected_keys"]):
        raise ModelError(
            f"model.id: {checkpoint.id} has weights of layers that config.json leaves out, "
            f"{surplus[0]} first; fetch config and weights that belong together"
        )
    # A pooler head is optional where it is not asked for; anything else would be random weights.
    needs_pooler = any(o.pooling == "pooler" for o in checkpoint.outputs)
    missing = sorted(k for k in report["missing_keys"] if needs_pooler or "pooler" not in k)
    if missing:
        raise ModelError(
            f"model.id: {checkpoint.id} lacks {len(missing)} weights, {missing[0]} first; "
            "they would be random"
        )
    if checkpoint.adapter is not None:
        model = _merge_adapter(model, checkpoint)
    # wav2vec 2.0's kin store a weight as direction and length, and make it anew for every batch.
    with torch.no_grad():
        for module in model.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
    model = model.eval().to(device)
    # What code of the checkpoint's own does with its layers is not known.
    is_known = type(model).__module__.startswith("transformers.")
    if device.type == "cpu" and not checkpoint.compile and is_known and checkpoint.family.fuses:
        fuse(model)
    return model


def _surplus_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights that the model has too, but of layers with other numbers.

    A checkpoint may hold more than is asked for, as heads for other tasks; but a model of fewer
    layers than were trained would be another one, without a word.
    """
    known = {_NUMBER.sub(".*.", name) for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in unexpected
        if _NUMBER.search(name) and _NUMBER.sub(".*.", name.removeprefix(prefix)) in known
    )


def _merge_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    from peft import PeftModel

    with loading(f"{checkpoint.adapter}, for {checkpoint.id},", "model.adapter"):
        adapted = PeftModel.from_pretrained(model, str(adapter_folder(checkpoint)))
        return adapted.merge_and_unload(safe_merge=True)
