"""Tables of the same rows: which vectors tell the labels best, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.errors import SpecError, TableError
from fmembed.evaluate.sample import check_rows, read_card, to_floats
from fmembed.probes import comparison, paired
from fmembed.probes.comparison import Pair
from fmembed.rows.columns import CONTENT_HASH, ROW_ID
from fmembed.rows.precision import PRECISIONS
from fmembed.rows.vectors import vector_type
from fmembed.spec import OWN_COLUMNS
from fmembed.table.card import Card
from fmembed.table.reading import list_labelled, rows_of, sample
from fmembed.table.table import Table

# Of fewer rows that all have nothing is said.
_MIN_ROWS = 50


@dataclass(frozen=True)
class Model:
    """What made one of the tables, and what its vectors cost: `bytes_a_row` as they lie in memory,
    `rows_per_s` of the last run that embedded, None of vectors made elsewhere.
    """

    table: str
    version: int
    model: str
    column: str
    dim: int
    precision: str
    bytes_a_row: int
    rows_per_s: float | None


@dataclass(frozen=True)
class Ranked:
    """What a probe has found of one table: the share of rows that it said right, the ranks that
    nothing rules out, and whether no other is as good in everything and cheaper.
    """

    table: str
    value: float
    low: float
    high: float
    best_rank: int
    worst_rank: int
    is_pareto: bool


@dataclass(frozen=True)
class Comparison:
    """`ranked` and `pairs` by probe; `rows` are those that all have, with one content and a label;
    `notes` what was left out.
    """

    label: str
    rows: int
    classes: int
    models: list[Model]
    ranked: dict[str, list[Ranked]]
    pairs: dict[str, list[Pair]]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Side:
    model: Model
    ids: list[str]
    hashes: list[str]
    labels: list[Any] | None
    splits: list[Any] | None
    vectors: Floats
    is_imported: bool


def check(
    uris: Sequence[str], names: Sequence[str], label: str | None, split: str | None
) -> tuple[str, str | None]:
    """What is to be compared, before anything is read.

    Returns:
        The columns of labels and of splits; those of the first table's config, where none is named.

    Raises:
        TableError: No table there, or one without a row.
        SpecError: No such column or probe, or fewer than two tables.
    """
    if len(uris) < 2 or len(set(uris)) < len(uris):
        raise SpecError("compare: takes two tables or more, each once")
    if unknown := [name for name in names if name not in paired.JUDGES]:
        raise SpecError(f"compare: takes the probes {', '.join(paired.JUDGES)}, got {unknown[0]}")
    tables = [Table.open(uri) for uri in uris]
    for table in tables:
        if not table.schema().names:
            raise TableError(f"table: {table.uri} has no row to compare")
    first = tables[0]
    label, split = label or _told(first, "label"), split or _told(first, "split")
    if label is None:
        raise SpecError("compare: which column is predicted? --label COLUMN")
    have = [f.name for f in first.schema() if vector_type(f.type) is None]
    if absent := [name for name in (label, split) if name is not None and name not in have]:
        carried = ", ".join(name for name in have if name not in OWN_COLUMNS) or "none"
        raise SpecError(f"compare: no column {absent[0]!r} in {first.uri}; it has {carried}")
    return label, split


def compare(uris: Sequence[str], names: Sequence[str], label: str, split: str | None) -> Comparison:
    """Compare tables on the rows that all of them have.

    Args:
        uris: The tables, as `check` has let them pass.
        names: Of probes: knn, linear.
        label: The column that is predicted.
        split: The column that names the test split; without one each row is judged by probes that
            were trained without it.

    Raises:
        TableError: Too few rows that all have.
    """
    began, notes = time.monotonic(), list[str]()
    sides = _read([Table.open(uri) for uri in uris], uris, label, split)
    first = sides[0]
    kept = _kept(sides, notes)
    if len(kept) < _MIN_ROWS:
        raise TableError(
            f"compare: {len(kept):,} rows with a label are in all tables, with the same content; "
            "too few to compare by"
        )
    place = {row_id: i for i, row_id in enumerate(first.ids)}
    at = [place[row_id] for row_id in kept]
    assert first.labels is not None
    labels = [first.labels[i] for i in at]
    known = next((s for s in sides if not s.is_imported), first)
    by_id = dict(zip(known.ids, known.hashes, strict=True))
    hashes = [by_id[row_id] for row_id in kept]
    splits = None if first.splits is None else [first.splits[i] for i in at]
    task: Any = ray.remote(num_cpus=1, max_retries=3)
    started = {}
    for side in sides:
        own = {row_id: i for i, row_id in enumerate(side.ids)}
        vectors = side.vectors[[own[row_id] for row_id in kept]]
        rows = ray.put(probes.label_rows(kept, hashes, vectors, labels, splits, None))
        for name in names:
            started[name, side.model.table] = task(_hits).remote(name, rows)
    found = {key: ray.get(ref) for key, ref in started.items()}
    contents = probes.codes(hashes)
    ranked, pairs = {}, {}
    for name in names:
        judged = found[name, uris[0]][1]
        hits = {uri: found[name, uri][0][judged] for uri in uris}
        pairs[name] = comparison.compare_pairs(hits, contents[judged])
        ranked[name] = _rank(hits, contents[judged], pairs[name], [s.model for s in sides])
    return Comparison(
        label, len(kept), len({str(v) for v in labels}), [s.model for s in sides], ranked, pairs,
        notes, round(time.monotonic() - began, 2),
    )  # fmt: skip


def _told(table: Table, field_: str) -> str | None:
    card = table.card()
    assert card is not None
    source = card.spec.get("source")
    told = source.get(field_) if isinstance(source, dict) else None
    return told if isinstance(told, str) else None


def _read(
    tables: Sequence[Table], uris: Sequence[str], label: str, split: str | None
) -> list[_Side]:
    """The same rows of all: some of the first one's, those with the smallest content hashes."""
    task: Any = ray.remote(num_cpus=1, max_retries=3)
    sides: list[_Side] = []
    for table, uri in zip(tables, uris, strict=True):
        card, version = read_card(table), table.version()
        schema = table.schema()
        column = next((c for c in card.pooled if c in schema.names), None)
        if column is None or version is None:
            raise TableError(f"table: {uri} has no column with one vector a row")
        named = [label, *([split] if split is not None else [])]
        wanted = [name for name in named if name in schema.names] + [column]
        if sides:
            rows = ray.get(task(rows_of).remote(table.uri, version, wanted, sides[0].ids))
        else:
            rows, _ = ray.get(
                task(sample).remote(table.uri, wanted, probes.MAX_ROWS, label, version)
            )
        check_rows(table, rows, [column])
        labels = rows[label].to_pylist() if label in rows.column_names else None
        if labels is not None:
            is_labelled = list_labelled(rows[label])
            labels = [v if told else None for v, told in zip(labels, is_labelled, strict=True)]
        has_split = split is not None and split in rows.column_names
        sides.append(
            _Side(
                _model(table, uri, version, card, column, rows.schema.field(column).type.list_size),
                rows[ROW_ID].to_pylist(),
                rows[CONTENT_HASH].to_pylist(),
                labels,
                rows[split].to_pylist() if has_split else None,
                to_floats(rows, column, card),
                card.is_imported,
            )
        )
    return sides


