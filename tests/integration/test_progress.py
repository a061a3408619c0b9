"""The line that shows how far a run is: when it is written, what it says, and when the rest will be done."""

from __future__ import annotations

import io
import re
import time

import pytest

from kvbench.runners import progress
from kvbench.runners.progress import ERASE_LINE, Progress, Work, clock, status_line


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_line_moves_within_two_seconds_of_work_and_is_gone_afterwards(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    begin = time.monotonic()
    with status_line(lambda: f"{time.monotonic() - begin:.0f} s"):
        time.sleep(1.5)
    lines = screen.getvalue().split(ERASE_LINE)
    assert lines[:2] == ["", "0 s"] and lines[-1] == ""
    assert len(lines) > 3 or lines[2] in ("1 s", "2 s")


def test_a_log_gets_a_line_in_half_a_minute_and_no_control_characters(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.1)
    with status_line(lambda: "working"):
        time.sleep(0.35)
    assert re.fullmatch("(working\n){1,3}", file.getvalue())
    file.truncate(0)
    with status_line(lambda: "working"):
        pass
    assert file.getvalue() == ""


def test_a_message_is_not_written_behind_the_line(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    progress.erase_status_line()
    assert screen.getvalue() == ""
    with status_line(lambda: "working"):
        progress.erase_status_line()
        assert screen.getvalue().endswith(f"working{ERASE_LINE}")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40")])
def test_clock(seconds, text):
    assert clock(seconds) == text


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_line_names_methods_example_phase_and_what_is_left():
    now = Clock()
    shown = Progress([Work("qasper", 1, 1000, 10), Work("qasper", 2, 2000, 10), Work("lcc", 1, 500, 0)], now)
    assert shown.text() == ""
    shown.begin_batch("full, snapkv 256")
    now.time += 5
    assert shown.text() == "example 1/4 (qasper): prefill of 1000 tokens  [full, snapkv 256]  0:05"
    now.time += 5  # 10 ms a token
    shown.advance(0)
    for step in range(1, 6):
        now.time += 2
        shown.advance(step)
    # 5 further steps of 2 s; 2000 tokens of 10 ms and 10 steps; 500 tokens
    assert shown.seconds_left() == pytest.approx(5 * 2 + 20 + 20 + 5)
    assert shown.text() == "27 %  example 1/4 (qasper): decode 5/10  [full, snapkv 256]  0:20, about 0:55 left"
    shown.begin_batch("full")  # the reply ended after half of its steps, so the next one may too
    assert shown.seconds_left() == pytest.approx(20 + 10 + 5)
    assert "example 2-3/4 (qasper): prefill of 2000 tokens  [full]" in shown.text()
    now.time += 20
    shown.advance(0)
    shown.begin_batch("full")
    now.time += 5
    shown.advance(0)
    assert shown.text().startswith("100 %  example 4/4 (lcc): scoring  [full]  0:45, about 0:00 left")


def test_several_prefills_of_one_batch_count_its_prompts_once():
    now = Clock()
    shown = Progress([Work("piqa", 1, 100, 0), Work("piqa", 1, 100, 0)], now)
    shown.begin_batch("full")
    for _ in range(2):
        now.time += 1
        shown.advance(0)
    assert shown.seconds_left() == pytest.approx(1)
