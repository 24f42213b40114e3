"""Probe a table: read a sample back from storage, run the probes as Ray tasks, write the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from fmembed import probes
from fmembed.checkpoint.opening import list_modalities, open_checkpoint
from fmembed.errors import ModelError, SpecError
from fmembed.evaluate import graph
from fmembed.evaluate.facts import in_usd, judge, pick_headlines, state_facts, stored_probes
from fmembed.evaluate.page import make_map, render
from fmembed.evaluate.sample import NO_SOURCE, TableSample, check_columns, read_card, read_sample
from fmembed.evaluate.text_tower import NO_MODEL, embed_captions, embed_prompts
from fmembed.result import RunResult, check_probe
from fmembed.rows.vectors import vector_type
from fmembed.spec import OWN_COLUMNS, ModelSpec, RunSpec, SourceSpec
from fmembed.table.card import Card
from fmembed.table.store import Store
from fmembed.table.table import Table

_DAMAGED = "the record of it is damaged; probe the table again"
# What a probe needs that is a column: the field of `source` that names it.
_COLUMN_OF = {"labels": "label", "captions": "caption"}


def evaluate(
    table: Table,
    spec: RunSpec,
    result: RunResult,
    source: SourceSpec | None,
    model: ModelSpec | None,
) -> RunResult:
    """Probe the newest version and write the report.

    Args:
        table: Where.
        spec: Which probes, of which columns, in which words; with no probe the vectors are not
            looked at, and the report has no map either. It may be the table's own, which anybody
            may have written: nothing that it names is opened.
        result: What the last run counted, for the report.
        source: What the user says the rows came from, to read inputs from; None to do without.
        model: What the user says embedded them, for its text tower; None to do without.

    Returns:
        `result` with `probes`, `report` and `usd` filled in.

    Raises:
        TableError: It is not what its metadata say.
        SpecError: A column is named that the table has not.
    """
    card = read_card(table)
    schema = check_columns(table, spec, card)
    left_out: list[dict[str, Any]] = []
    map_: dict[str, Any] | None = None
    if spec.probes and schema.names:
        sample = read_sample(table, schema, spec, card, source)
        flat = _project(sample)
        for found in _run_probes(table, result.version, sample, spec, card, model):
            # For want of a model: it must replace none that an earlier evaluation has found.
            if found.get("skipped") == NO_MODEL:
                left_out.append(found)
            else:
                old = table.get_probe(result.version, found["probe"], found["column"])
                known = check_probe(old, found["probe"], found["column"])
                table.put_probe(result.version, _with_competitor(found, known))
        map_ = _draw(flat, sample, spec.source.label)
    stored = _stored_probes(table, result.version, card, tuple(probes.PROBES))
    found_by = {(p["probe"], p["column"]): p for p in [*stored, *left_out]}
    results = list(found_by.values())
    named = [found for found in results if found["probe"] in spec.probes]
    result = replace(_with_headlines(result, table, card, named), usd=in_usd(spec, result))
    _write_report(table, spec, card, schema, result, results, map_)
    return result


def _with_competitor(found: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """What a probe found, with the competitor that an earlier one has found of the same rows and
    labels: it had the source, which this one has not.
    """
    if found.get("missing") != NO_SOURCE or known is None or "missing" in known:
        return found
    told, before = found["baselines"], known.get("baselines", {})
    is_same = found.get("headline") == known.get("headline") and all(
        before.get(name) == value for name, value in told.items() if value is not None
    )
    if not is_same or not all(before.get(name) for name in told):
        return found
    return {**{k: v for k, v in found.items() if k != "missing"}, "baselines": before}


def stored_results(table: Table, spec: RunSpec, result: RunResult) -> RunResult | None:
    """`result` with what earlier probes of this version found; None where some have not been run.

    Or not with all that this spec gives them.
    """
    card = read_card(table)
    names = runnable(spec)
    results = _stored_probes(table, result.version, card, names)
    if not table.has_report or len(results) < len(names) * len(card.pooled):
        return None
    if any(r.get("skipped") == _DAMAGED or r.get("missing") == NO_SOURCE for r in results):
        return None
    return _with_headlines(result, table, card, results)


def check_made_by(table: Table, spec: RunSpec) -> None:
    """Refuse a config of another model or setting than the table's.

    Raises:
        SpecError: It is one.
        ModelError: Its checkpoint cannot be found or understood.
    """
    card = read_card(table)
    modality, dtype = card.modality, card.identity["model.dtype"]
    if modality not in list_modalities(spec.model):
        raise ModelError(f"model.id: {spec.model.id} does not embed {modality}, as the table does")
    # `dtype: auto` goes by the device, and the table may have been made on another one.
    checkpoint = open_checkpoint(spec.model, dtype == "bfloat16", modality)
    identity = {**checkpoint.identity, **spec.preprocess.identity(modality)}
    names = identity.keys() | card.identity.keys()
    differ = sorted(n for n in names if identity.get(n) != card.identity.get(n))
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise SpecError(
            f"--from-config: it did not make the table at {table.uri}, which has another "
            f"{', '.join(n[:80] for n in differ[:5])}{more}; give the config that did"
        )


def describe_absent(spec: RunSpec, schema: pa.Schema, names: Sequence[str]) -> str:
    """What to name so that some probes run; empty where all have their columns.

    Args:
        spec: Names the columns.
        schema: Of the table.
        names: Of the probes.
    """
    able = runnable(spec)
    left = [name for name in names if name not in able]
    if not left:
        return ""
    needs = sorted({n for name in left for n in probes.PROBES[name].NEEDS if n in _COLUMN_OF})
    flags = {"labels": "--label COLUMN", "captions": "--set source.caption=COLUMN"}
    named = (f.name for f in schema if vector_type(f.type) is None)
    carried = [name for name in named if name not in OWN_COLUMNS]
    have = ", ".join(name[:80] for name in carried[:20]) or "none to name"
    asked = " and ".join(flags[need] for need in needs)
    verb = "needs" if len(left) == 1 else "need"
    return f"{', '.join(left)} {verb} a column: {asked} (source.label, in a config); it has {have}"


def runnable(spec: RunSpec) -> tuple[str, ...]:
    """The named probes that this source has columns for."""
    absent = {n for n, column in _COLUMN_OF.items() if getattr(spec.source, column) is None}
    return tuple(name for name in spec.probes if not probes.PROBES[name].NEEDS & absent)


def _run_probes(
    table: Table,
    version: int | None,
    sample: TableSample,
    spec: RunSpec,
    card: Card,
    model: ModelSpec | None,
) -> list[dict[str, Any]]:
    """Run each probe that can run on each column, a task each."""
    names = runnable(spec)
    started = []
    for column in card.pooled:
        given = _gather(names, column, sample, spec, card, model)
        if any("graph" in probes.PROBES[name].NEEDS for name in names):
            given["graph"] = graph.start(table, version, column, card)
        for name in names:
            needed = {need: given[need] for need in probes.PROBES[name].NEEDS}
            started.append(ray.remote(num_cpus=1)(_run).remote(name, column, **needed))
    results: list[dict[str, Any]] = ray.get(started)
    for found in results:
        if None in found.get("baselines", {}).values():
            found["missing"] = sample.missing or "no text has a word"
        if "labels" in probes.PROBES[found["probe"]].NEEDS:
            found["unlabelled"] = sample.num_unlabelled
    return results


def _gather(
    names: Sequence[str],
    column: str,
    sample: TableSample,
    spec: RunSpec,
    card: Card,
    model: ModelSpec | None,
) -> dict[str, Any]:
    """What these probes need of one column, by the need: references to it.

    Behind a reference there may be a text instead, which says why there is nothing.
    """
    needs = {need for name in names for need in probes.PROBES[name].NEEDS}
    task = ray.remote(num_cpus=1)
    vectors = sample.vectors[column]
    hashes = sample.rows["content_hash"].to_pylist()
    given: dict[str, Any] = {}
    if "labels" in needs:
        labelled = probes.label_rows(
            sample.rows["row_id"].to_pylist(),
            hashes,
            vectors,
            sample.values(spec.source.label) or [],
            sample.values(spec.source.split),
            sample.texts,
            sample.cheap,
        )
        given["labels"] = ray.put(labelled)
        if "competitor" in needs:
            given["competitor"] = task(probes.compete).remote(given["labels"])
        if "leaks" in needs:
            given["leaks"] = task(probes.find_leaks).remote(given["labels"])
        if "prompts" in needs:
            classes = labelled.classes
            given["prompts"] = task(embed_prompts).remote(spec, model, card, column, classes)
    if "captions" in needs:
        captions = sample.values(spec.source.caption) or []
        given["captions"] = task(embed_captions).remote(
            model, card, column, vectors, captions, hashes
        )
    return given


def _run(name: str, column: str, **given: Any) -> dict[str, Any]:
    if why := next((value for value in given.values() if isinstance(value, str)), None):
        return _skip(name, column, why)
    try:
        return {**probes.run_probe(name, probes.Sample(**given)), "column": column}
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as e:
        # Of vectors that no computation ends with; the others may have something to say.
        return _skip(name, column, f"cannot be computed of these vectors: {str(e)[:200]}")


def _skip(name: str, column: str, why: str) -> dict[str, Any]:
    result = {"probe": name, "version": probes.PROBES[name].VERSION, "column": column}
    return {**result, "num_train": 0, "num_test": 0, "seconds": 0.0, "skipped": why}


def _stored_probes(
    table: Table, version: int | None, card: Card, names: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        found or _skip(name, column, _DAMAGED)
        for name, column, found in stored_probes(table, version, card, names)
    ]


def _with_headlines(
    result: RunResult, table: Table, card: Card, results: Sequence[dict[str, Any]]
) -> RunResult:
    headlines = pick_headlines(results, card)
    report = f"{table.uri}/_report.html"
    return replace(result, probes=headlines, judgement=judge(headlines), report=report)


def _project(sample: TableSample) -> Any:
    """Lay the first column's vectors on a plane, in a task; None without a column."""
    if not sample.vectors:
        return None
    vectors = next(iter(sample.vectors.values()))
    return ray.remote(num_cpus=1)(probes.project).remote(vectors[_shown(sample)])


