"""Commands that look at a table, or change what is in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmembed.cli.app import app
from fmembed.cli.options import Json, TableName, say_line
from fmembed.errors import SpecError

if TYPE_CHECKING:
    from fmembed.deletion import Deletion
    from fmembed.table.versions import Vacuumed


@app.command()
def rejected(
    table: TableName,
    samples: Annotated[int, typer.Option(help="Rows to show of each cause.")] = 3,
    json_: Json = False,
) -> None:
    """Count the rejected rows by cause, and show some of each."""
    from fmembed.table.table import Table

    opened = Table.open(table)
    card, causes = opened.card(), opened.rejected_by_cause(samples)
    if json_:
        print(json.dumps({"table": table, "rows_rejected": _total(causes), "causes": causes}))
        return
    print(f"rows rejected: {_total(causes):,}")
    for cause in causes:
        say_line(f"{cause['rows']:,} {cause['error']} (stage {cause['stage']})")
        for row in cause["samples"]:
            say_line(f"  {row['row_id']}: {row['message']}")
    if causes and card is not None and not card.is_imported:
        print("fmembed embed --retry-rejected, with the same config, tries them again")


def _total(causes: list[dict[str, Any]]) -> int:
    return sum(cause["rows"] for cause in causes)


@app.command()
def verify(
    table: TableName,
    repair: Annotated[
        bool, typer.Option("--repair", help="First mend log, parts and records; delete nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Recount a table from storage; exit 1 if something is off."""
    from fmembed.table.verify import verify as verify_table

    repaired = []
    if repair:
        from fmembed.table.repair import repair as repair_table

        repaired = repair_table(table)
    result = verify_table(table)
    if json_:
        print(json.dumps({**asdict(result), "repaired": repaired}))
    else:
        for line in repaired:
            say_line(f"  mended: {line}")
        if repaired:
            say_line("run the same fmembed embed again for what is missing now")
        say_line(
            f"{result.table} version {result.version}: {result.rows:,} rows of dimension "
            f"{result.dim} in {result.parts:,} parts, {result.rows_rejected:,} rejected, norms "
            f"{result.norm_min:.4f} to {result.norm_max:.4f}"
        )
        for problem in result.problems:
            say_line(f"  off: {problem}")
        for note in result.notes:
            say_line(f"  note: {note}")
        print("something is off" if result.problems else "all is well")
    if result.problems:
        raise typer.Exit(1)


@app.command()
def info(
    table: TableName,
    version: Annotated[int | None, typer.Option(help="Which; the newest, if none.")] = None,
    json_: Json = False,
) -> None:
    """Say what a table is: rows, model, source, scores, version.

    And what of it is missing here. Nothing but the table is opened, so a copied folder will do.
    """
    from fmembed.embeddings import Embeddings

    found = Embeddings(table, version).info()
    if json_:
        print(json.dumps(asdict(found)))
        return
    for line in found.lines():
        say_line(line)


@app.command()
def versions(
    table: TableName,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    json_: Json = False,
) -> None:
    """List a table's versions, the newest first; of a store what was promoted."""
    from fmembed.promotion import describe
    from fmembed.table.store import Store
    from fmembed.table.versions import list_versions

    if (store := Store.find(table)) is not None:
        history = store.history(limit)
        if json_:
            print(json.dumps({"store": store.uri, "generations": [asdict(p) for p in history]}))
            return
        for pointer in history:
            say_line(f"{pointer.generation:>6}  {describe(pointer)}")
        return

    found = list_versions(table, limit)
    if json_:
        print(json.dumps({"table": table, "versions": [asdict(v) for v in found]}))
        return
    for v in found:
        by = f"run {v.run}" if v.run else f"{v.operation} by another tool"
        gone = "" if v.is_whole else "; parts of it are gone"
        say_line(
            f"{v.version:>6}  {v.time}  {v.rows:,} rows in {v.parts:,} parts, "
            f"{v.num_bytes / 2**20:,.1f} MiB; parts of {v.added:,} rows came, of {v.removed:,} "
            f"went; {by}{gone}"
        )


@app.command()
def diff(
    table: TableName,
    old: Annotated[int, typer.Argument(help="A version.")],
    new: Annotated[int | None, typer.Argument(help="Another; the newest, if none.")] = None,
    json_: Json = False,
) -> None:
    """Say which rows differ between two versions."""
    from fmembed.table.versions import diff_versions

    found = diff_versions(table, old, new)
    if json_:
        print(json.dumps({"table": table, **asdict(found)}))
        return
    print(f"from version {found.old} to {found.new}")
    for name, ids in found.samples.items():
        count = getattr(found, f"rows_{name}")
        more = ", ..." if count > len(ids) else ""
        say_line(f"{name:<10} {count:,}" + (f": {', '.join(ids)}{more}" if ids else ""))


