"""What the gate looks at: vectors by themselves, and against those that are promoted.

On plain arrays, in a Ray task: it takes scikit-learn, and minutes of twenty thousand rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.probes import drift, intervals, paired
from fmembed.spec import GateSpec

# Of fewer rows that both have, nothing is said of what has become of them.
_MIN_ROWS = 100
# One in twenty bootstraps lies below the lower end of a difference, and one above the upper one.
_OUTSIDE = 0.1
# What is told as a warning, and refuses nothing unless the config says so.
_DRIFTED = 0.6
# A map from the old vectors that keeps so much of the ten nearest is nearly as good.
_MAP_IS_ENOUGH = 0.95
# The lengths of one model's vectors do not double from one week to the next.
_MAX_NORM_FACTOR = 2.0
# Of a first version, which nothing can be compared with: so many inputs may share a vector.
_MAX_COPIES = 0.5
# So many vectors may be of length 0: empty texts, silence.
_MAX_ZERO = 0.01
# Of rows that have not changed, by the same model: one in a hundred may be farther off.
_SAME_COSINE = {"float32": 0.99, "float16": 0.99, "int8": 0.95}
# What rounding does to the length of a vector that was normalised, in float16 too.
_NORM_ERROR = 0.01


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `passed` is None where it is only told."""

    name: str
    passed: bool | None
    words: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """Rows of one version: a label is None where a row has none, `labels` and `splits` where no
    column of them is named; vectors by column, shape (rows, dim) each.
    """

    ids: list[str]
    hashes: list[str]
    labels: list[Any] | None
    splits: list[Any] | None
    vectors: Mapping[str, Floats]


@dataclass(frozen=True)
class Question:
    """What is asked of both: by these limits and probes, whether or not one model has made both.

    `precisions` are those of the new version's columns, `normalized` the columns whose vectors are
    of length 1.
    """

    gate: GateSpec
    probes: tuple[str, ...]
    same_model: bool
    precisions: Mapping[str, str] = field(default_factory=dict)
    normalized: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pair:
    """The rows that both have, by their ids: `at_new` and `at_old` say where, and `after` and
    `before` are their vectors, shape (rows, dim) each.
    """

    new: Side
    old: Side
    at_new: list[int]
    at_old: list[int]
    after: Floats
    before: Floats

    @classmethod
    def of(cls, new: Side, old: Side, column: str) -> Pair:
        """The pair of a column."""
        place = {row_id: i for i, row_id in enumerate(old.ids)}
        both = [(i, place[row_id]) for i, row_id in enumerate(new.ids) if row_id in place]
        at_new, at_old = [i for i, _ in both], [j for _, j in both]
        after, before = new.vectors[column][at_new], old.vectors[column][at_old]
        return cls(new, old, at_new, at_old, after, before)


def compare(question: Question, new: Side, old: Side | None) -> list[Check]:
    """Look at all columns of vectors, and compare those that both have.

    Args:
        question: What is asked.
        new: The candidate.
        old: What is promoted; None where nothing is.
    """
    found: list[Check] = []
    for column, vectors in new.vectors.items():
        before = None if old is None else old.vectors.get(column)
        was = None
        if old is not None and before is not None and len(before):
            was = drift.health(before, probes.codes(old.hashes))
        checks = list(_look(question, column, drift.health(vectors, probes.codes(new.hashes)), was))
        if old is not None and before is not None:
            checks += _compare(question, column, Pair.of(new, old, column))
        named = f"{column}: " if len(new.vectors) > 1 else ""
        found += [replace(check, words=named + check.words) for check in checks]
    return found


def _compare(question: Question, column: str, pair: Pair) -> Iterator[Check]:
    if len(pair.at_new) < _MIN_ROWS:
        yield Check(
            "same rows", None if question.same_model else False,
            f"both have {len(pair.at_new):,} rows of the same ids, too few to compare them by",
        )  # fmt: skip
        return
    if not (np.isfinite(pair.after).all() and np.isfinite(pair.before).all()):
        return  # said already
    judged = list(judge(question, pair))
    yield from judged
    if question.same_model:
        yield from _drift_within(question, column, pair)
    else:
        yield _drift_across(question, pair, any(c.name.startswith("probe ") for c in judged))