def _shown(sample: TableSample) -> slice:
    """The rows on the map: every so many-th."""
    return slice(None, None, max(math.ceil(sample.rows.num_rows / probes.MAX_MAP_ROWS), 1))


def _draw(flat: Any, sample: TableSample, label: str | None) -> dict[str, Any] | None:
    """The map for the page; None without a row."""
    if flat is None or not sample.rows.num_rows:
        return None
    method, points = ray.get(flat)
    shown = _shown(sample)
    ids = sample.rows["row_id"].to_pylist()[shown]
    labels = (sample.values(label) or [None] * sample.rows.num_rows)[shown]
    named = [None if v is None else str(v) for v in labels]
    return make_map(method, points, ids, named, sample.texts[shown] if sample.texts else None)


def _write_report(
    table: Table,
    spec: RunSpec,
    card: Card,
    schema: pa.Schema,
    result: RunResult,
    results: Sequence[dict[str, Any]],
    map_: dict[str, Any] | None,
) -> None:
    dims = {c: schema.field(c).type.list_size for c in card.pooled if c in schema.names}
    why = "no probe is named" if spec.source.label is not None else "no source.label names labels"
    if not dims:
        why = "no column holds one vector a row"
    facts = state_facts(spec, card, dims, result)
    dim = next(iter(dims.values()), 0)
    lies_in, gate = Store.of(table), None
    if lies_in is not None and result.version is not None:
        store, name = lies_in
        gate = store.gate_record(name, result.version)
    title = spec.source.stored_name
    table.put_report(render(title, result, facts, dim, results, why, map_, gate))
