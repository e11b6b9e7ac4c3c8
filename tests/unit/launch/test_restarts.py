"""The diary of starts, and giving up."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.launch.restarts import Diary


def diary_of(path: Path, *starts: tuple[str, int, str | None]) -> Diary:
    diary = Diary(path / "launch/starts.jsonl")
    for job, step, outcome in starts:
        diary.write_start(job, 4, step)
        if outcome:
            diary.write_end(outcome)
    return diary


def test_starts_are_read_back(tmp_path: Path) -> None:
    diary = diary_of(tmp_path, ("7", 0, "preempted"), ("7", 10, None), ("7", 20, "finished"))
    assert [(s.job, s.step, s.outcome) for s in diary.starts()] == [
        ("7", 0, "preempted"),
        ("7", 10, None),
        ("7", 20, "finished"),
    ]


def test_the_first_rank_to_fail_knows_why(tmp_path: Path) -> None:
    diary = diary_of(tmp_path, ("7", 0, "rank 3: out of memory"))
    diary.write_end("rank 0: connection closed by peer")
    assert diary.starts()[0].outcome == "rank 3: out of memory"


def test_a_line_torn_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    diary = diary_of(tmp_path, ("7", 0, None))
    with (tmp_path / "launch/starts.jsonl").open("a") as f:
        f.write('{"time": 1, "outc')
    diary.write_start("7", 4, 10)
    assert [s.step for s in diary.starts()] == [0, 10]


def test_giving_up_needs_as_many_fruitless_starts_in_a_row_of_this_job(tmp_path: Path) -> None:
    stuck = [("7", 5, "preempted"), ("7", 5, None), ("7", 5, "rank 1: ValueError: no")]
    message = diary_of(tmp_path / "a", *stuck).fruitless("7", 5, 3)
    assert message is not None
    for words in ("3 starts from step 5", "preempted", "without a word", "ValueError: no", "max_restarts"):
        assert words in message
    assert diary_of(tmp_path / "b", *stuck).fruitless("7", 5, 4) is None
    assert diary_of(tmp_path / "c", *stuck).fruitless("7", 6, 3) is None
    assert diary_of(tmp_path / "d", *stuck).fruitless("8", 5, 3) is None
    assert diary_of(tmp_path / "e", ("7", 0, None), *stuck[1:]).fruitless("7", 5, 3) is None
