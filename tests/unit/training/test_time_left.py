from __future__ import annotations

import pytest

from msdiff_dist.training.time_left import WINDOW, TimeLeft


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_first_step_of_a_start_counts_for_nothing() -> None:
    clock = Clock()
    left = TimeLeft(10, {}, clock)
    clock.now = 300.0  # compiling
    assert left.after(5) is None
    clock.now += 2.0
    assert left.after(6) == 4 * 2.0
    clock.now += 4.0
    assert left.after(7) == 3 * (2.0 + 4.0) / 2
    clock.now += 2.0
    assert left.after(10) is None


def test_only_recent_steps_count() -> None:
    clock = Clock()
    left = TimeLeft(10_000, {}, clock)
    left.after(1)
    for step in range(2, 50):
        clock.now += 9.0
        left.after(step)
    for step in range(50, 50 + WINDOW):
        clock.now += 1.0
        found = left.after(step)
    assert found == 10_000 - step


def test_pauses_to_come_are_expected_to_take_what_those_so_far_took() -> None:
    clock = Clock()
    left = TimeLeft(20, {"checkpoint": 4, "preview": 10, "validation": 0}, clock)
    for step in range(1, 6):
        clock.now += 1.0
        found = left.after(step)
        if step == 4:
            assert found == 16  # nothing is known of any pause
            clock.now += 7.0
            left.paused("checkpoint", 7.0)
    assert found == 15 * 1.0 + 4 * 7.0  # checkpoints at 8, 12, 16, 20
    clock.now += 30.0
    left.paused("validation", 30.0)  # after the last step alone, as in a run without a period
    clock.now += 1.0
    assert left.after(6) == pytest.approx(14 * 1.0 + 4 * 7.0)
