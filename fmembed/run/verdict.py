"""Where a run's time went, and one sentence on what to change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

ACTOR, _BUDGET, _SECONDS = PREFIXES = ("actor/", "batch_tokens/", "seconds/")
# The stages as they are shown and recorded.
READ, EMBED, WRITE = "read, preprocess", "embed", "write, commit"
# And those of a refresh, before and after: seconds of the run.
COMPARE, SETTLE = "compare", "settle"
_IDLE, _WASTE, _LOW_MFU = 0.10, 0.10, 0.25


def judge(
    counts: Mapping[str, float],
    stages: Mapping[str, Any],
    compute: Mapping[str, Any],
    seconds: float,
    num_shards: int,
) -> dict[str, Any]:
    """Sum up what the processes of a run have counted.

    Args:
        counts: `actor/<name>/<figure>` of all windows, summed (`meter.Meter`), and
            `batch_tokens/<tokens>/<how they were chosen>`, once for each loaded model, and
            `seconds/preprocess`.
        stages: Rows and seconds at work of each stage; Ray runs reading and preprocessing as one.
        compute: The plan (`plan.Plan`).
        seconds: What the run took.
        num_shards: Pieces that the source is read in.

    Returns:
        `seconds` by stage, summed over tasks or actors; `actors`, the same for each; `wait_share`,
        the part of the actors' time, once they had begun, in which they waited; `padding_waste`,
        the part of the computed tokens that were padding; `tokens_per_s` while at work;
        `mfu`, the model's FLOP/s while at work against a matrix product's, null where not counted;
        `batch_tokens`, for each budget and how it was chosen the models loaded with it; `advice`.
        Empty where no model ran here.
    """
    actors: dict[str, dict[str, float]] = defaultdict(dict)
    budgets = {}
    for key, value in counts.items():
        if key.startswith(ACTOR):
            _, name, figure = key.split("/")
            actors[name][figure] = value
        elif key.startswith(_BUDGET):
            budgets[" ".join(key.split("/")[1:])] = int(value)

    def total(figure: str) -> float:
        return sum(a.get(figure, 0.0) for a in actors.values())

    busy_s, wait_s = total("busy_s"), total("wait_s")
    if not busy_s or not total("tokens"):
        return {}
    forward_s, copy_s = total("forward_s"), total("copy_s")
    could = sum(a.get("peak_flops", 0.0) * a.get("busy_s", 0.0) for a in actors.values())
    both_s = stages[READ]["busy_s"]
    preprocess_s = min(counts.get(f"{_SECONDS}preprocess", 0.0), both_s)
    found = {
        "seconds": {
            "read": round(both_s - preprocess_s, 2),
            "preprocess": round(preprocess_s, 2),
            "write": round(stages[WRITE]["busy_s"], 2),
            "load": round(total("load_s"), 2),
            "wait": round(wait_s, 2),
            "forward": round(forward_s, 2),
            "copy": round(copy_s, 2),
            "around the model": round(max(busy_s - forward_s - copy_s, 0.0), 2),
        },
        "actors": {
            name: {k: round(a.get(k, 0.0), 2) for k in _SHOWN} for name, a in actors.items()
        },
        "wait_share": round(wait_s / (wait_s + busy_s), 4),
        "padding_waste": round(1 - total("tokens") / total("slots"), 4),
        "tokens_per_s": round(total("tokens") / busy_s * len(actors), 1),
        "mfu": round(total("flop") / could, 4) if could and total("flop") else None,
        "batch_tokens": budgets,
    }
    return {**found, "advice": _advise(found, compute, busy_s / len(actors), seconds, num_shards)}


_SHOWN = ("load_s", "wait_s", "busy_s", "forward_s", "copy_s", "tokens")


def _advise(
    found: Mapping[str, Any],
    compute: Mapping[str, Any],
    busy_s: float,
    seconds: float,
    num_shards: int,
) -> str:
    idle, waste, mfu = found["wait_share"], found["padding_waste"], found["mfu"]
    if busy_s < seconds / 3:
        return (
            f"the model was at work for {busy_s:.1f} of {seconds:.1f} s, the rest was start and "
            "end: give a run more rows"
        )
    if idle > _IDLE:
        read_s, preprocess_s = found["seconds"]["read"], found["seconds"]["preprocess"]
        waited = f"the model waited {idle:.0%} of the time for "
        waited += "reading: " if read_s > preprocess_s else "preprocessing: "
        # One more than keeps pace, so that the model never waits for the last of them.
        needed, given = math.ceil((read_s + preprocess_s) / busy_s) + 1, compute["num_workers"]
        if num_shards < needed:
            pieces = "one piece" if num_shards == 1 else f"{num_shards} pieces"
            return waited + f"the source is read in {pieces}; cut it into at least {needed} files"
        if given < needed:
            return waited + f"give it {needed} CPU workers instead of {given}"
        return waited + f"{given} CPU workers are enough, so look at how fast the source is read"
    if waste > _WASTE:
        return (
            f"{waste:.0%} of what was computed was padding: raise compute.window_rows (now "
            f"{compute.get('window_rows')}), so that rows of like length meet"
        )
    if mfu is not None and mfu < _LOW_MFU:
        slow = f"the model ran at {mfu:.0%} of a matrix product's rate: "
        if any(b.endswith(("measured", "cached")) for b in found["batch_tokens"]):
            return slow + "larger batches were no faster; try model.compile"
        return slow + "raise compute.batch_tokens, or try model.compile"
    return f"nothing to change: the model was at work {1 - idle:.0%} of the time"
