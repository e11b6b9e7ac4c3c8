"""Launched runs seen from outside: the state of their jobs, their progress, their logs, and ending them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from msdiff_dist.errors import RunFolderError
from msdiff_dist.files.atomic import atomic_write
from msdiff_dist.launch.job import CANCELLED_FILE
from msdiff_dist.launch.restarts import Diary
from msdiff_dist.launch.slurm import ACTIVE, job_infos

_TAIL_BYTES = 1 << 16  # enough of metrics.jsonl for the last hundred steps or so


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """`launch/job.json` of a run folder: its newest job.

    run, logs: folders. job_ids: one, or those of a data job's parts that were submitted. submitted: seconds since 1970.
    parts: number of all parts of a data job, None for training.
    """

    run: str
    job_ids: list[str]
    executor: str
    logs: str
    submitted: float
    parts: int | None = None

    @staticmethod
    def load(folder: Path) -> JobRecord | None:
        """The record in the run folder `folder`, None if nothing was launched there."""
        path = folder / "launch/job.json"
        return JobRecord(**json.loads(path.read_text())) if path.is_file() else None

    def save(self) -> None:
        """Write the record to its run folder."""
        atomic_write(Path(self.run) / "launch/job.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a run's job.

    state: SLURM's word, or RUNNING / ENDED without SLURM; of several jobs "3 RUNNING, 5 COMPLETED". active: it runs or
    may still run. nodes: their number, "" if unknown. reason: why it waits or failed.
    """

    state: str
    active: bool
    nodes: str = ""
    reason: str = ""


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

    eta_s: estimated seconds until the last step. restarts: of the newest job. loss: of the last step.
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
    """The status of the run in each folder; folders where nothing was launched are skipped."""
    records = [record for folder in folders if (record := JobRecord.load(folder))]
    return [_status(record, state) for record, state in zip(records, states(records), strict=True)]


def _status(record: JobRecord, state: JobState) -> RunStatus:
    run = Path(record.run)
    starts = [s for s in Diary(run / "launch/starts.jsonl").starts() if s.job in record.job_ids]
    restarts = len(starts) - 1 if starts else None
    job_id = record.job_ids[0] if len(record.job_ids) == 1 else record.job_ids[0].split("_")[0]
    # A cancelled run saves and ends with status 0, which SLURM calls COMPLETED.
    if (run / "launch" / CANCELLED_FILE).exists() and not state.active:
        state = JobState(state="CANCELLED", active=False, nodes=state.nodes)
    if not state.active and starts and starts[-1].outcome not in (None, "finished", "preempted"):
        state = dataclasses.replace(state, reason=textwrap.shorten(str(starts[-1].outcome), 60))
    if record.parts is not None:
        done = sum(done_file(run, i).exists() for i in range(record.parts))
        return RunStatus(run=record.run, job_id=job_id, state=state, step=done, total_steps=record.parts)
    total = total_steps(run)
    tail = last_metrics(run)
    if not tail:
        return RunStatus(run=record.run, job_id=job_id, state=state, step=None, total_steps=total, restarts=restarts)
    rate = statistics.median(m["images_per_second"] for m in tail[-20:])
    last = tail[-1]
    images_per_step = last["images_seen"] / last["step"]
    eta = (total - last["step"]) * images_per_step / rate if total is not None and rate > 0 and state.active else None
    return RunStatus(
        run=record.run,
        job_id=job_id,
        state=state,
        step=last["step"],
        total_steps=total,
        images_per_second=rate,
        eta_s=eta,
        restarts=restarts,
        loss=last["loss"],
    )


def done_file(folder: Path, part: int) -> Path:
    """The file whose presence says that a part of a data job is done."""
    return folder / "parts" / f"{part:05d}.done"


def total_steps(run: Path) -> int | None:
    """`train.steps` of the run's recipe."""
    path = run / "recipe.yaml"
    return OmegaConf.load(path).train.steps if path.is_file() else None


