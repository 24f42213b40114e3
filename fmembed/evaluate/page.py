"""The HTML page: one file, no network, every value escaped by the template engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
import numpy.typing as npt

from fmembed.result import RunResult

# Paul Tol's bright and muted schemes: told apart by colour-blind readers too.
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#332288", "#999933",
    "#882255", "#44aa99", "#ddcc77", "#cc6677",
)  # fmt: skip
_OTHER = "#999999"
_WIDTH, _HEIGHT, _MARGIN = 1000, 640, 20
_MAX_HOVER_CHARS = 200


def render(
    title: str,
    run: RunResult,
    facts: Sequence[tuple[str, str]],
    dim: int,
    probes: Sequence[dict[str, Any]],
    why_no_probes: str,
    map_: dict[str, Any] | None,
    gate: dict[str, Any] | None = None,
) -> str:
    """Render the report.

    Args:
        title: What was embedded.
        run: What the last run did.
        facts: Name and value of each line of "what was embedded, and by what".
        dim: Length of a vector.
        probes: Results of `probes.run_probe`.
        why_no_probes: What to say where there are none.
        map_: What `make_map` gave, or None.
        gate: What `gate.run_gate` has said, if it was asked.

    Returns:
        A complete HTML document.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fmembed.evaluate", "."), autoescape=True, trim_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        run=run,
        facts=facts,
        dim=dim,
        probes=probes,
        why_no_probes=why_no_probes,
        map=map_,
        gate=gate,
        # At most one of each, whichever probe has it: they are long.
        confused=next((p for p in probes if p.get("confusion")), None),
        suspicious=next((p["suspicious"] for p in probes if p.get("suspicious")), None),
        score=_score,
    )
    # A file's name may be no text: Python then holds its bytes as halves of surrogate pairs.
    return html.encode(errors="replace").decode()


def make_map(
    method: str,
    flat: npt.NDArray[Any],
    row_ids: Sequence[str],
    labels: Sequence[str | None],
    texts: Sequence[str | None] | None,
) -> dict[str, Any]:
    """Lay out the map's points, coloured by label, with what hovering shows.

    Args:
        method: How `flat` was made.
        flat: Shape (rows, 2).
        row_ids: Id of each row.
        labels: Label of each row, None where it has none.
        texts: Text of each row, where it is known.
    """
    low, span = flat.min(axis=0), flat.max(axis=0) - flat.min(axis=0)
    span[span == 0] = 1.0
    unit = (flat - low) / span
    # The most frequent labels get the colours; beyond twelve no eye tells them apart.
    counts: dict[str, int] = {}
    for label in labels:
        if label is not None:
            counts[label] = counts.get(label, 0) + 1
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    colours = dict(zip(ranked, _COLOURS, strict=False))
    key = sorted(colours.items())
    if len(ranked) > len(colours) or None in labels:
        key.append(("other", _OTHER))
    hover = []
    for i, row_id in enumerate(row_ids):
        text = (texts[i] or "") if texts is not None else ""
        hover.append([row_id, labels[i] or "", text[:_MAX_HOVER_CHARS]])
    return {
        "method": method,
        "key": key,
        "hover": hover,
        "points": [
            {
                "x": round(_MARGIN + float(x) * (_WIDTH - 2 * _MARGIN), 1),
                "y": round(_MARGIN + float(y) * (_HEIGHT - 2 * _MARGIN), 1),
                "colour": colours.get(label or "", _OTHER),
            }
            for (x, y), label in zip(unit, labels, strict=True)
        ],
    }


def _score(s: dict[str, float]) -> markupsafe.Markup:
    def percent(v: float) -> float:
        return round(100 * min(max(v, 0.0), 1.0), 2)

    low, high = percent(s["low"]), percent(s["high"])
    range_ = f"{s['low']:z.4f} to {s['high']:z.4f}"
    if s.get("shuffles"):
        range_ += f" in {s['shuffles']:,} shuffles, p = {s['p']:.3f}"
    return markupsafe.Markup(  # noqa: S704 - only formatted numbers go in
        f'<td class="n">{s["value"]:z.4f}</td><td class="n">{range_}</td>'
        f'<td><div class="track"><i style="width:{percent(s["value"])}%"></i>'
        f'<u style="left:{low}%;width:{max(high - low, 0.5):.2f}%"></u></div></td>'
    )
