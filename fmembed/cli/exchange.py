"""Commands that take vectors in from other tools, and give them out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fmembed import summary
from fmembed.cli.app import app
from fmembed.cli.options import Json, TableName, say_line


@app.command("import")
def import_(
    path: Annotated[
        str, typer.Argument(help="An .npz, .npy, .parquet or .faiss file, or a dataset's folder.")
    ],
    output: Annotated[str, typer.Option(help="The table: a folder or URL with nothing there.")],
    column: Annotated[str | None, typer.Option(help="Which holds the vectors.")] = None,
    ids: Annotated[
        str | None, typer.Option(help="Which holds the ids, or a file of them, one a line.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Which others to take, with commas; else all.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Which holds labels, or a file of them, one a line.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which names the test split's rows.")] = None,
    as_float32: Annotated[bool, typer.Option("--as-float32", help="Round float64 to it.")] = False,
    json_: Json = False,
) -> None:
    """Make a table of vectors that somebody else has made.

    \b
      fmembed import vectors.npz --output out/theirs
      fmembed import vectors.npy --ids ids.txt --label labels.txt --output out/theirs
    """
    from fmembed.exchange.importing import import_vectors

    result = import_vectors(
        path, output, column=column, ids=ids, columns=_list(columns), label=label, split=split,
        as_float32=as_float32,
    )  # fmt: skip
    if json_:
        print(json.dumps(asdict(result)))
        return
    for line in summary.lines(asdict(result)):
        say_line(line)


@app.command()
def export(
    table: TableName,
    path: Annotated[str, typer.Argument(help="The file to write; a folder for hf and lance.")],
    to: Annotated[
        str | None, typer.Option(help="npz, npy, parquet, hf, lance or faiss; else as PATH ends.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Of the vectors; else the first.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="What to write beside them, with commas; else all.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Which; the newest, if none.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Of an NPZ in splits (X_train, y_train, ...): the labels.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of an NPZ in splits: what names them.")] = None,
    json_: Json = False,
) -> None:
    """Write a version's vectors, ids and columns to a file that others read.

    \b
      fmembed export out/articles articles.npz
      fmembed export out/articles split.npz --label topic --split split
    """
    from fmembed.exchange.exporting import export as write

    done = write(
        table, path, to,
        column=column, columns=_list(columns), version=version, label=label, split=split,
    )  # fmt: skip
    if json_:
        print(json.dumps(asdict(done)))
        return
    say_line(
        f"wrote {done.rows:,} vectors × {done.dim:,} {done.dtype} of version {done.version} as "
        f"{done.format}: {', '.join(done.files)}"
    )


def _list(names: str | None) -> list[str] | None:
    if names is None:
        return None
    return [name for raw in names.split(",") if (name := raw.strip())]
