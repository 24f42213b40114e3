"""Commands on a store: what is promoted in it, and what is to be."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fmembed.cli.app import app
from fmembed.cli.options import Json, Verbose, say_line

_Store = Annotated[str, typer.Argument(help="A store's folder or URL.")]
_Why = Annotated[str, typer.Option(help="For people; it is kept.")]


@app.command()
def status(store: _Store, json_: Json = False) -> None:
    """Say what a store holds: what is promoted, its tables, what the gate has said of them."""
    from fmembed import promotion

    found = promotion.status(store)
    if json_:
        print(json.dumps(asdict(found)))
        return
    for line in found.lines():
        say_line(line)


@app.command()
def promote(
    store: _Store,
    table: Annotated[
        str | None, typer.Argument(help="One of its tables; the one that is not promoted, if none.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Of it; the newest, if none.")] = None,
    why: _Why = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate says.")] = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a version what a store's readers get, if the gate lets it pass.

    A refresh with --store does so by itself. Exit 3 where the gate refuses.
    """
    from fmembed import promotion

    done = promotion.promote(
        store, table, version, why=why, force=force, verbose=verbose, quiet=json_
    )
    if json_:
        print(json.dumps(asdict(done)))
        return
    say_line(f"promoted  {promotion.describe(done)}")


@app.command()
def rollback(
    store: _Store,
    to: Annotated[int | None, typer.Option(help="A generation, as fmembed versions lists.")] = None,
    why: _Why = "by hand",
    json_: Json = False,
) -> None:
    """Give a store's readers what they had before, or what they had in a generation."""
    from fmembed import promotion

    done = promotion.rollback(store, to, why=why)
    if json_:
        print(json.dumps(asdict(done)))
        return
    say_line(f"promoted  {promotion.describe(done)}")
