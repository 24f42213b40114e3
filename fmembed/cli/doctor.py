"""The command that looks for what is wrong before a run finds out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fmembed.cli.app import app
from fmembed.cli.options import Json, SetFields, named_fields, say_line


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML config, a table, a store or a manifest; this machine, if none."
        ),
    ] = None,
    set_: SetFields = None,
    json_: Json = False,
) -> None:
    """Look for what would go wrong or be slow, and say what to do.

    At this machine, a config and all that it names; Ray is not started, nothing is changed. Exit 1
    where something is wrong.
    """
    from fmembed.doctor import examine

    found = examine(config, named_fields({}, set_))
    if json_:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}))
    else:
        for finding in found:
            say_line(finding.line())
    if any(finding.state == "wrong" for finding in found):
        raise typer.Exit(1)
