"""A BERT and a ViT that say what they do, as a checkpoint's own code, for the tests of faults.

They append the row count of every forward pass to a file, so that a test knows how much was
computed, committed or not; they take time, and stand still while a file says so, so that there is a
middle to kill them in; and they can be told to end their process.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel, ViTConfig, ViTModel


class CountedConfig(BertConfig):
    model_type = "counted"

    def __init__(
        self, log: str = "", row_s: float = 0.0, dies: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.log, self.row_s, self.dies = log, row_s, dies


class CountedViTConfig(ViTConfig):
    model_type = "counted_vit"

    def __init__(
        self, log: str = "", row_s: float = 0.0, dies: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.log, self.row_s, self.dies = log, row_s, dies


class CountedModel(BertModel):
    config_class = CountedConfig

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        count(self.config, len(input_ids))
        return super().forward(input_ids=input_ids, **kwargs)


class CountedViT(ViTModel):
    config_class = CountedViTConfig

    def forward(self, pixel_values: Any = None, **kwargs: Any) -> Any:
        count(self.config, len(pixel_values))
        return super().forward(pixel_values=pixel_values, **kwargs)


def count(config: Any, num_rows: int) -> None:
    """Count rows, and take the time that they are to take."""
    with Path(config.log).open("ab") as log:
        log.write(b"%d\n" % num_rows)
    if config.dies:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(config.row_s * num_rows)
    while _held(config.log):
        time.sleep(0.01)


def _held(log: str) -> bool:
    """Whether a file says to stand still after so many rows, counted over all processes."""
    try:
        limit = int(Path(log + ".hold").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return sum(map(int, Path(log).read_bytes().split())) > limit
