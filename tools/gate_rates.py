"""How often the gate refuses what is as good, and what is five points worse.

    export PYTHONPATH=tests:tests/helpers:tools
    python tools/gate_rates.py --seeds 100

Simulated vectors of ten classes, whose spread sets how many rows a probe judges right; compared as
the gate does (evaluate/checks.py). Prints of each case the share refused of so many seeds, and how
much less the first probe shows on average.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from fmembed import probes
from fmembed.evaluate.checks import Pair, Question, Side, judge
from fmembed.probes.data import LabelledRows
from fmembed.spec import GateSpec

_CLASSES, _DIM = 10, 32


def find_noise(accuracy: float, num_rows: int) -> float:
    """Which spread lets kNN judge so many rows right."""
    from fmembed.probes import paired

    low, high = 0.05, 1.5
    rng = np.random.default_rng(5)
    truth = rng.integers(0, _CLASSES, num_rows)
    for _ in range(12):
        middle = (low + high) / 2
        vectors = np.eye(_CLASSES, _DIM)[truth] + middle * rng.normal(size=(num_rows, _DIM))
        data = labelled(truth, vectors.astype(np.float32))
        found = paired.hits("knn", data).mean()
        low, high = (middle, high) if found > accuracy else (low, middle)
    return low


def labelled(truth: Any, vectors: Any) -> LabelledRows:
    """As the gate makes them."""
    hashes = [f"{i * 2654435761 % 2**32:032x}" for i in range(len(truth))]
    ids = [f"r{i}" for i in range(len(truth))]
    return probes.label_rows(ids, hashes, vectors, [str(t) for t in truth], None, None)


def is_refused(truth: Any, old: Any, new: Any, same_model: bool, names: list[str]) -> Any:
    """Whether the gate refuses, and by how much a probe shows less."""
    ids, labels = [f"r{i}" for i in range(len(truth))], [str(t) for t in truth]
    hashes = [f"{i * 2654435761 % 2**32:032x}" for i in range(len(truth))]
    sides = [Side(ids, hashes, labels, None, {"embedding": v}) for v in (new, old)]
    question = Question(GateSpec(), tuple(names), same_model)
    checks = [c for c in judge(question, Pair.of(*sides, "embedding")) if c.figures]
    return any(c.passed is False for c in checks), checks[0].figures["value"]


def pair(case: str, num_rows: int, seed: int, good: float, bad: float) -> tuple[Any, Any, Any]:
    """The labels, and both versions' vectors."""
    rng = np.random.default_rng([seed, num_rows])
    truth = rng.integers(0, _CLASSES, num_rows)
    centres, others = (np.linalg.qr(rng.normal(size=(_DIM, _DIM)))[0][:_CLASSES] for _ in range(2))
    spread, own = (rng.normal(size=(num_rows, _DIM)) for _ in range(2))
    old = centres[truth] + good * spread
    new = others[truth] + good * own
    if case == "5 % of the rows are others":
        is_new = rng.random((num_rows, 1)) < 0.05
        new = np.where(is_new, centres[truth] + good * own, old)
    elif case == "a model with the same hard rows":
        # Nine tenths of what is not said of a row are the row's.
        both = np.sqrt(0.9) * spread + np.sqrt(0.1) * own
        turn = np.linalg.qr(rng.normal(size=(_DIM, _DIM)))[0]
        new = (centres[truth] + good * both) @ turn
    elif case == "all rows 5 points worse":
        new = centres[truth] + bad * own
    elif case == "a model 5 points worse":
        new = others[truth] + bad * own
    return truth, old.astype(np.float32), new.astype(np.float32)


# Whether the model is the same one.
CASES = {
    "5 % of the rows are others": True,
    "a model with the same hard rows": False,
    "a model with other hard rows": False,
    "all rows 5 points worse": True,
    "a model 5 points worse": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 5000, 20_000])
    parser.add_argument("--probes", nargs="+", default=["knn", "linear"])
    parser.add_argument("--accuracy", type=float, default=0.95)
    given = parser.parse_args()
    good, bad = (find_noise(a, 4000) for a in (given.accuracy, given.accuracy - 0.05))
    for num_rows in given.rows:
        for case, same_model in CASES.items():
            began, refused, less = time.monotonic(), 0, []
            for seed in range(given.seeds):
                truth, old, new = pair(case, num_rows, seed, good, bad)
                found, value = is_refused(truth, old, new, same_model, given.probes)
                refused += found
                less.append(value)
            print(
                f"{num_rows:>6} rows  {case:<32} refused {refused:>3} of {given.seeds}; "
                f"{given.probes[0]} {np.mean(less):+.4f} on average; "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
