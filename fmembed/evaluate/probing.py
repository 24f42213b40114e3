"""Probe a table: read a sample back from storage, run the probes as Ray tasks, write the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from fmembed import probes
from fmembed.arrays import Floats
from fmembed.checkpoint.opening import list_modalities, open_checkpoint
from fmembed.errors import ModelError, SpecError, TableError, reason
from fmembed.evaluate.facts import in_usd, pick_headlines, state_facts
from fmembed.evaluate.page import make_map, render
from fmembed.evaluate.source_again import cut_inputs, fetch_inputs
from fmembed.evaluate.stored import DAMAGED, Stored
from fmembed.evaluate.text_tower import NO_MODEL, embed_captions, embed_prompts
from fmembed.result import check_probe
from fmembed.rows.columns import PARENT_ID, PIECE_START, PIECE_STOP
from fmembed.rows.ids import keys_of
from fmembed.rows.precision import PRECISIONS, dequantize
from fmembed.spec import ModelSpec, RunSpec, SourceSpec
from fmembed.table.reading import sample
from fmembed.table.table import Table

_NO_SOURCE = "needs the source: give --from-config CONFIG"


def evaluate(
    table: Table,
    spec: RunSpec,
    run: dict[str, Any],
    source: SourceSpec | None,
    model: ModelSpec | None,
) -> dict[str, Any]:
    """Probe the newest version and write the report.

    Args:
        table: Where.
        spec: Which probes, of which columns, in which words; with no probe the vectors are not
            looked at, and the report has no map either. It may be the table's own, which anybody
            may have written: nothing that it names is opened.
        run: The last run's counts, for the report.
        source: What the user says the rows came from, to read inputs from; None to do without.
        model: What the user says embedded them, for its text tower; None to do without.

    Returns:
        `run` with `probes` and `report` filled in.

    Raises:
        TableError: It is not what its metadata say.
        SpecError: A column is named that the table has not.
    """
    stored = Stored.of(table)
    version = run["version"]
    schema = _check_columns(table, spec, stored)
    map_: dict[str, Any] | None = None
    left_out: list[dict[str, Any]] = []
    if spec.probes and schema.names:
        map_, left_out = _look(table, schema, spec, stored, version, source, model)
    found = [*_stored_probes(table, version, stored, tuple(probes.PROBES)), *left_out]
    results = list({(r["probe"], r["column"]): r for r in found}.values())
    run = {
        **run,
        "probes": pick_headlines(results, stored),
        "report": f"{table.uri}/_report.html",
        "usd": in_usd(spec, run),
    }
    dims = {c: schema.field(c).type.list_size for c in stored.pooled if c in schema.names}
    why = "no probe is named" if spec.source.label is not None else "no source.label names labels"
    if not dims:
        why = "no column holds one vector a row"
    facts = state_facts(spec, stored, dims, run)
    dim = next(iter(dims.values()), 0)
    html = render(spec.source.stored_name, run, facts, dim, results, why, map_)
    table.put_report(html)
    return run


def check_made_by(table: Table, spec: RunSpec) -> None:
    """Refuse a config of another model or setting than the table's.

    Raises:
        SpecError: It is one.
        ModelError: Its checkpoint cannot be found or understood.
    """
    stored = Stored.of(table)
    modality, dtype = stored.modality, stored.identity["model.dtype"]
    if modality not in list_modalities(spec.model):
        raise ModelError(f"model.id: {spec.model.id} does not embed {modality}, as the table does")
    # `dtype: auto` goes by the device, and the table may have been made on another one.
    checkpoint = open_checkpoint(spec.model, dtype == "bfloat16", modality)
    identity = {**checkpoint.identity, **spec.preprocess.identity(modality)}
    names = identity.keys() | stored.identity.keys()
    differ = sorted(n for n in names if identity.get(n) != stored.identity.get(n))
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise SpecError(
            f"--from-config: it did not make the table at {table.uri}, which has another "
            f"{', '.join(n[:80] for n in differ[:5])}{more}; give the config that did"
        )


def _check_columns(table: Table, spec: RunSpec, stored: Stored) -> pa.Schema:
    """The table's columns: vectors where its metadata say so, and all that the spec names."""
    try:
        schema = table.schema()
    except (pa.ArrowException, OSError) as e:
        raise TableError(f"table: {table.uri}: cannot read its parts: {reason(e)}") from None
    if not schema.names:
        return schema
    if stored.identity["preprocess.pieces_are_rows"] and PARENT_ID not in schema.names:
        raise TableError(f"table: {table.uri}: its metadata are damaged: no pieces; embed it anew")
    for column in stored.pooled:
        type_ = schema.field(column).type if column in schema.names else pa.null()
        precision = PRECISIONS[stored.outputs[column]["precision"]]
        ends = stored.ranges.get(column, ())
        shapes = [tuple(map(precision.stored_dim, end.shape)) for end in ends]
        if (
            not pa.types.is_fixed_size_list(type_)
            or type_.value_type not in [p.arrow for p in PRECISIONS.values()]
            or not type_.list_size
            or (precision.needs_ranges and shapes != [(type_.list_size,)] * 2)
        ):
            raise TableError(
                f"table: {table.uri}: its column {column} does not hold the vectors that its "
                "metadata promise; embed it anew"
            )
    for field in ("label", "split", "caption"):
        column = getattr(spec.source, field)
        if column is not None and column not in schema.names:
            has = ", ".join(name[:80] for name in schema.names[:20])
            raise SpecError(f"source.{field}: no column {column[:80]!r} in the table; it has {has}")
    return schema