@app.command()
def files(
    table: TableName,
    version: Annotated[int | None, typer.Option(help="Which; the newest, if none.")] = None,
    json_: Json = False,
) -> None:
    """Print where the parts of a version are, for other readers."""
    from fmembed.table.versions import list_files

    found = list_files(table, version)
    if json_:
        print(json.dumps({"table": table, "files": found}))
        return
    for path in found:
        say_line(path)


@app.command()
def vacuum(
    table: TableName,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Days to remember; else as its config says.")
    ] = None,
    keep_versions: Annotated[
        int | None, typer.Option(min=1, help="Versions to keep anyway; else as its config says.")
    ] = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Keep the newest version, and nothing that tells more.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json_: Json = False,
) -> None:
    """Delete files that only older versions name, of a table or of all tables of a store."""
    from fmembed.table.versions import vacuum as vacuum_table

    for place in _places(table):
        done = vacuum_table(
            place, keep_days=keep_days, keep_versions=keep_versions, purge=purge, dry_run=dry_run
        )
        if json_:
            print(json.dumps({**asdict(done), "dry_run": dry_run}))
        else:
            _tell_vacuumed(done, purge, dry_run)


def _places(uri: str) -> list[str]:
    """A table; of a store all its tables."""
    from fmembed.table.store import Store

    store = Store.find(uri)
    return [uri] if store is None else [store.uri_of(table.name) for table in store.tables()]


def _tell_vacuumed(done: Vacuumed, purge: bool, dry_run: bool) -> None:
    say_line(
        f"{done.table}: {'would delete' if dry_run else 'deleted'} {done.files:,} files of "
        f"{done.num_bytes / 2**20:,.1f} MiB; versions {done.oldest} to {done.newest} "
        f"{'would stay' if dry_run else 'are whole'}"
    )
    if purge and not dry_run:
        print("fmembed probe makes the report anew")


@app.command()
def delete(
    table: TableName,
    where: Annotated[
        str | None, typer.Option(help="Which rows, in SQL: \"row_id = '5'\", \"topic = 'spam'\".")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="FILE", help="Or a file of their ids, one a line.")
    ] = None,
    listed_in: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Or all that was deleted from that table.")
    ] = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Leave no byte: older versions and probes go too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which would go.")] = False,
    json_: Json = False,
) -> None:
    """Take rows out of a table, or of all tables of a store, and keep them out.

    In one new version; no later run brings them back.

    \b
      fmembed delete out/articles --where "topic = 'spam' and year < 2020" --dry-run
      fmembed delete out/articles --ids forgotten.txt --purge
    """
    from fmembed.deletion import delete as delete_rows

    given, places = None if ids is None else _read_lines(ids), _places(table)
    for one in places if places != [table] else ():  # that all of them can be asked this
        delete_rows(one, where, ids=given, listed_in=listed_in, purge=purge, dry_run=True)
    for one in places:
        if places != [table] and not json_:
            say_line(f"in {one}:")
        done = delete_rows(one, where, ids=given, listed_in=listed_in, purge=purge, dry_run=dry_run)
        if json_:
            print(json.dumps({**asdict(done), "dry_run": dry_run}))
        else:
            _tell(done, purge, dry_run)


def _tell(done: Deletion, purge: bool, dry_run: bool) -> None:
    num_rows, more = done.rows + done.rows_rejected, ""
    if done.samples:
        more = f": {', '.join(done.samples)}{', ...' if num_rows > len(done.samples) else ''}"
    would = "would delete" if dry_run else "deleted"
    rejected_too = f" and {done.rows_rejected:,} rejected ones" if done.rows_rejected else ""
    say_line(f"{would} {done.rows:,} row{'' if done.rows == 1 else 's'}{rejected_too}{more}")
    if done.num_absent:
        some = f"{', '.join(done.absent)}{', ...' if done.num_absent > len(done.absent) else ''}"
        kept = "" if dry_run else ", and are kept out from now on"
        say_line(f"{done.num_absent:,} of the given ids are not in the table{kept}: {some}")
    if not dry_run and num_rows:
        say_line(f"version {done.version} has {done.rows_left:,} rows; no run brings these back")
        say_line("fmembed probe makes the report anew; fmembed undelete lets rows come back")
        if done.is_behind:
            say_line("the store's readers get an older version, which may have them: promote this")
        if not purge:
            say_line("older versions still have them: fmembed vacuum --purge, or --purge here")


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line for raw in file if (line := raw.rstrip("\r\n"))]
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise SpecError(f"--ids: {path}: {why}; give a file of ids, one a line") from None


@app.command()
def undelete(table: TableName, json_: Json = False) -> None:
    """Let rows come back that delete has removed, by the next run."""
    from fmembed.deletion import undelete as let_come_back

    # Of a store's tables one does for all.
    num_rows = let_come_back(next(iter(_places(table)), table))
    if json_:
        print(json.dumps({"table": table, "rows": num_rows}))
        return
    say_line(f"{num_rows:,} ids are kept out no more: the next run reads the whole source for them")
