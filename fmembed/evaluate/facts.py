"""What a report says of a run and a table, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fmembed.result import RunResult, check_probe
from fmembed.spec import EndpointSpec, RunSpec
from fmembed.table.card import Card, StoredOutput
from fmembed.table.table import Table

_UNITS = {"text": "tokens", "image": "patches", "audio": "samples"}


def stored_probes(
    table: Table, version: int | None, card: Card, names: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """What probes of a version have found, by probe and column: None where its record is damaged.

    Args:
        table: Where.
        version: Of its rows.
        card: The table's.
        names: Of these probes; those that were not run are left out.
    """
    for column in card.pooled:
        for name in names:
            raw = table.get_probe(version, name, column)
            if raw is not None:
                yield name, column, check_probe(raw, name, column)


def pick_headlines(results: Sequence[dict[str, Any]], card: Card) -> dict[str, Any]:
    several = len(card.pooled) > 1
    return {
        f"{r['probe']} {r['column']}" if several else r["probe"]: {
            "unlabelled": r.get("unlabelled", 0),
            **_headline(r),
        }
        for r in results
    }


def _headline(r: dict[str, Any]) -> dict[str, Any]:
    if "skipped" in r:
        return {"skipped": r["skipped"]}
    if "findings" in r:
        return {
            "findings": r["findings"],
            "figures": {f["name"]: f["value"] for f in r["figures"]},
            "random": {f["name"]: f["random"] for f in r["figures"] if "random" in f},
            "num_seen": r["num_test"],
            "num_rows": r["num_rows"],
        }
    there = {n: b for n, b in r["baselines"].items() if b is not None}
    return {
        **r["headline"],
        "num_test": r["num_test"],
        "baselines": {n: b["value"] for n, b in there.items()},
        **{"against": {n: b["difference"] for n, b in there.items() if b.get("difference")}},
        **{name: r[name] for name in ("leaks", "wrong_labels") if r.get(name)},
        **_by_chance(r["baselines"]),
        **({"missing": r["missing"]} if "missing" in r else {}),
    }


def _by_chance(baselines: dict[str, Any]) -> dict[str, Any]:
    """Of the baseline that was made by shuffling, all its figures; a probe has at most one."""
    for name, found in baselines.items():
        if found is not None and found.get("shuffles"):
            return {"by_chance": {"baseline": name, **found}}
    return {}


# Labels that were shuffled score as high as these in more than so many cases of one.
_BY_CHANCE = 0.05
# Where a line between classes tells fewer labels, it is no witness against one of them.
_TELLS = 0.8
# By which of the probes vectors are judged: the competitor is a logistic regression, too.
_JUDGES = ("linear", "knn")


def judge(headlines: Mapping[str, Any]) -> list[str]:
    """Whether vectors are better than what costs no model, and what is wrong, in words.

    Args:
        headlines: As `pick_headlines` gives them.
    """
    columns = list(dict.fromkeys(name.partition(" ")[2] for name in headlines))
    said = []
    for column in columns:
        named = f"{column}: " if column else ""
        by = {name.partition(" ")[0]: f for name, f in headlines.items()
              if name.partition(" ")[2] == column and "skipped" not in f}  # fmt: skip
        name = next((judge for judge in _JUDGES if judge in by), None)
        if name is not None:
            said.append(named + _judge(name, by[name]))
            leaks = by[name].get("leaks")
            if leaks and leaks["without"] is not None:
                said.append(named + _tell_leaks(name, leaks))
        if findings := by.get("health", {}).get("findings"):
            kinds = ", ".join(finding["kind"] for finding in findings)
            said.append(f"{named}to be looked at: {kinds}")
        linear = by.get("linear", {})
        # Of vectors that tell little, what models say of labels is their own mistake.
        tells = linear.get("value", 0) >= _TELLS and not _is_chance(linear)
        if tells and (num_wrong := linear.get("wrong_labels")):
            are = "label is" if num_wrong == 1 else "labels are"
            by_whom = "contradicted by models that have not seen the row"
            likeliest = "the report lists the likeliest to be wrong"
            said.append(f"{named}{num_wrong:,} {are} {by_whom}; {likeliest}")
    return said


def _judge(name: str, found: dict[str, Any]) -> str:
    """Whether a probe's score is better than chance, and than the cheap competitor's."""
    value, num = found["value"], found["num_test"]
    told = f"{name} tells the label of {value:.1%} of {num:,} rows"
    majority, leaks = found["baselines"].get("majority", 0.0), found.get("leaks")
    if leaks and leaks["without"] is None:
        return f"all {num:,} test rows are copies of train rows, or nearly: no score tells anything"
    if _is_chance(found):
        return f"no better than chance: {told}, {majority:.1%} by saying one"
    if value <= majority:
        return f"no better than saying one label of all rows: {told}, that of {majority:.1%}"
    if not found["against"]:
        return f"better than chance: {told}, {majority:.1%} by saying one; no competitor was there"
    rival, gap = next(iter(found["against"].items()))
    by = f"{told}, {rival} of {found['baselines'][rival]:.1%}"
    by += (
        f" ({100 * gap['value']:+.1f} points, {100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
    )
    if gap["low"] > 0:
        return f"better than what costs no model: {by}"
    if gap["high"] < 0:
        return f"worse than what costs no model: {by}"
    return f"no better than what costs no model, as far as {num:,} rows tell: {by}"


def _is_chance(found: dict[str, Any]) -> bool:
    return bool(found.get("by_chance", {}).get("p", 0.0) > _BY_CHANCE)


def _tell_leaks(name: str, leaks: dict[str, Any]) -> str:
    """What becomes of a score without the rows that were trained on."""
    are = "test row is a copy" if leaks["num"] == 1 else "test rows are copies"
    rest = f"{leaks['without']['value']:.1%} of the others"
    return f"{leaks['num']:,} {are} of train rows, or nearly: {name} tells the label of {rest}"


def in_usd(spec: RunSpec, run: RunResult) -> float | None:
    if spec.model.endpoint is None:
        return None
    return cost_usd(spec.model.endpoint, run.counts.get("endpoint_tokens", 0))


def state_facts(
    spec: RunSpec, card: Card, dims: dict[str, int], run: RunResult
) -> list[tuple[str, str]]:
    raw, identity, counts = spec.stored(), card.identity, run.counts
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
        usd = run.usd
        endpoint = [
            ("endpoint", raw["model"]["endpoint"]["base_url"]),
            ("tokens the server counted in this run", f"{counts.get('endpoint_tokens', 0):,}"),
            ("cost of this run", f"{usd:.4f} USD" if usd is not None else "no price is given"),
            ("requests", f"{counts.get('endpoint_requests', 0):,}"),
            ("requests sent again", f"{counts.get('endpoint_retries', 0):,}"),
        ]
    units = "characters" if spec.model.endpoint is not None else _UNITS[card.modality]
    return [
        ("source", f"{raw['source']['uri']} (format {spec.source.format})"),
        *(("not read", f"{n:,} {why}") for why, n in run.passed_over.items()),
        ("input column", spec.source.input),
        ("carried columns", ", ".join(spec.source.columns) or "none"),
        ("model", raw["model"]["id"]),
        ("revision", identity["model.revision"] or "a local folder"),
        ("weights, blake2b", identity["model.weights"] or "the server's"),
        *([("adapter", raw["model"]["adapter"])] if raw["model"]["adapter"] else []),
        ("embeds", card.modality),
        *((f"column {c}", _describe(output, dims.get(c))) for c, output in card.outputs.items()),
        *(text if card.modality == "text" else []),
        *pieces,
        ("dtype", identity["model.dtype"]),
        ("remote code", "allowed by the config" if spec.model.trust_remote_code else "off"),
        *endpoint,
        (f"{units} in this run", f"{run.num_units:,}"),
        ("rows cut in this run", f"{run.num_truncated:,}"),
        ("bytes a row between preprocessing and model", _bytes_a_row(counts)),
        ("batches halved for memory in this run", f"{counts.get('batches_halved', 0):,}"),
        *(
            (
                f"{name.replace('_', ' ')} of this run, and of all on record",
                f"{amount:,.6g}, {run.table_spent.get(name, amount):,.6g}",
            )
            for name, amount in run.spent.items()
            if amount
        ),
        ("run", f"{run.run_id}, started {run.started}"),
    ]


def _bytes_a_row(counts: dict[str, int]) -> str:
    if not counts.get("input_rows"):
        return "nothing was embedded"
    return f"{counts['input_bytes'] / counts['input_rows']:,.0f}"


def _describe(output: StoredOutput, dim: int | None) -> str:
    parts = [output.pooling]
    if dim is not None:
        parts.append(f"{dim} numbers")
    if output.layer is not None:
        parts.append(f"layer {output.layer}")
    if output.dims is not None:
        parts.append(f"the first {output.dims} dimensions")
    parts.append("normalised" if output.normalize else "not normalised")
    return ", ".join([*parts, output.precision])


def cost_usd(spec: EndpointSpec, num_tokens: int) -> float | None:
    """What the tokens cost, None where no price is given."""
    if spec.usd_per_million_tokens is None:
        return None
    return math.ceil(num_tokens * spec.usd_per_million_tokens) / 1e6
