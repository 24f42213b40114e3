"""A BERT that says what it does, as a checkpoint's own code: what the fault tests embed with.

It appends the row count of every forward pass to a file, so that a test knows how much was
computed, committed or not; it takes time, and stands still while a file says so, so that there is a
middle to kill it in; and it can be told to end its process.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel


class CountedConfig(BertConfig):
    model_type = "counted"

    def __init__(
        self, log: str = "", row_s: float = 0.0, dies: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.log, self.row_s, self.dies = log, row_s, dies


class CountedModel(BertModel):
    config_class = CountedConfig

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        with Path(self.config.log).open("ab") as log:
            log.write(b"%d\n" % len(input_ids))
        if self.config.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.config.row_s * len(input_ids))
        while self._held():
            time.sleep(0.01)
        return super().forward(input_ids=input_ids, **kwargs)

    def _held(self) -> bool:
        """Whether a file says to stand still after so many rows, counted over all processes."""
        try:
            limit = int(Path(self.config.log + ".hold").read_text())
        except (FileNotFoundError, ValueError):
            return False
        return sum(map(int, Path(self.config.log).read_bytes().split())) > limit