def _look(
    table: Table,
    schema: pa.Schema,
    spec: RunSpec,
    stored: Stored,
    version: int | None,
    source: SourceSpec | None,
    model: ModelSpec | None,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Run the probes and put their results beside the table.

    Returns:
        The map, where there is a vector; and the results of probes that were left out for want of
        a model, which replace none that an earlier look has found.
    """
    named = [c for c in (spec.source.label, spec.source.split, spec.source.caption) if c]
    by_piece = stored.identity["preprocess.pieces_are_rows"]
    has_texts = stored.modality == "text" and spec.source.input in schema.names
    has_texts = has_texts and pa.types.is_string(schema.field(spec.source.input).type)
    if has_texts:
        named.append(spec.source.input)
    if by_piece:
        named += [PARENT_ID, PIECE_START, PIECE_STOP]
    task = ray.remote(num_cpus=1)
    rows: pa.Table = ray.get(
        task(sample).remote(table.uri, [*named, *stored.pooled], probes.MAX_ROWS, spec.source.label)
    )
    _check_sample(table, rows, stored)
    texts, cheap, missing = None, None, None
    if has_texts:
        texts = rows[spec.source.input].to_pylist()
        if by_piece:
            texts = cut_inputs(texts, rows)
    elif source is None:
        missing = _NO_SOURCE
    else:
        texts, cheap, missing = fetch_inputs(source, stored, rows)
    vectors = {column: _matrix(rows, column, stored) for column in stored.pooled}
    flat = None
    step = max(math.ceil(rows.num_rows / probes.MAX_MAP_ROWS), 1)
    if vectors:
        flat = task(probes.project).remote(next(iter(vectors.values()))[::step])
    results: list[dict[str, Any]] = ray.get(
        [
            future
            for column in stored.pooled
            for future in _probe(spec, stored, model, rows, column, vectors[column], texts, cheap)
        ]
    )
    left_out = [r for r in results if r.get("skipped") == NO_MODEL]
    for r in results:
        if None in r.get("baselines", {}).values():
            r["missing"] = missing or "no text has a word"
        if r not in left_out:
            table.put_probe(version, r)
    if flat is None or not rows.num_rows:
        return None, left_out
    map_ = _map(
        spec,
        ray.get(flat),
        rows.take(list(range(0, rows.num_rows, step))),
        texts[::step] if texts else None,
    )
    return map_, left_out


def _check_sample(table: Table, rows: pa.Table, stored: Stored) -> None:
    """Refuse rows that no run has written: parts are files, which anybody may have made.

    Raises:
        TableError: Texts that are no UTF-8, hashes that are none, rows without id or vector.
    """
    try:
        rows.validate(full=True)
        is_hash = pc.match_substring_regex(rows["content_hash"], "^[0-9a-f]{32}$")
        whole = pc.all(is_hash).as_py() is not False and not rows["row_id"].null_count
        for column in stored.pooled:
            values = rows[column].combine_chunks()
            whole &= not values.null_count and not values.flatten().null_count
        keys_of(rows["row_id"].to_pylist())
    except (pa.ArrowException, AttributeError, TypeError, KeyError) as e:
        raise TableError(f"table: {table.uri}: its rows are damaged: {reason(e)}") from None
    if not whole:
        raise TableError(
            f"table: {table.uri}: its rows are damaged: an id, a content hash or a vector is none"
        )


def stored_results(table: Table, spec: RunSpec, run: dict[str, Any]) -> dict[str, Any] | None:
    """`run` with what earlier probes of this version found; None where some have not been run.

    Or not with all that this spec gives them.
    """
    stored = Stored.of(table)
    names = _runnable(spec)
    results = _stored_probes(table, run["version"], stored, names)
    if not table.has_report or len(results) < len(names) * len(stored.pooled):
        return None
    if any(r.get("skipped") == DAMAGED or r.get("missing") == _NO_SOURCE for r in results):
        return None
    found = {"probes": pick_headlines(results, stored), "report": f"{table.uri}/_report.html"}
    return {**run, **found}


def _runnable(spec: RunSpec) -> tuple[str, ...]:
    """The named probes that this source has columns for."""
    needs = {"crossmodal": spec.source.caption}
    return tuple(n for n in spec.probes if needs.get(n, spec.source.label) is not None)


def _stored_probes(
    table: Table, version: int | None, stored: Stored, names: Sequence[str]
) -> list[dict[str, Any]]:
    found = []
    for column in stored.pooled:
        for name in names:
            raw = table.get_probe(version, name, column)
            if raw is not None:
                probe = check_probe(raw, name, column)
                found.append(probe or _skip(name, column, DAMAGED))
    return found


def _skip(name: str, column: str, why: str) -> dict[str, Any]:
    result = {"probe": name, "version": probes.PROBES[name].VERSION, "column": column}
    return {**result, "num_train": 0, "num_test": 0, "seconds": 0.0, "skipped": why}


def _probe(
    spec: RunSpec,
    stored: Stored,
    model: ModelSpec | None,
    rows: pa.Table,
    column: str,
    vectors: Floats,
    texts: list[str | None] | None,
    cheap: tuple[str, Floats] | None,
) -> list[Any]:
    """Start the probes of one column; references to their results."""
    task = ray.remote(num_cpus=1)
    names = _runnable(spec)
    hashes = rows["content_hash"].to_pylist()
    labels = rows[spec.source.label].to_pylist() if spec.source.label is not None else []
    splits = rows[spec.source.split].to_pylist() if spec.source.split is not None else None
    started: list[Any] = []
    if spec.source.label is not None:
        made = probes.make_probe_data(
            rows["row_id"].to_pylist(), hashes, vectors, labels, splits, texts, cheap
        )
        data = ray.put(made)
        competitor = task(probes.cheap_accuracy).remote(data)
        for name in names:
            if name == "zeroshot":
                prompts = task(embed_prompts).remote(spec, model, stored, column, made.classes)
                started.append(task(_run).remote(name, column, data, prompts))
            elif name != "crossmodal":
                started.append(task(_run).remote(name, column, data, competitor))
    if "crossmodal" in names:
        captions = rows[spec.source.caption].to_pylist()
        pairs = task(embed_captions).remote(model, stored, column, vectors, captions, hashes)
        started.append(task(_run).remote("crossmodal", column, pairs))
    return started


def _run(name: str, column: str, data: Any, *more: Any) -> dict[str, Any]:
    if isinstance(data, str) or (more and isinstance(more[0], str)):
        # Instead of vectors the reason why there are none.
        return _skip(name, column, data if isinstance(data, str) else more[0])
    return {**probes.run_probe(name, data, *more), "column": column}


def _matrix(rows: pa.Table, column: str, stored: Stored) -> Floats:
    dim = rows.schema.field(column).type.list_size
    flat = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    precision = stored.outputs[column]["precision"]
    return dequantize(flat.reshape(-1, dim), column, precision, stored.ranges)


def _map(
    spec: RunSpec, flat: tuple[str, Any], rows: pa.Table, texts: list[str | None] | None
) -> dict[str, Any] | None:
    method, points = flat
    if not len(points):
        return None
    ids = rows["row_id"].to_pylist()
    label = spec.source.label
    labels = rows[label].to_pylist() if label is not None else [None] * len(ids)
    named = [None if v is None else str(v) for v in labels]
    return make_map(method, points, ids, named, texts)
