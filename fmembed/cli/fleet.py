"""Commands about clusters: the files by which a config runs on one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fmembed.cli.app import app
from fmembed.cli.options import Json, SetFields, named_fields, say_line
from fmembed.errors import SpecError
from fmembed.spec import RunSpec

_KINDS = "rayjob, raycronjob, cronjob (for Kubernetes), cluster (for Ray's launcher)."


@app.command()
def manifest(
    files: Annotated[
        list[str], typer.Argument(metavar="CONFIG", help="A YAML config; with --check manifests.")
    ],
    kind: Annotated[str | None, typer.Option(metavar="KIND", help=_KINDS)] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write it; else it is printed.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with manifests, whoever wrote them.")
    ] = False,
    set_: SetFields = None,
    json_: Json = False,
) -> None:
    """Write the file by which a config runs on a cluster, or check such files.

    Of the config's section cluster; fmembed fields cluster lists what that may say. No secret gets
    into it: these are named.

    \b
      fmembed manifest config.yaml --kind rayjob --output articles.yaml
      fmembed manifest --check articles.yaml
    """
    if check:
        if kind is not None or output is not None or set_:
            raise SpecError("manifest: --check takes files, and no --kind, --output or --set")
        _check(files, json_)
        return
    from fmembed.manifest.writing import KINDS, write_manifest

    if kind is None or len(files) != 1:
        raise SpecError(f"manifest: takes one config, and --kind {', '.join(KINDS)}")
    if json_:
        raise SpecError("manifest: --json goes with --check")
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


def _check(files: list[str], as_json: bool) -> None:
    from fmembed.manifest.check import check_file

    found = {path: check_file(path) for path in files}
    num_faults = sum(f.is_fault for findings in found.values() for f in findings)
    if as_json:
        told = {path: [asdict(f) for f in findings] for path, findings in found.items()}
        print(json.dumps({"files": told, "faults": num_faults}))
    else:
        for path, findings in found.items():
            for finding in findings:
                say_line(f"{path}: {'' if finding.is_fault else 'note: '}{finding}")
            if not any(f.is_fault for f in findings):
                say_line(f"{path}: holds")
    if num_faults:
        raise typer.Exit(1)
