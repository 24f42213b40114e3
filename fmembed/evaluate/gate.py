"""The gate: whether a version may take the place of the one that a store's readers get.

Both are read back from storage, and compared on the same rows; each check says in words what it
found. A version without one before it is only looked at for what is wrong whatever it is for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.evaluate.sample import check_rows, read_card, to_floats
from fmembed.probes import drift, paired
from fmembed.rows.columns import CONTENT_HASH, ROW_ID
from fmembed.rows.vectors import vector_type
from fmembed.spec import GateSpec, RunSpec
from fmembed.table.card import Card
from fmembed.table.files import Part
from fmembed.table.reading import rows_of, sample
from fmembed.table.store import Pointer
from fmembed.table.table import Table

# Rows that are compared: with so many two models that are as good, and err on other rows, pass a
# margin of 0.01 (tools/gate_rates.py).
_MAX_ROWS = probes.MAX_ROWS
# Of fewer rows that both have, nothing is said of what has become of them.
_MIN_ROWS = 100
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
class _Side:
    """One version, and the rows of it that are compared."""

    table: Table
    version: int
    card: Card
    parts: list[Part]
    rows_rejected: int
    rows: pa.Table

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def vectors(self, column: str) -> Floats:
        return to_floats(self.rows, column, self.card)


def run_gate(table: Table, version: int, over: tuple[Table, Pointer] | None, spec: RunSpec) -> Any:
    """Look at a version, and compare it with what is promoted.

    Args:
        table: The candidate's.
        version: Which.
        over: The table that is promoted, and the pointer to its version; None where nothing is.
        spec: Names the limits, the label, the split and the probes.

    Returns:
        JSON: `passed`; `over`, the table and the version that it was compared with, None where
        there was none; `checks`, each as `Check`; `words`, why it was refused, or what was found;
        `seconds`.

    Raises:
        TableError: A table is not as a run writes it.
    """
    began = time.monotonic()
    card = read_card(table)
    schema = _schema_of(table, version)
    old = None if over is None else (over[0], over[1].version, read_card(over[0]))
    old_schema = None if old is None else _schema_of(old[0], old[1])
    checks = list(_compare_columns(schema, old_schema, card, old[2] if old else None, spec.gate))
    columns = [c for c in card.pooled if c in schema.names]
    shared = columns
    if old is not None and old_schema is not None:
        shared = [c for c in columns if c in old[2].pooled and c in old_schema.names]
    named = [spec.source.label, spec.source.split]
    named = [n for n in named if n and n in schema.names]
    task: Any = ray.remote(num_cpus=1, max_retries=3)
    rows, _ = ray.get(task(sample).remote(table.uri, [*named, *columns], _MAX_ROWS, None, version))
    check_rows(table, rows, columns)
    new_side = _Side(table, version, card, table.rows.parts(version), table.num_rejected(), rows)
    old_side = None
    if old is not None and over is not None and old_schema is not None:
        there = [n for n in named if n in old_schema.names]
        ids = rows[ROW_ID].to_pylist()
        found = ray.get(task(rows_of).remote(old[0].uri, old[1], [*there, *shared], ids))
        check_rows(old[0], found, shared)
        parts = old[0].rows.parts(old[1])
        old_side = _Side(old[0], old[1], old[2], parts, over[1].rows_rejected, found)
    checks += _count(new_side, old_side, spec)
    found_checks = task(_measure).remote(_given(new_side, old_side, spec, columns, shared))
    checks += [Check(**raw) for raw in ray.get(found_checks)]
    refused = [check for check in checks if check.passed is False]
    if refused:
        words = "; ".join(check.words for check in refused)
    else:
        told = [check.words for check in checks if check.passed is None or check.figures]
        words = "; ".join(told) or "nothing is wrong"
    return {
        "passed": not refused,
        "over": None if over is None else {"table": over[1].table, "version": over[1].version},
        "checks": [asdict(check) for check in checks],
        "words": words,
        "seconds": round(time.monotonic() - began, 2),
    }


def _schema_of(table: Table, version: int) -> pa.Schema:
    parts = table.rows.parts(version)
    return table.schema_of(parts[0]) if parts else pa.schema([])


def _compare_columns(
    schema: pa.Schema,
    old_schema: pa.Schema | None,
    card: Card,
    old_card: Card | None,
    gate: GateSpec,
) -> Iterator[Check]:
    if not schema.names:
        yield Check("rows", False, "it has no row")
    if old_schema is None or old_card is None or not schema.names:
        return
    if gone := [name for name in old_schema.names if name not in schema.names]:
        have = ", ".join(name[:80] for name in gone[:5])
        yield Check("columns", False, f"readers lose the columns {have}")
    for column in old_card.pooled:
        if column not in schema.names or column not in old_schema.names:
            continue
        before, now = (vector_type(s.field(column).type) for s in (old_schema, schema))
        dims = [None if type_ is None else type_.list_size for type_ in (before, now)]
        kinds = [c.outputs[column].precision for c in (old_card, card) if column in c.outputs]
        if dims[0] == dims[1] and len(set(kinds)) == 1:
            continue
        words = (
            f"vectors of {column} are {dims[1]} numbers of {kinds[-1]}, those of the promoted "
            f"version {dims[0]} of {kinds[0]}"
        )
        if gate.same_dim:
            yield Check(
                "dimension", False,
                f"{words}: no index takes both (gate.same_dim: false, where readers can)",
            )  # fmt: skip
        else:
            yield Check("dimension", None, words)


def _count(new: _Side, old: _Side | None, spec: RunSpec) -> Iterator[Check]:
    """What is counted of all rows."""
    gate = spec.gate
    num_read = new.num_rows + new.rows_rejected
    share = new.rows_rejected / max(num_read, 1)
    last = new.table.last_run()
    num_broken = 0 if last is None else last.files_broken
    if num_broken and (old is None or old.card.fingerprint != new.card.fingerprint):
        yield Check(
            "files", False,
            f"{num_broken:,} files of the source cannot be read to their ends, and it lacks what "
            "is in them",
        )  # fmt: skip
    figures = {"rejected": share}
    if old is None:
        yield Check(
            "rejected", spec.output.allows(new.rows_rejected, num_read),
            f"{share:.1%} of the rows are rejected", figures,
        )  # fmt: skip
        return
    before = old.rows_rejected / max(old.num_rows + old.rows_rejected, 1)
    yield Check(
        "rejected", share <= before + gate.max_rejected_increase,
        f"{share:.1%} of the rows are rejected, of the promoted version {before:.1%}",
        {**figures, "before": before},
    )  # fmt: skip
    lost = 1 - new.num_rows / max(old.num_rows, 1)
    yield Check(
        "rows", lost <= gate.max_lost_fraction,
        f"{new.num_rows:,} rows, of the promoted version {old.num_rows:,}", {"lost": max(lost, 0)},
    )  # fmt: skip


def _given(
    new: _Side, old: _Side | None, spec: RunSpec, columns: list[str], shared: list[str]
) -> dict[str, Any]:
    """What is computed with, as plain arrays."""

    def values(side: _Side, name: str | None) -> list[Any] | None:
        return side.rows[name].to_pylist() if name in side.rows.column_names else None

    sides = {"new": new} if old is None else {"new": new, "old": old}
    return {
        "gate": spec.gate,
        "probes": [name for name in spec.probes if name in paired.JUDGES],
        "named": list(spec.probes),
        "label": spec.source.label,
        "precisions": {c: new.card.outputs[c].precision for c in columns},
        "same_model": old is not None and old.card.fingerprint == new.card.fingerprint,
        "normalized": [
            c for c in columns
            if new.card.outputs[c].normalize
            and new.card.outputs[c].precision in ("float32", "float16")
        ],
        "shared": shared,
        **{
            side: {
                "ids": given.rows[ROW_ID].to_pylist(),
                "hashes": given.rows[CONTENT_HASH].to_pylist(),
                "labels": values(given, spec.source.label),
                "splits": values(given, spec.source.split),
                "vectors": {
                    c: given.vectors(c)
                    for c in (columns if side == "new" else shared)
                },
            }
            for side, given in sides.items()
        },
    }  # fmt: skip


def _measure(given: dict[str, Any]) -> list[dict[str, Any]]:
    """What is computed, in a task: it takes scikit-learn, and a minute of ten thousand rows."""
    new, old = given["new"], given.get("old")
    found: list[Check] = []
    at_new, at_old = _common(new, old)
    several = len(new["vectors"]) > 1
    for column, vectors in new["vectors"].items():
        named = f"{column}: " if several else ""
        before = None
        if old is not None and column in given["shared"]:
            before = old["vectors"][column]
        checks = [*_look(given, column, vectors, new, before, old)]
        if old is not None and before is not None and len(at_new) >= _MIN_ROWS:
            both = before[at_old], vectors[at_new]
            if all(np.isfinite(v).all() for v in both):
                checks += _judge(given, new, old, at_new, at_old, both)
                is_judged = any(check.name.startswith("probe ") for check in checks)
                checks += _drifts(
                    given, column, vectors, new, old, at_new, at_old, both, is_judged
                )  # fmt: skip
        elif before is not None:
            checks.append(
                Check(
                    "same rows", None if given["same_model"] else False,
                    f"both have {len(at_new):,} rows of the same ids, too few to compare them by",
                )
            )  # fmt: skip
        found += [Check(c.name, c.passed, named + c.words, c.figures) for c in checks]
    return [asdict(check) for check in found]


def _common(new: dict[str, Any], old: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Where the rows are that both have, by their ids."""
    if old is None:
        return [], []
    place = {row_id: i for i, row_id in enumerate(old["ids"])}
    both = [(i, place[row_id]) for i, row_id in enumerate(new["ids"]) if row_id in place]
    return [i for i, _ in both], [j for _, j in both]


