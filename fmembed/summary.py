"""What a run has done, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fmembed.telling import duration

# Labels that were shuffled score as high as these in more than so many cases of one.
_BY_CHANCE = 0.05


def lines(result: dict[str, Any], verbose: bool = False) -> Iterator[str]:
    """What a run has done, a line each: rows, scores, what was left out, where it is, how long.

    Args:
        result: The fields of a `RunResult`.
        verbose: Where the time went, too, and what was spent; and of scores all that was compared.
    """
    first, *rest = _refreshed(result) if result["kind"] == "refresh" else _embedded(result)
    # Unless there was nothing to do, the judgement leads: it is of an earlier run then.
    is_idle = first.startswith("nothing to do")
    yield from [first] if is_idle else []
    yield from _judged(result)
    yield from rest if is_idle else [first, *rest]
    if num_pieces := result["pieces_embedded"]:
        num_rows = result["rows_embedded"]
        yield f"pieces    {num_pieces:,} of {num_rows:,} rows, each with a vector of its own"
    yield from _scores(result, verbose)
    for cause, count in result["causes"].items():
        yield f"rejected  {count:,} {cause}: fmembed rejected {result['table']}"
    if num_before := result["table_rejected"] - result["rows_rejected"]:
        yield f"rejected  {num_before:,} by earlier runs: fmembed rejected {result['table']}"
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
    if verbose or result["spent"].get("cost"):
        yield from _spent(result)
    if verbose:
        yield from _verdict(result)
    yield from _promotion(result)
    yield f"table     {result['table']} version {result['version']}"
    if result["report"]:
        yield f"report    {result['report']}"
    if result["rows_embedded"] or result["probe_s"]:
        yield _time(result)


def _promotion(result: dict[str, Any]) -> Iterator[str]:
    """What has become of the version in a store, and what the gate has said."""
    store, promotion = result["store"], result["promotion"]
    if not store:
        return
    for words in _said_by_gate(result["gate"]):
        yield f"gate      {words}"
    told = {
        "promoted": "promoted: readers get this version",
        "current": "readers get this version already",
        "refused": "refused by the gate: what was promoted stays; fmembed promote --force switches",
        "beside": "it stays beside what is promoted; fmembed promote switches to it",
    }
    what = told.get(promotion, "not promoted: fmembed promote switches to it")
    yield f"store     {store}: {what}"


def _said_by_gate(gate: dict[str, Any]) -> Iterator[str]:
    """What it refuses for; where it does not, what it has compared."""
    checks = gate.get("checks", [])
    refused = [check for check in checks if check["passed"] is False]
    yield from (f"refused: {check['words']}" for check in refused)
    if not refused:
        told = [check["words"] for check in checks if check["passed"] is None or check["figures"]]
        yield from told or filter(None, [gate.get("words")])


def probed(result: dict[str, Any], verbose: bool = False) -> Iterator[str]:
    """What probes have found of a table, a line each: nothing of the run that made it.

    Args:
        result: The fields of a `RunResult`.
        verbose: Of scores all that was compared.
    """
    yield from _judged(result)
    yield f"table     {result['table']} version {result['version']}, {result['table_rows']:,} rows"
    yield from _scores(result, verbose)
    yield f"report    {result['report']}"
    yield f"time      {duration(result['probe_s'])}"


def _judged(result: dict[str, Any]) -> Iterator[str]:
    """Whether the vectors are any good: the first that anybody wants to know."""
    yield from (f"verdict   {words}" for words in result["judgement"])


def _scores(result: dict[str, Any], verbose: bool) -> Iterator[str]:
    for name, found in result["probes"].items():
        yield from describe_probe(name, found, verbose)
    if unlabelled := max((p.get("unlabelled", 0) for p in result["probes"].values()), default=0):
        yield f"labels    {unlabelled:,} rows have none, and no part in the probes of labels"


def _time(result: dict[str, Any]) -> str:
    """How long it took, and how fast that was."""
    said = [duration(result["seconds"])] if result["rows_embedded"] else []
    if result["rows_embedded"]:
        rate = f"{result['rows_per_s']:,.1f} rows/s"
        if steady := result["steady_rows_per_s"]:
            rate += f", {steady:,.1f} once the model was at work"
        said.append(rate)
    if result["probe_s"]:
        said.append(f"probes and report {duration(result['probe_s'])} more")
    return f"time      {'; '.join(said)}"


def _spent(result: dict[str, Any]) -> Iterator[str]:
    if any(result["spent"].values()):
        both = (_amount(result[name]) for name in ("spent", "table_spent"))
        yield "spent     {}; by all runs on record {}".format(*both)


def _verdict(result: dict[str, Any]) -> Iterator[str]:
    """Where the time went."""
    if not (verdict := result["verdict"]):
        return
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


def describe_probe(name: str, found: dict[str, Any], verbose: bool = False) -> Iterator[str]:
    """What a probe has found: in a line its score, and beside it what costs no model; or a line for
    each thing that is wrong.

    Args:
        name: Of the probe, with its column where there are several.
        found: As `RunResult.probes` has it.
        verbose: All baselines, how labels that were shuffled did among them; and all figures.
    """
    if "skipped" in found:
        yield f"{name:<9} skipped: {found['skipped']}"
        return
    if "findings" in found:
        yield from _found(name, found, verbose)
        return
    metric = found["metric"] + (f" (k = {found['k']})" if "k" in found else "")
    chance = found.get("by_chance", {})
    baselines = [
        f"{n} {v:z.3f}" + (_describe_chance(chance) if n == chance.get("baseline") else "")
        for n, v in found["baselines"].items()
        if verbose or n != chance.get("baseline")
    ]
    if not verbose and chance.get("p", 0.0) > _BY_CHANCE:
        baselines.append(f"shuffled labels do as well (p = {chance['p']:.3f})")
    if "missing" in found:
        baselines.append(f"no cheap competitor: {found['missing']}")
    score = f"{name:<9} {metric} {found['value']:z.3f} [{found['low']:z.3f}, {found['high']:z.3f}]"
    yield "; ".join([score, ", ".join(baselines)]) if baselines else score


def _found(name: str, found: dict[str, Any], verbose: bool) -> Iterator[str]:
    """What is wrong with vectors, or that nothing is."""
    seen, num_rows = found["num_seen"], found["num_rows"]
    of = f"{num_rows:,} rows" if seen == num_rows else f"{seen:,} of {num_rows:,} rows"
    for finding in found["findings"]:
        rows = ", ".join(row for group in finding["rows"][:1] for row in group)
        yield f"{name:<9} {finding['words']}" + (f": {rows}" if rows else "")
    if not found["findings"]:
        yield f"{name:<9} nothing wrong found in {of}"
    if verbose:
        for figure, value in found["figures"].items():
            beside = found["random"].get(figure)
            random = f", of random vectors {beside:,.4g}" if beside is not None else ""
            yield f"{name:<9} {figure} {value:,.4g}{random}"


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


def _amount(spent: dict[str, float]) -> str:
    cost = f", {spent['cost']:,.4f} of the price's currency" if "cost" in spent else ""
    return f"{spent.get('device_hours', 0):,.4f} device hours{cost}"


def _describe_chance(chance: dict[str, Any]) -> str:
    return (
        f" ({chance['low']:z.3f} to {chance['high']:z.3f} in {chance['shuffles']:,} shuffles, "
        f"p = {chance['p']:.3f})"
    )


def compared(found: Any) -> Iterator[str]:
    """A comparison, as `evaluate.compare.Comparison`, in lines: who is better, by how much, and is
    it sure.
    """
    models = {m.table: m for m in found.models}
    yield (
        f"compared  {len(models):,} tables by {found.label}: {found.rows:,} rows that all have, of "
        f"{found.classes:,} labels"
    )
    for name, ranked in found.ranked.items():
        for r in ranked:
            m = models[r.table]
            ranks = f"{r.best_rank}" + (f"-{r.worst_rank}" if r.worst_rank > r.best_rank else "")
            rate = "" if m.rows_per_s is None else f", {m.rows_per_s:,.0f} rows/s"
            yield (
                f"{name:<9} rank {ranks:<4} {r.value:z.3f} [{r.low:z.3f}, {r.high:z.3f}] {r.table} "
                f"({m.model}, {m.dim:,} × {m.precision}, {m.bytes_a_row:,} bytes a row{rate})"
                + ("" if r.is_pareto else "; another is as good and costs no more")
            )
        for pair in found.pairs[name]:
            gap = f"{100 * pair.value:+.1f} points, {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
            told = "a tie" if pair.is_tie else f"{'better' if pair.value > 0 else 'worse'}"
            yield f"{name:<9} {pair.two} against {pair.one}: {told} ({gap}, p = {pair.p:.3f})"
    for note in found.notes:
        yield f"note      {note}"
    yield f"time      {duration(found.seconds)}"
