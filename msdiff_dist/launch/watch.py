"""Runs seen from outside: the state of their jobs, their progress, and ending them."""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import subprocess
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msdiff_dist.errors import RunFolderError
from msdiff_dist.launch.job import CANCELLED_FILE
from msdiff_dist.launch.plain_run import is_run, last_metrics, plain_state, total_steps
from msdiff_dist.launch.record import JobRecord, JobState, done_file
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.launch.slurm import ACTIVE, job_infos
from msdiff_dist.training.run_folder import RunFolder


def states(records: Sequence[JobRecord]) -> list[JobState]:
    """The state of each record's job, with one question to SLURM for all of them."""
    infos = job_infos([i for record in records if record.executor == "slurm" for i in record.job_ids])
    found = []
    for record in records:
        if record.executor != "slurm":
            running = any(_local_controller(i) for i in record.job_ids)
            found.append(JobState(state="RUNNING" if running else "ENDED", active=running, nodes="1"))
            continue
        jobs = [infos[i] for i in record.job_ids if i in infos]
        names = [job.state for job in jobs] or ["UNKNOWN"]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        text = names[0] if len(names) == 1 else ", ".join(f"{n} {name}" for name, n in counts.items())
        reason = jobs[0].reason if len(jobs) == 1 and jobs[0].state == "PENDING" else ""
        found.append(
            JobState(
                state=text, active=any(job.active for job in jobs), nodes=jobs[0].nodes if jobs else "", reason=reason
            )
        )
    return found


def _local_controller(job_id: str) -> bool:
    """Whether process `job_id` is the shell around the controller of one of submitit's local jobs.

    The number alone is not enough: another process may have it by now. For a moment after its start a process has a
    program, but no command line yet; an ended one that nobody has waited for has neither.
    """
    process = Path(f"/proc/{job_id}")
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command or (not command and (process / "exe").exists())


def _descendants(process: int) -> list[int]:
    """All processes below `process`, each before those that it started."""
    try:
        children = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_descendants(child))]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One line of `msdiff jobs`. Numbers are None where nothing is known yet; steps of a data job are its parts.

    job_id: "" for a run of `msdiff train`. eta_s: estimated seconds until the last step. restarts: of the newest job.
    loss: of the last step.
    """

    run: str
    job_id: str
    state: JobState
    step: int | None = None
    total_steps: int | None = None
    images_per_second: float | None = None
    eta_s: float | None = None
    restarts: int | None = None
    loss: float | None = None

    @property
    def finished(self) -> bool:
        """Every step is trained."""
        return self.step is not None and self.step == self.total_steps


def run_statuses(folders: Sequence[Path]) -> list[RunStatus]:
    """The status of the run in each folder, launched or of `msdiff train`; folders without a run are skipped."""
    records = {folder: record for folder in folders if (record := JobRecord.load(folder))}
    of_jobs = dict(zip(records, states(list(records.values())), strict=True))
    found = []
    for folder in folders:
        if folder in records:
            found.append(_job_status(folder, records[folder], of_jobs[folder]))
        elif is_run(folder):
            found.append(_progress(folder, plain_state(folder)))
    return found


def is_active(run: Path) -> bool:
    """Whether the run in a folder goes on, as a job or by `msdiff train`."""
    return any(status.state.active for status in run_statuses([run]))


def _job_status(run: Path, record: JobRecord, state: JobState) -> RunStatus:
    if not state.active and record.parts is None and RunFolder(run).in_use():
        return _progress(run, plain_state(run))  # `msdiff train` resumes what a job began
    starts = [s for s in Diary(run / "launch/starts.jsonl").starts() if s.job in record.job_ids]
    job_id = record.job_ids[0] if len(record.job_ids) == 1 else record.job_ids[0].split("_")[0]
    # A cancelled run saves and ends with status 0, which SLURM calls COMPLETED.
    if (run / "launch" / CANCELLED_FILE).exists() and not state.active:
        state = JobState(state="CANCELLED", active=False, nodes=state.nodes)
    if not state.active and starts and starts[-1].outcome not in (None, "finished", "preempted"):
        state = dataclasses.replace(state, reason=str(starts[-1].outcome))
    if record.parts is not None:
        done = sum(done_file(run, i).exists() for i in range(record.parts))
        return RunStatus(run=str(run.resolve()), job_id=job_id, state=state, step=done, total_steps=record.parts)
    return _progress(run, state, job_id, len(starts) - 1 if starts else None)


def _progress(run: Path, state: JobState, job_id: str = "", restarts: int | None = None) -> RunStatus:
    """The status of a run in this state, with what its folder says."""
    state = dataclasses.replace(state, reason=textwrap.shorten(state.reason, 60))
    total, tail = total_steps(run), last_metrics(run)
    status = RunStatus(run=str(run.resolve()), job_id=job_id, state=state, total_steps=total, restarts=restarts)
    if not tail:
        return status
    rate = statistics.median(m["images_per_second"] for m in tail[-20:])
    last = tail[-1]
    eta = last.get("eta_seconds") if state.active else None  # runs of earlier versions have none
    return dataclasses.replace(status, step=last["step"], images_per_second=rate, eta_s=eta, loss=last["loss"])


def wait_for(runs: Sequence[Path]) -> list[RunStatus]:
    """Wait until no job of these runs is active; returns the runs that have not done all their steps or parts."""
    while any(status.state.active for status in run_statuses(runs)):
        time.sleep(2)
    return [status for status in run_statuses(runs) if not status.finished]


def cancel(run: Path, now: bool) -> str:
    """End the run's job without a requeue: it saves first, or with `now` is killed. Returns what was done, in words.

    Raises:
        RunFolderError: nothing was launched in `run`, or its job is not active.
    """
    record = JobRecord.load(run)
    if record is None:
        remedy = "Stop `msdiff train` where it runs: at Ctrl-C or SIGTERM it saves first."
        raise RunFolderError("RUN", str(run), "nothing was launched there", remedy)
    state = states([record])[0]
    if not state.active:
        raise RunFolderError("RUN", str(run), f"its job is not active ({state.state})", "See `msdiff jobs`.")
    # Before any signal: the job looks for this file when it decides whether to requeue.
    (run / "launch" / CANCELLED_FILE).touch()
    if record.executor != "slurm":
        for job_id in filter(_local_controller, record.job_ids):
            below = _descendants(int(job_id))
            # The first process below the shell is submitit's controller, which forwards SIGTERM to the ranks.
            for process in [int(job_id), *below] if now else below[:1]:
                os.kill(process, signal.SIGKILL if now else signal.SIGTERM)
        return "killed" if now else "asked to save and stop"
    infos = job_infos(record.job_ids)
    running = [i for i in record.job_ids if i in infos and infos[i].state == "RUNNING"]
    waiting = [i for i in record.job_ids if i in infos and infos[i].state in ACTIVE and i not in running]
    if waiting or now:
        subprocess.run(["scancel", *waiting, *(running if now else [])], check=True)
    if running and not now:
        subprocess.run(["scancel", "--signal=USR2", *running], check=True)
        return "asked to save and stop; it will not be requeued"
    return "cancelled"