def _look(
    given: dict[str, Any],
    column: str,
    vectors: Floats,
    new: dict[str, Any],
    before: Floats | None,
    old: dict[str, Any] | None,
) -> Iterator[Check]:
    """What is wrong with vectors whatever they are for."""
    gate: GateSpec = given["gate"]
    now = drift.health(vectors, _codes(new["hashes"]))
    was = None
    if before is not None and old is not None and len(before):
        was = drift.health(before, _codes(old["hashes"]))
    yield Check(
        "finite", now["not_finite"] == 0,
        f"{now['not_finite']:.1%} of the vectors hold a NaN or an infinity",
    ) if now["not_finite"] else Check("finite", True, "all numbers are finite")  # fmt: skip
    if now["zero"]:
        allowed = max(_MAX_ZERO, was["zero"] if was else 0)
        yield Check(
            "zero", now["zero"] <= allowed, f"{now['zero']:.1%} of the vectors are of length 0"
        )
    is_one = now["mean_cosine"] > gate.max_mean_cosine and len(vectors) > 1
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
    norms = f"lengths are {now['norm_low']:.3f} to {now['norm_high']:.3f}"
    if column in given["normalized"]:
        is_unit = max(abs(now["norm_low"] - 1), abs(now["norm_high"] - 1)) <= _NORM_ERROR
        yield Check("norms", is_unit, f"{norms}, of vectors of length 1")
    elif was is not None and given["same_model"]:
        factor = now["norm"] / max(was["norm"], 1e-12)
        is_like = 1 / _MAX_NORM_FACTOR <= factor <= _MAX_NORM_FACTOR
        yield Check("norms", is_like, f"{norms}, {factor:.2f} of those of the promoted version")


