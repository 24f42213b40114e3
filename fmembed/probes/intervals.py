"""95 % intervals, and what chance alone would give.

`tools/interval_coverage.py` measures how often an interval holds the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fmembed.probes.arrays import SEED, Bools, Floats, Ints

Z = 1.959964  # of 95 in 100
NUM_SHUFFLES = 1000
_NUM_BOOTSTRAPS = 2000


def accuracy(
    truth: Ints | Bools, predicted: Ints | Bools, groups: Ints | None = None
) -> dict[str, float]:
    """Share of equal entries, with Wilson's interval.

    The truth that it is about: the share in the population that these rows were drawn from.

    Args:
        truth: Shape (rows,).
        predicted: Shape (rows,).
        groups: Rows of one content have one number, and stand or fall together; shape (rows,).
    """
    hits = truth == predicted
    value = float(np.mean(hits))
    codes = None if groups is None else np.unique(groups, return_inverse=True)[1]
    if codes is None or codes.max(initial=0) + 1 == len(hits):
        return wilson(value, len(hits))
    moved: Floats = np.bincount(codes, (hits - value) / len(hits)).astype(np.float64)
    return averaged(value, moved, codes.max() + 1)


def wilson(value: float, num: float) -> dict[str, float]:
    """A share and its interval (Wilson 1927): never empty, in [0, 1], and holds its value.

    Args:
        value: The share, in [0, 1].
        num: Of how many independent trials.
    """
    centre = (value + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * np.sqrt(value * (1 - value) / num + Z**2 / (4 * num**2))
    # By rounding, all of 89 rows would be above the upper end.
    low, high = max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))
    return {"value": value, "low": float(low), "high": float(high)}


def mean_by_class(truth: Ints, predicted: Ints, metric: str) -> dict[str, float]:
    """Macro F1 or the mean recall over classes, with the interval of `averaged`.

    The truth: the same mean in the population, over the classes that are in these rows.

    Args:
        truth: Shape (rows,).
        predicted: Shape (rows,).
        metric: "F1", over the classes that are true or predicted, or "recall", over the true.
    """
    return averaged(*moved_by_class(truth, predicted, metric))


def moved_by_class(truth: Ints, predicted: Ints, metric: str) -> tuple[float, Floats, float]:
    """The same before the interval: what `averaged` takes."""
    both, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true, said = codes[: len(truth)], codes[len(truth) :]
    num_true, num_said, num_hits = (
        np.bincount(c, minlength=len(both)) for c in (true, said, true[true == said])
    )
    hit = true == said
    if metric == "recall":
        size = num_true.astype(np.float64)
        size[size == 0] = np.inf  # predicted, and never true: it is not among the classes
        scores = num_hits / size
        moved = (hit - scores[true]) / size[true]
    else:
        size = (num_true + num_said) / 2
        scores = num_hits / size
        moved = (hit - scores[true] / 2) / size[true] - scores[said] / (2 * size[said])
    # Rows of one class lie nearer to its own score than to the population's.
    moved *= np.sqrt(size[true] / np.maximum(size[true] - 1, 1))
    num_classes = int(np.isfinite(size).sum())
    # As many rows as the mean of shares of such sizes is worth.
    num = num_classes**2 / float((1 / size).sum())
    return float(scores.sum() / num_classes), moved / num_classes, num


def averaged(value: float, moved: Floats, num: float) -> dict[str, float]:
    """Wilson's interval for a score in [0, 1] whose units do not count alike, or come in groups.

    It takes the number of independent trials that would vary as much (Korn and Graubard 1998).

    Args:
        value: The score.
        moved: Shape (units,): by how much each independent unit moves the score, to first order;
            they sum to 0.
        num: The number of trials to take where no unit moves it, as all of them hit or none does.
    """
    variance = float((moved**2).sum()) * len(moved) / max(len(moved) - 1, 1)
    if 0 < value < 1 and variance > 0:
        num = value * (1 - value) / variance
    return wilson(value, num)


def shuffled_accuracy(truth: Ints, predicted: Ints, groups: Ints | None = None) -> dict[str, float]:
    """What is left of an accuracy when the labels of the judged rows are dealt out anew.

    Args:
        truth: Shape (rows,).
        predicted: Shape (rows,).
        groups: As for `accuracy`: of each group the first row counts.
    """
    if groups is not None:
        first = np.unique(groups, return_index=True)[1]
        truth, predicted = truth[first], predicted[first]

    def shuffle(rng: np.random.Generator) -> float:
        return float(np.mean(rng.permutation(truth) == predicted))

    return permutation_test(float(np.mean(truth == predicted)), shuffle)


def permutation_test(
    value: float, shuffle: Callable[[np.random.Generator], float]
) -> dict[str, float]:
    """What a score is by chance.

    Args:
        value: The score.
        shuffle: The same once the labels were shuffled.

    Returns:
        `value`, `low` and `high`: mean, lowest and highest of 1,000 `shuffles`; and `p`, how often
        chance gives the score or more (Phipson and Smyth 2010: the score itself counted, so that it
        is never 0).
    """
    rng = np.random.default_rng(SEED)
    found = np.array([shuffle(rng) for _ in range(NUM_SHUFFLES)])
    # A shuffle that only rounding puts below the score is not below it.
    p = (1 + int((found >= value - 1e-12).sum())) / (1 + NUM_SHUFFLES)
    low, high = float(found.min()), float(found.max())
    # By rounding, the mean of equal numbers would be beside them.
    mean = min(max(float(found.mean()), low), high)
    return {"value": mean, "low": low, "high": high, "shuffles": NUM_SHUFFLES, "p": p}


def difference(
    old: Bools, new: Bools, groups: Ints, outside: float = 0.05, doubts: int = 0
) -> dict[str, float]:
    """The difference of two shares of hits, what it is at least and at most: by a paired bootstrap.

    Args:
        old: Shape (rows,).
        new: The same rows, shape (rows,).
        groups: Rows of one content have one number, and are drawn together; shape (rows,).
        outside: The share of bootstraps that lie outside of the interval, half on each side.
        doubts: So many rows more that only the one, and only the other says, for the interval: of
            few rows that differ it would be too narrow, and of none nothing at all (Agresti and Min
            2005).

    Returns:
        `old` and `new`, both shares; `value`, new - old; `low` and `high`, the interval.
    """
    _, codes = np.unique(groups, return_inverse=True)
    size = np.bincount(codes).astype(np.float64)
    moved = np.bincount(codes, new.astype(np.float64) - old.astype(np.float64))
    size = np.concatenate([size, np.ones(2 * doubts)])
    moved = np.concatenate([moved, np.repeat([1.0, -1.0], doubts)])
    rng, shares = np.random.default_rng(SEED), np.empty(_NUM_BOOTSTRAPS)
    for i in range(_NUM_BOOTSTRAPS):
        drawn = rng.integers(0, len(size), len(size))
        shares[i] = moved[drawn].sum() / size[drawn].sum()
    low, high = np.quantile(shares, [outside / 2, 1 - outside / 2])
    return {
        "old": float(old.mean()),
        "new": float(new.mean()),
        "value": float(new.mean() - old.mean()),
        "low": float(low),
        "high": float(high),
    }
