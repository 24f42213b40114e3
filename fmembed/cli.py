"""The command line: thin, every command is one call into the pipeline or the table."""

from __future__ import annotations

import atexit
import errno
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, NoReturn

# Before anything imports huggingface_hub, which reads these once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Bars are drawn with control characters, of which none is let through.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from fmembed import __version__, signals, summary, terminal
from fmembed import fields as of_config
from fmembed.config_file import read_yaml
from fmembed.errors import FmembedError, SpecError
from fmembed.redaction import scrub
from fmembed.spec import RunSpec


class _Commands(typer.core.TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _scrubbed():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _scrubbed():
            return super().invoke(ctx)


@contextmanager
def _scrubbed() -> Iterator[None]:
    """What a wrong command line is told quotes it."""
    try:
        yield
    except Exception as e:
        # The exceptions' class is not exported.
        if isinstance(getattr(e, "message", None), str):
            e.message = scrub(e.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Verified tables of embeddings from a dataset and a pretrained foundation model.",
)

# The exit code of a refresh that has left rows in the table which the source has no more.
_WITHHELD = 3
_STDIN = "-"
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".npz", ".npy", ".tar", ".gz")
_INTERRUPTED = "interrupted; what is committed stays, the same command resumes"
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
_Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Say nothing where all is well: for cron, which mails."),
]
_Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Tell where the time went, and show Ray's output.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, e.g. compute.actors=2."),
]
_AllowRemovals = Annotated[
    int | None,
    typer.Option(min=0, help="So many rows may leave, in place of max_removed_fraction."),
]


def _flag(field: str, metavar: str, *names: str, several: bool = False) -> tuple[str, Any]:
    """A field that is used much, as a flag: what it means, takes and is without it."""
    (told,) = of_config.describe_fields(field)
    says = told.meaning[0].upper() + told.meaning[1:]
    takes = f" One of {told.choices}." if told.choices else ""
    default = {"required": "", "none": ""}.get(told.default, f" Default: {told.default}.")
    more = " Once for each." if several else ""
    kind: Any = list[str] | None if several else str | None
    option = typer.Option(*names, metavar=metavar, help=f"{says}.{takes}{default}{more}")
    return field, Annotated[kind, option]


# Of the fields that are used most, the flags: their names in a command, and in the config.
_FLAGS: dict[str, tuple[str, Any]] = {
    "source": _flag("source.uri", "PATH"),
    "format_": _flag("source.format", "FORMAT", "--format"),
    "input_": _flag("source.input", "COLUMN", "--input"),
    "id_": _flag("source.id", "COLUMN", "--id"),
    "label": _flag("source.label", "COLUMN"),
    "split": _flag("source.split", "COLUMN"),
    "carry": _flag("source.carry", "COLUMN", several=True),
    "model": _flag("model.id", "MODEL"),
    "revision": _flag("model.revision", "NAME"),
    "dtype": _flag("model.dtype", "TYPE"),
    "prompt": _flag("model.prompt", "TEXT"),
    "output": _flag("output.uri", "FOLDER"),
}
_Config = Annotated[
    str | None, typer.Argument(help="A YAML config; fmembed init writes one. Flags come over it.")
]


def _option_of(name: str) -> Any:
    """The flag of a field, for a command that takes some of them."""
    return _FLAGS[name][1].__metadata__[0]


