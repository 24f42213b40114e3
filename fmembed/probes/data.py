"""What a probe is, what it gets, and what probes share: the split and the baselines."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from fmembed.probes.arrays import Bools, Floats, Ints
from fmembed.probes.intervals import accuracy, difference
from fmembed.probes.neighbours import Neighbours

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

MAX_ROWS = 20_000
_BUCKETS = 100
_TEST_BUCKETS = 20
_C_GRID = tuple(float(c) for c in 10.0 ** np.arange(-2, 6))
_FIT_SEED = 0
# What a split is called that is judged by, the first that there is.
_TEST_NAMES = ("test", "val", "valid", "validation", "dev")
_MAX_LEAKS = 10


# What a probe may ask for: the fields of `Sample`. Prompts, competitor and leaks come with labels
# only.
Need = Literal["labels", "captions", "prompts", "competitor", "leaks", "graph"]


class Probe(Protocol):
    """A module of this folder: a named protocol whose version goes up when its numbers change."""

    VERSION: int
    NEEDS: frozenset[Need]

    def run(self, sample: Sample) -> dict[str, Any]:
        """Score the vectors of one column.

        Args:
            sample: What NEEDS names; everything else in it is None.

        Returns:
            JSON: of a probe that judges nothing by a score `figures` (name, value, and perhaps
            `random`, the same of random vectors) and `findings` (kind, words, and `rows`, groups of
            ids that show it). Else `scores`, each with metric, value, low and high (a 95 %
            interval) and perhaps k;
            `headline`, the one of them that is shown first; `baselines` by name, value, low and
            high each, or None where its input is missing; the one made by shuffling as
            `intervals.permutation_test` gives it. A probe may add `confusion` (classes, counts) and
            `suspicious` (row_id, label, predicted, probability, text), which the report shows, and
            put its own `num_train` and `num_test` over those of the sample.

        Raises:
            UnfitError: These rows do not suffice.
        """
        ...


class UnfitError(Exception):
    """Why rows do not suffice for a probe; it is then left out, and the report says so."""


@dataclass(frozen=True)
class LabelledRows:
    """Labelled rows read back from a table.

    Shapes: vectors (rows, dim) float32; labels (rows,) positions in `classes`; bucket (rows,) 0 to
    99, the first 20 being the test split unless the dataset names its own (`named_split`); contents
    (rows,): rows of one content have one number; texts the inputs, or else `cheap`, shape (rows, n)
    float32: features that anyone can have without a model, called `cheap_name`.
    """

    row_ids: list[str]
    vectors: Floats
    labels: Ints
    classes: list[str]
    bucket: Ints
    contents: Ints
    test: Bools
    texts: list[str] | None
    num_rows: int
    named_split: bool = False
    cheap: Floats | None = None
    cheap_name: str = "TF-IDF"

    @property
    def is_split(self) -> bool:
        """Whether there are two labels to train on, and rows to test with."""
        return len(np.unique(self.labels[~self.test])) > 1 and bool(self.test.any())


@dataclass(frozen=True)
class CaptionedRows:
    """Rows and their captions, in one space.

    Shapes: vectors and captions (rows, dim); the codes (rows,): rows of one content have one row
    code, equal captions one caption code, and belong to each other's.
    """

    vectors: Floats
    captions: Floats
    row_codes: Ints
    caption_codes: Ints


@dataclass(frozen=True)
class Graph:
    """Rows of a table, with labels or without, and which rows of it are nearest to each.

    The nodes are those rows, and after them the others that are nearest to one: `row_ids` and
    `contents` (rows of one content have one number) are of all nodes; `vectors` (rows, dim) float32
    and `neighbours`, by number of node, of the rows. The table has `num_rows`.
    """

    row_ids: list[str]
    contents: Ints
    vectors: Floats
    neighbours: Neighbours
    num_rows: int


@dataclass(frozen=True)
class Competitor:
    """What costs no model, on the test split: its accuracy, and `hits`, shape (test rows,): whether
    it says the label of each.
    """

    accuracy: dict[str, float]
    hits: Bools

    def against(self, data: LabelledRows, predicted: Ints) -> dict[str, Any]:
        """Its accuracy, and by how much predictions of the same rows are better: `difference`, with
        its 95 % interval.
        """
        hits = np.asarray(predicted == data.labels[data.test])
        found = difference(self.hits, hits, data.contents[data.test], doubts=1)
        return {**self.accuracy, "difference": {k: found[k] for k in ("value", "low", "high")}}


@dataclass(frozen=True)
class Leaks:
    """Test rows that are copies of train rows, or nearly: `is_leaked`, shape (test rows,), and
    `pairs` of their ids, the test row's first.
    """

    is_leaked: Bools
    pairs: list[list[str]]

    def left(self, truth: Ints, predicted: Ints) -> dict[str, Any] | None:
        """How many leaked, the first of them, and the accuracy of the others; None without one."""
        if not self.is_leaked.any():
            return None
        kept = ~self.is_leaked
        rest = accuracy(truth[kept], predicted[kept]) if kept.any() else None
        return {"num": int((~kept).sum()), "rows": self.pairs[:_MAX_LEAKS], "without": rest}


@dataclass(frozen=True)
class Sample:
    """What a probe gets of one column: what it needs, and None for the rest.

    `labels` are the labelled rows, `captions` the rows with a caption, `prompts` the vectors of
    each label's templates, shape (classes, templates, dim) in the order of `labels.classes`, and
    `competitor` what `compete` made of the labelled rows, None without inputs, and `leaks` what
    `find_leaks` did;
    `graph` is of rows with labels and without.
    """

    labels: LabelledRows | None = None
    captions: CaptionedRows | None = None
    prompts: Floats | None = None
    competitor: Competitor | None = None
    leaks: Leaks | None = None
    graph: Graph | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Rows to learn from, rows to be judged by, and of labelled rows the labels."""
        if self.labels is not None:
            test = self.labels.test
            return {
                "num_train": int((~test).sum()),
                "num_test": int(test.sum()),
                "num_classes": len(self.labels.classes),
            }
        return {"num_train": 0, "num_test": len(self.captions.vectors) if self.captions else 0}

    def labelled_rows(self) -> LabelledRows:
        """The labelled rows, for a probe that trains nothing.

        Raises:
            UnfitError: There are fewer than two labels.
        """
        if self.labels is None or len(self.labels.classes) < 2:
            raise UnfitError("needs at least two labels")
        return self.labels

    def split_rows(self) -> LabelledRows:
        """The labelled rows, for a probe that is trained on one split and judged by the other.

        Raises:
            UnfitError: There is nothing to be told apart, or nothing to judge by.
        """
        if self.labels is None or not self.labels.is_split:
            raise UnfitError(
                "needs at least two labels with rows in the train split, and rows in the test one"
            )
        return self.labels

    def graph_of_rows(self) -> Graph:
        """The rows and their neighbours.

        Raises:
            UnfitError: There are none.
        """
        if self.graph is None or not len(self.graph.vectors):
            raise UnfitError("there is no row")
        return self.graph

    def captioned_rows(self) -> CaptionedRows:
        """The rows with a caption.

        Raises:
            UnfitError: There are fewer than two captions.
        """
        if self.captions is None or len(np.unique(self.captions.caption_codes)) < 2:
            raise UnfitError("needs rows with at least two captions (source.caption)")
        return self.captions


