"""The tree of errors: whole, in one file, and exported where docstrings promise it."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import fmembed
from fmembed import errors
from fmembed.errors import DamagedError, FmembedError, Interrupted, SpecError

OWN = {
    name: cls
    for name, cls in vars(errors).items()
    if inspect.isclass(cls) and cls.__module__ == errors.__name__
}


@pytest.mark.parametrize("function", ["embed", "probe", "read", "verify"])
def test_every_error_that_a_docstring_promises_is_exported(function: str) -> None:
    said = inspect.getdoc(getattr(fmembed, function)) or ""
    promised = re.findall(r"^ +(\w+): ", said.partition("Raises:")[2], re.MULTILINE)
    assert promised
    for name in promised:
        assert getattr(fmembed, name) is OWN[name]


@pytest.mark.parametrize("name", list(OWN))
def test_the_tree_names_every_error_and_all_are_exported(name: str) -> None:
    assert issubclass(OWN[name], errors.FmembedError)
    assert re.search(rf"\b{name} ", errors.__doc__ or "")
    assert name in fmembed.__all__


@pytest.mark.parametrize(
    "error", [SpecError("a: b"), DamagedError("uri", "cut"), Interrupted("stopped", 15)]
)
def test_errors_come_back_whole_from_other_processes(error: FmembedError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (type(again), str(again)) == (type(error), str(error))
    assert (again.exit_code, vars(again)) == (error.exit_code, vars(error))
