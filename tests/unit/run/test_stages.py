"""What is said of a model before a pool of actors is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from tiny import save_tiny

from fmembed.checkpoint.opening import open_checkpoint
from fmembed.compute_spec import ComputeSpec
from fmembed.errors import ModelError
from fmembed.run.placement import plan_compute
from fmembed.run.stages import try_model
from fmembed.spec import ModelSpec


def test_a_model_that_cannot_be_run_is_named_before_the_pool(
    tmp_path: Path, tiny_bert: Path, minilm: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import NystromformerConfig, NystromformerModel

    # It takes texts of just this many tokens.
    config = NystromformerConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, segment_means_seq_len=512,
    )  # fmt: skip
    save_tiny(tmp_path, NystromformerModel, config, minilm)
    plan = plan_compute(ComputeSpec())
    with pytest.raises(ModelError, match=r"^model\.id: .* is of the architecture "
                       r"NystromformerModel, which cannot be run: [^\n]+$"):  # fmt: skip
        try_model(open_checkpoint(ModelSpec(id=str(tmp_path)), False), plan)
    # The usual ones are not tried: it would cost each run some seconds.
    monkeypatch.setattr(ray, "remote", None)
    try_model(open_checkpoint(ModelSpec(id=str(tiny_bert)), False), plan)
