"""Runs seen from outside through their folders alone: progress, and the state of those of plain `msdiff train`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.layout import complete_checkpoints, step_of
from msdiff_dist.files.json_text import whole_lines
from msdiff_dist.files.text import read_yaml
from msdiff_dist.launch.record import JobState
from msdiff_dist.training.run_folder import RunFolder

_NUMBERS = ("images_seen", "images_per_second", "loss")
_TAIL_BYTES = 1 << 18  # enough of metrics.jsonl for the last hundreds of steps, or twenty of 1,024 ranks
_RANK_LOG = re.compile(r"rank_(\d+)\.log")
# The last line of a traceback: `package.module.SomeError: why`.
_RAISED = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?)")


def is_run(folder: Path) -> bool:
    """Whether `folder` is the folder of a run that has begun."""
    run = RunFolder(folder)
    return run.recipe_file.is_file() and (run.checkpoints.is_dir() or run.metrics_file.is_file())


def plain_state(folder: Path) -> JobState:
    """The state of a run without a job.

    RUNNING: a process uses the folder. FINISHED: all steps are trained. STOPPED: it saved at its last step, as after a
    signal. FAILED: a rank raised an error, or the last steps were not saved.
    """
    if RunFolder(folder).in_use():
        return JobState(state="RUNNING", active=True)
    failure, trained = _failure(folder), last_step(folder)
    if failure is None and trained and trained == total_steps(folder):
        return JobState(state="FINISHED", active=False)
    saved = [step_of(path) for path in complete_checkpoints(folder / "checkpoints")]
    if failure is None and trained > max(saved, default=0):
        failure = "killed: it neither saved nor left a message"
    if failure is None and trained:
        return JobState(state="STOPPED", active=False)
    return JobState(state="FAILED", active=False, reason=failure or "ended before its first step")


def _failure(folder: Path) -> str | None:
    """The error of the rank that failed first in the newest start, None if no log ends in one."""
    lock = folder / ".lock"
    # Logs go on over all starts, and every start writes the lock anew: an error in an older log is of an earlier start.
    began = lock.stat().st_mtime if lock.exists() else 0.0
    for number, path in sorted(plain_logs(folder).items(), key=lambda item: item[1].stat().st_mtime):
        if path.stat().st_mtime >= began and (raised := _RAISED.fullmatch(_last_line(path))):
            return f"rank {number}: {raised[1]}"
    return None


def _last_line(path: Path) -> str:
    lines = _tail(path)[0].decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def plain_logs(folder: Path) -> dict[int, Path]:
    """What each rank of `msdiff train --nproc` has printed, by rank."""
    logs = folder / "logs"
    names = os.listdir(logs) if logs.is_dir() else []
    return dict(sorted((int(match[1]), logs / name) for name in names if (match := _RANK_LOG.fullmatch(name))))


def total_steps(run: Path) -> int | None:
    """`train.steps` of the run's recipe; None where there is none.

    Raises:
        ConfigError: the recipe's file is no YAML.
    """
    path = run / "recipe.yaml"
    train = read_yaml(path, "RUN").get("train") if path.is_file() else None
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if type(steps) is int else None


def last_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of the last steps, oldest first: complete lines of metrics.jsonl only, those of a step."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    text, from_start = _tail(path)
    # The first line may be cut, the last is empty or being written.
    first, last = 0 if from_start else text.find(b"\n") + 1, text.rfind(b"\n") + 1
    return [line for line in whole_lines(text[first:last]) if _is_of_a_step(line)]


def _is_of_a_step(line: dict[str, Any]) -> bool:
    step = line.get("step")
    eta = line.get("eta_seconds")
    numbers = [*(line.get(name, 0) for name in _NUMBERS), 0 if eta is None else eta]
    return type(step) is int and step > 0 and all(isinstance(number, (int, float)) for number in numbers)


def last_step(run: Path) -> int:
    """The last step in the run's metrics, 0 before the first."""
    metrics = last_metrics(run)
    return int(metrics[-1]["step"]) if metrics else 0


def _tail(path: Path) -> tuple[bytes, bool]:
    """The last bytes of a file, and whether they are all of it."""
    with path.open("rb") as f:
        start = max(0, f.seek(0, os.SEEK_END) - _TAIL_BYTES)
        f.seek(start)
        return f.read(), start == 0
