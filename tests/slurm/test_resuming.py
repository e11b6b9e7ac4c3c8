"""A launched run resumes by itself, whatever ends its job."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msdiff_dist.launch.restarts import Diary, Start
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import RECIPE, ClusterFile, Msdiff, losses, wait_for_step

pytestmark = pytest.mark.slurm


def start(msdiff: Msdiff, run: Path, *arguments: object) -> str:
    """Launch the debug recipe; returns the job's id."""
    status, printed = msdiff("launch", RECIPE, "--run-dir", run, *arguments)
    assert status == 0, printed
    return json.loads((run / "launch/job.json").read_text())["job_ids"][0]


def starts_of(run: Path) -> list[Start]:
    return Diary(run / "launch/starts.jsonl").starts()


def wait_for_starts(run: Path, count: int, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while len(starts_of(run)) < count:
        assert time.monotonic() < end, f"start {count} did not come in {timeout_s} s: {starts_of(run)}"
        time.sleep(0.2)


def undisturbed(msdiff: Msdiff, folder: Path, *changes: str) -> dict[int, float]:
    """Losses of the same recipe on one rank of one machine, without interruption."""
    status, printed = msdiff("train", RECIPE, *changes, "--run-dir", folder)
    assert status == 0, printed
    return losses(folder)


def preempt(slurm: SlurmCluster) -> None:
    """A job of the higher partition takes both nodes for a moment."""
    blocker = slurm.run(
        "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    ).strip()
    slurm.wait_job(blocker, "COMPLETED")


def tasks_of(job: str) -> Iterator[tuple[int, int]]:
    """(rank, process) of the job's running tasks on this machine."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                command = (folder / "cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if variables.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in variables and "_submit" in command:
                yield int(variables["SLURM_PROCID"]), int(folder.name)


def test_preemption_and_a_bare_requeue_lose_no_step(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    run, changes = tmp_path / "run", ("train.steps=120", "train.precision=fp32", "checkpoint.every=1000")
    job = start(msdiff, run, *changes, "--cluster", cluster_file(tasks_per_node=1))
    wait_for_step(run, 10)
    preempt(slurm)
    wait_for_starts(run, 2)
    stopped_at = max(losses(run))
    wait_for_step(run, stopped_at + 10)
    slurm.run("scontrol", "requeue", job)
    slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=180)
    first, second, third = starts_of(run)
    assert (first.outcome, second.outcome, third.outcome) == ("preempted", "preempted", "finished")
    assert second.step == stopped_at
    assert third.step >= stopped_at + 10
    assert losses(run) == pytest.approx(undisturbed(msdiff, tmp_path / "alone", *changes), rel=1e-5)
    assert json.loads(msdiff("jobs", run, "--json")[1])["restarts"] == 2
    assert "s from the signal until all was saved; allowed are 60 s" in msdiff("logs", run, "--rank", 0)[1]


@pytest.mark.slow
def test_cancel_saves_does_not_requeue_and_the_run_resumes_on_fewer_nodes(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    run, changes = tmp_path / "run", ("train.steps=60", "checkpoint.every=1000")
    job = start(msdiff, run, *changes, "--cluster", cluster_file())
    wait_for_step(run, 5)
    assert "asked to save and stop" in msdiff("cancel", run)[1]
    slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED")
    assert json.loads(msdiff("jobs", run, "--json")[1])["state"]["state"] == "CANCELLED"
    stopped_at = max(losses(run))
    assert stopped_at < 60
    assert msdiff("cancel", run)[0] == 2
    start(msdiff, run, *changes, "--cluster", cluster_file(), "--nodes", 1)
    assert msdiff("attach", run)[0] == 0
    assert [(s.ranks, s.step, s.outcome) for s in starts_of(run)] == [
        (4, 0, "preempted"),
        (2, stopped_at, "finished"),
    ]
    assert len(losses(run)) == 60


def test_a_dead_rank_ends_the_job_quickly(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start(msdiff, run, "train.steps=100000", "--cluster", cluster_file(tasks_per_node=1))
    wait_for_step(run, 2)
    os.kill(dict(tasks_of(job))[1], signal.SIGKILL)
    assert slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=40) == "FAILED"
    shown = json.loads(msdiff("jobs", run, "--json")[1])["state"]
    assert shown["state"] == "FAILED"
    assert not dict(tasks_of(job))


@pytest.mark.slow
def test_time_limits_preemption_power_cut_and_requeue_in_one_run(
    slurm: SlurmCluster, cluster_file: ClusterFile, msdiff: Msdiff, tmp_path: Path
) -> None:
    """The job may have one node or two. SLURM signals up to a minute earlier than asked; the time limit allows for
    that.
    """
    run, every, patience = tmp_path / "run", 20, 400
    changes = ("train.steps=800", "train.precision=fp32", "train.global_batch_size=96", f"checkpoint.every={every}")
    job = start(msdiff, run, *changes, "--cluster", cluster_file(nodes="1-2", time="0:02:00", signal_delay_s=20))
    wait_for_starts(run, 3, patience)  # two time limits
    assert [s.outcome for s in starts_of(run)[:2]] == ["preempted", "preempted"]
    slurm.run("scontrol", "update", f"jobid={job}", "TimeLimit=120")  # and no more of them

    before = wait_for_step(run, starts_of(run)[-1].step + 5, patience)
    preempt(slurm)
    wait_for_starts(run, 4, patience)
    assert starts_of(run)[-1].step >= before

    before = wait_for_step(run, starts_of(run)[-1].step + every + 5, patience)
    slurm.power_cut("node1")
    wait_for_starts(run, 5, patience)
    crashed = starts_of(run)[-1]
    assert crashed.step >= before - every
    assert crashed.ranks == 2
    slurm.start_node("node1")

    before = wait_for_step(run, before + every, patience)  # past what the metrics still hold from before the crash
    slurm.run("scontrol", "requeue", job)
    wait_for_starts(run, 6, patience)
    assert starts_of(run)[-1].step >= before
    slurm.wait_job(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=1800)
    assert starts_of(run)[-1].outcome == "finished"
    found, expected = losses(run), undisturbed(msdiff, tmp_path / "alone", *changes)
    assert list(found) == list(range(1, 801))
    assert found == pytest.approx(expected, rel=1e-5)