def _of_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Make of a command that takes a spec one that takes a config, fields' flags and `--set`."""
    shared = {"config": _Config, **{name: type_ for name, (_, type_) in _FLAGS.items()}}
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [
        *(_parameter(name, type_) for name, type_ in {**shared, "set_": _Set}.items()),
        *(p for p in own if p.name != "spec"),
    ]

    def run(config: str | None, set_: list[str] | None, **given: Any) -> None:
        fields = {field: given.pop(name) for name, (field, _) in _FLAGS.items()}
        fields["source.carry"] = fields["source.carry"] or None  # a list that nothing is in
        if config is not None and config.lower().endswith(_DATA):
            raise SpecError(
                f"config {config}: takes a YAML file, and this looks like data: --source {config}, "
                f"or fmembed init {config}, which writes a config for it"
            )
        spec = RunSpec.from_yaml(config, _overrides(fields, set_))
        if spec.source.uri != _STDIN:
            command(spec, **given)
            return
        from fmembed.api import of_stream

        if sys.stdin is None:
            raise SpecError("source.uri: - is standard input, and there is none")
        if sys.stdin.isatty():
            terminal.say("a text a line; Ctrl-D ends them")
        with of_stream(spec, sys.stdin.buffer) as spooled:
            command(spooled, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, type_: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=type_)


@app.command()
@_of_spec
def embed(
    spec: RunSpec,
    *,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Try rejected rows again.")
    ] = False,
    quiet: _Quiet = False,
    json_: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Embed a dataset into a table; the same command again resumes.

    Of a config, or of flags alone; fmembed fields lists all that a config may say.

    \b
      fmembed embed config.yaml
      fmembed embed --source articles.csv --input body --label topic \\
        --model sentence-transformers/all-MiniLM-L6-v2 --output out/articles
    """
    from fmembed import pipeline

    silent = quiet or json_
    result = pipeline.embed(spec, retry_rejected=retry_rejected, verbose=verbose, quiet=silent)
    if not quiet or _needs_a_look(asdict(result)):
        _print_result(asdict(result), json_, verbose)


@app.command()
@_of_spec
def refresh(
    spec: RunSpec,
    *,
    allow_removals: _AllowRemovals = None,
    quiet: _Quiet = False,
    json_: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Bring a table in step with its source, as one new version.

    What is new or has changed is embedded, what is gone leaves; where nothing has changed nothing
    is read. Exit 3 where rows stay in the table that should have left; all else is committed.
    """
    from fmembed import pipeline

    silent = quiet or json_
    result = pipeline.refresh(spec, allow_removals=allow_removals, verbose=verbose, quiet=silent)
    if not quiet or _needs_a_look(asdict(result)):
        _print_result(asdict(result), json_, verbose)
    if result.rows_withheld:
        raise typer.Exit(_WITHHELD)


