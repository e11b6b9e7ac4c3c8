"""The diary of a run's starts and ends: what the limit on restarts without progress is judged by."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
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
    """`run/launch/starts.jsonl`: lines are a start, written by rank 0, or an end, written by rank 0 or a failed rank.

    A rank may fail before rank 0 has written the start, so both lines name it: job and number of requeues.
    """

    def __init__(self, path: Path, job: str = "", requeues: int = 0) -> None:
        self._path, self._job, self._key = path, job, f"{job}.{requeues}"

    def starts(self) -> list[Start]:
        """Every start so far, oldest first."""
        found: list[Start] = []
        open_at: dict[str, int] = {}
        early: dict[str, str] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # torn by a crash
                continue
            key = entry["key"]
            if "step" in entry:
                outcome = early.pop(key, None)
                found.append(
                    Start(
                        time=entry["time"], job=entry["job"], ranks=entry["ranks"], step=entry["step"], outcome=outcome
                    )
                )
                open_at[key] = len(found) - 1
            elif key not in open_at:
                early.setdefault(key, entry["outcome"])
            elif found[open_at[key]].outcome is None:  # the first rank to fail knows why
                found[open_at[key]] = dataclasses.replace(found[open_at[key]], outcome=entry["outcome"])
        return found

    def write_start(self, ranks: int, step: int, **more: Any) -> None:
        self._append({"key": self._key, "time": time.time(), "job": self._job, "ranks": ranks, "step": step, **more})

    def write_end(self, outcome: str, **more: Any) -> None:
        self._append({"key": self._key, "time": time.time(), "outcome": outcome, **more})

    def starts_without_progress(self, step: int, limit: int) -> str | None:
        """Why to give up: the last `limit` starts of this job all began at `step`, where it is still. None: go on."""
        recent = [s for s in self.starts() if s.job == self._job][-limit:]
        if len(recent) < limit or any(s.step != step for s in recent):
            return None
        endings = "; ".join(s.outcome or "ended without a word (node failure, out of memory, killed)" for s in recent)
        return (
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