def label_rows(
    row_ids: list[str],
    content_hashes: list[str],
    vectors: Floats,
    labels: list[Any],
    splits: list[Any] | None,
    texts: list[str | None] | None,
    cheap: tuple[str, Floats] | None = None,
) -> LabelledRows:
    """Choose, split and code the labelled rows.

    Where the dataset names no split, a row's content hash decides: a fifth is test. So the split
    is the same in every run, a row never changes sides when others come, and copies of one text
    are on one side, where they cannot leak. Of more than 20,000 rows those with the smallest
    hashes are taken: a sample that is fixed in the same way.
    """
    # Of what is not finite nothing can be learned; the probe health tells of it.
    is_finite: Bools = np.asarray(np.isfinite(vectors).all(axis=1))
    labelled = [i for i, label in enumerate(labels) if label is not None and is_finite[i]]
    by_hash = sorted(labelled, key=lambda i: (content_hashes[i], row_ids[i]))[:MAX_ROWS]
    chosen = sorted(by_hash)
    classes = sorted({str(labels[i]) for i in chosen})
    code = {c: k for k, c in enumerate(classes)}
    bucket = np.array([int(content_hashes[i][-8:], 16) % _BUCKETS for i in chosen], dtype=np.int64)
    test, named_split = bucket < _TEST_BUCKETS, False
    if splits is not None:
        names = [str(splits[i]).lower() for i in chosen]
        judged = next((name for name in _TEST_NAMES if name in names), None)
        if judged is not None and len(set(names)) > 1:
            test, named_split = np.array([n == judged for n in names], dtype=np.bool_), True
    return LabelledRows(
        row_ids=[row_ids[i] for i in chosen],
        vectors=vectors[chosen],
        labels=np.array([code[str(labels[i])] for i in chosen], dtype=np.int64),
        classes=classes,
        bucket=bucket,
        contents=codes([content_hashes[i] for i in chosen]),
        test=test,
        texts=[str(texts[i] or "") for i in chosen] if texts is not None else None,
        num_rows=len(row_ids),
        named_split=named_split,
        cheap=cheap[1][chosen] if cheap is not None else None,
        cheap_name=cheap[0] if cheap is not None else "TF-IDF",
    )


