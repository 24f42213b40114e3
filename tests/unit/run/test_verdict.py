"""The verdict from counts written down by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fmembed.run.verdict import judge

ACTOR = {
    "load_s": 2.0, "wait_s": 1.0, "busy_s": 99.0, "forward_s": 90.0, "copy_s": 1.0,
    "tokens": 9900, "slots": 10_000, "flop": 99 * 60.0, "peak_flops": 100.0,
}  # fmt: skip
STAGES = {
    "read, preprocess": {"rows": 10, "busy_s": 50.0},
    "embed": {"rows": 10, "busy_s": 1.0},
    "write, commit": {"rows": 10, "busy_s": 1.0},
}


def verdict(
    num_shards: int = 9,
    seconds: float = 110.0,
    num_workers: int = 1,
    preprocess: float = 30.0,
    **changed: Any,
) -> dict[str, Any]:
    counts = {f"actor/{a}/{k}": v for a in "ab" for k, v in {**ACTOR, **changed}.items()}
    counts |= {
        "seconds/preprocess": preprocess,
        "batches_halved": 3,
        "batch_tokens/2048/measured": 1,
        "batch_tokens/2048/cached": 1,
    }
    compute = {"window_rows": 256, "num_workers": num_workers}
    return judge(counts, STAGES, compute, seconds, num_shards)


def test_figures() -> None:
    found = verdict()
    assert found["seconds"] == {
        "read": 20.0, "preprocess": 30.0, "write": 1.0, "load": 4.0, "wait": 2.0,
        "forward": 180.0, "copy": 2.0, "around the model": 16.0,
    }  # fmt: skip
    assert list(found["actors"]) == ["a", "b"]
    assert found["wait_share"] == 0.01
    assert found["padding_waste"] == 0.01
    assert found["tokens_per_s"] == 200.0
    assert found["mfu"] == 0.6
    assert found["batch_tokens"] == {"2048 measured": 1, "2048 cached": 1}
    assert found["advice"] == "nothing to change: the model was at work 99% of the time"


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        (
            {"wait_s": 66.0},
            "waited 40% of the time for preprocessing: give it 2 CPU workers instead of 1$",
        ),
        ({"wait_s": 66.0, "preprocess": 9.0}, "waited 40% of the time for reading: give it 2 CPU"),
        ({"wait_s": 66.0, "num_workers": 2}, "preprocessing: 2 CPU workers are enough"),
        ({"wait_s": 66.0, "num_shards": 1}, "read in one piece; cut it into at least 2 files"),
        ({"slots": 20_000}, r"50% of what was computed was padding: .* \(now 256\)"),
        ({"flop": 99 * 9.0}, "the model ran at 9% of .* larger batches were no faster"),
        ({"seconds": 900.0}, "at work for 99.0 of 900.0 s, .* give a run more rows"),
    ],
)
def test_advice_names_what_to_change(changed: dict[str, Any], advice: str) -> None:
    assert re.search(advice, verdict(**changed)["advice"])


def test_no_model_no_verdict() -> None:
    assert judge({"endpoint_tokens": 5}, STAGES, {}, 10.0, 1) == {}
    assert verdict(flop=0)["mfu"] is None
