"""What is printed: nothing of it is obeyed by a terminal, and where nobody reads, nothing fails.

File names, labels, causes and other libraries' errors quote data, which may hold escape sequences:
they move the cursor, hide what is there, or answer for the user.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


def printable(text: str, kept: str = "") -> str:
    r"""Text with what a terminal obeys or cannot show written out, `\x1b` for the escape character.

    Control characters, marks that turn the direction of text, separators of lines and paragraphs,
    halves of surrogate pairs; line ends too, so that one line stays one.

    Args:
        text: Whatever came.
        kept: Characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print one line on stderr, as fmembed's."""
    print(f"fmembed: {printable(text)}", file=sys.stderr)


class _Stream:
    """A text stream in front of stdout or stderr.

    `is_clean`: everything is made printable, and libraries see no terminal, for which they would
    write control sequences. `is_strict`: what cannot be written is an error.
    """

    def __init__(self, stream: Any, is_clean: bool, is_strict: bool) -> None:
        self.stream = stream
        self._is_clean = is_clean
        self._is_strict = is_strict
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "backslashreplace"

    def write(self, text: str) -> int:
        clean = printable(text, "\n\t") if self._is_clean else text
        try:
            self.stream.write(clean.encode(self.encoding, self.errors).decode(self.encoding))
        except OSError:
            if self._is_strict:
                raise
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            if self._is_strict:
                raise

    def isatty(self) -> bool:
        return not self._is_clean and bool(self.stream.isatty())

    def fileno(self) -> int:
        return int(self.stream.fileno())


@contextmanager
def clean_output() -> Iterator[None]:
    """Have all that is printed meanwhile made printable; stderr may be closed or gone."""
    # Either is null where the process was started without.
    out: Any = sys.stdout and _Stream(sys.stdout, is_clean=True, is_strict=True)
    err: Any = sys.stderr and _Stream(sys.stderr, is_clean=True, is_strict=False)
    with redirect_stdout(out), redirect_stderr(err):
        yield


def stderr_to_draw_on() -> Any:
    """Stderr as it is, terminal or not, for what is drawn of our own texts."""
    stream: Any = sys.stderr
    while isinstance(stream, _Stream):
        stream = stream.stream
    return _Stream(stream, is_clean=False, is_strict=False)
