"""How often the 95 % intervals of the probes hold the truth, on simulated tables.

    python tools/interval_coverage.py --tables 1000

Tables are drawn from populations that are known: classes are normal clouds, some labels are wrong;
a table has 50 to 1,000 judged rows and 2 to 20 labels. For each score that a probe prints it says
in how many of 100 tables the interval held the truth, in how many it held its own value, and its
mean width; and the first by number of rows and labels. The truths:

- linear (accuracy, macro F1), knn (accuracy): of the very classifier that the table's train split
  gave, on the population.
- zeroshot (accuracy at 1 and 5, mean recall by class): of the same prompts, on the population.
- clustering (AMI, V-measure, NMI, ARI): of the very clusters that the table gave, on the
  population: each of its rows is in the cluster whose centre is nearest. AMI's is the V-measure's
  there, as chance gives nothing in a population.
- crossmodal (recall at 1, 5 and 10, both ways): the mean over tables of as many rows and captions,
  since recall falls with the number of candidates.

It takes some minutes on one core, and ends with exit code 1 where an interval left out its value or
a score's truth was held in fewer than 93 or more than 97 of 100.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmembed.probes import CaptionedRows, Sample, label_rows, run_probe
from fmembed.probes.agreement import agreement
from fmembed.probes.clustering import cluster
from fmembed.probes.data import LabelledRows, fit
from fmembed.probes.intervals import accuracy, mean_by_class
from fmembed.probes.knn import knn_predict

LOW, HIGH = 93.0, 97.0
Score = dict[str, float]


@dataclass
class Held:
    """Of one score: how often its interval held the truth and its value."""

    tables: int = 0
    truth: int = 0
    value: int = 0
    width: float = 0.0
    by_kind: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, score: Score, truth: float) -> None:
        held = score["low"] <= truth <= score["high"]
        self.tables += 1
        self.truth += held
        self.value += score["low"] <= score["value"] <= score["high"]
        self.width += score["high"] - score["low"]
        self.by_kind[kind].append(held)

    @property
    def percent(self) -> float:
        return 100 * self.truth / self.tables


@dataclass(frozen=True)
class Population:
    """Rows of which a table is a sample: vectors (rows, dim), and labels (rows,), some wrong."""

    vectors: np.ndarray
    labels: np.ndarray
    num_classes: int
    kind: str

    def draw(self, num: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(0, len(self.labels), num)
        return self.vectors[rows], self.labels[rows]


def populate(
    num: int, num_classes: int, wrong: float, apart: float, rng: np.random.Generator, dim: int = 16
) -> Population:
    """Classes of unlike sizes, whose centres are `apart` from the origin in random directions."""
    weights = rng.dirichlet(np.full(num_classes, 10.0))
    centres = rng.normal(size=(num_classes, dim))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    truth = rng.choice(num_classes, num, p=weights)
    vectors = (centres[truth] + rng.normal(size=(num, dim))).astype(np.float32)
    given = np.where(rng.random(num) < wrong, rng.choice(num_classes, num, p=weights), truth)
    return Population(vectors, given, num_classes, f"{num_classes} labels")


def populations(num: int, rng: np.random.Generator, sizes: tuple[int, ...]) -> list[Population]:
    """Easy and hard ones, with clean labels and wrong ones."""
    return [
        populate(num, k, wrong, apart, rng)
        for k in sizes
        for wrong, apart in ((0.02, 3.5), (0.1, 4.5), (0.3, 3.0))
    ]


def learned(num_tables: int, rng: np.random.Generator) -> Iterator[tuple[str, str, Score, float]]:
    """The probes that are trained: linear and knn."""
    many = populations(20_000, rng, (2, 5, 10))
    for i in range(num_tables):
        population = many[i % len(many)]
        num_test = int(rng.choice([50, 100, 300, 1000]))
        vectors, labels = population.draw(200, rng)
        test_vectors, truth = population.draw(num_test, rng)
        kind = f"{num_test} rows"
        model = fit(vectors, labels, 1.0)
        predicted, of_all = model.predict(test_vectors), model.predict(population.vectors)
        right = float(np.mean(of_all == population.labels))
        yield "linear accuracy", kind, accuracy(truth, predicted), right
        everyone = mean_by_class(population.labels, of_all, "F1")["value"]
        yield "linear macro F1", kind, mean_by_class(truth, predicted, "F1"), everyone
        few = slice(0, 4000)
        said = knn_predict(
            vectors,
            labels,
            np.concatenate([test_vectors, population.vectors[few]]),
            [10],
            population.num_classes,
        )[10]
        right = float(np.mean(said[num_test:] == population.labels[few]))
        yield "knn accuracy", kind, accuracy(truth, said[:num_test]), right


def zeroshot(num_tables: int, rng: np.random.Generator) -> Iterator[tuple[str, str, Score, float]]:
    """Nothing is trained: the prompts are what they are."""
    many = []
    for population in populations(50_000, rng, (6, 10, 20)):
        means = [population.vectors[population.labels == k] for k in range(population.num_classes)]
        prompts = np.stack([m[:2] + m.mean(axis=0) for m in means]).astype(np.float32)
        whole = scored("zeroshot", label(population.vectors, population.labels), prompts)
        many.append((population, prompts, whole))
    for i in range(num_tables):
        population, prompts, whole = many[i % len(many)]
        num = int(rng.choice([100, 300, 1000]))
        vectors, labels = population.draw(num, rng)
        while len(np.unique(labels)) < population.num_classes:  # else there would be other prompts
            vectors, labels = population.draw(num, rng)
        for metric, score in scored("zeroshot", label(vectors, labels), prompts).items():
            yield f"zeroshot {metric}", f"{num} rows", score, whole[metric]["value"]


def clustering(
    num_tables: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, Score, float]]:
    """The clusters are found once, by the table."""
    many = populations(20_000, rng, (2, 5, 10, 20))
    for i in range(num_tables):
        population = many[i % len(many)]
        num = int(rng.choice([100, 300, 1000]))
        vectors, labels = population.draw(num, rng)
        found = cluster(vectors, population.num_classes)
        centres = np.stack([vectors[found == k].mean(axis=0) for k in np.unique(found)])
        distance = (centres**2).sum(axis=1) - 2 * population.vectors @ centres.T
        truth = agreement(population.labels, distance.argmin(axis=1))
        for metric, score in agreement(labels, found).items():
            kind = f"{num} rows, {population.kind}"
            yield f"clustering {metric}", kind, score, truth[metric]["value"]


def crossmodal(
    num_tables: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, Score, float]]:
    """Pictures with one caption, or with five each."""
    for part, (num, captions) in enumerate(((100, 1), (400, 1), (60, 5))):
        found = []
        for _ in range(part, num_tables, 3):
            rows = rng.normal(size=(num, 16))
            codes = np.repeat(np.arange(num), captions)
            own = 0.6 * rng.normal(size=(num, 16))[codes] + 0.5 * rng.normal(size=(len(codes), 16))
            said = (rows[codes] + own).astype(np.float32)
            data = CaptionedRows(rows[codes].astype(np.float32), said, codes, np.arange(len(codes)))
            found.append(flat(run_probe("crossmodal", Sample(captions=data))))
        for metric in found[0]:
            truth = float(np.mean([f[metric]["value"] for f in found]))
            for f in found:
                kind = f"{num} rows, {captions} captions each"
                yield f"crossmodal {metric}", kind, f[metric], truth


def label(vectors: np.ndarray, labels: np.ndarray) -> LabelledRows:
    ids = [f"{i:08x}" for i in range(len(labels))]
    return label_rows(ids, ids, vectors, [f"{k:03d}" for k in labels], None, None)


def scored(probe: str, rows: LabelledRows, prompts: np.ndarray) -> dict[str, Score]:
    return flat(run_probe(probe, Sample(rows, prompts=prompts)))


def flat(result: dict[str, Any]) -> dict[str, Score]:
    """The scores of a probe by metric and k."""
    return {f"{s['metric']} {s.get('k', '')}".strip(): s for s in result["scores"]}


WHAT: dict[str, Callable[..., Iterator[tuple[str, str, Score, float]]]] = {
    "learned": learned, "zeroshot": zeroshot, "clustering": clustering, "crossmodal": crossmodal,
}  # fmt: skip


def measure(what: str, num_tables: int, seed: int = 0) -> dict[str, Held]:
    """Simulate tables; by score, how often its interval held what it should."""
    held: dict[str, Held] = defaultdict(Held)
    for name, kind, score, truth in WHAT[what](num_tables, np.random.default_rng(seed)):
        held[name].add(kind, score, truth)
    return dict(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(WHAT), nargs="*", default=list(WHAT))
    given = parser.parse_args()
    missed = False
    for what in given.only:
        started = time.monotonic()
        for name, held in measure(what, given.tables, given.seed).items():
            outside = not LOW <= held.percent <= HIGH or held.value < held.tables
            missed |= outside
            print(
                f"{name:<32} {held.tables:>5} tables, truth held in {held.percent:5.1f} of 100, "
                f"value in {100 * held.value / held.tables:.0f}, mean width "
                f"{held.width / held.tables:.3f}{'   OUTSIDE' if outside else ''}"
            )
            for kind, each in sorted(held.by_kind.items()):
                print(f"    {kind:<28} {len(each):>5} tables, {100 * np.mean(each):5.1f}")
        print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
