"""Runs of plain `msdiff train` seen from outside, from folders in the states that such runs leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from msdiff_dist.checkpoint.layout import step_folder
from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.known_runs import known_runs, register_run, runs_in
from msdiff_dist.launch.plain_run import is_run, plain_state
from msdiff_dist.launch.record import JobRecord
from msdiff_dist.launch.run_logs import log_texts, rank_logs
from msdiff_dist.launch.tables import live
from msdiff_dist.launch.watch import cancel, run_statuses
from msdiff_dist.training.run_folder import RunFolder

RECIPE = {"name": "faces", "train": {"steps": 8, "precision": "fp32"}}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was killed after step 5 of 8; its newest checkpoint is of step 4."""
    folder = RunFolder(tmp_path / "runs/faces")
    folder.open(RECIPE)
    train(folder, 5)
    save(folder, 4)
    folder.close()
    return folder


def train(folder: RunFolder, steps: int) -> None:
    lines = [
        {"step": n, "images_seen": 4 * n, "images_per_second": 2.0, "loss": 1 / n, "eta_seconds": 2.0 * (8 - n)}
        for n in range(1, steps + 1)
    ]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def save(folder: RunFolder, step: int) -> None:
    step_folder(folder.checkpoints, step).mkdir()


def write_log(folder: RunFolder, rank: int, text: str) -> None:
    with (folder.logs / f"rank_{rank}.log").open("a") as log:
        log.write(text)


def start(folder: RunFolder) -> None:
    """Open and close the run's folder, as a start does, a second after all that was written."""
    for path in (*folder.logs.iterdir(), folder.path / ".lock"):
        os.utime(path, (0, 0))
    folder.open(RECIPE)
    folder.close()


def test_the_lock_says_whether_it_runs(run: RunFolder) -> None:
    for watched, state in ((True, "RUNNING"), (False, "FAILED")):
        if watched:
            run.open(RECIPE)
        (status,) = run_statuses([run.path])
        assert (status.state.state, status.state.active) == (state, watched)
        assert (status.job_id, status.step, status.total_steps, status.loss) == ("", 5, 8, 1 / 5)
        assert status.eta_s == (6.0 if watched else None)
        run.close()
    assert "killed" in plain_state(run.path).reason


def in_another_process(run: RunFolder, code: str) -> subprocess.Popen[str]:
    """A process that prints a line once its variable `run` is this run folder and the first line of `code` is done."""
    lines = ["import pathlib, time", "from msdiff_dist.training.run_folder import RunFolder"]
    lines += [f"run = RunFolder(pathlib.Path({str(run.path)!r}))", code]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_process_leaves_no_lock(run: RunFolder) -> None:
    with in_another_process(run, f"run.open({RECIPE!r}); print('ready', flush=True); time.sleep(600)") as process:
        assert plain_state(run.path).state == "RUNNING"
        with pytest.raises(RunFolderError, match="in use"):
            run.open(RECIPE)
        process.kill()
    assert plain_state(run.path).state == "FAILED"


def test_looking_does_not_keep_a_run_from_starting(run: RunFolder) -> None:
    with in_another_process(run, "print('ready', flush=True)\nwhile True: run.in_use()") as looking:
        for _ in range(20):
            run.open(RECIPE)
            run.close()
        looking.kill()


def test_how_it_ended(run: RunFolder) -> None:
    save(run, 5)
    assert plain_state(run.path).state == "STOPPED"
    train(run, 8)
    save(run, 8)
    assert plain_state(run.path).state == "FINISHED"
    shutil.rmtree(run.checkpoints)
    (run.path / ".lock").unlink()
    assert plain_state(run.path).state == "FINISHED", "a copy without its lock and checkpoints"
    run.metrics_file.unlink()
    assert plain_state(run.path).reason == "ended before its first step"


def test_the_error_of_the_rank_that_failed_first_in_the_newest_start(run: RunFolder) -> None:
    error = "Traceback (most recent call last):\n  File ...\nmsdiff_dist.errors.TrainingError: the loss is nan\n"
    write_log(run, 1, error)
    write_log(run, 0, error.replace("the loss is nan", "rank 1 has failed"))
    write_log(run, 2, "a line of a library: SomeError\n")
    times = {0: 2_000_000_002, 1: 2_000_000_001, 2: 2_000_000_000}
    for rank, at in times.items():
        os.utime(run.logs / f"rank_{rank}.log", (at, at))
    assert plain_state(run.path).reason == "rank 1: TrainingError: the loss is nan"
    save(run, 5)
    start(run)
    assert plain_state(run.path).state == "STOPPED", "the error is of an earlier start"


def test_logs_of_the_newest_start(run: RunFolder, tmp_path: Path) -> None:
    write_log(run, 0, "a\nb\n")
    write_log(run, 11, "c\n")
    assert "".join(log_texts(run.path, None, 1, False)).split("\n")[1::2] == ["b", "c"]
    assert "".join(log_texts(run.path, 11, None, True)) == "c\n"
    job = JobRecord(run=str(run.path), job_ids=["9" * 9], executor="local", logs=str(run.logs), submitted=0.0)
    (run.path / "launch").mkdir()
    job.save()
    (run.logs / "999999999_0_log.out").write_text("of the job\n")
    os.utime(run.logs / "999999999_0_log.out", (0, 0))
    assert list(rank_logs(run.path)) == [0, 11]
    os.utime(run.logs / "999999999_0_log.out", (2e9, 2e9))
    assert list(rank_logs(run.path).values()) == [run.logs / "999999999_0_log.out"]
    assert [s.state.state for s in run_statuses([run.path])] == ["ENDED"]
    run.open(RECIPE)
    assert [s.state.state for s in run_statuses([run.path])] == ["RUNNING"], "msdiff train resumes what a job began"
    run.close()


def test_attach_prints_one_line_for_an_ended_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    live(run.path)
    assert capsys.readouterr().out.startswith(
        "FAILED (killed: it neither saved nor left a message)  step 5/8  loss 0.2"
    )
    with pytest.raises(RunFolderError, match="no run has begun there"):
        live(run.path.parent)
    with pytest.raises(RunFolderError, match="Ctrl-C or SIGTERM"):
        cancel(run.path, now=False)


def test_runs_are_found_in_folders_of_runs(run: RunFolder, tmp_path: Path) -> None:
    variant = RunFolder(run.path.parent / "ablation/variant/seed_0")
    variant.open(RECIPE)
    variant.close()
    (tmp_path / "recipe.yaml").write_text("name: no run\n")
    assert not is_run(tmp_path)
    assert runs_in([run.path.parent]) == [run.path]
    assert runs_in([run.path.parent / "ablation"]) == [variant.path]
    assert runs_in([tmp_path]) == [run.path]


def test_a_home_folder_that_cannot_be_written_is_a_note(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    register_run(run.path)
    assert capsys.readouterr().err.startswith("note: ")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    register_run(run.path)
    assert known_runs() == [run.path]
