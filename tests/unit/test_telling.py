"""What a run says while it goes."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fmembed import telling
from fmembed.telling import Pulse, Teller, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_begun_is_said_with_the_time_of_day(capsys: pytest.CaptureFixture[str]) -> None:
    Teller().say("starting Ray \x1b[31m…")
    Teller(quiet=True).say("nothing")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d starting Ray \\x1b\[31m…\n", capsys.readouterr().err
    )


def test_the_date_is_said_once_a_day(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([datetime(2026, 3, 1, 23, 58), datetime(2026, 3, 1, 23, 59), datetime(2026, 3, 2)])
    monkeypatch.setattr(telling, "datetime", Mock(now=lambda: next(times)))
    teller = Teller()
    for text in ("one", "two", "three"):
        teller.say(text)
    said = capsys.readouterr().err.splitlines()
    assert said == ["2026-03-01 23:58 one", "23:59 two", "2026-03-02 00:00 three"]


def test_every_half_minute_a_line_says_how_far_it_has_come() -> None:
    said: list[str] = []
    clock = Clock()
    pulse = Pulse(said.append, clock)
    beats = [
        # seconds, read, embedded, kept, total
        (1, 0, 0, 0, None),
        (31, 9000, 0, 0, None),
        (40, 12000, 100, 0, None),
        (62, 20000, 4500, 0, None),
        (80, 30000, 8000, 4500, 60000),
        (95, 40000, 11100, 8192, 60000),
        (3695, 60000, 59900, 50000, 60000),
    ]
    for seconds, read, embedded, kept, total in beats:
        clock.now = 100.0 + seconds
        pulse.beat(read, embedded, kept, "committed", total, is_exact=seconds > 1000)
    assert said == [
        "the model is being loaded · 9,000 rows read",
        "embedded 4,500 · 200 rows/s · committed 0",
        "embedded 11,100 of about 60,000 (18 %) · 200 rows/s · 4 min left · committed 8,192",
        "embedded 59,900 of 60,000 (100 %) · 16 rows/s · 6 s left · committed 50,000",
    ]


def test_what_is_waited_for_is_said_in_place_of_what_is_not_true_meanwhile() -> None:
    said: list[str] = []
    clock = Clock()
    pulse = Pulse(said.append, clock)
    clock.now += 31
    pulse.beat(9000, 0, 0, "", None, False, "waiting for 4 GPUs, for 31 s")
    pulse.beat(9000, 100, 0, "committed", 400, True)
    clock.now += 31
    pulse.beat(9000, 200, 64, "committed", 400, True, "waiting for 1 GPU, for 62 s")
    assert said == [
        "waiting for 4 GPUs, for 31 s · 9,000 rows read",
        "embedded 200 of 400 (50 %) · 3.2 rows/s · waiting for 1 GPU, for 62 s · committed 64",
    ]


def test_more_rows_than_were_likely_are_no_share_over_all() -> None:
    said: list[str] = []
    clock = Clock()
    pulse = Pulse(said.append, clock)
    pulse.beat(500, 10, 0, "committed", 400, is_exact=False)
    clock.now += 31
    pulse.beat(500, 498, 0, "committed", 400, is_exact=False)
    assert said == ["embedded 498 of about 498 (100 %) · 16 rows/s · 0 s left · committed 0"]


def test_a_notebook_is_told_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = Clock()
    pulse = Pulse(said.append, clock)
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", Mock(get_ipython=lambda: shell))
    clock.now += 6
    pulse.beat(0, 0, 0, "", None, is_exact=False)
    assert said == []  # in a terminal's IPython
    shell.kernel = object()
    pulse.beat(0, 0, 0, "", None, is_exact=False)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (5399, "90 min"), (5401, "1.5 h")],
)  # fmt: skip
def test_a_duration_is_said_as_people_say_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said
