"""The tree of errors, and what of an error a user is told.

FmembedError            exit 1: the run failed
├── RejectedError       exit 1: too many rows were rejected
├── ChangedError        exit 1: rows are others than when they were embedded
├── StorageError        exit 1: storage is full, forbidden or out of reach
│   └── DamagedError    exit 1: a log or a part is not as it was written
├── LockedError         exit 1: another run is writing the table
├── ConflictError       exit 1: somebody else has changed the table
├── GateRefusedError    exit 3: a version is no better, or worse, than what is promoted
├── BudgetSpentError    exit 4: the run has cost what it may
├── WaitedError         exit 1: no device came for as long as the run may wait
├── Interrupted         exit 129, 130 or 143: stopped by a signal
└── UserError           exit 2: the user's input; nothing was written
    ├── SpecError       a field of the config
    ├── SourceError     the dataset
    │   └── NoFilesError  there is nothing of it where it should be
    ├── ModelError      the checkpoint
    └── TableError      the output table
"""

from __future__ import annotations

import re
from typing import Any

from fmembed.redaction import redact as redact
from fmembed.redaction import scrub as scrub


class FmembedError(Exception):
    """A run failed. The message is one line, fit to be shown to the user as it is.

    URLs in it are cut to what holds no secret: other libraries' errors quote them whole.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(scrub(message))

    def __reduce__(self) -> Any:
        # Ray's workers send errors: one that is made of more than its message comes back whole.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[FmembedError], args: tuple[Any, ...], fields: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class RejectedError(FmembedError):
    """More rows were rejected than `output.max_rejected_fraction` allows."""


class ChangedError(FmembedError):
    """Rows of the source are others than the table's rows of the same ids."""


class BudgetSpentError(FmembedError):
    """The run has cost what it may; what was finished stays, and the same command goes on."""

    exit_code = 4


class GateRefusedError(FmembedError):
    """The gate does not let a version take the place of what is promoted."""

    exit_code = 3


class WaitedError(FmembedError):
    """No device came for as long as the run may wait; what was finished stays."""


class Interrupted(FmembedError):  # noqa: N818 - not an error: the run can be resumed
    """A signal stopped the run; what was committed stays and the same command resumes."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class UserError(FmembedError):
    """The user's input is wrong. The message names the field and the remedy."""

    exit_code = 2


class SpecError(UserError):
    """A field of the config."""


class SourceError(UserError):
    """The dataset: a missing file, an absent column, an unknown format."""


class NoFilesError(SourceError):
    """There is the place that the dataset was in, and nothing of it."""


class ModelError(UserError):
    """The checkpoint: no weights, an unsupported module, a refused format."""


class TableError(UserError):
    """The output: unwritable, made by another model, not a table."""


_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class StorageError(FmembedError):
    """Storage refused or failed; what was committed stays."""


def reason(error: BaseException) -> str:
    """The one line of an error that tells its reason."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    # Delta's reader tells a chain, a link a line, the cause last; others put the cause first.
    chain = [line.removeprefix("↳").strip() for line in lines if line.startswith("↳")]
    if chain:
        return ": ".join([lines[0], *chain])[:400]
    return lines[0] if lines else type(error).__name__


class LockedError(FmembedError):
    """Another run holds the table, or has taken it over."""


class ConflictError(FmembedError):
    """Somebody else has committed to the table since this run last looked."""


class DamagedError(StorageError):
    """A log or a part is not as it was written: cut, changed, gone."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(
            f"table: {uri} is damaged: {what}; nothing was deleted or taken for done: "
            f"fmembed verify --repair {uri} mends it"
        )
        self.what = what