def _look(
    question: Question, column: str, now: dict[str, float], was: dict[str, float] | None
) -> Iterator[Check]:
    """What is wrong with vectors whatever they are for, by `drift.health` of now and before."""
    gate, broken = question.gate, now["not_finite"]
    yield Check("finite", not broken, f"{broken:.1%} of the vectors hold a NaN or an infinity")
    if now["zero"]:
        allowed = max(_MAX_ZERO, was["zero"] if was else 0)
        yield Check(
            "zero", now["zero"] <= allowed, f"{now['zero']:.1%} of the vectors are of length 0"
        )
    is_one = now["mean_cosine"] > gate.max_mean_cosine
    words = f"pairs of rows have a mean cosine of {now['mean_cosine']:.3f}"
    if was is not None:
        words += f", of the promoted version {was['mean_cosine']:.3f}"
    if is_one:
        words = f"the vectors have collapsed: {words}"
    yield Check(
        "collapse", not is_one, f"{words}, and spread to {now['rank']:,.1f} directions",
        {"mean_cosine": now["mean_cosine"], "rank": now["rank"]},
    )  # fmt: skip
    most = _MAX_COPIES if was is None else was["copies"] + gate.max_copies_increase
    yield Check(
        "copies", now["copies"] <= most,
        f"{now['copies']:.1%} of unlike inputs share a vector"
        + (f", of the promoted version {was['copies']:.1%}" if was else ""),
    )  # fmt: skip
    if was is not None:
        more = now["repeated"] - was["repeated"]
        yield Check(
            "repeated rows", more <= gate.max_repeated_increase,
            f"{now['repeated']:.1%} of the rows have the content of another row, of the promoted "
            f"version {was['repeated']:.1%} (gate.max_repeated_increase = "
            f"{gate.max_repeated_increase})",
        )  # fmt: skip
    norms = f"lengths are {now['norm_low']:.3f} to {now['norm_high']:.3f}"
    if column in question.normalized:
        is_unit = max(abs(now["norm_low"] - 1), abs(now["norm_high"] - 1)) <= _NORM_ERROR
        yield Check("norms", is_unit, f"{norms}, of vectors of length 1")
    elif was is not None and question.same_model:
        factor = now["norm"] / max(was["norm"], 1e-12)
        is_like = 1 / _MAX_NORM_FACTOR <= factor <= _MAX_NORM_FACTOR
        yield Check("norms", is_like, f"{norms}, {factor:.2f} of those of the promoted version")


def judge(question: Question, pair: Pair) -> Iterator[Check]:
    """The same probe on both, on the same rows and split."""
    gate, new, old = question.gate, pair.new, pair.old
    if new.labels is None or old.labels is None:
        yield Check("probes", None, "no probe compares them: there is no column of labels")
        return
    if not question.probes:
        yield Check("probes", None, "no probe compares them: probes names neither knn nor linear")
        return
    labels = [new.labels[i] for i in pair.at_new], [old.labels[j] for j in pair.at_old]
    kept = [k for k, pair in enumerate(zip(*labels, strict=True)) if None not in pair]
    hashes = [new.hashes[pair.at_new[k]] for k in kept]
    splits = None if new.splits is None else [new.splits[pair.at_new[k]] for k in kept]
    ids = [new.ids[pair.at_new[k]] for k in kept]
    sides = [
        probes.label_rows(ids, hashes, v[kept], [own[k] for k in kept], splits, None)
        for v, own in ((pair.before, labels[1]), (pair.after, labels[0]))
    ]
    num_relabelled = sum(str(labels[0][k]) != str(labels[1][k]) for k in kept)
    if num_relabelled:
        yield Check("labels", None, f"{num_relabelled:,} of {len(kept):,} rows have another label")
    if any(len(side.classes) < 2 for side in sides):
        yield Check("probes", None, "no probe compares them: there are no two labels")
        return
    if any(len(side.classes) > len(kept) / 2 for side in sides):
        yield Check("probes", None, "no probe compares them: most rows have a label of their own")
        return
    is_judged = paired.judged(sides[1])
    groups = probes.codes(hashes)[is_judged]
    most_frequent = float(np.bincount(sides[0].labels[is_judged]).max() / max(is_judged.sum(), 1))
    for name in question.probes:
        was, now = (paired.hits(name, side)[is_judged] for side in sides)
        found = intervals.difference(was, now, groups, _OUTSIDE)
        # Another model has to show that it is not worse. Of the same one the new rows are what they
        # are, and it has to be seen that it is: of 600 rows twelve that are new, four of them hard
        # to judge, kept readers from all that was new.
        end = "high" if question.same_model else "low"
        is_enough = found[end] >= -gate.margin
        words = (
            f"{name}: {found['old']:.4f} before, {found['new']:.4f} now on the same "
            f"{int(is_judged.sum()):,} rows ({found['value']:+.4f}, {found['low']:+.4f} to "
            f"{found['high']:+.4f})"
        )
        if found["old"] <= most_frequent + gate.margin:
            words += ", no more than the most frequent label alone: it tells nothing of them"
            yield Check(f"uninformative {name}", None, words)
            continue
        if not is_enough and found["high"] >= -gate.margin:
            words += f", too few rows to rule out that it is gate.margin = {gate.margin} worse"
        elif not is_enough:
            words += f", worse by more than gate.margin = {gate.margin}"
        elif found["value"] < -gate.margin:
            words += ", which so few contents make nobody sure of"
        yield Check(f"probe {name}", is_enough, words, found)