def last_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of the last steps, oldest first: complete lines of metrics.jsonl only."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        f.seek(start)
        lines = f.read().split(b"\n")
    whole = lines[1 if start else 0 : -1]  # the first may be cut, the last is empty or being written
    return [json.loads(line) for line in whole]


def rank_logs(run: Path) -> dict[int, Path]:
    """The newest job's log of each rank, by rank; without a launched job the logs of `msdiff train`."""
    record = JobRecord.load(run)
    folder = Path(record.logs) if record else run / "logs"
    jobs = "|".join(map(re.escape, record.job_ids)) if record else ""
    pattern = re.compile(rf"(?:{jobs})_(\d+)_log\.out" if jobs else r"rank_(\d+)\.log")
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := pattern.fullmatch(name))}
    return dict(sorted(found.items()))


def log_texts(run: Path, rank: int | None, lines: int | None, follow: bool) -> Iterator[str]:
    """The ranks' logs, rank 0's first, each under a heading.

    Args:
        rank: only this one.
        lines: only so many last lines of each.
        follow: of one rank (0 unless `rank` is given), and then what it writes until the job has ended.

    Raises:
        RunFolderError: no log of this rank, or none at all.
    """
    logs = rank_logs(run)
    wanted = [rank] if rank is not None else [0] if follow else list(logs)
    if not logs or wanted[0] not in logs:
        had = f"there are logs of ranks {', '.join(map(str, logs))}" if logs else "no rank has started yet"
        raise RunFolderError("RUN" if rank is None else "--rank", str(run) if rank is None else rank, had, "Try again.")
    for number in wanted:
        if len(wanted) > 1:
            yield f"==> rank {number}: {logs[number]} <==\n"
        with logs[number].open(errors="replace") as f:
            yield "".join(collections.deque(f, maxlen=lines))
            while follow and _is_active(run):
                time.sleep(1)
                yield f.read()
            yield f.read()  # what was written between the last look and the end of the job


def _is_active(run: Path) -> bool:
    record = JobRecord.load(run)
    return record is not None and states([record])[0].active


def wait_for(runs: Sequence[Path]) -> list[RunStatus]:
    """Wait until no job of these runs is active; returns the runs that have not done all their steps or parts."""
    while any(status.state.active for status in run_statuses(runs)):
        time.sleep(2)
    return [status for status in run_statuses(runs) if not status.finished]


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The launched run folders among `folders` and directly in them.

    Raises:
        RunFolderError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError("FOLDER", str(folder), "no such folder", "Name a run folder or a folder of runs.")
    candidates = [path for folder in folders for path in (folder, *sorted(folder.iterdir()))]
    return [path for path in candidates if (path / "launch/job.json").is_file()]


def cancel(run: Path, now: bool) -> str:
    """End the run's job without a requeue: it saves first, or with `now` is killed. Returns what was done, in words.

    Raises:
        RunFolderError: nothing was launched in `run`, or its job is not active.
    """
    record = JobRecord.load(run)
    if record is None:
        raise RunFolderError("RUN", str(run), "nothing was launched there", "See `msdiff jobs`.")
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


def known_runs() -> list[Path]:
    """Every run folder that this user launched and that still exists, newest last."""
    path = _registry()
    lines = path.read_text().splitlines() if path.is_file() else []
    return [folder for line in dict.fromkeys(lines) if (folder := Path(line)).is_dir()]


def find_run(name: str) -> Path:
    """A run folder by its path, or by its name among the known runs: the newest of that name.

    Raises:
        RunFolderError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    matches = [folder for folder in known_runs() if folder.name == name]
    if not matches:
        raise RunFolderError("RUN", name, "no such run", "Name its run folder; see `msdiff jobs`.")
    return matches[-1]


def register_run(folder: Path) -> None:
    """Remember a run folder for `msdiff jobs`."""
    path = _registry()
    path.parent.mkdir(parents=True, exist_ok=True)
    if str(folder.resolve()) not in map(str, known_runs()):
        with path.open("a") as f:
            f.write(f"{folder.resolve()}\n")


def _registry() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "msdiff" / "runs"
