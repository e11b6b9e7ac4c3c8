"""Launched runs seen from outside, without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.known_runs import find_run, known_runs, register_run, runs_in
from msdiff_dist.launch.plain_run import last_metrics
from msdiff_dist.launch.record import JobRecord
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.launch.run_logs import log_texts, rank_logs
from msdiff_dist.launch.tables import show
from msdiff_dist.launch.watch import cancel, run_statuses, states


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was at step 30 of 50 when its local job ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "runs/faces"
    (folder / "launch").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "recipe.yaml").write_text("train: {steps: 50}\n")
    JobRecord(run=str(folder), job_ids=["999999999"], executor="local", logs=str(folder / "logs"), submitted=0.0).save()
    lines = [
        {"step": i, "images_seen": 8 * i, "images_per_second": 4.0 * i, "loss": 1 / i, "loss_per_stage": [1.0]}
        | {"grad_norm": 1.0, "lr": 0.1}
        for i in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    for rank in (0, 1, 10):
        (folder / f"logs/999999999_{rank}_log.out").write_text(f"rank {rank} a\nrank {rank} b\n")
    (folder / "logs/888_0_log.out").write_text("an older job\n")
    diary = Diary(folder / "launch/starts.jsonl", "999999999")
    for step, outcome in ((0, "preempted"), (10, "preempted"), (20, "finished")):
        diary.write_start(1, step)
        diary.write_end(outcome)
    return folder


def test_status_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (status,) = run_statuses([run, run.parent])
    assert (status.step, status.total_steps, status.restarts, status.loss) == (30, 50, 2, 1 / 30)
    assert status.images_per_second == pytest.approx(4 * 20.5)  # median of the last 20 steps
    assert status.state.state == "ENDED"
    assert status.eta_s is None
    assert not status.finished
    show([status])
    assert "30/50" in capsys.readouterr().out


def test_why_a_job_failed_is_shown(run: Path) -> None:
    diary = Diary(run / "launch/starts.jsonl", "999999999")
    diary.write_start(1, 30)
    diary.write_end("rank 2: ValueError: no")
    assert run_statuses([run])[0].state.reason == "rank 2: ValueError: no"


def test_only_whole_lines_of_the_metrics_count(run: Path) -> None:
    assert last_metrics(run)[-1]["step"] == 30
    long = run / "metrics.jsonl"
    long.write_text("".join(json.dumps({"step": i, "more": "x" * 500}) + "\n" for i in range(1000)))
    steps = [m["step"] for m in last_metrics(run)]
    assert steps == list(range(steps[0], 1000))


def test_logs_of_the_newest_job_rank_0_first(run: Path) -> None:
    assert list(rank_logs(run)) == [0, 1, 10]
    text = "".join(log_texts(run, None, 1, False))
    assert text.index("rank 0 b") < text.index("rank 1 b") < text.index("rank 10 b")
    assert "rank 0 a" not in text
    assert "older" not in text
    assert "".join(log_texts(run, 10, None, True)) == "rank 10 a\nrank 10 b\n"
    with pytest.raises(RunFolderError, match="ranks 0, 1, 10"):
        next(iter(log_texts(run, 2, None, False)))


def test_known_runs_are_remembered_once_and_found_by_name(run: Path) -> None:
    register_run(run)
    register_run(run)
    assert known_runs() == [run]
    assert find_run("faces") == run
    assert runs_in([run.parent]) == [run]
    with pytest.raises(RunFolderError, match="no such run"):
        find_run("facets")


def test_cancelling_what_does_not_run_is_refused(run: Path) -> None:
    with pytest.raises(RunFolderError, match="not active"):
        cancel(run, now=False)
    with pytest.raises(RunFolderError, match="nothing was launched"):
        cancel(run.parent, now=False)
    assert not os.path.exists(run / "launch/cancelled")


def test_a_local_job_is_active_from_its_start_to_its_end(tmp_path: Path) -> None:
    # A process has no command line for a moment after its start, so many short ones are watched closely.
    for _ in range(20):
        with subprocess.Popen(f"{sys.executable} -S -c pass submitit", shell=True) as shell:
            record = JobRecord(
                run=str(tmp_path), job_ids=[str(shell.pid)], executor="local", logs=str(tmp_path), submitted=0.0
            )
            looks = [states([record])[0].active for _ in range(60)]
            shell.wait()
            assert looks[0]
            assert looks == sorted(looks, reverse=True), "active, then ended for good"
        assert not states([record])[0].active
