"""States to one vector a piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fmembed.checkpoint.files import read_config
from fmembed.checkpoint.opening import Checkpoint
from fmembed.checkpoint.processors import loading
from fmembed.checkpoint.shapes import explain_layer
from fmembed.errors import ModelError


@dataclass(frozen=True)
class States:
    """What the model makes of a batch.

    `layers` are the hidden states, shape (B, L, D) each, `mask_BL` is 1 where a state is of the row
    itself and no padding, class or register token; `pooled_BD` the model's own pooled or projected
    vector, null where it has none. `hidden_BLD` is what follows the last layer's norm.
    """

    hidden_BLD: Tensor
    mask_BL: Tensor
    layers: Sequence[Tensor] = ()
    pooled_BD: Tensor | None = None


def as_sequence(hidden: Tensor) -> Tensor:
    """A map as convolutions make it, shape (B, D, height, width), to (B, L, D); else unchanged."""
    if hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2)
    return hidden


def pool(states: States, pooling: str, layer: int | None = None) -> Tensor:
    """Reduce the states of each row to one vector.

    Padding never enters: it is excluded before summing or comparing, so batch composition cannot
    change a row's vector.

    Args:
        states: What the model made of a batch.
        pooling: cls (first token), mean, cls+mean (the two after one another), last (last real
            token), max, or pooler or projection (the model's own).
        layer: Which hidden state; None for what follows the last layer's norm.

    Returns:
        Shape (rows, dim), float32.

    Raises:
        ModelError: The model has no such layer, or no pooled vector of its own.
    """
    if pooling in ("pooler", "projection"):
        if states.pooled_BD is None:
            raise ModelError(f"model.pooling: this model has no {pooling}; take cls or mean")
        return states.pooled_BD.float()
    hidden_BLD = pick_layer(states, layer).float()
    mask_BL1 = states.mask_BL.unsqueeze(-1)
    if pooling == "cls":
        return hidden_BLD[:, 0]
    if pooling == "max":
        return hidden_BLD.masked_fill(mask_BL1 == 0, -torch.inf).amax(dim=1)
    if pooling == "last":
        last_B = states.mask_BL.sum(dim=1) - 1
        return hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), last_B]
    mean_BD = (hidden_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    if pooling == "cls+mean":
        return torch.cat([hidden_BLD[:, 0], mean_BD], dim=1)
    assert pooling == "mean", pooling
    return mean_BD


def pick_layer(states: States, layer: int | None) -> Tensor:
    """A layer's states.

    Raises:
        ModelError: The model has no such layer, or one of another length than the last.
    """
    if layer is None:
        return states.hidden_BLD
    num_layers = len(states.layers)
    if not -num_layers <= layer < num_layers:
        raise ModelError(explain_layer(num_layers, layer))
    hidden = states.layers[layer]
    if hidden.shape[1] != states.mask_BL.shape[1]:
        raise ModelError(
            f"model.layer: layer {layer} of this model has {hidden.shape[1]} places where its last "
            f"has {states.mask_BL.shape[1]}; only layers of the last size can be pooled"
        )
    return hidden


class _Dense(nn.Module):
    """A Dense module of sentence-transformers; names and shapes of its weights are theirs."""

    def __init__(self, config: dict[str, Any], activation: nn.Module) -> None:
        super().__init__()
        dims = config["in_features"], config["out_features"]
        self.linear = nn.Linear(*dims, bias=config.get("bias", True))
        self.activation = activation
        self.has_residual = bool(config.get("use_residual"))
        if self.has_residual and dims[0] != dims[1]:
            self.residual = nn.Linear(*dims, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (rows, in) to (rows, out)."""
        y: Tensor = self.activation(self.linear(x))
        if self.has_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        return y


def load_dense(checkpoint: Checkpoint, device: torch.device) -> list[nn.Module]:
    """Load sentence-transformers Dense modules: linear, then an activation of torch.nn."""
    modules: list[nn.Module] = []
    for path in checkpoint.dense:
        folder: Path = checkpoint.folder() / path
        config = read_config(folder)
        with loading(f"{checkpoint.id}: {path}"):
            name = str(config.get("activation_function", "torch.nn.Tanh")).rsplit(".", 1)[-1]
            activation = getattr(nn, name, None)
            if activation is None:
                raise ModelError(f"model.id: {path}: unknown activation {name!r}")
            dense = _Dense(config, activation())
            dense.load_state_dict(load_file(folder / "model.safetensors"))
            # float32, as pooling is: the projection is a few thousandths of the work.
            modules.append(dense.eval().to(device))
    return modules