def _model(table: Table, uri: str, version: int, card: Card, column: str, stored_dim: int) -> Model:
    precision = PRECISIONS[card.outputs[column].precision]
    told = card.spec.get("model")
    last = table.last_run()
    rate = None if last is None or card.is_imported else last.rows_per_s or None
    return Model(
        table=uri,
        version=version,
        model=str(told.get("id", "?") if isinstance(told, dict) else "?")[:200],
        column=column,
        dim=stored_dim * precision.dims_each,
        precision=card.outputs[column].precision,
        bytes_a_row=stored_dim * (precision.arrow.bit_width // 8),
        rows_per_s=rate,
    )


def _kept(sides: Sequence[_Side], notes: list[str]) -> list[str]:
    """Ids that all have with a label, one content and a finite vector; the first one's order."""
    first = sides[0]
    assert first.labels is not None
    given = [i for i, v in zip(first.ids, first.labels, strict=True) if v is not None]
    everywhere = set(given).intersection(*(side.ids for side in sides))
    known = [dict(zip(s.ids, s.hashes, strict=True)) for s in sides if not s.is_imported]
    same = {i for i in everywhere if len({by_id[i] for by_id in known}) < 2}
    broken = {
        i for s in sides for i, ok in zip(s.ids, _is_finite(s), strict=True)
        if not ok
    }  # fmt: skip
    for num, what in (
        (len(given) - len(everywhere), "are not in all tables"),
        (len(everywhere) - len(same), "have other contents in other tables"),
        (len(same & broken), "have a vector that is not finite"),
    ):
        if num:
            notes.append(f"{num:,} of {len(given):,} rows {what}, and were left out")
    return [i for i in given if i in same and i not in broken]


def _is_finite(side: _Side) -> list[bool]:
    return [bool(ok) for ok in np.asarray(np.isfinite(side.vectors).all(axis=1))]


def _hits(name: str, rows: probes.LabelledRows) -> tuple[Any, Any]:
    return paired.hits(name, rows), paired.judged(rows)


def _rank(
    hits: dict[str, Any], contents: Any, pairs: Sequence[Pair], models: Sequence[Model]
) -> list[Ranked]:
    ranks = comparison.rank_intervals(list(hits), pairs)
    scores = {uri: probes.accuracy(own, np.ones_like(own), contents) for uri, own in hits.items()}
    # How fast a model is counts only where that is known of all.
    is_known = all(m.rows_per_s is not None for m in models)
    points = {
        m.table: (
            scores[m.table]["value"], -m.bytes_a_row, (m.rows_per_s or 0.0) if is_known else 0.0,
        )
        for m in models
    }  # fmt: skip
    best = comparison.pareto(points)
    found = [
        Ranked(uri, s["value"], s["low"], s["high"], *ranks[uri], uri in best)
        for uri, s in scores.items()
    ]
    return sorted(found, key=lambda r: -r.value)
