"""What several commands take: a spec by config and flags, a table, how to tell the end."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from fmembed import fields as of_config
from fmembed import terminal
from fmembed.config_file import read_yaml
from fmembed.errors import SpecError
from fmembed.spec import RunSpec

STDIN = "-"
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".npz", ".npy", ".tar", ".gz")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Say nothing where all is well: for cron, which mails."),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Tell where the time went, and show Ray's output.")
]
SetFields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field, e.g. compute.actors=2."),
]
IfLocked = Annotated[
    Literal["fail", "wait", "skip"],
    typer.Option(help="Where another run is writing the table: end with 1, wait, or end with 0."),
]
AllowRemovals = Annotated[
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
    "store": _flag("output.store", "FOLDER"),
}
_Config = Annotated[
    str | None, typer.Argument(help="A YAML config; fmembed init writes one. Flags come over it.")
]


def option_of(name: str) -> Any:
    """The flag of a field, for a command that takes some of them."""
    return _FLAGS[name][1].__metadata__[0]


def of_spec(command: Callable[..., None]) -> Callable[..., None]:
    """Make of a command that takes a spec one that takes a config, fields' flags and `--set`."""
    shared = {"config": _Config, **{name: type_ for name, (_, type_) in _FLAGS.items()}}
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [
        *(_parameter(name, type_) for name, type_ in {**shared, "set_": SetFields}.items()),
        *(p for p in own if p.name != "spec"),
    ]

    def run(config: str | None, set_: list[str] | None, **given: Any) -> None:
        fields = {field: given.pop(name) for name, (field, _) in _FLAGS.items()}
        fields["source.carry"] = fields["source.carry"] or None  # a list that nothing is in
        overrides = named_fields(fields, set_)
        if config is not None and config.lower().endswith(_DATA):
            raise SpecError(
                f"config {config}: takes a YAML file, and this looks like data: --source {config}, "
                f"or fmembed init {config}, which writes a config for it"
            )
        spec = RunSpec.from_yaml(config, overrides)
        if spec.source.uri != STDIN:
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


TableName = Annotated[str, typer.Argument(help="A table's folder or URL.")]


def named_fields(fields: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """What flags name, by dotted field."""
    overrides = {field: value for field, value in fields.items() if value is not None}
    for assignment in assignments or ():
        name, _, value = assignment.partition("=")
        if not (name and value):
            raise SpecError(f"--set: takes FIELD=VALUE (null for none), got {assignment!a:.200}")
        overrides[name] = read_yaml(value, f"--set {name}")
    # A table's place comes over a store's, and the other way round, whatever a config says.
    if overrides.get("output.store") is not None:
        overrides.setdefault("output.uri", "")
    elif overrides.get("output.uri"):
        overrides.setdefault("output.store", None)
    return overrides


def say_line(line: str) -> None:
    # One line, whatever ids, labels and messages of the dataset are quoted in it.
    print(terminal.printable(line))
