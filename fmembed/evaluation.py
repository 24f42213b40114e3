"""Probe a table: read a sample back from storage, run the probes as Ray tasks, write the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from fmembed import probes, report
from fmembed.checkpoint import list_modalities, open_checkpoint
from fmembed.endpoint import cost_usd
from fmembed.outputs import Ranges, dequantize, ranges_from_lists
from fmembed.preprocess import Preprocess
from fmembed.readers import Shard, Source, read_shard
from fmembed.result import check_probe
from fmembed.rows import PARENT_ID, PIECE_START, PIECE_STOP, RowIds, keys_of, row_schema
from fmembed.source import open_source
from fmembed.spec import (
    FmembedError,
    Modality,
    ModelError,
    ModelSpec,
    PreprocessSpec,
    RunSpec,
    SourceSpec,
    SpecError,
    TableError,
)
from fmembed.storage import reason
from fmembed.table import Table, sample

_UNITS = {"text": "tokens", "image": "patches", "audio": "samples"}
_MAX_FETCH_BYTES = 10 * 2**30
# Why a probe, or its cheap competitor, is left out where nobody but the table names what it needs.
_NO_MODEL = "needs the model: give --from-config CONFIG"
_NO_SOURCE = "needs the source: give --from-config CONFIG"
# What is read of an identity.
_NAMED = (
    "model.adapter", "model.dtype", "model.max_tokens", "model.prompt", "model.revision",
    "model.weights", "preprocess.pieces_are_rows",
)  # fmt: skip
_DAMAGED = "the record of it is damaged; probe the table again"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Stored:
    """What the table's metadata say of its vectors."""

    identity: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    ranges: Ranges
    modality: Modality

    @classmethod
    def of(cls, table: Table) -> _Stored:
        card = table.card()
        assert card is not None
        if missing := sorted(set(_NAMED) - card.identity.keys()):
            raise TableError(
                f"table: {table.uri}: its metadata are damaged (no {missing[0]}); embed it anew"
            )
        outputs = {c: output.model_dump() for c, output in card.outputs.items()}
        return cls(card.identity, outputs, ranges_from_lists(card.ranges), card.modality)

    @property
    def pooled(self) -> list[str]:
        """The columns that hold one vector a row."""
        return [c for c, output in self.outputs.items() if output["pooling"] != "tokens"]


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
    stored = _Stored.of(table)
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
        "probes": _headlines(results, stored),
        "report": f"{table.uri}/_report.html",
        "usd": _usd(spec, run),
    }
    dims = {c: schema.field(c).type.list_size for c in stored.pooled if c in schema.names}
    why = "no probe is named" if spec.source.label is not None else "no source.label names labels"
    if not dims:
        why = "no column holds one vector a row"
    facts = _facts(spec, stored, dims, run)
    dim = next(iter(dims.values()), 0)
    html = report.render(spec.source.stored_name, run, facts, dim, results, why, map_)
    table.put_report(html)
    return run


def check_made_by(table: Table, spec: RunSpec) -> None:
    """Refuse a config of another model or setting than the table's.

    Raises:
        SpecError: It is one.
        ModelError: Its checkpoint cannot be found or understood.
    """
    stored = _Stored.of(table)
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


