"""What a run has done, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What a run has done, a line each.

    Args:
        result: The fields of a `RunResult`.
    """
    yield from _refreshed(result) if result["kind"] == "refresh" else _embedded(result)
    if any(result["spent"].values()):
        both = (f"{_spent(result[name])}" for name in ("spent", "table_spent"))
        yield "spent     {}; by all runs on record {}".format(*both)
    if result["rows_embedded"]:
        yield f"rate      {result['rows_per_s']:,.1f} rows/s over {result['seconds']:,.1f} s"
    if verdict := result["verdict"]:
        steady = result["steady_rows_per_s"]
        if steady:
            yield f"steady    {steady:,.1f} rows/s once the model was at work"
        spent = ", ".join(f"{name} {s:,.1f}" for name, s in verdict["seconds"].items())
        yield f"seconds   {spent}"
        mfu = verdict["mfu"]
        yield (
            f"model     waited {verdict['wait_share']:.1%}, "
            f"padding {verdict['padding_waste']:.1%}, {verdict['tokens_per_s']:,.0f} tokens/s"
            + (f", {mfu:.0%} of a matrix product's rate" if mfu is not None else "")
        )
        if budgets := verdict.get("batch_tokens"):
            yield f"batches   tokens: {', '.join(budgets)}"
        yield f"advice    {verdict['advice']}"
    num_changed = result["rows_changed"]
    if num_changed and result["kind"] == "embed":
        yield (
            f"changed   {num_changed:,} rows are others by now (input, or carried columns); kept: "
            "fmembed refresh takes them over"
        )
    if num_cut := result["num_truncated"]:
        yield f"cut       {num_cut:,} rows are longer than the model takes, and it saw a part"
    for why, count in result["passed_over"].items():
        yield f"not read  {count:,} {why}"
    if num_absent := result["rows_absent"]:
        yield f"absent    {num_absent:,} rows of the table were not in the source; they stay"
    if num_before := result["table_rejected"] - result["rows_rejected"]:
        yield f"rejected  {num_before:,} by earlier runs: fmembed rejected {result['table']}"
    for cause, count in result["causes"].items():
        yield f"rejected  {count:,} {cause}"
    if unlabelled := max((p.get("unlabelled", 0) for p in result["probes"].values()), default=0):
        yield f"labels    {unlabelled:,} rows have none, and no part in the probes of labels"
    for name, found in result["probes"].items():
        yield describe_probe(name, found)
    yield f"table     {result['table']} version {result['version']}"
    if result["report"]:
        yield f"report    {result['report']}"


def describe_probe(name: str, found: dict[str, Any]) -> str:
    """What a probe has found, in a line.

    Args:
        name: Of the probe, with its column where there are several.
        found: As `RunResult.probes` has it.
    """
    if "skipped" in found:
        return f"{name:<9} skipped: {found['skipped']}"
    metric = found["metric"] + (f" (k = {found['k']})" if "k" in found else "")
    chance = found.get("by_chance", {})
    baselines = ", ".join(
        f"{n} {v:z.3f}" + (_describe_chance(chance) if n == chance.get("baseline") else "")
        for n, v in found["baselines"].items()
    )
    if "missing" in found:
        baselines += f"; no cheap competitor: {found['missing']}"
    interval = f"[{found['low']:z.3f}, {found['high']:z.3f}]"
    return f"{name:<9} {metric} {found['value']:z.3f} {interval}; {baselines}"


def _embedded(result: dict[str, Any]) -> Iterator[str]:
    if not result["rows_read"]:
        yield "nothing to do: the source holds no row"
    elif not (result["rows_embedded"] or result["rows_rejected"] or result["rows_changed"]):
        yield f"nothing to do: all {result['rows_skipped']:,} rows are done"
    yield (
        f"rows      {result['rows_read']:,} read, {result['rows_embedded']:,} embedded, "
        f"{result['rows_rejected']:,} rejected, {result['rows_skipped']:,} skipped"
    )


def _refreshed(result: dict[str, Any]) -> Iterator[str]:
    if result["unchanged"]:
        yield "nothing to do: the table is in step with its source"
    counts = ", ".join(
        f"{result[f'rows_{name}']:,} {name}"
        for name in ("new", "changed", "unchanged", "removed", "rejected")
    )
    yield f"rows      {result['rows_read']:,} in the source; {counts}"
    if result["rows_embedded"] or result["rows_copied"]:
        yield (
            f"embedded  {result['rows_embedded']:,} rows, of {result['contents_embedded']:,} "
            f"contents; {result['rows_copied']:,} took a vector that was there"
        )
    if result["parts_written"]:
        yield (
            f"parts     {result['parts_written']:,} written, in place of "
            f"{result['parts_rewritten']:,} others"
        )
    if num_withheld := result["rows_withheld"]:
        yield f"withheld  {num_withheld:,} rows that should have left stay: {result['withheld']}"


def _spent(spent: dict[str, float]) -> str:
    cost = f", {spent['cost']:,.4f} of the price's currency" if "cost" in spent else ""
    return f"{spent.get('device_hours', 0):,.4f} device hours{cost}"


def _describe_chance(chance: dict[str, Any]) -> str:
    return (
        f" ({chance['low']:z.3f} to {chance['high']:z.3f} in {chance['shuffles']:,} shuffles, "
        f"p = {chance['p']:.3f})"
    )