@app.command()
@_of_spec
def plan(
    spec: RunSpec,
    *,
    refresh_: Annotated[
        bool, typer.Option("--refresh", help="Of fmembed refresh; else of fmembed embed.")
    ] = False,
    allow_removals: _AllowRemovals = None,
    json_: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Say what a run would do now, take and cost; write nothing.

    Nothing is written, no GPU is taken where runs on record tell how fast the model is, and no
    server is asked.
    """
    from fmembed import forecast, pipeline

    found = pipeline.plan(
        spec, refresh=refresh_, allow_removals=allow_removals, verbose=verbose, quiet=json_
    )
    if json_:
        print(json.dumps({**asdict(found), "nothing": found.is_nothing}))
        return
    for line in forecast.lines(found):
        _print(line)


@app.command()
def probe(
    table: Annotated[str, typer.Argument(help="A table's folder or URL.")],
    probes: Annotated[
        list[str] | None, typer.Option("--probe", help="Which; default: those of its config.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--from-config", metavar="CONFIG", help="The YAML config that made it."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="source.uri")] = None,
    label: Annotated[str | None, typer.Option(help="source.label")] = None,
    split: Annotated[str | None, typer.Option(help="source.split")] = None,
    model: Annotated[str | None, typer.Option(help="model.id")] = None,
    set_: _Set = None,
    json_: _Json = False,
    verbose: _Verbose = False,
) -> None:
    """Probe an existing table anew and write its report.

    Whoever made it: the source and the model that it names are opened only if named here.
    """
    fields = {
        "source.uri": source,
        "source.label": label,
        "source.split": split,
        "model.id": model,
    }
    overrides = _overrides(fields, set_)
    from fmembed import pipeline

    names = tuple(probes) if probes else None
    result = pipeline.probe(
        table, names, spec=config, overrides=overrides, verbose=verbose, quiet=json_
    )
    if json_:
        print(json.dumps(asdict(result)))
        return
    for line in summary.probed(asdict(result), verbose):
        _print(line)


def _overrides(fields: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """What flags name, by dotted field."""
    overrides = {field: value for field, value in fields.items() if value is not None}
    for assignment in assignments or ():
        name, _, value = assignment.partition("=")
        if not (name and value):
            raise SpecError(f"--set: takes FIELD=VALUE (null for none), got {assignment!a:.200}")
        overrides[name] = read_yaml(value, f"--set {name}")
    return overrides


@app.command()
def rejected(
    table: Annotated[str, typer.Argument(help="A table's folder or URL.")],
    samples: Annotated[int, typer.Option(help="Rows to show of each cause.")] = 3,
    json_: _Json = False,
) -> None:
    """Count the rejected rows by cause, and show some of each."""
    from fmembed.table.table import Table

    causes = Table.open(table).rejected_by_cause(samples)
    if json_:
        print(json.dumps({"table": table, "rows_rejected": _total(causes), "causes": causes}))
        return
    print(f"rows rejected: {_total(causes):,}")
    for cause in causes:
        _print(f"{cause['rows']:,} {cause['error']} (stage {cause['stage']})")
        for row in cause["samples"]:
            _print(f"  {row['row_id']}: {row['message']}")
    if causes:
        print("fmembed embed --retry-rejected, with the same config, tries them again")


def _total(causes: list[dict[str, Any]]) -> int:
    return sum(cause["rows"] for cause in causes)


def _print(line: str) -> None:
    # One line, whatever ids, labels and messages of the dataset are quoted in it.
    print(terminal.printable(line))


@app.command()
def verify(
    table: Annotated[str, typer.Argument(help="A table's folder or URL.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="First mend log, parts and records; delete nothing.")
    ] = False,
    json_: _Json = False,
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
            _print(f"  mended: {line}")
        if repaired:
            _print("run the same fmembed embed again for what is missing now")
        _print(
            f"{result.table} version {result.version}: {result.rows:,} rows of dimension "
            f"{result.dim} in {result.parts:,} parts, {result.rows_rejected:,} rejected, norms "
            f"{result.norm_min:.4f} to {result.norm_max:.4f}"
        )
        for problem in result.problems:
            _print(f"  off: {problem}")
        for note in result.notes:
            _print(f"  note: {note}")
        print("something is off" if result.problems else "all is well")
    if result.problems:
        raise typer.Exit(1)


_Table = Annotated[str, typer.Argument(help="A table's folder or URL.")]


@app.command()
def info(
    table: _Table,
    version: Annotated[int | None, typer.Option(help="Which; the newest, if none.")] = None,
    json_: _Json = False,
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
        _print(line)


@app.command()
def versions(
    table: _Table,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    json_: _Json = False,
) -> None:
    """List a table's versions, the newest first."""
    from fmembed.table.versions import list_versions

    found = list_versions(table, limit)
    if json_:
        print(json.dumps({"table": table, "versions": [asdict(v) for v in found]}))
        return
    for v in found:
        by = f"run {v.run}" if v.run else f"{v.operation} by another tool"
        gone = "" if v.is_whole else "; parts of it are gone"
        _print(
            f"{v.version:>6}  {v.time}  {v.rows:,} rows in {v.parts:,} parts, "
            f"{v.num_bytes / 2**20:,.1f} MiB; parts of {v.added:,} rows came, of {v.removed:,} "
            f"went; {by}{gone}"
        )


@app.command()
def diff(
    table: _Table,
    old: Annotated[int, typer.Argument(help="A version.")],
    new: Annotated[int | None, typer.Argument(help="Another; the newest, if none.")] = None,
    json_: _Json = False,
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
        _print(f"{name:<10} {count:,}" + (f": {', '.join(ids)}{more}" if ids else ""))


@app.command()
def files(
    table: _Table,
    version: Annotated[int | None, typer.Option(help="Which; the newest, if none.")] = None,
    json_: _Json = False,
) -> None:
    """Print where the parts of a version are, for other readers."""
    from fmembed.table.versions import list_files

    found = list_files(table, version)
    if json_:
        print(json.dumps({"table": table, "files": found}))
        return
    for path in found:
        _print(path)


@app.command()
def vacuum(
    table: _Table,
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
    json_: _Json = False,
) -> None:
    """Delete files that only older versions name."""
    from fmembed.table.versions import vacuum as vacuum_table

    done = vacuum_table(
        table, keep_days=keep_days, keep_versions=keep_versions, purge=purge, dry_run=dry_run
    )
    if json_:
        print(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    _print(
        f"{'would delete' if dry_run else 'deleted'} {done.files:,} files of "
        f"{done.num_bytes / 2**20:,.1f} MiB; versions {done.oldest} to {done.newest} "
        f"{'would stay' if dry_run else 'are whole'}"
    )
    if purge and not dry_run:
        print("fmembed probe makes the report anew")


@app.command()
def delete(
    table: _Table,
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
    json_: _Json = False,
) -> None:
    """Take rows out of a table, and keep them out.

    In one new version; no later run brings them back.

    \b
      fmembed delete out/articles --where "topic = 'spam' and year < 2020" --dry-run
      fmembed delete out/articles --ids forgotten.txt --purge
    """
    from fmembed.deletion import delete as delete_rows

    given = None if ids is None else _read_lines(ids)
    done = delete_rows(table, where, ids=given, listed_in=listed_in, purge=purge, dry_run=dry_run)
    if json_:
        print(json.dumps({**asdict(done), "dry_run": dry_run}))
        return
    num_rows, more = done.rows + done.rows_rejected, ""
    if done.samples:
        more = f": {', '.join(done.samples)}{', ...' if num_rows > len(done.samples) else ''}"
    would = "would delete" if dry_run else "deleted"
    rejected_too = f" and {done.rows_rejected:,} rejected ones" if done.rows_rejected else ""
    _print(f"{would} {done.rows:,} row{'' if done.rows == 1 else 's'}{rejected_too}{more}")
    if done.num_absent:
        some = f"{', '.join(done.absent)}{', ...' if done.num_absent > len(done.absent) else ''}"
        kept = "" if dry_run else ", and are kept out from now on"
        _print(f"{done.num_absent:,} of the given ids are not in the table{kept}: {some}")
    if not dry_run and num_rows:
        _print(f"version {done.version} has {done.rows_left:,} rows; no run brings these back")
        _print("fmembed probe makes the report anew; fmembed undelete lets rows come back")
        if not purge:
            _print("older versions still have them: fmembed vacuum --purge, or --purge here")


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line for raw in file if (line := raw.rstrip("\r\n"))]
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise SpecError(f"--ids: {path}: {why}; give a file of ids, one a line") from None


@app.command()
def undelete(table: _Table, json_: _Json = False) -> None:
    """Let rows come back that delete has removed, by the next run."""
    from fmembed.deletion import undelete as let_come_back

    num_rows = let_come_back(table)
    if json_:
        print(json.dumps({"table": table, "rows": num_rows}))
        return
    _print(f"{num_rows:,} ids are kept out no more: the next run reads the whole source for them")


@app.command()
def init(
    data: Annotated[str | None, typer.Argument(help="A dataset, as source.uri.")] = None,
    example: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or one of the configs that come with it.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="The config to write; - prints it.")
    ] = None,
    format_: Annotated[str | None, _option_of("format_")] = None,
    model: Annotated[str | None, _option_of("model")] = None,
    output: Annotated[str | None, _option_of("output")] = None,
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
    if path == _STDIN:
        print(text, end="")
        return
    first_config.write(text, path)
    _print(f"wrote {path}; look at it, then: fmembed embed {path}")


@app.command()
def fields(
    part: Annotated[str | None, typer.Argument(help="As model, source.csv, or one field.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
) -> None:
    """List the fields of a config, their defaults and meaning."""
    for line in of_config.markdown() if markdown else of_config.lines(part):
        _print(line)


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Suites; all, if none is named. `memory` is one more, by itself."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    reps: Annotated[int, typer.Option(min=1, help="Repetitions; the medians are told.")] = 3,
    out: Annotated[str, typer.Option(help="Folder for bench.json and bench.md.")] = "out/bench",
    scale: Annotated[float, typer.Option(help="Factor on the rows, for a quick look.")] = 1.0,
    images: Annotated[int, typer.Option(help="memory: pictures, then ten times as many")] = 2000,
    clips: Annotated[int, typer.Option(help="memory: sounds; then ten times as many.")] = 200,
) -> None:
    """Measure this machine: fmembed beside other ways."""
    from fmembed import bench as benchmarks

    if device not in ("cpu", "cuda"):
        raise SpecError(f"bench: device is cpu or cuda, got {device!r}")
    suites = benchmarks.list_suites(device)
    if unknown := sorted(set(what or []) - {*suites, "memory"}):
        raise SpecError(f"bench: takes {', '.join(suites)} or memory, got {', '.join(unknown)}")
    if what == ["memory"]:
        for line in benchmarks.memory(images, clips):
            print(json.dumps(line))
        return
    benchmarks.check_peers(device)
    names = [name for name in suites if not what or name in what]
    report = benchmarks.compare(names, device, reps, out, scale)
    print(benchmarks.to_markdown(report))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print it.")] = False) -> None:
    if version:
        print(f"fmembed {__version__}")
        raise typer.Exit


def _needs_a_look(result: dict[str, Any]) -> bool:
    """Whether something was left out by this run that should not have been."""
    return any(result[name] for name in ("rows_rejected", "rows_withheld", "rows_absent"))


def _print_result(result: dict[str, Any], as_json: bool, verbose: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for line in summary.lines(result, verbose):
        _print(line)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process; a user's mistake is one line on stderr, no traceback."""
    # For the processes that libraries start with -c or -m, which look into the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    with signals.raise_stopped(), terminal.clean_output():
        code = _finish(arguments)
    # Not through the interpreter's teardown: a thread of the object store's client that answers
    # meanwhile aborts the process, one run in 80 that read from S3
    # (https://github.com/PyO3/pyo3-async-runtimes/issues/40). What has to be closed is registered.
    atexit._run_exitfuncs()
    os._exit(code)


def _finish(arguments: list[str] | None) -> int:
    code = 1
    try:
        code = run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has gone, as `head` does
        pass
    except OSError as e:
        code = code or 1
        if e.errno != errno.ENOSPC:
            _print_traceback()
        else:
            terminal.say(f"cannot write the output: {e.strerror}")
    except Exception:
        _print_traceback()
    except signals.Stopped as e:  # once more, while it was ending
        e.heard()
        code = e.exit_code
    return code


def _print_traceback() -> None:
    print(scrub(traceback.format_exc()), end="", file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit code."""
    with terminal.clean_output():
        try:
            app(arguments)
        except SystemExit as e:
            if isinstance(e.code, str):
                terminal.say(e.code)
                return 1
            return e.code or 0
        except KeyboardInterrupt:  # where the signals are not ours
            terminal.say(_INTERRUPTED)
            return 130
        except (Exception, signals.Stopped) as e:
            if (stopped := signals.Stopped.unheard) is not None:
                stopped.heard()
                terminal.say(_INTERRUPTED)
                return stopped.exit_code
            if not isinstance(e, FmembedError):
                raise
            terminal.say(" ".join(str(e).split()))
            return e.exit_code
    return 0


if __name__ == "__main__":
    main()
