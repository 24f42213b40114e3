"""The command line: thin, every command is one call into the pipeline or the table."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import traceback
from typing import NoReturn

from fmembed import signals, terminal
from fmembed.cli import (  # noqa: F401 - add commands
    configs,
    doctor,
    exchange,
    fleet,
    runs,
    store,
    tables,
)
from fmembed.cli.app import app
from fmembed.errors import FmembedError
from fmembed.redaction import scrub

_INTERRUPTED = "interrupted; what is committed stays, the same command resumes"


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