def _judge(
    given: dict[str, Any],
    new: dict[str, Any],
    old: dict[str, Any],
    at_new: list[int],
    at_old: list[int],
    both: tuple[Floats, Floats],
) -> Iterator[Check]:
    """The same probe on both, on the same rows and split."""
    gate: GateSpec = given["gate"]
    if given["label"] is None or new["labels"] is None or old["labels"] is None:
        yield Check("probes", None, "no probe compares them: there is no column of labels")
        return
    if not given["probes"]:
        yield Check("probes", None, "no probe compares them: probes names neither knn nor linear")
        return
    labels = [new["labels"][i] for i in at_new], [old["labels"][j] for j in at_old]
    kept = [k for k, pair in enumerate(zip(*labels, strict=True)) if None not in pair]
    hashes = [new["hashes"][at_new[k]] for k in kept]
    splits = None if new["splits"] is None else [new["splits"][at_new[k]] for k in kept]
    ids = [new["ids"][at_new[k]] for k in kept]
    sides = [
        probes.label_rows(ids, hashes, v[kept], [own[k] for k in kept], splits, None)
        for v, own in ((both[0], labels[1]), (both[1], labels[0]))
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
    groups = _codes(hashes)[is_judged]
    most_frequent = float(np.bincount(sides[0].labels[is_judged]).max() / max(is_judged.sum(), 1))
    for name in given["probes"]:
        was, now = (paired.hits(name, side)[is_judged] for side in sides)
        found = paired.difference(was, now, groups)
        # Another model has to show that it is not worse. Of the same one the new rows are what they
        # are, and it has to be seen that it is: of 600 rows twelve that are new, four of them hard
        # to judge, kept readers from all that was new.
        end = "high" if given["same_model"] else "low"
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
            words += f", too few rows to tell that it is no more than {gate.margin} worse"
        yield Check(f"probe {name}", is_enough, words, found)


def _drifts(
    given: dict[str, Any],
    column: str,
    vectors: Floats,
    new: dict[str, Any],
    old: dict[str, Any],
    at_new: list[int],
    at_old: list[int],
    both: tuple[Floats, Floats],
    is_judged: bool,
) -> Iterator[Check]:
    """How the vectors differ without a label: by what arrived, or across models."""
    gate: GateSpec = given["gate"]
    if not given["same_model"]:
        some = drift.spread(len(at_new), drift.MAX_NEIGHBOURED)
        shared = drift.mutual_neighbours(both[0][some], both[1][some])
        cka, kept = drift.linear_cka(*both), drift.kept_by_a_map(*both)
        least = max(gate.min_neighbours, 2 * shared["by_chance"])
        is_like = bool(shared["value"] >= least or gate.min_neighbours == 0)
        # A better model may have other neighbours: where probes judge both, it is only told.
        like = None if is_judged else is_like
        worth = (
            "embedding all anew changes little" if kept >= _MAP_IS_ENOUGH
            else "which no map of the old ones gives"
        )  # fmt: skip
        yield Check(
            "neighbours",
            like,
            f"of the ten nearest rows {shared['value']:.0%} are the old ones' too (by chance "
            f"{shared['by_chance']:.1%}); linear CKA {cka:.2f}; a map from the old vectors keeps "
            f"{kept:.0%} of the new ten nearest: {worth}",
            {"mutual": shared["value"], "cka": cka, "kept_by_a_map": kept},
        )  # fmt: skip
        return
    is_same = [new["hashes"][i] == old["hashes"][j] for i, j in zip(at_new, at_old, strict=True)]
    stayed = np.flatnonzero(np.array(is_same, dtype=np.bool_))
    limit = _SAME_COSINE.get(given["precisions"][column])
    if len(stayed) and limit is not None:
        same = float(np.quantile(drift.cosines(both[0][stayed], both[1][stayed]), 0.01))
        yield Check(
            "unchanged rows", same >= limit,
            f"{len(stayed):,} rows have not changed; cosine of old and new at least {same:.3f} for "
            "99 in 100",
        )  # fmt: skip
    changed = np.flatnonzero(~np.array(is_same, dtype=np.bool_))
    if len(changed):
        cosines = drift.cosines(both[0][changed], both[1][changed])
        low = float((cosines < 0.5).mean())
        yield Check(
            "changed rows", None,
            f"{len(changed):,} of {len(at_new):,} rows have changed: cosine of old and new "
            f"{np.median(cosines):.2f} at the median, below 0.5 for {low:.0%}",
            {"median": float(np.median(cosines)), "below_half": low},
        )  # fmt: skip
    stays = np.zeros(len(vectors), dtype=np.bool_)
    stays[[i for i, same in zip(at_new, is_same, strict=True) if same]] = True
    arrived, before = np.flatnonzero(~stays), np.flatnonzero(stays)
    num = min(len(arrived), len(before), drift.MAX_ARRIVED)
    if num < drift.MIN_ARRIVED:
        return
    rng = np.random.default_rng(0)
    told = drift.told_apart(
        vectors[rng.permutation(before)[:num]], vectors[rng.permutation(arrived)[:num]]
    )
    limit = gate.max_arrival_auc
    passed = None if limit is None else told["low"] <= limit
    words = f"what arrived ({len(arrived):,} rows) can be told from what was there with AUC "
    words += f"{told['auc']:.2f}"
    if told["auc"] > _DRIFTED and told["low"] > 0.5:
        words += ": it is of another kind"
    yield Check("arrivals", passed, words, told)


def _codes(hashes: list[str]) -> Any:
    return np.unique(np.array(hashes, dtype=object).astype(str), return_inverse=True)[1]
