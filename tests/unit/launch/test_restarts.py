"""The diary of starts, and giving up."""

from __future__ import annotations

from pathlib import Path

from msdiff_dist.launch.restarts import Diary


def write(path: Path, *starts: tuple[str, int, str | None]) -> Path:
    """A diary of starts (job, step, outcome); returns its file."""
    file = path / "launch/starts.jsonl"
    for requeues, (job, step, outcome) in enumerate(starts):
        diary = Diary(file, job, requeues)
        diary.write_start(4, step)
        if outcome:
            diary.write_end(outcome)
    return file


def test_starts_are_read_back(tmp_path: Path) -> None:
    file = write(tmp_path, ("7", 0, "preempted"), ("7", 10, None), ("7", 20, "finished"))
    assert [(s.job, s.step, s.outcome) for s in Diary(file).starts()] == [
        ("7", 0, "preempted"),
        ("7", 10, None),
        ("7", 20, "finished"),
    ]


def test_the_first_rank_to_fail_gives_the_cause(tmp_path: Path) -> None:
    file = write(tmp_path, ("7", 0, None))
    early, diary = Diary(file, "7", 1), Diary(file, "7", 1)
    early.write_end("rank 3: out of memory")  # before rank 0 has got to writing the start
    diary.write_start(4, 5)
    diary.write_end("rank 0: connection closed by peer")
    assert [s.outcome for s in diary.starts()] == [None, "rank 3: out of memory"]


def test_a_local_job_starts_again_under_the_same_key(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "starts.jsonl", "7")
    for step, outcome in ((0, "preempted"), (5, "finished")):
        diary.write_start(4, step)
        diary.write_end(outcome)
    assert [s.outcome for s in diary.starts()] == ["preempted", "finished"]


def test_a_line_cut_off_by_a_crash_is_skipped(tmp_path: Path) -> None:
    file = write(tmp_path, ("7", 0, None))
    with file.open("a") as f:
        f.write('{"time": 1, "outc')
    Diary(file, "7", 1).write_start(4, 10)
    assert [s.step for s in Diary(file).starts()] == [0, 10]


def test_giving_up_needs_as_many_starts_without_progress_in_a_row_of_this_job(tmp_path: Path) -> None:
    stuck = [("7", 5, "preempted"), ("7", 5, None), ("7", 5, "rank 1: ValueError: no")]
    file = write(tmp_path / "a", *stuck)
    message = Diary(file, "7", 3).starts_without_progress(5, 3)
    assert message is not None
    for words in ("3 starts from step 5", "preempted", "without a message", "ValueError: no", "max_restarts"):
        assert words in message
    assert Diary(file, "7", 3).starts_without_progress(5, 4) is None
    assert Diary(file, "7", 3).starts_without_progress(6, 3) is None
    assert Diary(file, "8", 0).starts_without_progress(5, 3) is None
    assert Diary(write(tmp_path / "b", ("7", 0, None), *stuck[1:]), "7", 3).starts_without_progress(5, 3) is None
