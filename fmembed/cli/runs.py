"""Commands that run the line: embed, refresh, plan, probe, and the benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from fmembed import summary, terminal
from fmembed.cli.app import app
from fmembed.cli.options import (
    AllowRemovals,
    IfLocked,
    Json,
    Quiet,
    SetFields,
    Verbose,
    named_fields,
    of_spec,
    say_line,
)
from fmembed.errors import LockedError, SpecError
from fmembed.spec import RunSpec

# The exit code of a refresh that has left rows in the table which the source has no more, or whose
# version the gate has refused.
_NOT_ALL = 3


@app.command()
@of_spec
def embed(
    spec: RunSpec,
    *,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Try rejected rows again.")
    ] = False,
    if_locked: IfLocked = "fail",
    quiet: Quiet = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Embed a dataset into a table; the same command again resumes.

    Of a config, or of flags alone; fmembed fields lists all that a config may say.

    \b
      fmembed embed config.yaml
      fmembed embed --source articles.csv --input body --label topic \\
        --model sentence-transformers/all-MiniLM-L6-v2 --output out/articles
    """
    from fmembed import pipeline

    silent, waits = quiet or json_, if_locked == "wait"
    with _skipped(if_locked == "skip", json_, quiet):
        result = pipeline.embed(
            spec, retry_rejected=retry_rejected, waits=waits, verbose=verbose, quiet=silent
        )
    if not quiet or _needs_a_look(asdict(result)):
        _print_result(asdict(result), json_, verbose)


@app.command()
@of_spec
def refresh(
    spec: RunSpec,
    *,
    allow_removals: AllowRemovals = None,
    gate: Annotated[
        Literal["enforce", "report", "off"],
        typer.Option(
            help="In a store, where the gate refuses the new version: end with 3, or with 0; off: "
            "it is not asked."
        ),
    ] = "enforce",
    if_locked: IfLocked = "fail",
    quiet: Quiet = False,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Bring a table in step with its source, as one new version.

    What is new or has changed is embedded, what is gone leaves; where nothing has changed nothing
    is read. With --store the gate decides whether readers get the new version. Exit 3 where it
    refuses, or rows stay in the table that should have left; all else is committed.

    \b
      fmembed refresh config.yaml
      fmembed refresh --store s3://bucket/articles config.yaml --if-locked skip
    """
    from fmembed import pipeline

    silent, waits = quiet or json_, if_locked == "wait"
    with _skipped(if_locked == "skip", json_, quiet):
        result = pipeline.refresh(
            spec, allow_removals=allow_removals, gate=gate, waits=waits, verbose=verbose,
            quiet=silent,
        )  # fmt: skip
    if not quiet or _needs_a_look(asdict(result)):
        _print_result(asdict(result), json_, verbose)
    if result.rows_withheld or (result.promotion == "refused" and gate == "enforce"):
        raise typer.Exit(_NOT_ALL)


@contextmanager
def _skipped(skips: bool, as_json: bool, quiet: bool) -> Iterator[None]:
    """Where another run is at work, say so and end well: what a schedule that ticks wants."""
    try:
        yield
    except LockedError as e:
        if not skips:
            raise
        if not quiet:
            terminal.say(f"skipped: {' '.join(str(e).split())}")
        if as_json:
            print(json.dumps({"skipped": str(e)}))
        raise typer.Exit from None


@app.command()
@of_spec
def plan(
    spec: RunSpec,
    *,
    refresh_: Annotated[
        bool, typer.Option("--refresh", help="Of fmembed refresh; else of fmembed embed.")
    ] = False,
    allow_removals: AllowRemovals = None,
    json_: Json = False,
    verbose: Verbose = False,
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
        say_line(line)


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
    set_: SetFields = None,
    json_: Json = False,
    verbose: Verbose = False,
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
    overrides = named_fields(fields, set_)
    from fmembed import pipeline

    names = tuple(probes) if probes else None
    result = pipeline.probe(
        table, names, spec=config, overrides=overrides, verbose=verbose, quiet=json_
    )
    if json_:
        print(json.dumps(asdict(result)))
        return
    for line in summary.probed(asdict(result), verbose):
        say_line(line)


@app.command()
def compare(
    tables: Annotated[list[str], typer.Argument(help="Tables of the same rows, two or more.")],
    probes: Annotated[
        list[str] | None, typer.Option("--probe", help="knn or linear; both, if none is named.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="What is predicted; else as its config.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="What names the test split's rows.")] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare models by their tables: who tells the labels better, by how much, and is it sure.

    On the rows that all tables have, each judged by probes that were trained without it.
    """
    from fmembed import pipeline

    found = pipeline.compare(
        tables, tuple(probes or ("knn", "linear")),
        label=label, split=split, verbose=verbose, quiet=json_,
    )  # fmt: skip
    if json_:
        print(json.dumps(asdict(found)))
        return
    for line in summary.compared(found):
        say_line(line)


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


def _needs_a_look(result: dict[str, Any]) -> bool:
    """Whether something was left out by this run that should not have been."""
    counts = any(result[name] for name in ("rows_rejected", "rows_withheld", "rows_absent"))
    return counts or result["promotion"] == "refused"


def _print_result(result: dict[str, Any], as_json: bool, verbose: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for line in summary.lines(result, verbose):
        say_line(line)