def is_usable(vectors: Floats) -> Bools:
    """Whether a vector has a direction: finite, and not of length 0; shape (rows,)."""
    return np.asarray(np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1), dtype=np.bool_)


def codes(hashes: list[str]) -> Ints:
    """Equal ones have one number, shape (rows,)."""
    texts = np.array(hashes, dtype=object).astype(str)
    return np.asarray(np.unique(texts, return_inverse=True)[1], dtype=np.int64)


def normalized(vectors: Floats) -> Floats:
    """Vectors of length 1 along the last axis, float32; a vector of zeros stays one.

    By its largest number first: the squares of 1e25 are more than float32 holds, of 1e-25 nothing.
    """
    largest = np.abs(vectors).max(axis=-1, keepdims=True).astype(np.float64)
    wide = vectors.astype(np.float64) / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.asarray(wide / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def majority(data: LabelledRows) -> dict[str, float]:
    """Accuracy on the test split of always saying the train split's most frequent label."""
    most = np.bincount(data.labels[~data.test]).argmax()
    truth = data.labels[data.test]
    return accuracy(truth, np.full_like(truth, most), data.contents[data.test])


def fit_logistic(features: Any, labels: Ints, bucket: Ints) -> tuple[LogisticRegression, float]:
    """Fit a logistic regression whose C is chosen on a held-out tenth, then refit on all rows.

    Protocol after DINOv2's log_regression.py: L2, features as they are, in float64, at most 1,000
    iterations; C from 10**-2 .. 10**5 in decades where DINOv2 takes 45 steps from 10**-6.

    Args:
        features: Shape (rows, dim), dense or sparse.
        labels: Shape (rows,).
        bucket: Shape (rows,); the highest tenth is held out.

    Returns:
        The fitted model, and C.
    """
    held = bucket > np.quantile(bucket, 0.9)
    if not held.any() or len(np.unique(labels[~held])) < 2:
        held = np.arange(len(labels)) % 10 == 0  # too few rows for the hash to cut a tenth
    if len(np.unique(labels[~held])) < 2:
        return fit(features, labels, 1.0), 1.0
    scores = [
        fit(features[~held], labels[~held], c).score(features[held], labels[held]) for c in _C_GRID
    ]
    best = _C_GRID[int(np.argmax(scores))]
    return fit(features, labels, best), best


def fit(features: Any, labels: Ints, c: float) -> LogisticRegression:
    """Fit one logistic regression at a given C."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # At C = 10**5 the limit is reached; the choice of C then decides whether that was enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=1000, random_state=_FIT_SEED)
        return model.fit(features.astype(np.float64), labels)


def cheap_features(data: LabelledRows, fit_on: Bools) -> Any:
    """TF-IDF of the texts, fitted on some rows, or what `cheap` holds; None without either."""
    if data.texts is None:
        return data.cheap
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = np.array(data.texts, dtype=object)
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=50_000)
    try:
        vectorizer.fit(texts[fit_on])
    except ValueError:  # no word in any text
        return None
    return vectorizer.transform(texts)


def compete(data: LabelledRows) -> Competitor | None:
    """The cheap competitor: logistic regression on cheap features, same split; None without."""
    train, test = ~data.test, data.test
    features = cheap_features(data, train)
    if features is None or not data.is_split:
        return None
    model, _ = fit_logistic(features[train], data.labels[train], data.bucket[train])
    truth, predicted = data.labels[test], model.predict(features[test].astype(np.float64))
    contents = data.contents[test]
    return Competitor(accuracy(truth, predicted, contents), np.asarray(predicted == truth))
