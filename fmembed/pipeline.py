"""The line: read -> preprocess -> embed -> write parts -> commit -> probe -> report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmembed.inputs import open_inputs
from fmembed.spec import RunSpec

if TYPE_CHECKING:
    from fmembed.result import RunResult


def embed(
    spec: RunSpec, *, retry_rejected: bool = False, verbose: bool = False, quiet: bool = False
) -> RunResult:
    """Run the whole line once; run it again to resume.

    Args:
        spec: What to do.
        retry_rejected: Try the rows again that earlier runs have rejected.
        verbose: Show Ray's own output.
        quiet: Draw no progress.

    Returns:
        What was counted, and where the table and the report are.

    Raises:
        UserError: The spec, the source, the checkpoint or the output is wrong; nothing was written.
        RejectedError: Too many rows were rejected; what was embedded is committed.
        Interrupted: SIGINT, SIGTERM or SIGHUP; what was finished is committed.
        LockedError: Another run is writing the table.
        FmembedError: Anything else; what was committed stays.
    """
    # On a cluster what `dtype: auto` means depends on its nodes: it is joined first.
    joins = os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    inputs = None if joins else open_inputs(spec)
    from fmembed.run.record import embed

    return embed(spec, inputs, retry_rejected=retry_rejected, verbose=verbose, quiet=quiet)


def probe(
    uri: str,
    names: tuple[str, ...] | None = None,
    *,
    spec: RunSpec | str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    verbose: bool = False,
) -> RunResult:
    """Probe an existing table anew and write its report.

    A table may be anybody's: the source and the model that its metadata name are never opened. What
    needs them is left out, and says so, unless they are named here.

    Args:
        uri: The table.
        names: Which probes; None for those the spec names.
        spec: What made the table, or a YAML file of it: its source and model are the user's own.
        overrides: Dotted field names to values, laid over `spec`, or else over the words of the
            table's own spec; `source.uri` and `model.id` are then opened.
        verbose: Show Ray's own output.

    Raises:
        TableError: No table there, or not one as a run leaves it.
        SpecError: Another probe or column than there is, or a spec of another table.
        ModelError: The checkpoint that `spec` names cannot be found.
    """
    if isinstance(spec, str | Path):
        spec = RunSpec.from_yaml(str(spec))
    from fmembed.run.record import probe

    return probe(uri, names, spec, overrides or {}, verbose=verbose)
