"""Fused linear layers against torch's own, and what must stay as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.model.linear import FusedLinear, fuse, fused_dtypes
from fmembed.model.loading import load_tower
from fmembed.spec import ModelSpec


class Feedforward(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(24, 40)
        self.intermediate_act_fn: Any = ACT2FN[activation]
        self.out = nn.Linear(40, 24, bias=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.out(self.intermediate_act_fn(self.dense(inputs)))


@pytest.mark.parametrize(("activation", "is_fused"), [("gelu", True), ("gelu_new", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers(activation: str, is_fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Feedforward(activation)
    inputs = torch.randn(3, 17, 24) * 3
    with torch.inference_mode():
        exact = model.double()(inputs.double())
        model.to(dtype)
        plain = model(inputs.to(dtype))
        fuse(model)
        found = model(inputs.to(dtype))
    is_packed = dtype in fused_dtypes()
    assert isinstance(model.dense, FusedLinear) == is_packed
    assert isinstance(model.out, FusedLinear) == is_packed
    assert isinstance(model.intermediate_act_fn, nn.Identity) == (is_packed and is_fused)
    assert found.dtype == dtype
    assert found.shape == inputs.shape
    # No further from the truth than torch's own layers, but for a rounding.
    error = (found.double() - exact).abs().max()
    assert error <= 1.5 * (plain.double() - exact).abs().max() + 1e-6


def test_what_computes_something_of_its_own_stays() -> None:
    class Own(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + 1

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4).half())
    fuse(model)
    assert [type(layer) for layer in model] == [Own, nn.Linear]


@pytest.mark.parametrize(("code", "is_fused"), [("transformers", True), ("its own", False)])
def test_a_loaded_model_is_fused_unless_it_brings_its_own_code(
    code: str, is_fused: bool, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "its own":
        monkeypatch.setattr("transformers.BertModel.__module__", "modeling_own")
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    model = load_tower(checkpoint, torch.device("cpu")).model
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, FusedLinear))]
    assert layers
    assert {isinstance(layer, FusedLinear) for layer in layers} == {is_fused}
    # One GELU in each of the two layers' feedforward.
    fused_gelus = [x for x in layers if isinstance(x, FusedLinear) and x._after[0] == "gelu"]
    assert len(fused_gelus) == (2 if is_fused else 0)
