"""Progress of long work in log files: lines with rate and time left, and not too many of them."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pty
import re

import pytest

from msdiff_dist.terminal import Lines, LongWork, duration, track


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_have_rate_and_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    with LongWork("packing", 600, "images", done=100, file=log, clock=clock) as work:
        for _ in range(50):
            clock.now += 1
            work.advance(10)
    lines = log.getvalue().splitlines()
    assert lines[0] == "packing 120/600 images  10 images/s  ETA 0:00:48"
    assert lines[1] == "packing 220/600 images  10 images/s  ETA 0:00:38"
    assert lines[-1] == "packing 600/600 images  10 images/s  in 0:00:50"
    assert len(lines) == 1 + 4 + 1


def test_megabytes_and_unknown_totals() -> None:
    clock, log = Clock(), io.StringIO()
    for total in (10e6, None):
        with LongWork("reading", total, "MB", file=log, clock=clock) as work:
            clock.now += 4
            work.advance(5e6)
    assert log.getvalue().splitlines() == [
        "reading 5/10 MB  1.25 MB/s  ETA 0:00:04", "reading 5/10 MB  1.25 MB/s  in 0:00:04",
        "reading 5 MB  1.25 MB/s", "reading 5 MB  1.25 MB/s  in 0:00:04",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "most"), [(1.9, 0), (60, 6), (3600, 90), (7 * 86400, 200)])
def test_days_of_work_give_some_hundred_lines(seconds: float, most: int) -> None:
    clock = Clock()
    lines, count = Lines(clock), 0
    for _ in itertools.repeat(None, 20000):
        clock.now += seconds / 20000
        count += lines.due()
    assert most / 2 <= count <= most


def test_short_work_and_failed_work_end_without_a_line() -> None:
    clock, log = Clock(), io.StringIO()
    with LongWork("packing", 5, "images", file=log, clock=clock) as work:
        work.advance(5)
    assert log.getvalue() == ""
    with contextlib.suppress(KeyError), LongWork("packing", 5, "images", file=log, clock=clock) as work:
        clock.now += 3
        work.advance(2)
        raise KeyError
    assert len(log.getvalue().splitlines()) == 1


def test_track_counts_what_was_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("msdiff_dist.terminal.FIRST_LINE_S", 0.0)
    assert list(track(iter("abc"), "reading", "letters", 3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading 1/3 letters")
    assert lines[-1].startswith("reading 3/3 letters")
    assert list(track([], "reading", "letters")) == []


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, LongWork("packing", 4, "images", file=terminal) as work:
        work.advance(2)
        work._bar.refresh()
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert re.search(r"packing .*2/4 images", shown)
    assert shown.rpartition("\x1b[2K")[2] in ("", "\x1b[?25h"), "the bar's line is empty again"


def test_durations() -> None:
    assert [duration(s) for s in (4.6, 65, 3 * 3600, 2 * 86400 + 3661)] == [
        "0:00:05",
        "0:01:05",
        "3:00:00",
        "2-01:01:01",
    ]
