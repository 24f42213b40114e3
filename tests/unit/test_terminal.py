"""What is printed is never obeyed by a terminal, and never fails for its characters."""

from __future__ import annotations

import io
import sys
import traceback

import pytest

from fmembed.terminal import clean_output, printable, say, stderr_to_draw_on

HOSTILE = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1bP1$r\x1b\\", "\x9b31m", "\x90", "\x00", "\x07", "\x08",
    "\r", "\x0b", "\x0c", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u202a", "\u2066",
    "\u2069", "\u200f", "\u061c", "\ufeff", "\ud800", "\udcff", "\U000e0041", "\ue000", "\ufff9",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_obeys_is_written_out(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = f"a{text}b"
    assert printable(whole).isprintable()
    assert printable(whole)[0] + printable(whole)[-1] == "ab"
    assert printable(printable(whole)) == printable(whole)
    with clean_output():
        print(whole)
        print(whole, file=sys.stderr)
        say(whole)
    out, err = capsys.readouterr()
    assert out == f"{printable(whole)}\n"
    assert err == f"{printable(whole)}\nfmembed: {printable(whole)}\n"


def test_other_text_is_left_alone() -> None:
    for text in ("", "plain", "Grüße, 世界, مرحبا, emoji \U0001f600", "a  b"):
        assert printable(text) == text
    assert printable("a\nb\tc") == r"a\nb\tc"
    assert printable("a\nb\tc", "\n\t") == "a\nb\tc"


def test_a_line_of_ours_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("forged\nfmembed: all is well")
    assert capsys.readouterr().err == "fmembed: forged\\nfmembed: all is well\n"


def test_libraries_see_no_terminal_and_their_messages_are_cleaned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert stderr_to_draw_on().isatty()
    with clean_output():
        assert not sys.stderr.isatty()
        assert stderr_to_draw_on().isatty()
        try:
            raise ValueError("\x1b[2J")
        except ValueError:
            traceback.print_exc()
        stderr_to_draw_on().write("\x1b[1A")  # what we draw ourselves
    err = capsys.readouterr().err
    assert err.endswith("\x1b[1A")
    assert "\x1b" not in err.removesuffix("\x1b[1A")
    assert "\\x1b[2J" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_character_can_be_printed_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with clean_output():
        print("é世\udcff")
        sys.stdout.flush()
    said = raw.getvalue().decode(encoding)
    assert said.endswith("\\udcff\n")
    assert ("世" in said) == (encoding == "utf-8")


class _Gone(io.StringIO):
    """The terminal was closed."""

    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_nothing_fails_because_nobody_reads_errors_but_lost_output_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", _Gone())
    monkeypatch.setattr(sys, "stdout", _Gone())
    with clean_output():
        say("interrupted")
        sys.stderr.flush()
        stderr_to_draw_on().write("bar")
        with pytest.raises(OSError, match="Input/output"):
            print("a result")


def test_a_process_may_have_been_started_without_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    with clean_output():
        say("a")
        print("b")
