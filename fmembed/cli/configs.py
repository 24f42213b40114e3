"""Commands about a config: write a first one, list what it may say."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fmembed import fields as of_config
from fmembed.cli.app import app
from fmembed.cli.options import STDIN, option_of, say_line
from fmembed.errors import SpecError


@app.command()
def init(
    data: Annotated[str | None, typer.Argument(help="A dataset, as source.uri.")] = None,
    example: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or one of the configs that come with it.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="The config to write; - prints it.")
    ] = None,
    format_: Annotated[str | None, option_of("format_")] = None,
    model: Annotated[str | None, option_of("model")] = None,
    output: Annotated[str | None, option_of("output")] = None,
) -> None:
    """Write a first config for a dataset, each choice explained.

    Format and columns are as they look like, the model is a small one for what the dataset holds.

    \b
      fmembed init articles.csv
      fmembed embed articles.yaml
    """
    from fmembed import first_config

    if (data is None) == (example is None):
        raise SpecError("init: takes a dataset, or --example NAME; either")
    given: Any = format_ or "auto"
    if data is None:
        text = first_config.example(str(example))
    else:
        text = first_config.propose(data, format_=given, model=model or "", output=output or "")
    path = to or first_config.default_path(data or str(example))
    if path == STDIN:
        print(text, end="")
        return
    first_config.write(text, path)
    say_line(f"wrote {path}; look at it, then: fmembed embed {path}")


@app.command()
def fields(
    part: Annotated[str | None, typer.Argument(help="As model, source.csv, or one field.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
) -> None:
    """List the fields of a config, their defaults and meaning."""
    for line in of_config.markdown() if markdown else of_config.lines(part):
        say_line(line)
