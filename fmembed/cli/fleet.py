"""Commands about clusters: the files by which a config runs on one."""

from __future__ import annotations

from typing import Annotated

import typer

from fmembed.cli.app import app
from fmembed.cli.options import SetFields, named_fields, say_line
from fmembed.errors import SpecError
from fmembed.spec import RunSpec

_KINDS = "rayjob, raycronjob, cronjob (for Kubernetes), cluster (for Ray's launcher)."


@app.command()
def manifest(
    files: Annotated[list[str], typer.Argument(metavar="CONFIG", help="A YAML config.")],
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=_KINDS)] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write it; else it is printed.")
    ] = None,
    set_: SetFields = None,
) -> None:
    """Write the file by which a config runs on a cluster.

    Of the config's section cluster; fmembed fields cluster lists what that may say. No secret gets
    into it: these are named.

    \b
      fmembed manifest config.yaml --kind rayjob --output articles.yaml
    """
    from fmembed.manifest.writing import KINDS, write_manifest

    if kind is None or len(files) != 1:
        raise SpecError(f"manifest: takes one config, and --kind {', '.join(KINDS)}")
    text = write_manifest(RunSpec.from_yaml(files[0], named_fields({}, set_)), kind)
    if output is None:
        print(text, end="")
        return
    try:
        with open(output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise SpecError(f"--output {output}: {e.strerror}; give the path of a file") from None
    say_line(f"wrote {output}")
