"""The diary of a run's starts and ends: what the limit on fruitless restarts is judged by."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdiff_dist.errors import TrainingError


@dataclass(frozen=True)
class Start:
    """One start of the job.

    step: newest checkpoint then (0: none). outcome: how it ended, None if it ended without a word.
    """

    time: float
    job: str
    ranks: int
    step: int
    outcome: str | None


class Diary:
    """`run/launch/starts.jsonl`, appended to by rank 0 only. A line is either a start or the end of the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def starts(self) -> list[Start]:
        """Every start so far, oldest first."""
        found: list[Start] = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # torn by a crash
                continue
            if "outcome" in entry and found:
                last = found[-1]
                found[-1] = Start(last.time, last.job, last.ranks, last.step, entry["outcome"])
            elif "step" in entry:
                found.append(Start(entry["time"], entry["job"], entry["ranks"], entry["step"], None))
        return found

    def write_start(self, job: str, ranks: int, step: int, **more: Any) -> None:
        self._append({"time": time.time(), "job": job, "ranks": ranks, "step": step, **more})

    def write_end(self, outcome: str, **more: Any) -> None:
        self._append({"time": time.time(), "outcome": outcome, **more})

    def refuse_fruitless(self, job: str, step: int, limit: int) -> None:
        """Stop an endless loop.

        Raises:
            TrainingError: the last `limit` starts of this job all began at `step`, where it is still.
        """
        recent = [s for s in self.starts() if s.job == job][-limit:]
        if len(recent) < limit or any(s.step != step for s in recent):
            return
        endings = "; ".join(s.outcome or "ended without a word (node failure, out of memory, killed)" for s in recent)
        raise TrainingError(
            f"gave up after {limit} starts from step {step} which reached no new checkpoint: {endings}. "
            f"Read the logs, save more often (checkpoint.every) or allow more time, then launch again; "
            f"`max_restarts` in the cluster file is the limit."
        )

    def _append(self, entry: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as f:
            f.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            f.flush()
            os.fsync(f.fileno())
