"""Probe a table: read a sample back from storage, run the probes as Ray tasks, write the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from fmembed import probes, report
from fmembed.checkpoint import list_modalities, open_checkpoint
from fmembed.endpoint import cost_usd
from fmembed.outputs import Ranges, dequantize, ranges_from_json
from fmembed.preprocess import Preprocess
from fmembed.readers import Shard, Source, read_shard
from fmembed.rows import PARENT_ID, PIECE_START, PIECE_STOP, RowIds, keys_of, row_schema
from fmembed.source import open_source
from fmembed.spec import FmembedError, Modality, ModelSpec, PreprocessSpec, RunSpec
from fmembed.table import Table, sample

_UNITS = {"text": "tokens", "image": "patches", "audio": "samples"}
_MAX_FETCH_BYTES = 10 * 2**30

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
        configuration = table.configuration()
        return cls(
            json.loads(configuration["fmembed.identity"]),
            json.loads(configuration["fmembed.outputs"]),
            ranges_from_json(configuration.get("fmembed.ranges", "{}")),
            configuration["fmembed.modality"],  # type: ignore[arg-type]
        )

    @property
    def pooled(self) -> list[str]:
        """The columns that hold one vector a row."""
        return [c for c, output in self.outputs.items() if output["pooling"] != "tokens"]


def evaluate(table: Table, spec: RunSpec, run: dict[str, Any]) -> dict[str, Any]:
    """Probe the newest version and write the report.

    Args:
        table: Where.
        spec: Which probes, and what of the source they need; with none the vectors are not looked
            at, and the report has no map either.
        run: The last run's counts, for the report.

    Returns:
        `run` with `probes` and `report` filled in.
    """
    stored = _Stored.of(table)
    version = run["version"]
    map_ = _look(table, spec, stored, version) if spec.probes else None
    results = _stored_probes(table, version, stored, tuple(probes.PROBES))
    run = {
        **run,
        "probes": _headlines(results, stored),
        "report": f"{table.uri}/_report.html",
        "usd": _usd(spec, run),
    }
    schema = table.schema()
    dims = {c: schema.field(c).type.list_size for c in stored.pooled if c in schema.names}
    why = "no probe is named" if spec.source.label is not None else "no source.label names labels"
    if not dims:
        why = "no column holds one vector a row"
    facts = _facts(spec, stored, dims, run)
    dim = next(iter(dims.values()), 0)
    html = report.render(spec.source.stored_name, run, facts, dim, results, why, map_)
    table.put_report(html)
    return run


def _look(
    table: Table, spec: RunSpec, stored: _Stored, version: int | None
) -> dict[str, Any] | None:
    """Run the probes and put their results beside the table; the map, where there is a vector."""
    named = [c for c in (spec.source.label, spec.source.split, spec.source.caption) if c]
    has_texts = stored.modality == "text" and spec.source.input in spec.source.columns
    if has_texts:
        named.append(spec.source.input)
    if stored.identity["preprocess.pieces_are_rows"]:
        named += [PARENT_ID, PIECE_START, PIECE_STOP]
    task = ray.remote(num_cpus=1)
    rows: pa.Table = ray.get(
        task(sample).remote(table.uri, [*named, *stored.pooled], probes.MAX_ROWS, spec.source.label)
    )
    texts, cheap = None, None
    if has_texts and not stored.identity["preprocess.pieces_are_rows"]:
        texts = rows[spec.source.input].to_pylist()
    else:
        texts, cheap = _fetch_inputs(spec, stored, rows)
    vectors = {column: _matrix(rows, column, stored) for column in stored.pooled}
    flat = None
    step = max(math.ceil(rows.num_rows / probes.MAX_MAP_ROWS), 1)
    if vectors:
        flat = task(probes.project).remote(next(iter(vectors.values()))[::step])
    results = ray.get(
        [
            future
            for column in stored.pooled
            for future in _probe(spec, stored, rows, column, vectors[column], texts, cheap)
        ]
    )
    for r in results:
        table.put_probe(version, r)
    if flat is None or not rows.num_rows:
        return None
    return _map(
        spec,
        ray.get(flat),
        rows.take(list(range(0, rows.num_rows, step))),
        texts[::step] if texts else None,
    )


def stored_results(table: Table, spec: RunSpec, run: dict[str, Any]) -> dict[str, Any] | None:
    """`run` with what earlier probes of this version found; None where some have not been run."""
    stored = _Stored.of(table)
    names = _runnable(spec)
    results = _stored_probes(table, run["version"], stored, names)
    if not table.has_report or len(results) < len(names) * len(stored.pooled):
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
    found = [table.get_probe(version, name, column) for column in stored.pooled for name in names]
    return [r for r in found if r is not None]


def _probe(
    spec: RunSpec,
    stored: _Stored,
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
                prompts = task(_embed_prompts).remote(spec, stored, column, made.classes)
                started.append(task(_run).remote(name, column, data, prompts))
            elif name != "crossmodal":
                started.append(task(_run).remote(name, column, data, competitor))
    if "crossmodal" in names:
        captions = rows[spec.source.caption].to_pylist()
        pairs = task(_embed_captions).remote(spec, stored, column, vectors, captions, hashes)
        started.append(task(_run).remote("crossmodal", column, pairs))
    return started


def _run(name: str, column: str, data: Any, *more: Any) -> dict[str, Any]:
    if isinstance(data, str) or (more and isinstance(more[0], str)):
        # Instead of vectors the reason why there are none.
        why = data if isinstance(data, str) else more[0]
        version = probes.PROBES[name].VERSION
        result = {"probe": name, "version": version, "num_train": 0, "num_test": 0, "seconds": 0.0}
        return {**result, "skipped": why, "column": column}
    return {**probes.run_probe(name, data, *more), "column": column}


def _matrix(rows: pa.Table, column: str, stored: _Stored) -> Floats:
    dim = rows.schema.field(column).type.list_size
    flat = rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    precision = stored.outputs[column]["precision"]
    return dequantize(flat.reshape(-1, dim), column, precision, stored.ranges)


# --- the text tower -------------------------------------------------------------------------------


def _embed_prompts(spec: RunSpec, stored: _Stored, column: str, classes: list[str]) -> Floats | str:
    """Every template with every class, shape (classes, templates, dim), or why there is none."""
    templates = spec.zeroshot.templates or probes.TEMPLATES[stored.modality]
    words = [spec.zeroshot.classes.get(c, c) for c in classes]
    texts = [t.replace("{}", w) for w in words for t in templates]
    found = _embed_texts(spec.model, stored, column, texts)
    return found if isinstance(found, str) else found.reshape(len(words), len(templates), -1)


def _embed_captions(
    spec: RunSpec,
    stored: _Stored,
    column: str,
    vectors: Floats,
    captions: list[str | None],
    hashes: list[str],
) -> probes.PairData | str:
    given = [i for i, caption in enumerate(captions) if caption]
    kept = [str(captions[i]) for i in given]
    distinct, at = np.unique(np.array(kept, dtype=object).astype(str), return_inverse=True)
    found = _embed_texts(spec.model, stored, column, distinct.tolist())
    if isinstance(found, str):
        return found
    codes = np.unique([hashes[i] for i in given], return_inverse=True)[1]
    return probes.PairData(vectors[given], found[at], codes, np.asarray(at, dtype=np.int64))


def _embed_texts(model: ModelSpec, stored: _Stored, column: str, texts: list[str]) -> Floats | str:
    """Embed texts by the tower that shares the column's space, or say why that cannot be."""
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
        if checkpoint.digest != stored.identity["model.weights"]:
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
    spec: RunSpec, stored: _Stored, rows: pa.Table
) -> tuple[list[str | None] | None, tuple[str, Floats] | None]:
    """Texts of the sample, or cheap features of its pictures or sounds, from the source again.

    None where the source is gone, too large to read twice, or has changed since.
    """
    by_piece = stored.identity["preprocess.pieces_are_rows"]
    if by_piece and stored.modality != "text":
        return None, None
    try:
        source = open_source(spec.source, (stored.modality,))
    except FmembedError:
        return None, None
    if source.num_bytes > _MAX_FETCH_BYTES:
        return None, None
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
            return None, None
        inputs.append(value)
    if stored.modality == "text":
        if by_piece:
            spans = zip(rows[PIECE_START].to_pylist(), rows[PIECE_STOP].to_pylist(), strict=True)
            inputs = [t[start:stop] for t, (start, stop) in zip(inputs, spans, strict=True)]
        return inputs, None
    if not inputs:
        return None, None
    return None, (inputs[0][0], np.stack([features for _, features in inputs]))


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
