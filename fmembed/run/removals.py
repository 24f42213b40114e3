"""Whether rows may leave a table because its source has them no more.

A source that cannot be read whole, or of which much is gone at once, is more often broken than it
is right.
"""

from __future__ import annotations

from collections.abc import Mapping

from fmembed.sources.opening import OF_OTHERS
from fmembed.sources.source import Source
from fmembed.sources.walking import DEAD_LINKS
from fmembed.spec import RunSpec


def why_withheld(
    spec: RunSpec, source: Source, counts: Mapping[str, int], allowed: int | None
) -> str:
    """Why no row leaves; empty where they may.

    Args:
        spec: What share may leave.
        source: What there is, and what is passed over.
        counts: Those of `diff.Compared`.
        allowed: How many may leave, in place of that share.
    """
    num_leaving, num_old = counts["gone"] + counts["gone_wrong"], counts["were"]
    share = spec.refresh.max_removed_fraction
    if num_broken := counts["broken_off"]:
        return f"{num_broken:,} files of the source cannot be read to their ends"
    if (n := counts["without_id"]) and spec.refresh.on_rejected == "keep":
        return f"{n:,} rows of the source have come to have no id that can be read"
    if allowed is not None:
        return f"they are more than --allow-removals {allowed}" if num_leaving > allowed else ""
    num_links = source.passed_over.get(DEAD_LINKS, 0)
    if num_links and num_leaving:
        return (
            f"{num_links:,} links in the source lead to nothing, as to a disk that is not there; "
            f"mend or remove them, or --allow-removals {num_leaving} lets the rows go"
        )
    if num_leaving > share * num_old:
        return (
            f"they are more than refresh.max_removed_fraction = {share} of {num_old:,} rows"
            f"{_what_is_there(source)}; --allow-removals {num_leaving} lets them go"
        )
    return ""


def _what_is_there(source: Source) -> str:
    """What else may have become of the rows: where the format is what most files have, another one
    may have most of them by now.
    """
    if not source.shards:
        return ", as no file of the source is left"
    others = (n for name, n in source.passed_over.items() if name.startswith(OF_OTHERS))
    num_others = sum(others)
    if source.spec.format != "auto" or not num_others:
        return ""
    return (
        f", with {num_others:,} files passed over, as most are {source.format} (source.format "
        "names another)"
    )