def _check_columns(table: Table, spec: RunSpec, stored: _Stored) -> pa.Schema:
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
        shapes = [ends.shape for ends in stored.ranges.get(column, ())]
        if (
            not pa.types.is_fixed_size_list(type_)
            or not (pa.types.is_floating(type_.value_type) or pa.types.is_int8(type_.value_type))
            or not type_.list_size
            or (
                stored.outputs[column]["precision"] == "int8" and shapes != [(type_.list_size,)] * 2
            )
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
    stored: _Stored,
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
            texts = _cut(texts, rows)
    elif source is None:
        missing = _NO_SOURCE
    else:
        texts, cheap, missing = _fetch_inputs(source, stored, rows)
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
    left_out = [r for r in results if r.get("skipped") == _NO_MODEL]
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


def _check_sample(table: Table, rows: pa.Table, stored: _Stored) -> None:
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
    stored = _Stored.of(table)
    names = _runnable(spec)
    results = _stored_probes(table, run["version"], stored, names)
    if not table.has_report or len(results) < len(names) * len(stored.pooled):
        return None
    if any(r.get("skipped") == _DAMAGED or r.get("missing") == _NO_SOURCE for r in results):
        return None
    found = {"probes": _headlines(results, stored), "report": f"{table.uri}/_report.html"}
    return {**run, **found}


def _runnable(spec: RunSpec) -> tuple[str, ...]:
    """The named probes that this source has columns for."""
    needs = {"crossmodal": spec.source.caption}
    return tuple(n for n in spec.probes if needs.get(n, spec.source.label) is not None)


def _stored_probes(
    table: Table, version: int | None, stored: _Stored, names: Sequence[str]
) -> list[dict[str, Any]]:
    found = []
    for column in stored.pooled:
        for name in names:
            raw = table.get_probe(version, name, column)
            if raw is not None:
                probe = check_probe(raw, name, column)
                found.append(probe or _skip(name, column, _DAMAGED))
    return found


def _skip(name: str, column: str, why: str) -> dict[str, Any]:
    result = {"probe": name, "version": probes.PROBES[name].VERSION, "column": column}
    return {**result, "num_train": 0, "num_test": 0, "seconds": 0.0, "skipped": why}


def _probe(
    spec: RunSpec,
    stored: _Stored,
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
                prompts = task(_embed_prompts).remote(spec, model, stored, column, made.classes)
                started.append(task(_run).remote(name, column, data, prompts))
            elif name != "crossmodal":
                started.append(task(_run).remote(name, column, data, competitor))
    if "crossmodal" in names:
        captions = rows[spec.source.caption].to_pylist()
        pairs = task(_embed_captions).remote(model, stored, column, vectors, captions, hashes)
        started.append(task(_run).remote("crossmodal", column, pairs))
    return started


def _run(name: str, column: str, data: Any, *more: Any) -> dict[str, Any]:
    if isinstance(data, str) or (more and isinstance(more[0], str)):
        # Instead of vectors the reason why there are none.
        return _skip(name, column, data if isinstance(data, str) else more[0])
    return {**probes.run_probe(name, data, *more), "column": column}


def _matrix(rows: pa.Table, column: str, stored: _Stored) -> Floats:
    dim = rows.schema.field(column).type.list_size
    flat = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    precision = stored.outputs[column]["precision"]
    return dequantize(flat.reshape(-1, dim), column, precision, stored.ranges)


# --- the text tower -------------------------------------------------------------------------------


def _embed_prompts(
    spec: RunSpec, model: ModelSpec | None, stored: _Stored, column: str, classes: list[str]
) -> Floats | str:
    """Every template with every class, shape (classes, templates, dim), or why there is none."""
    templates = spec.zeroshot.templates or probes.TEMPLATES[stored.modality]
    words = [spec.zeroshot.classes.get(c, c) for c in classes]
    texts = [t.replace("{}", w) for w in words for t in templates]
    found = _embed_texts(model, stored, column, texts)
    return found if isinstance(found, str) else found.reshape(len(words), len(templates), -1)


def _embed_captions(
    model: ModelSpec | None,
    stored: _Stored,
    column: str,
    vectors: Floats,
    captions: list[str | None],
    hashes: list[str],
) -> probes.PairData | str:
    given = [i for i, caption in enumerate(captions) if caption]
    kept = [str(captions[i]) for i in given]
    distinct, at = np.unique(np.array(kept, dtype=object).astype(str), return_inverse=True)
    found = _embed_texts(model, stored, column, distinct.tolist())
    if isinstance(found, str):
        return found
    codes = np.unique([hashes[i] for i in given], return_inverse=True)[1]
    return probes.PairData(vectors[given], found[at], codes, np.asarray(at, dtype=np.int64))


def _embed_texts(
    model: ModelSpec | None, stored: _Stored, column: str, texts: list[str]
) -> Floats | str:
    """Embed texts by the tower that shares the column's space, or say why that cannot be."""
    if model is None:
        return _NO_MODEL
    from fmembed.encoder import Encoder  # with torch, which the driver does without

    output = stored.outputs[column]
    try:
        if "text" not in list_modalities(model) or output["pooling"] != "projection":
            return "needs a model with a text tower, and its projection"
        same_space = {
            "modality": "text", "outputs": {}, "pooling": None, "layer": None, "prompt": None,
            "precision": "float32", "dims": output["dims"], "normalize": output["normalize"],
            "dtype": stored.identity["model.dtype"],
        }  # fmt: skip
        checkpoint = open_checkpoint(model.model_copy(update=same_space), False, "text")
        digests = (stored.identity["model.weights"], stored.identity["model.adapter"])
        if (checkpoint.digest, checkpoint.adapter_digest) != digests:
            return "the checkpoint has changed since the table was made"
        encoder = Encoder(checkpoint)
    except FmembedError as e:
        return f"its text tower cannot be loaded: {e}"
    rows = [{"row_id": str(i), "_input": text} for i, text in enumerate(texts)]
    table = pa.Table.from_pylist(rows, schema=row_schema(pa.schema([])))
    embedded = encoder(Preprocess(checkpoint, PreprocessSpec())(table))
    for error, message in zip(embedded["_error"], embedded["_message"], strict=True):
        if error.is_valid:
            return f"a text cannot be embedded: {error}: {message}"
    flat = embedded["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=np.float32).reshape(len(texts), -1)


# --- the source's inputs --------------------------------------------------------------------------


def _fetch_inputs(
    spec: SourceSpec, stored: _Stored, rows: pa.Table
) -> tuple[list[str | None] | None, tuple[str, Floats] | None, str | None]:
    """Texts of the sample, or cheap features of its pictures or sounds, from the source again.

    Returns:
        The texts, or the features, or why there is neither.
    """
    by_piece = stored.identity["preprocess.pieces_are_rows"]
    if by_piece and stored.modality != "text":
        return None, None, f"pieces of {stored.modality} have no cheap features"
    try:
        source = open_source(spec, (stored.modality,))
    except FmembedError as e:
        return None, None, f"the source cannot be read again: {e}"
    if source.num_bytes > _MAX_FETCH_BYTES:
        return None, None, "the source is too large to be read again"
    ids = rows[PARENT_ID if by_piece else "row_id"].to_pylist()
    wanted = ray.put(RowIds(keys_of(dict.fromkeys(ids))))
    fetch = ray.remote(num_cpus=1)(_fetch_shard)
    found: dict[str, tuple[str, Any]] = {}
    described = ray.put(source.without_shards)
    for pairs in ray.get([fetch.remote(described, shard, wanted) for shard in source.shards]):
        found.update(pairs)
    inputs = []
    for row_id, content_hash in zip(ids, rows["content_hash"].to_pylist(), strict=True):
        known_hash, value = found.get(row_id, ("", None))
        if known_hash != content_hash:
            return None, None, "the source has changed since"
        inputs.append(value)
    if stored.modality == "text":
        return _cut(inputs, rows) if by_piece else inputs, None, None
    if not inputs:
        return None, None, "there is no row"
    return None, (inputs[0][0], np.stack([features for _, features in inputs])), None


def _cut(texts: list[str | None], rows: pa.Table) -> list[str | None]:
    """The pieces that are rows, of the texts that they are pieces of."""
    spans = zip(rows[PIECE_START].to_pylist(), rows[PIECE_STOP].to_pylist(), strict=True)
    return [(t or "")[start:stop] for t, (start, stop) in zip(texts, spans, strict=True)]


def _fetch_shard(source: Source, shard: Shard, wanted: RowIds) -> dict[str, tuple[str, Any]]:
    found = {}
    for rows in read_shard(source, shard, 0):
        rows = rows.filter(rows["_input"].is_valid())
        ids = rows["row_id"].to_pylist()
        here = np.flatnonzero(wanted.contains(keys_of(ids)))
        values: list[Any] = rows["_input"].take(pa.array(here)).to_pylist()
        if source.modality != "text":
            # Not the pictures themselves, which the driver could not hold.
            name, features = probes.CHEAP[source.modality](values)
            values = [(name, f) for f in features]
        for i, value in zip(here.tolist(), values, strict=True):
            found[ids[i]] = (rows["content_hash"][i].as_py(), value)
    return found


# --- the report -----------------------------------------------------------------------------------


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
    return report.make_map(method, points, ids, named, texts)


def _headlines(results: list[dict[str, Any]], stored: _Stored) -> dict[str, Any]:
    several = len(stored.pooled) > 1
    return {
        f"{r['probe']} {r['column']}" if several else r["probe"]: {"skipped": r["skipped"]}
        if "skipped" in r
        else {
            **r["headline"],
            "baselines": {n: b["value"] for n, b in r["baselines"].items() if b is not None},
            **({"missing": r["missing"]} if "missing" in r else {}),
        }
        for r in results
    }


def _usd(spec: RunSpec, run: dict[str, Any]) -> float | None:
    if spec.model.endpoint is None:
        return None
    return cost_usd(spec.model.endpoint, run["counts"].get("endpoint_tokens", 0))


def _facts(
    spec: RunSpec, stored: _Stored, dims: dict[str, int], run: dict[str, Any]
) -> list[tuple[str, str]]:
    raw, identity, counts = spec.stored(), stored.identity, run["counts"]
    text = [
        ("tokens at most", str(identity["model.max_tokens"])),
        ("prompt", repr(identity["model.prompt"]) if identity["model.prompt"] else "none"),
    ]
    pieces = [
        (name.removeprefix("preprocess.").replace("_", " "), str(value))
        for name, value in identity.items()
        if name.startswith("preprocess.") and value
    ]
    endpoint = []
    if spec.model.endpoint is not None:
        usd = run["usd"]
        endpoint = [
            ("endpoint", raw["model"]["endpoint"]["base_url"]),
            ("tokens the server counted in this run", f"{counts.get('endpoint_tokens', 0):,}"),
            ("cost of this run", f"{usd:.4f} USD" if usd is not None else "no price is given"),
            ("requests", f"{counts.get('endpoint_requests', 0):,}"),
            ("requests sent again", f"{counts.get('endpoint_retries', 0):,}"),
        ]
    units = "characters" if spec.model.endpoint is not None else _UNITS[stored.modality]
    return [
        ("source", f"{raw['source']['uri']} (format {spec.source.format})"),
        ("input column", spec.source.input),
        ("carried columns", ", ".join(spec.source.columns) or "none"),
        ("model", raw["model"]["id"]),
        ("revision", identity["model.revision"] or "a local folder"),
        ("weights, blake2b", identity["model.weights"] or "the server's"),
        *([("adapter", raw["model"]["adapter"])] if raw["model"]["adapter"] else []),
        ("embeds", stored.modality),
        *((f"column {c}", _describe(output, dims.get(c))) for c, output in stored.outputs.items()),
        *(text if stored.modality == "text" else []),
        *pieces,
        ("dtype", identity["model.dtype"]),
        ("remote code", "allowed by the config" if spec.model.trust_remote_code else "off"),
        *endpoint,
        (f"{units} in this run", f"{run['num_units']:,}"),
        ("rows cut in this run", f"{run['num_truncated']:,}"),
        ("bytes a row between preprocessing and model", _bytes_a_row(counts)),
        ("batches halved for memory in this run", f"{counts.get('batches_halved', 0):,}"),
        ("run", f"{run['run_id']}, started {run['started']}"),
    ]


def _bytes_a_row(counts: dict[str, int]) -> str:
    if not counts.get("input_rows"):
        return "nothing was embedded"
    return f"{counts['input_bytes'] / counts['input_rows']:,.0f}"


def _describe(output: dict[str, Any], dim: int | None) -> str:
    parts = [output["pooling"]]
    if dim is not None:
        parts.append(f"{dim} numbers")
    if output["layer"] is not None:
        parts.append(f"layer {output['layer']}")
    if output["dims"] is not None:
        parts.append(f"the first {output['dims']} dimensions")
    parts.append("normalised" if output["normalize"] else "not normalised")
    return ", ".join([*parts, output["precision"]])