def _drift_across(question: Question, pair: Pair, is_judged: bool) -> Check:
    """How the vectors of another model differ, without a label."""
    some = drift.spread(len(pair.at_new), drift.MAX_NEIGHBOURED)
    shared = drift.mutual_neighbours(pair.before[some], pair.after[some])
    cka, kept = (
        drift.linear_cka(pair.before, pair.after),
        drift.kept_by_a_map(pair.before, pair.after),
    )
    least = max(question.gate.min_neighbours, 2 * shared["by_chance"])
    is_like = bool(shared["value"] >= least or question.gate.min_neighbours == 0)
    # A better model may have other neighbours: where probes judge both, it is only told.
    like = None if is_judged else is_like
    worth = (
        "embedding all anew changes little" if kept >= _MAP_IS_ENOUGH
        else "which no map of the old ones gives"
    )  # fmt: skip
    return Check(
        "neighbours",
        like,
        f"of the ten nearest rows {shared['value']:.0%} are the old ones' too (by chance "
        f"{shared['by_chance']:.1%}); linear CKA {cka:.2f}; a map from the old vectors keeps "
        f"{kept:.0%} of the new ten nearest: {worth}",
        {"mutual": shared["value"], "cka": cka, "kept_by_a_map": kept},
    )  # fmt: skip


def _drift_within(question: Question, column: str, pair: Pair) -> Iterator[Check]:
    """How the vectors of one model differ, without a label: by what changed, and what arrived."""
    vectors = pair.new.vectors[column]
    is_same = [
        pair.new.hashes[i] == pair.old.hashes[j]
        for i, j in zip(pair.at_new, pair.at_old, strict=True)
    ]
    stayed = np.flatnonzero(np.array(is_same, dtype=np.bool_))
    limit = _SAME_COSINE.get(question.precisions[column])
    if len(stayed) and limit is not None:
        same = float(np.quantile(drift.cosines(pair.before[stayed], pair.after[stayed]), 0.01))
        yield Check(
            "unchanged rows", same >= limit,
            f"{len(stayed):,} rows have not changed; cosine of old and new at least {same:.3f} for "
            "99 in 100",
        )  # fmt: skip
    changed = np.flatnonzero(~np.array(is_same, dtype=np.bool_))
    if len(changed):
        cosines = drift.cosines(pair.before[changed], pair.after[changed])
        low = float((cosines < 0.5).mean())
        yield Check(
            "changed rows", None,
            f"{len(changed):,} of {len(pair.at_new):,} rows have changed: cosine of old and new "
            f"{np.median(cosines):.2f} at the median, below 0.5 for {low:.0%}",
            {"median": float(np.median(cosines)), "below_half": low},
        )  # fmt: skip
    stays = np.zeros(len(vectors), dtype=np.bool_)
    stays[[i for i, same in zip(pair.at_new, is_same, strict=True) if same]] = True
    arrived, before = np.flatnonzero(~stays), np.flatnonzero(stays)
    num = min(len(arrived), len(before), drift.MAX_ARRIVED)
    if num < drift.MIN_ARRIVED:
        return
    rng = np.random.default_rng(0)
    told = drift.told_apart(
        vectors[rng.permutation(before)[:num]], vectors[rng.permutation(arrived)[:num]]
    )
    limit = question.gate.max_arrival_auc
    passed = None if limit is None else told["low"] <= limit
    words = f"what arrived ({len(arrived):,} rows) can be told from what was there with AUC "
    words += f"{told['auc']:.2f}"
    if told["auc"] > _DRIFTED and told["low"] > 0.5:
        words += ": it is of another kind"
    yield Check("arrivals", passed, words, told)
