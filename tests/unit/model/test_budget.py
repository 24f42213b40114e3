"""The choice of a budget from seconds written down by hand, and its way through the cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fmembed import cache
from fmembed.checkpoint.opening import open_checkpoint
from fmembed.model import budget
from fmembed.model.budget import choose, choose_budget
from fmembed.model.encoder import Encoder
from fmembed.model.forward import Model
from fmembed.spec import ModelSpec

BUDGETS = (1000, 2000, 4000, 8000)


def pick(rates: dict[int, float], default: int = 4000, limit_s: float = 2.0) -> Any:
    """Choose where a batch runs at so many tokens/s (0: fails); the choice and what was asked."""
    asked: list[int] = []

    def measure(tokens: int) -> float | None:
        asked.append(tokens)
        rate = rates.get(tokens, 1e5)
        return tokens / rate if rate else None

    return choose(BUDGETS, measure, default, 100, limit_s), asked


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1000: 8e4, 2000: 9.8e4, 4000: 1e5, 8000: 9e4}, 2000),
        ({1000: 8e4, 2000: 9.6e4, 4000: 1e5, 8000: 9e4}, 4000),
        ({1000: 1e4, 2000: 2e4, 4000: 4e4, 8000: 8e4}, 8000),
        ({}, 1000),
        # Out of memory: nothing larger, be the default among it or not.
        ({1000: 8e4, 2000: 9e4, 4000: 1e5, 8000: 0}, 4000),
        ({1000: 8e4, 2000: 1e5, 4000: 0}, 2000),
        ({100: 0}, None),
        ({1000: 0}, None),
    ],
)
def test_the_smallest_of_the_fast(rates: dict[int, float], expected: int | None) -> None:
    found, asked = pick(rates)
    assert found == expected
    failed = [i for i, tokens in enumerate(asked) if rates.get(tokens) == 0]
    assert all(t < asked[i] for i in failed for t in asked[i + 1 :])


def test_the_best_of_a_few_rounds_counts() -> None:
    seconds = iter([1.0, 0.01, *[0.5] * 4, 0.01, 0.01, 0.08, 0.16, *[0.5] * 4])
    assert choose(BUDGETS, lambda _: next(seconds), 4000, 100, 9.0) == 2000


def test_time_is_bounded() -> None:
    # 100 tokens in 0.1 s: a thousand would take 1 s, and two thousand not end in time.
    slow = dict.fromkeys((100, *BUDGETS), 1e3)
    assert pick(slow) == (None, [100, 100, 1000])
    # So slow that the second row is not run, let alone a batch.
    assert pick({100: 40.0}) == (None, [100])
    # Time for the default and not for more: that is enough to compare.
    enough = dict.fromkeys((100, *BUDGETS), 5e3)
    assert pick(enough) == (1000, [100, 100, 1000, 2000, 4000])


def test_an_encoder_measures_once(
    tiny_bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def seconds(_: Model, rows: list[Any]) -> float:
        tokens = sum(len(r.values) for r in rows)
        asked.append(tokens)
        return tokens / (2e5 if tokens >= 2048 else 1e5)

    monkeypatch.setattr(budget, "time_batch", seconds)
    load = loader(tiny_bert)
    assert load("float32", 512) == (512, "given")
    assert load("float32", None) == (4096, "default")
    assert not asked
    assert load("float32", "auto") == (2048, "measured")
    assert set(asked) == {64, 1024, 2048, 4096, 8192}
    asked.clear()
    assert load("float32", "auto") == (2048, "cached")
    assert not asked
    assert load("bfloat16", "auto") == (2048, "measured")
    # What was found for a whole GPU says nothing of a part of one.
    assert load("float32", "auto", 0.5) == (2048, "measured")
    assert load("float32", "auto", 0.25) == (2048, "measured")
    assert load("float32", "auto", 0.5) == (2048, "cached")
    # A model too slow to measure is not tried again either.
    monkeypatch.setattr(budget, "time_batch", lambda *_: 60.0)
    for path in folder.iterdir():
        path.unlink()
    assert load("float32", "auto") == (4096, "default")
    assert load("float32", "auto") == (4096, "cached")


def test_an_encoder_really_measures(tiny_bert: Path, folder: Path) -> None:
    tokens, how = loader(tiny_bert)("float32", "auto")
    # On a machine that stands still for two seconds it gives up, and says so.
    assert (tokens in budget.BUDGETS["cpu"], how in ("measured", "default")) == (True, True)
    (path,) = folder.iterdir()
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["value"] == {"batch_tokens": tokens}
    # What an earlier version may have chosen is none of today's.
    cache.remember("batch_tokens", kept["key"], {"batch_tokens": 32})
    assert loader(tiny_bert)("float32", "auto")[0] in budget.BUDGETS["cpu"]


def test_a_model_that_fails_on_large_batches(
    tiny_bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside other work even a tiny model may take the two seconds that there are.
    monkeypatch.setattr(budget, "choose", functools.partial(choose, limit_s=600.0))
    checkpoint = open_checkpoint(ModelSpec(id=str(tiny_bert), dtype="float32"), False)
    model = Encoder(checkpoint)._model
    call = model.tower._call

    def small_device(input_ids: torch.Tensor, **more: Any) -> Any:
        if input_ids.numel() > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(input_ids=input_ids, **more)

    model.tower._call = small_device
    assert choose_budget("auto", model) == (1024, "measured")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fmembed"


def loader(folder: Path) -> Callable[..., tuple[int, str]]:
    def load(dtype: Any, batch_tokens: Any, share: float = 1.0) -> tuple[int, str]:
        checkpoint = open_checkpoint(ModelSpec(id=str(folder), dtype=dtype), False)
        (said,) = Encoder(checkpoint, gpu_share=share, batch_tokens=batch_tokens)._news
        _, tokens, how = said.split("/")
        return int(tokens), how

    return load
