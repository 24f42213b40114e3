"""The command itself, to which each module here adds its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

# Before anything imports huggingface_hub, which reads these once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Bars are drawn with control characters, of which none is let through.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from fmembed import __version__
from fmembed.redaction import scrub


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


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print it.")] = False) -> None:
    if version:
        print(f"fmembed {__version__}")
        raise typer.Exit
